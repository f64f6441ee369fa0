import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from attnlens.cli import main
from attnlens.cli.main_job import Plan, build_task, run_report
from attnlens.cli.output import staged
from attnlens.cli.texts import Texts, cut_texts, read_texts
from attnlens.errors import TaskError
from attnlens.graphs import load_graph
from attnlens.lens import load
from tests.views.models import hand_wired

TEXTS = ("Ann and Ben went to the park.", "Then <script>alert(1)</script> said Ben & Ann.")


@pytest.fixture(scope="module")
def small_report(small_model, tmp_path_factory):
    """Findings and folder of one run on the random model."""
    out = tmp_path_factory.mktemp("reports") / "deep" / "small"
    lens = load(small_model)
    task = build_task(lens, "repeat", 4)
    return run_report(lens, Texts.given(TEXTS), task, out, Plan("small <model>")), out


def test_the_hand_wired_circuit_is_named(tmp_path):
    lens = hand_wired()
    findings = run_report(
        lens, Texts(), build_task(lens, "repeat", 4), tmp_path / "r", Plan("wired")
    )
    lines = "\n".join(findings.lines())
    assert "1 previous-token head: L0H1 (1.00)" in lines
    assert "1 induction head: L1H2 (1.00)" in lines
    ablating = [line for line in findings.lines() if line.startswith("Ablating")]
    assert {line.split()[1] for line in ablating} == {"L0H1", "L1H2"}
    table = pd.read_csv(tmp_path / "r" / "heads.csv").set_index("head")
    assert table.loc["L1H2", "induction"] == pytest.approx(1, abs=1e-3)
    assert table["effect"].nlargest(2).index.tolist() == ["L0H1", "L1H2"]


def test_the_report_holds_every_file(small_report):
    _, out = small_report
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"index.html", "heads.csv", "heads.parquet", "rollout.graphml"} <= names
    assert "figures/plotly.min.js" in names
    page = (out / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'href="([^"#]+)"', page[page.index("<main") :])
    assert links
    assert all((out / link).is_file() for link in links)
    assert list(out.parent.iterdir()) == [out]  # nothing left beside it


def test_one_row_a_head_and_the_same_in_both_tables(small_report):
    findings, out = small_report
    csv, parquet = pd.read_csv(out / "heads.csv"), pd.read_parquet(out / "heads.parquet")
    assert csv["head"].tolist() == [str(head) for head in findings.anatomy.heads]
    assert parquet["head"].tolist() == csv["head"].tolist()
    wanted = {"entropy", "first_token", "sink_rate", "induction", "copying", "effect", "control"}
    assert wanted <= set(csv.columns)
    assert not any(name.endswith(("_x", "_y")) for name in csv.columns)
    assert csv["effect"].tolist() == pytest.approx(parquet["effect"].tolist(), rel=1e-12)


def test_the_graph_multiplies_out_to_the_rollout(small_report):
    findings, out = small_report
    graph = load_graph(out / "rollout.graphml")
    tokens = findings.rollout.tokens[0]
    assert [graph.nodes[f"L0P{i}"]["token"] for i in range(len(tokens))] == list(tokens)
    for target in graph.nodes:
        incoming = [data["weight"] for *_, data in graph.in_edges(target, data=True)]
        assert not incoming or 0.9 < sum(incoming) < 1 + 1e-6


def test_text_from_outside_stays_text(small_report):
    page = (small_report[1] / "index.html").read_text(encoding="utf-8")
    body = page[page.index("<main") :]
    assert "<script>alert" not in body
    assert "<title>small &lt;model&gt;</title>" in page
    assert not re.search(r"(src|href)=\"(https?:)?//", body)


def test_a_second_run_replaces_the_first_and_leaves_other_files(small_model, tmp_path):
    lens = load(small_model, check=False)
    run_report(lens, Texts.given(TEXTS), build_task(lens, "repeat", 2), tmp_path / "r")
    (tmp_path / "r" / "notes.txt").write_text("mine")
    run_report(lens, Texts.given(TEXTS), None, tmp_path / "r")
    assert (tmp_path / "r" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "r" / "figures" / "ablation.html").exists()
    assert "Ablation is left out: no task was asked for." in (
        tmp_path / "r" / "index.html"
    ).read_text(encoding="utf-8")


