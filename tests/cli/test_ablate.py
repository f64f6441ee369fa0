"""`attnlens ablate`: every value kept, gone on with after a stop, drawn without the model."""

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from inspect import signature

import pandas as pd
import pytest
import torch
from transformers import LlamaForCausalLM

from attnlens.cli import main, options
from attnlens.cli.ablate_job import values_kept
from attnlens.cli.ablate_show import vocabulary
from attnlens.cli.app import ablate as command
from attnlens.cli.main_job import TASKS
from attnlens.errors import BudgetError
from attnlens.sweeps.modes import Mode
from attnlens.sweeps.store import Store
from attnlens.sweeps.sweep import SweepSettings
from attnlens.tasks.metrics import METRICS

FEW = ("--prompts", "4")
TABLES = {"heads": "ablation", "layers": "groups", "pairs": "pairs", "positions": "positions"}


@pytest.fixture
def run(capsys):
    """Run a command; gives its exit code, what it printed and what it said on the way."""

    def given(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["ablate", *(str(part) for part in arguments)])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return given


@pytest.fixture
def refused(run, tmp_path):
    """Run a command that must be refused and leaves everything as it was; gives what it said."""

    def given(*arguments) -> str:
        before = _files(tmp_path)
        code, out, told = run(*arguments)
        assert code == 2
        assert out == ""
        assert _files(tmp_path) == before
        return told

    return given


def _files(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def _tables(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "results" / "tables").iterdir()}


@pytest.mark.parametrize("by", TABLES)
def test_what_each_way_writes_is_drawn_again_without_the_model(run, wired_model, tmp_path, by):
    out = tmp_path / "sweep"
    code, said, told = run(
        wired_model, "--by", by, "--heads", "L0H1,L1", *FEW, "--metric", "accuracy", "--out", out
    )
    assert code == 0
    assert "Task repeated tokens: accuracy 1.00 with every head in place." in said
    assert ("L0 as a whole" if by == "layers" else "L0H1") in said
    assert said.endswith(f"Written to {out / 'results'}: open {out / 'results' / 'index.html'}\n")
    assert "Ablating" in told
    rows = pd.read_parquet(out / "rows")
    manifest = Store.open(out).manifest
    assert len(rows) == 4 * (len(manifest.trials) + 1)
    assert (rows.loc[rows["trial"] == -1, "value"] == 1).all()
    table = pd.read_csv(out / "results" / "tables" / f"{TABLES[by]}.csv")
    assert len(table) in {"heads": (5,), "layers": (2,), "pairs": (10,)}.get(by, (5 * 25,))
    page = (out / "results" / "index.html").read_text(encoding="utf-8")
    assert "wired" in page
    assert "http" not in page[page.index("<main") :]

    code, again, _ = run("--show", out, "--out", tmp_path / "elsewhere")
    assert code == 0
    assert again.splitlines()[:-1] == said.splitlines()[:-1]
    for name, content in _tables(out).items():
        assert (tmp_path / "elsewhere" / "tables" / name).read_bytes() == content


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.FROZEN])
def test_the_circuit_is_found_in_every_mode(run, wired_model, tmp_path, mode):
    out = tmp_path / "sweep"
    code, said, _ = run(
        wired_model, "--mode", mode, *FEW, "--metric", "accuracy", "--out", out
    )  # fmt: skip
    assert code == 0
    lines = [line for line in said.splitlines() if line.startswith("Ablating")]
    assert {line.split()[1] for line in lines} == {"L0H1", "L1H2"}
    assert all("random heads of its layer 0.000)" in line for line in lines)


def test_what_is_there_is_not_run_again(run, wired_model, tmp_path):
    asked = [wired_model, "--heads", "L0", *FEW, "--out", tmp_path / "sweep"]
    run(*asked)
    rows = _files(tmp_path / "sweep" / "rows")
    tables = _tables(tmp_path / "sweep")
    code, _, _ = run(*asked, "--resume")
    assert code == 0
    assert _files(tmp_path / "sweep" / "rows") == rows
    assert _tables(tmp_path / "sweep") == tables


def test_resume_begins_where_there_is_nothing_yet(run, wired_model, tmp_path):
    code, said, _ = run(
        wired_model, "--heads", "L0H1", *FEW, "--resume", "--out", tmp_path / "new" / "sweep"
    )
    assert code == 0
    assert "L0H1" in said


def test_a_model_that_only_guesses_is_said_to(run, copy_of, tmp_path):
    """Loud wrong answers; the vocabulary is known from the store, so --show says it too."""
    model = LlamaForCausalLM.from_pretrained(copy_of)
    with torch.no_grad():
        model.lm_head.weight *= 50
    model.save_pretrained(copy_of)
    asked = [copy_of, "--heads", "L0H1", *FEW, "--out", tmp_path / "sweep"]
    for words in (asked, ["--show", tmp_path / "sweep"]):
        code, said, _ = run(*words)
        assert code == 0
        assert "That is no better than guessing" in said
    manifest = Store.open(tmp_path / "sweep").manifest
    size = vocabulary(manifest)
    assert size == manifest.model["config"]["vocab_size"]
    nested = {**manifest.model, "config": {"text_config": {"vocab_size": size}}}
    assert vocabulary(replace(manifest, model=nested)) == size
    assert vocabulary(replace(manifest, model={**nested, "config": {}})) is None


