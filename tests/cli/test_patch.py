"""`attnlens patch`: the machinery of `ablate`, whose tests have stops and stores."""

from typing import get_args

import pandas as pd
import pytest

import attnlens as al
from attnlens.cli import main, patch_command
from attnlens.cli.main_job import build_task
from attnlens.sweeps.patches import Kind
from attnlens.zoo import small_path

FEW = ("--task", "ioi", "--prompts", 2)


@pytest.fixture
def run(capsys):
    """Run a command; gives its exit code, what it printed and what it said on the way."""

    def command(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(part) for part in arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return command


def test_the_command_gives_what_the_function_gives(run, tmp_path):
    out = tmp_path / "patched"
    code, said, told = run("patch", small_path(), *FEW, "--positions", "-1,4", "--out", out)
    assert code == 0, told
    assert "Patching z (denoise) position by position" in told
    lens = al.load(small_path())
    found = al.patch(lens, build_task(lens, "ioi", 2), positions=[-1, 4])
    (table,) = (out / "results" / "tables").glob("patching.csv")
    shares = pd.read_csv(table)["share"].tolist()
    expected = found.to_frame()["share"].tolist()
    assert sorted(shares) == pytest.approx(sorted(expected), abs=1e-5)
    assert said.strip().endswith(f"open {out / 'results' / 'index.html'}")
    code, again, _ = run("ablate", "--show", out)
    assert code == 0
    assert again.splitlines()[1:4] == said.splitlines()[1:4]
    code, *_ = run("patch", small_path(), *FEW, "--positions", "-1,4", "--out", out, "--resume")
    assert code == 0


@pytest.mark.parametrize(
    "options",
    [("--kind", "residual", "--positions", "each"), ("--kind", "mlp", "--direction", "noise"),
     ("--kind", "k", "--places", "L3")],
)  # fmt: skip
def test_other_kinds(run, tmp_path, options):
    code, _, told = run("patch", small_path(), *FEW, *options, "--out", tmp_path / "out")
    assert code == 0, told
    assert (tmp_path / "out" / "results" / "index.html").is_file()


def test_every_kind_can_be_asked_for():
    assert set(get_args(Kind)) == {str(kind) for kind in patch_command.Patched}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [(("--positions", "x"), "write each"), (("--places", "L9"), "names no layer"),
     (("--positions", "99"), "position")],
)  # fmt: skip
def test_what_cannot_be_patched_is_said(run, tmp_path, options, sentence):
    code, said, told = run("patch", small_path(), *FEW, *options, "--out", tmp_path / "out")
    assert code == 2
    assert said == ""
    assert sentence in told
    assert not (tmp_path / "out").exists()