def test_profile_prints_what_was_found_and_where(small_model, text_file, tmp_path, capsys):
    out = tmp_path / "report"
    code = main(
        ["profile", str(small_model), "--file", str(text_file), "--out", str(out), "--prompts", "2"]
    )
    said = capsys.readouterr()
    assert code == 0
    assert said.out.strip().splitlines()[-1] == f"Written to {out}: open {out / 'index.html'}"
    assert "induction head" in said.out
    assert "Ablating 8 heads one by one" in said.err


def test_doctor_finds_the_hand_wired_heads(wired_model, capsys):
    assert main(["doctor", str(wired_model)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"Strongest previous-token heads .*: L0H1 1\.00", said)
    assert re.search(r"Strongest induction heads .*: L1H2 1\.00", said)
    assert "Self-check passed" in said


def test_doctor_says_so_when_the_check_fails(wired_model, capsys, monkeypatch):
    from attnlens.hooks import check

    monkeypatch.setitem(check.TOLERANCES, __import__("torch").float32, -1.0)
    assert main(["doctor", str(wired_model)]) == 1
    assert "cannot be trusted" in capsys.readouterr().out


def test_doctor_on_a_real_model(shared_data, capsys):
    sample = shared_data / "tinystories_sample" / "tinystories_sample.txt"
    assert main(["doctor", str(shared_data / "stories260K"), "--file", str(sample)]) == 0
    said = capsys.readouterr().out
    assert "L1H3 0.64" in said
    assert "L3H6 0.61" in said
    assert "No induction head" in said


def test_unknown_tasks_are_refused_from_python_too():
    with pytest.raises(TaskError, match="chess"):
        build_task(hand_wired(), "chess", 4)


def test_texts_are_separated_and_cut_without_losing_a_word(small_model, tmp_path):
    (tmp_path / "t.txt").write_text("one two\n<|endoftext|>\n" + "three four five\n" * 60)
    texts = read_texts(tmp_path / "t.txt")
    assert len(texts) == 2
    lens = load(small_model, check=False)
    pieces = cut_texts(lens, texts)
    assert len(pieces) > 2
    assert all(len(lens.tokenizer(piece)["input_ids"]) <= lens.context for piece in pieces)
    assert " ".join(pieces).split() == " ".join(texts).split()


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path):
    def half() -> None:
        with staged(tmp_path / "a" / "b") as folder:
            (folder / "index.html").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert list(tmp_path.iterdir()) == []
    with staged(tmp_path / "a" / "b") as folder:
        (folder / "index.html").write_text("whole")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "b" / "index.html").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_help_loads_neither_torch_nor_plotly():
    code = (
        "import sys; from attnlens.cli import main; code = main(['profile', '--help']); "
        "heavy = {'torch', 'transformers', 'plotly', 'pandas'} & set(sys.modules); "
        "print(sorted(heavy), code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    assert done.stdout.splitlines()[-1] == "[] 0"
    assert "--ablate" in done.stdout


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["demo", "--help"]])
def test_what_needs_no_model(arguments, capsys):
    assert main(arguments) == 0
    assert "attnlens" in capsys.readouterr().out


def test_no_command_shows_the_help(capsys):
    assert main([]) in (0, 2)
    assert "doctor" in "".join(capsys.readouterr())


def test_an_interrupt_while_files_move_brings_back_what_stood_there(tmp_path, monkeypatch):
    def report(text: str) -> None:
        with staged(tmp_path / "r") as folder:
            (folder / "figures").mkdir()
            for name in ("heads.csv", "figures/profile.html", "index.html"):
                (folder / name).write_text(text)

    report("first")
    replace, calls = Path.replace, []

    def interrupted(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == 4:  # heads.csv and the old figures have moved
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report("second")
    kept = [path for path in (tmp_path / "r").rglob("*") if path.is_file()]
    assert len(kept) == 3
    assert {path.read_text() for path in kept} == {"first"}
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_the_demo_names_the_shipped_models_heads(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--prompts", "4"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\d+ induction heads?: L\dH\d \(0\.\d+\)", said)
    assert re.search(r"previous-token heads?: L\dH\d \(0\.\d+\)", said)
    assert "guessing" not in said
    assert (out / "index.html").is_file()
