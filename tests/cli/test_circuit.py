"""The commands circuit and compare: what they print, write, keep after a stop, and refuse."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

import attnlens as al
from attnlens.cli import circuit_job, main
from attnlens.cli.main_job import build_task
from attnlens.graphs import load_graph
from attnlens.zoo import small_path
from tests.architectures import ARCHITECTURES
from tests.cli.test_task_names import ROWS

FEW = ("--prompts", 4, "--steps", 2, "--top", 60)
TABLES = {"edges", "nodes", "evaluation", "curve", "scores"}


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


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The folder of a circuit of indirect objects in the shipped model."""
    out = tmp_path_factory.mktemp("circuits") / "names"
    given = ["circuit", small_path(), "--task", "ioi", *FEW, "--out", out]
    assert main([str(part) for part in given]) == 0
    return out


@pytest.fixture
def refused(run, tmp_path):
    """Run a command that must be refused in a sentence and write nothing; gives the sentence."""

    def command(*arguments) -> str:
        before = sorted(tmp_path.rglob("*"))
        code, out, told = run(*arguments)
        assert code == 2
        assert out == ""
        assert sorted(tmp_path.rglob("*")) == before
        return told

    return command


def _body(out: Path) -> str:
    page = (out / "index.html").read_text(encoding="utf-8")
    return page[page.index("<main") :]


def test_every_file_is_there_and_reads_back(names):
    circuit = al.Circuit.load(names / "circuit.json")
    assert circuit.evaluation is not None
    assert circuit.curve is not None
    assert circuit.evaluation["prompts"] == 4
    assert circuit.about["selection"] == "top 60"
    for suffix in ("graphml", "cyjs"):
        graph = load_graph(names / f"circuit.{suffix}")
        assert {data["name"] for *_, data in graph.edges(data=True)} == set(circuit.edges)
    for name in TABLES:
        table = pd.read_csv(names / "tables" / f"{name}.csv")
        assert len(table) == len(pd.read_parquet(names / "tables" / f"{name}.parquet")) > 0
    assert set(pd.read_csv(names / "tables" / "edges.csv")["edge"]) == set(circuit.edges)
    assert len(pd.read_csv(names / "tables" / "scores.csv")) == len(circuit.network)
    figures = {path.stem for path in (names / "figures").glob("*.html")}
    assert figures == {"circuit", "evaluation", "curve", "scores"}
    assert [path.name for path in names.parent.iterdir()] == ["names"]


def test_the_page_opens_offline_and_its_links_lead_somewhere(names):
    body = _body(names)
    links = re.findall(r'href="([^"#]+)"', body)
    assert {"circuit.json", "circuit.graphml", "circuit.cyjs", "tables/edges.csv"} <= set(links)
    assert all((names / link).is_file() for link in links)
    for page in (names / "index.html", *(names / "figures").glob("*.html")):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"(src|href)=[\"'](https?:)?//", text[text.index("<body") :])


def test_the_summary_is_what_the_analyses_find(run, names, tmp_path):
    code, said, told = run("circuit", small_path(), "--task", "ioi", *FEW, "--out", tmp_path / "c")
    assert code == 0, told
    assert "Scoring 1,055 edges by eap-ig" in told
    lens = al.load(small_path())
    chosen_on, judged = (build_task(lens, "ioi", 4, seed) for seed in (0, 1))
    circuit = al.edges(lens, chosen_on, steps=2).circuit(60)
    assert circuit.edges == al.Circuit.load(names / "circuit.json").edges
    found = circuit.evaluate(lens, judged)
    assert f"The circuit: {len(circuit)} edges of 1,055" in said
    assert f"it does {float(found.faithfulness.mean):.2f} of the task" in said
    assert "on 4 prompts that had no part in choosing it" in said
    losses = dict(zip(found.nodes, found.minimality.mean.tolist(), strict=True))
    most = max(losses, key=lambda node: losses[node])
    assert f"of the task without a node: {most} {losses[most]:.2f}" in said
    assert "Strongest edges, in logits: " in said
    assert "Were the prompts drawn again" in said
    assert "CPR" in said
    assert said.strip().endswith(f"open {tmp_path / 'c' / 'index.html'}")


def test_how_many_edges_where_nothing_is_said(run, wired_model, tmp_path):
    given = ("circuit", wired_model, "--prompts", 2, "--steps", 1)
    code, said, _ = run(*given, "--out", tmp_path / "edges")
    assert code == 0
    assert "a tenth of all edges, as neither --top nor --threshold says" in said
    code, said, _ = run(*given, "--granularity", "nodes", "--out", tmp_path / "nodes")
    assert code == 0
    assert "a third of all nodes" in said
    assert not (tmp_path / "nodes" / "tables" / "curve.csv").exists()
    code, said, _ = run(*given, "--greedy", "--threshold", 0.5, "--out", tmp_path / "sizes")
    assert code == 0
    assert "at least 0.5, greedily from the logits" in said


