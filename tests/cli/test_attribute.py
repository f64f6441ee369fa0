"""Commands that explain one text: what they print and write, and how they refuse."""

import io
import re
import sys

import pandas as pd
import pytest
from rich.console import Console

import attnlens as al
from attnlens.analyses.target import Target
from attnlens.cli import main
from attnlens.cli.terminal import coloured
from attnlens.graphs.export import SUFFIXES
from attnlens.zoo.trained import small_path

TEXT = "The king is dead, and all his friends are"


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def run(capsys):
    """Run a command on the shipped model; gives what it printed."""

    def command(name, *arguments) -> str:
        code = main([name, str(small_path()), *map(str, arguments)])
        said = capsys.readouterr()
        assert code == 0, said.err
        assert "Traceback" not in said.err
        return said.out

    return command


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Run a command that must be refused, before the model is opened unless it is `late`."""

    def command(*arguments, late: bool = False) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main([str(part) for part in arguments]) == 2
        said = capsys.readouterr()
        assert sorted(tmp_path.rglob("*")) == before
        assert "Traceback" not in said.err
        assert late or "Opening" not in said.err
        return re.sub(r"[\s│]+", " ", said.err)

    return command


def rows(said: str) -> list[list[str]]:
    """The rows of a printed table, without their bars."""
    cut = [line.replace("█", "").split() for line in said.splitlines() if line.startswith(" ")]
    return [row for row in cut if row and row[0].isdecimal()]


def test_attribute_prints_the_tokens_by_size(run):
    said = run("attribute", TEXT, "--target", " dead", "--against", " king", "--at", 3, "--top", 4)
    lens = al.load(small_path())
    found = al.attribute(lens, TEXT, Target(" dead", " king", 3))
    scores = found.of(0).abs().tolist()
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    assert [int(row[0]) for row in rows(said)] == order[:4]
    assert "Explained by attnlrp: '·dead' − '·king', value" in said
    assert f"and {len(scores) - 4} tokens with smaller scores; --top {len(scores)}" in said
    assert "Where the value" in said
    assert "Heads with the largest scores: L" in said
    assert "Written" not in said


def test_attribute_writes_a_page_a_table_or_a_figure(run, tmp_path):
    out = tmp_path / "out"
    said = run("attribute", TEXT, "--method", "attention_gradient", "--out", out)
    assert said.strip().endswith(f"Written to {out}: open {out / 'index.html'}")
    assert "attention_gradient on small" in (out / "index.html").read_text()
    found = al.attribute(al.load(small_path()), TEXT, method="attention_gradient")
    for name in ("tokens", "heads", "layers"):
        frame = pd.read_parquet(out / "tables" / f"{name}.parquet")
        assert (out / "figures" / f"{name}.html").is_file()
        if name == "tokens":
            wanted = found.to_frame().set_index("position")["score"]
            assert frame.set_index("position")["score"].sort_index().tolist() == wanted.tolist()
    run("attribute", TEXT, "--method", "attention_gradient", "--out", tmp_path / "scores.csv")
    assert pd.read_csv(tmp_path / "scores.csv")["token"].tolist() == list(found.tokens[0])
    run("attribute", TEXT, "--method", "attention_gradient", "--out", tmp_path / "figure.html")
    assert "Plotly.newPlot" in (tmp_path / "figure.html").read_text()


def test_the_text_comes_from_a_file_or_the_input_too(run, tmp_path, monkeypatch):
    asked = ("--method", "random", "--target", "id:5", "--set", "seed=3")
    given = run("attribute", TEXT, *asked)
    (tmp_path / "text.txt").write_text(TEXT + "\n")
    assert run("attribute", "--file", tmp_path / "text.txt", *asked) == given
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{TEXT}\n".encode())))
    assert run("attribute", "-", *asked) == given
    assert run("attribute", TEXT, *asked[:-1], "seed=4") != given


@pytest.mark.parametrize("method", ["attention_flow", "rollout"])
def test_flow_prints_the_sources_and_writes_the_graph(run, tmp_path, method):
    out = tmp_path / "flow.gexf"
    said = run("flow", TEXT, "--target", 4, "--method", method, "--out", out)
    trace = al.load(small_path()).run(TEXT, keep=("pattern",))
    if method == "rollout":
        wanted = al.rollout(trace).of(0)[-1, 4]
    else:
        wanted = al.attention_flow(trace, targets=4).of(0)[0]
        assert "pairs are saturated" in said
        assert "The graph is one maximum flow from <s> at 0." in said
    found = rows(said)
    assert [int(row[0]) for row in found] == wanted.argsort(descending=True)[:5].tolist()
    assert found[0][2] == f"{wanted.max():.2f}"
    graph = al.load_graph(out)
    assert {node for node, degree in graph.out_degree() if degree == 0} == {"L4P4"}
    assert f"{len(graph)} nodes, {graph.number_of_edges()} edges." in said


def test_the_graph_of_a_source_holds_its_paths_alone(run, tmp_path):
    for method in ("attention_flow", "rollout"):
        out = tmp_path / f"{method}.json"
        run("flow", TEXT, "--source", 2, "--method", method, "--threshold", 0, "--out", out)
        graph = al.load_graph(out)
        assert {node for node, degree in graph.in_degree() if degree == 0} == {"L0P2"}


def test_routes_are_printed_and_written_in_every_format(run, tmp_path):
    said = run("routes", TEXT, "--target", -2, "--threshold", 0.1, "--out", tmp_path / "r.json")
    found = al.routes(al.load(small_path()), TEXT, -2, 0.1)
    assert "Routes to ·friends at 9" in said
    assert "Heads through which most passes: L" in said
    assert int(rows(said)[0][0]) == int(found.of(0).argmax())
    graph = al.load_graph(tmp_path / "r.json")
    assert set(graph) == set(found.graph())
    run("routes", TEXT, "--threshold", 0.2, "--out", tmp_path / "r.html")
    assert "Plotly.newPlot" in (tmp_path / "r.html").read_text()


def test_a_method_a_setting_or_an_id_that_is_not_there(refused):
    model = small_path()
    said = refused("attribute", model, TEXT, "--method", "lime")
    assert "no attribution method 'lime'; there is attnlrp" in said
    said = refused("attribute", model, TEXT, "--set", "depth=3")
    assert "attnlrp has no setting 'depth'; it has maps, batch_size" in said
    assert "--set takes NAME=VALUE, not 'strict'" in refused(
        "attribute", model, TEXT, "--set", "strict"
    )
    assert "'id:x' is no token id" in refused("attribute", model, TEXT, "--target", "id:x")
    said = refused("attribute", model, TEXT, "--target", "the dead king", late=True)
    assert "a target is one. Give one of them, or an id." in said
    said = refused("attribute", model, TEXT, "--at", 99, late=True)
    assert "position 99 is not in prompt 0, which has 11 tokens" in said
    said = refused("attribute", model, TEXT, "--set", "batch_size=many", late=True)
    assert "cannot be run with --set as given" in said
    said = refused("attribute", model, TEXT, "--method", "rollout", "--set", "residual=2")
    assert "residual=2 is out of range" in said
    said = refused("attribute", model, TEXT, "--method", "rollout", "--set", "residual=much")
    assert "rollout cannot take --set as given" in said
    said = refused("attribute", model, TEXT, "--method", "rollout", "--set", "settings={}")
    assert "rollout has no setting 'settings'; it has stack, row, fuse, residual" in said
    said = refused("attribute", model, TEXT, "--method", "rollout", "--set", "row=99", late=True)
    assert "attnlens: target=99 is not in prompt 0" in said  # what it says by itself


def test_a_text_that_is_not_there(refused, tmp_path, monkeypatch):
    model = small_path()
    (tmp_path / "empty.txt").write_text(" \n")
    assert "Give a TEXT to explain" in refused("attribute", model)
    assert "The text holds no text" in refused("flow", model, "  ")
    assert "holds no text" in refused("routes", model, "--file", tmp_path / "empty.txt")
    assert "no file" in refused("routes", model, "--file", tmp_path / "none.txt")
    assert "not in --file too" in refused("flow", model, TEXT, "--file", tmp_path / "empty.txt")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert "The input is no UTF-8 text (byte 0)" in refused("attribute", model, "-")


def test_a_place_that_cannot_be(refused, tmp_path):
    model, taken = small_path(), tmp_path / "taken"
    taken.write_text("mine")
    said = refused("attribute", model, TEXT, "--out", tmp_path / "a.xlsx")
    assert "has the suffix '.xlsx'; give a folder, or a file with .csv, .html, .graphml" in said
    assert "taken is a file" in refused("attribute", model, TEXT, "--out", taken)
    for command in ("flow", "routes"):
        said = refused(command, model, TEXT, "--out", tmp_path / "a.png")
        assert f"graphs are files with {', '.join(SUFFIXES)}, drawings with .html" in said
    said = refused("flow", model, TEXT, "--out", tmp_path / "no" / "a.json")
    assert "There is no folder" in said
    assert taken.read_text() == "mine"


def test_attribute_writes_the_graph_of_a_method_that_has_one(run, refused, tmp_path):
    lens = al.load(small_path())
    for method in ("attnlrp", "attention_flow"):
        out = tmp_path / f"{method}.gexf"
        run("attribute", TEXT, "--method", method, "--out", out)
        more = {"maps": "all"} if method == "attnlrp" else {}
        wanted = al.attribute(lens, TEXT, method=method, **more).graph()
        assert set(al.load_graph(out).edges(keys=True)) == set(wanted.edges(keys=True))
    said = refused(
        "attribute", small_path(), TEXT, "--method", "random", "--out", tmp_path / "a.json",
        late=True,
    )  # fmt: skip
    assert "random traces no graph" in said


def test_settings_of_a_rollout_go_by_their_names(run):
    said = run("attribute", TEXT, "--method", "rollout", "--set", "residual=0.9", "--top", 1)
    settings = al.RolloutSettings(residual=0.9)
    found = al.attribute(al.load(small_path()), TEXT, method="rollout", settings=settings)
    assert rows(said)[0][2] == f"{found.of(0).max():.2f}"


def test_a_flow_that_is_spread_thin_has_a_path(run, tmp_path):
    """No edge of weight .9 carries anything, and the path is there all the same."""
    for method, more in (("attention_flow", ()), ("rollout", ("--source", 1))):
        out = tmp_path / f"{method}.json"
        run("flow", TEXT, "--method", method, "--threshold", 0.9, "--out", out, *more)
        graph = al.load_graph(out)
        ends = {0: set(), 1: set()}
        for node in graph:
            for side, degree in enumerate((graph.in_degree(node), graph.out_degree(node))):
                if not degree:
                    ends[side].add(node)
        assert len(ends[0]) == 1
        assert ends[1] == {"L4P10"}


def test_positions_that_the_text_does_not_have(refused):
    model = small_path()
    for command in ("flow", "routes"):
        assert "11" in refused(command, model, TEXT, "--target", 11, late=True)
    for more in (("--target", 11), ("--source", 11)):
        said = refused("flow", model, TEXT, "--method", "rollout", *more, late=True)
        assert f"{more[0]} 11 is not in the text, which has 11 tokens" in said
    for method in ("attention_flow", "rollout"):
        said = refused(
            "flow", model, TEXT, "--method", method, "--target", 1, "--source", 3, late=True
        )
        assert "No attention leads from ·is at 3 to The at 1" in said
    said = refused("routes", model, TEXT, "--stack", "vision", late=True)
    assert "Say which stack" in said


def test_a_model_without_a_tokenizer(refused, wired_model):
    for command in ("attribute", "flow", "routes"):
        said = refused(command, wired_model, TEXT, late=True)
        assert "no tokenizer" in said
        assert "--tokenizer" in said


def test_tokens_are_text_and_not_markup():
    text = coloured(("[bold]", "\x1b[0m", "\n", " x"), (1.0, -1.0, 0.5, 0.0))
    console = Console(width=60, file=io.StringIO(), force_terminal=False)
    console.print(text)
    assert console.file.getvalue().splitlines() == ["[bold]␛[0m⏎", "·x"]
    styles = [span.style for span in text.spans]
    assert styles[0] == "black on rgb(224,154,118)"
    assert styles[1] == "black on rgb(134,174,205)"