def test_an_interrupted_sweep_goes_on_to_the_same_values(run, small_model, tmp_path):
    """A true Ctrl-C, in a process of its own, once the first values are on disk."""
    # One head of one prompt a forward: long enough to be interrupted.
    slow = ["--batch-size", "1", "--tokens", "1"]
    asked = [str(small_model), "--prompts", "100", "--seed", "3", *slow]
    out = tmp_path / "the sweep"
    words = [*asked, "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "attnlens.cli", "ablate", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # Tests that run in the background are told to ignore Ctrl-C, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    until = time.monotonic() + 120
    while (values_kept(out) or (0, 0))[0] < 20 and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == ""
    assert "Traceback" not in told
    done = Store.open(out).done()
    assert 0 < done.sum() < done.size
    lines = told.splitlines()
    assert lines[-2] == (
        f"attnlens: interrupted; {done.sum():,} of {done.size:,} values are kept in {out}. "
        "This goes on:"
    )
    again = shlex.split(lines[-1])
    assert again == ["attnlens", "ablate", *words, "--resume"]

    code, said, _ = run("--show", out)
    assert code == 0
    assert f"Not finished: {done.size - done.sum():,} of {done.size:,} values are missing" in said
    kept = pd.read_parquet(out / "rows")

    code, said, _ = run(*again[2:])
    assert code == 0
    assert "Not finished" not in said
    run(*asked, "--out", tmp_path / "unbroken")
    parts, unbroken = (Store.open(place).table() for place in (out, tmp_path / "unbroken"))
    pd.testing.assert_frame_equal(parts, unbroken)
    assert _tables(out) == _tables(tmp_path / "unbroken")
    whole = pd.read_parquet(out / "rows").set_index(["trial", "prompt"])["value"]
    assert whole.index.is_unique
    there = kept.set_index(["trial", "prompt"])["value"]
    assert (whole.loc[there.index] == there).all()


def test_an_error_on_the_way_says_what_is_kept(run, wired_model, tmp_path, monkeypatch):
    from attnlens.cli import ablate_job

    measured = ablate_job.ablate

    def short(*given, progress, **named):
        def stop(done, total):
            progress(done, total)
            if done >= 8:
                raise BudgetError("Memory does not suffice.")

        return measured(*given, progress=stop, **named)

    monkeypatch.setattr(ablate_job, "ablate", short)
    code, _, told = run(wired_model, "--heads", "L0", *FEW, "--out", tmp_path / "sweep")
    assert code == 2
    out = tmp_path / "sweep"
    assert told.splitlines()[-3:] == [
        "attnlens: Memory does not suffice.",
        f"8 of 20 values are kept in {out}. This goes on:",
        f"  attnlens ablate {wired_model} --heads L0 --prompts 4 --out {out} --resume",
    ]


def test_another_sweep_is_not_mixed_in(run, refused, wired_model, tmp_path):
    out = tmp_path / "sweep"
    asked = [wired_model, "--heads", "L0", *FEW, "--out", out]
    run(*asked)
    said = refused(*asked)
    assert "add --resume to go on with it" in said
    assert f"attnlens ablate --show {out}" in said
    assert "Opening" not in said  # refused before the model is opened
    for other, told in (
        (["--mode", "mean"], 'settings.mode is "zero" there and "mean" here'),
        (["--seed", "1"], "seed is 0 there and 1 here"),
        (["--prompts", "5"], "prompts is 4 there and 5 here"),
        (["--by", "layers"], 'settings.kind is "heads" there'),
        (["--heads", "L1"], "settings.heads"),
    ):
        said = refused(*asked, *other, "--resume")
        assert f"holds another sweep: {told}" in said
        assert "This goes on" not in said


def test_folders_that_cannot_hold_a_sweep(refused, wired_model, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(wired_model, "--out", tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "holds 'notes.txt'" in refused(wired_model, *FEW, "--out", tmp_path / "mine")
    if sys.platform == "linux":
        said = refused(wired_model, "--out", "/proc/sweep")
        assert "Nothing can be written in /proc" in said
        assert "Opening" not in said


def test_mistakes_are_named(refused, wired_model, encoder_model, tmp_path):
    out = ["--out", tmp_path / "sweep"]
    assert "L7H0" in refused(wired_model, "--heads", "L7H0", *out)
    assert "position_mean" in refused(wired_model, "--mode", "noise", *out)
    assert "no tokenizer" in refused(wired_model, "--task", "ioi", *out)
    assert "a pair needs two" in refused(wired_model, "--by", "pairs", "--heads", "L0H1", *out)
    assert "see both sides" in refused(encoder_model, *out)
    assert "no model folder" in refused("./nowhere", *out)
    assert "Give --out DIR" in refused(wired_model)
    assert "Give a MODEL" in refused(*out)
    assert "--workers is about" in refused(wired_model, "--workers", "2", *out)


def test_a_store_is_shown_as_it_is(refused, wired_model, tmp_path):
    assert "holds no sweep" in refused("--show", tmp_path)
    assert "leave MODEL out" in refused(wired_model, "--show", tmp_path)
    assert "leave --batch-size out" in refused("--show", tmp_path, "--batch-size", "4")


def test_a_sweep_without_a_value_is_not_drawn(run, refused, wired_model, tmp_path):
    out = tmp_path / "sweep"
    run(wired_model, "--heads", "L0H1", *FEW, "--out", out)
    for part in (out / "rows").iterdir():
        part.unlink()
    assert "none to show yet" in refused("--show", out)


def test_the_options_are_those_of_the_library():
    assert [mode.value for mode in options.Mode] == list(Mode)
    assert [metric.value for metric in options.MetricName] == list(METRICS)
    assert [task.value for task in options.SweepTask] == list(TASKS)
    settings, defaults = SweepSettings(), signature(command).parameters
    for name in ("batch_size", "tokens", "resume", "ray", "workers", "gpus"):
        assert defaults[name].default == getattr(settings, name)