def test_a_saved_circuit_is_run_on_another_task(run, names, tmp_path):
    out = tmp_path / "other"
    saved = names / "circuit.json"
    code, said, told = run(
        "circuit", small_path(), "--task", "repeat", "--prompts", 4, "--evaluate", saved,
        "--graph", "json", "--out", out,
    )  # fmt: skip
    assert code == 0, told
    assert "Task repeated tokens: " in said
    again = al.Circuit.load(out / "circuit.json")
    assert again.edges == al.Circuit.load(saved).edges
    assert again.evaluation is not None
    assert again.evaluation["task"] == "repeated_tokens"
    assert len(load_graph(out / "circuit.graph.json").nodes) == len(again.nodes)
    assert not (out / "tables" / "scores.csv").exists()


def test_a_circuit_given_by_name_is_run_though_it_has_no_scores(run, wired_model, tmp_path):
    network = al.load(wired_model).wiring.network
    named = ["embed->L0H1<v>", "L0H1->L1H2<k>", "embed->L1H2<v>", "L1H2->logits"]
    mine = al.Circuit.of(network, named, {"metric": "mine"})
    saved = mine.save(tmp_path / "mine.json")
    given = ("circuit", wired_model, "--prompts", 2, "--evaluate", saved)
    code, said, told = run(*given, "--out", tmp_path / "out")
    assert code == 0, told
    assert "given by name" in said
    assert "By itself it does 1.00 of the task" in said
    assert "Strongest" not in said
    body = _body(tmp_path / "out")
    assert "Scores of its edges are not known." in body
    assert "Cold colours" not in body
    code, said, _ = run("compare", saved, saved, "--out", tmp_path / "both")
    assert code == 0
    assert "Edges: 4 shared of 4 and 4" in said


def test_a_removal_goes_on_after_a_stop(run, wired_model, tmp_path, monkeypatch):
    given = ("circuit", wired_model, "--method", "removal", "--prompts", 4, "--threshold", 0.05)
    code, said, _ = run(*given, "--out", tmp_path / "whole")
    assert code == 0
    assert re.search(r"Strongest edges.*: \S+ (helps|hinders) by \d", said)
    whole = al.Circuit.load(tmp_path / "whole" / "circuit.json")

    def stopped(*arguments, progress, **settings):
        def some(done: int, total: int) -> None:
            progress(done, total)
            if done > 20:
                raise KeyboardInterrupt

        return remove(*arguments, progress=some, **settings)

    remove = circuit_job.remove_edges
    monkeypatch.setattr(circuit_job, "remove_edges", stopped)
    out = tmp_path / "stopped"
    code, said, told = run(*given, "--out", out)
    assert code == 130
    assert said == ""
    assert re.search(r"\d+ of \d+ edges are decided, which is kept in", told)
    assert told.strip().endswith("--resume")
    assert [path.name for path in out.iterdir()] == ["removal.json"]
    decided = len(json.loads((out / "removal.json").read_bytes())["stays"])
    monkeypatch.setattr(circuit_job, "remove_edges", remove)
    code, _, told = run(*given, "--out", out)
    assert code == 2
    assert "add --resume" in told
    code, _, told = run(*given, "--resume", "--out", out)
    assert code == 0, told
    again = al.Circuit.load(out / "circuit.json")
    assert again.edges == whole.edges
    assert again.score.tolist() == pytest.approx(whole.score.tolist(), abs=1e-6)
    assert 20 < decided < len(whole.network)
    assert again.about["forward passes"] < whole.about["forward passes"]


def test_a_removal_that_keeps_nothing_leaves_nothing(refused, wired_model, tmp_path):
    given = ("circuit", wired_model, "--method", "removal", "--prompts", 2, "--steps", 1)
    out = ("--out", tmp_path / "out")
    told = refused(*given, "--threshold", 100, *out)
    assert "lower --threshold" in told
    assert "--resume" not in told
    assert "--top keeps lies on a way" in refused(*given, "--top", 1, *out)


def test_a_circuit_that_does_little_is_warned_of(run, tmp_path):
    given = ("circuit", small_path(), "--task", "ioi", "--prompts", 4, "--method", "eap")
    code, said, _ = run(*given, "--ablation", "mean", "--threshold", 0.2, "--out", tmp_path / "out")
    assert code == 0
    assert "Beware: The circuit does little of the task" in said


def test_two_circuits_are_compared_without_a_model(run, names, tmp_path):
    other = tmp_path / "repeat"
    code, *_ = run("circuit", small_path(), "--task", "repeat", *FEW, "--out", other)
    assert code == 0
    saved = (names / "circuit.json", other / "circuit.json")
    out = tmp_path / "both"
    code, said, _ = run("compare", *saved, "--out", out)
    assert code == 0
    found = al.Circuit.load(saved[0]).compare(al.Circuit.load(saved[1]))
    assert f"Edges: {len(found.edges.names)} shared of " in said
    assert "First: Indirect object: the largest 60 edges by EAP-IG." in said
    assert pd.read_csv(out / "tables" / "overlap.csv")["shared"].tolist() == [
        len(found.nodes.names), len(found.edges.names),
    ]  # fmt: skip
    links = re.findall(r'href="([^"#]+)"', _body(out))
    assert all((out / link).is_file() for link in links)
    code, again, _ = run("compare", *saved)
    assert code == 0
    assert again.strip() == said[: said.index("Written to")].strip()


def test_text_from_outside_stays_text(run, tmp_path):
    mine = tmp_path / "<b>mine<b>.jsonl"
    mine.write_text("\n".join(map(json.dumps, ROWS)))
    out = tmp_path / "out"
    code, said, told = run("circuit", small_path(), "--task", mine, *FEW, "--out", out)
    assert code == 0, told
    assert "on the 3 prompts that chose it" in said
    for page in (out / "index.html", *(out / "figures").glob("*.html")):
        text = page.read_text(encoding="utf-8")
        assert "<b>mine" not in text
        assert "mine" in text


def test_options_that_do_not_go_together(refused, tmp_path, names):
    given = ("circuit", small_path(), "--out", tmp_path / "out")
    both = refused(*given, "--top", 5, "--threshold", 0.1)
    assert "Give --top or --threshold, not both" in both
    assert "no format of graphs" in refused(*given, "--graph", "png")
    assert "nodes are chosen by --top" in refused(*given, "--granularity", "nodes", "--greedy")
    assert "--resume is of --method removal" in refused(*given, "--resume")
    assert "--order is of --method removal" in refused(*given, "--order", "random")
    removal = (*given, "--method", "removal")
    assert "leave --greedy out" in refused(*removal, "--greedy")
    assert "over 0" in refused(*removal, "--threshold", 0)
    saved = ("--evaluate", names / "circuit.json")
    assert "leave --top out" in refused(*given, *saved, "--top", 5)


def test_what_is_no_task_or_no_circuit_is_said(refused, tmp_path, names):
    given = ("circuit", small_path(), "--out", tmp_path / "out")
    assert "ioi" in refused(*given, "--task", "chess")
    damaged = tmp_path / "damaged.json"
    damaged.write_bytes((names / "circuit.json").read_bytes()[:400])
    assert "no circuit file" in refused(*given, "--evaluate", damaged)
    assert "no circuit file" in refused("compare", names / "circuit.json", damaged)
    damaged.write_text('{"attnlens circuit": 99}')
    assert "update it" in refused("compare", damaged, damaged)
    missing = tmp_path / "missing.json"
    assert "cannot be read" in refused("compare", missing, names / "circuit.json")
    assert "lower it" in refused(*given, "--prompts", 2, "--steps", 1, "--threshold", 1e6)


def test_models_whose_edges_are_not_defined_are_refused(refused, encoder_model, tmp_path):
    folder = tmp_path / "normed"
    ARCHITECTURES["gemma2"].build().save_pretrained(folder)
    out = ("--prompts", 2, "--out", tmp_path / "out")
    assert "norm" in refused("circuit", folder, *out)
    assert "cannot be graded" in refused("circuit", encoder_model, *out)


def test_a_circuit_of_another_model_is_refused(refused, wired_model, tmp_path, names):
    saved = names / "circuit.json"
    told = refused("circuit", wired_model, "--evaluate", saved, "--out", tmp_path / "out")
    assert "on the model it was found in" in told


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("circuit", ["--task", "--method", "--steps", "--ablation", "--metric", "--top", "--greedy",
                     "--threshold", "--granularity", "--order", "--resume", "--evaluate"]),
        ("compare", ["A.json", "B.json", "--out"]),
    ],
)  # fmt: skip
def test_help(run, monkeypatch, command, options):
    monkeypatch.setenv("COLUMNS", "120")
    code, said, _ = run(command, "--help")
    assert code == 0
    assert f"Example: attnlens {command}" in said
    assert all(option in said for option in options)
