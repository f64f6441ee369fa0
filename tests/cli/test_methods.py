"""The commands of one method each, and corpora of any length: on the shipped model."""

import re

import pandas as pd
import pytest
import torch

import attnlens as al
from attnlens.cli import main
from attnlens.cli.progress import clock, counts
from attnlens.lens.sources import text_lines
from attnlens.zoo.trained import small_path
from tests.cli.trees import TREES

LINES = [f"The {name} is come, and all the men of {name} are gone." for name in (
    "king", "queen", "duke", "fool", "lady", "lord", "servant", "guard", "father", "mother",
    "brother", "sister", "priest", "soldier", "prince", "master", "lover", "witch", "ghost", "boy",
)]  # fmt: skip


@pytest.fixture
def run(capsys):
    """Run a command; gives its exit code, what it printed and what it said on the way."""

    def command(*arguments) -> tuple[int, str, str]:
        code = main([str(part) for part in arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return command


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(LINES) + "\n")
    return path


@pytest.fixture
def trees(tmp_path):
    path = tmp_path / "trees.conllu"
    path.write_text(TREES * 3)
    return path


def _whole(out, tables) -> str:
    """Check that a report has its tables twice and that its links lead somewhere; its page."""
    for name in tables:
        csv = pd.read_csv(out / "tables" / f"{name}.csv")
        parquet = pd.read_parquet(out / "tables" / f"{name}.parquet")
        assert list(csv.columns) == list(parquet.columns)
        assert len(csv) == len(parquet)
    page = (out / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'href="([^"#]+)"', page[page.index("<main") :])
    assert {f"tables/{name}.csv" for name in tables} <= set(links)
    assert all((out / link).is_file() for link in links)
    assert not re.search(r"(src|href)=\"(https?:)?//", page[page.index("<main") :])
    assert list(out.parent.glob(f".{out.name}-*")) == []
    return page


def test_sinks_of_a_corpus_of_lines(run, corpus, tmp_path):
    out = tmp_path / "sinks"
    code, said, told = run("sinks", small_path(), "--file", corpus, "--lines", "--out", out)
    assert code == 0
    assert "Read: 20 texts." in said
    assert said.strip().endswith(f"Written to {out}: open {out / 'index.html'}")
    assert "Finding sinks" in told
    names = ("sinks-by-head", "sinks-by-layer", "sinks-by-position", "calibration-sinks")
    page = _whole(out, names)
    assert "Where attention gathers" in page

    found = al.sinks(al.load(small_path()), text_lines(corpus), max_tokens=512)
    table = pd.read_parquet(out / "tables" / "sinks-by-head.parquet")
    assert table["first_token"].tolist() == found.first_token.mean.tolist()
    share = 100 * float(found.first_token_all.mean)
    assert f"the first token gets {share:.0f} % of all attention" in said


def test_sinks_of_a_column_are_those_of_the_lines(run, corpus, tmp_path):
    pd.DataFrame({"id": range(20), "said": LINES}).to_parquet(tmp_path / "table.parquet")
    run("sinks", small_path(), "--file", corpus, "--lines", "--limit", 7, "--out", tmp_path / "a")
    code, said, _ = run(
        "sinks", small_path(), "--file", tmp_path / "table.parquet", "--column", "said",
        "--limit", 7, "--out", tmp_path / "b",
    )  # fmt: skip
    assert code == 0
    assert "Read: 7 texts." in said
    first, second = (
        (tmp_path / name / "tables" / "sinks-by-head.csv").read_bytes() for name in "ab"
    )
    assert first == second


def test_texts_of_a_corpus_are_cut_and_it_is_said(run, corpus, tmp_path):
    code, said, _ = run(
        "sinks", small_path(), "--file", corpus, "--lines", "--max-tokens", 9,
        "--out", tmp_path / "cut",
    )  # fmt: skip
    assert code == 0
    assert "20 of 20 texts were cut to their first 9 tokens." in said
    positions = pd.read_csv(tmp_path / "cut" / "tables" / "sinks-by-position.csv")
    assert len(positions) == 9


def test_an_interrupted_corpus_goes_on_to_the_same_numbers(run, corpus, tmp_path, monkeypatch):
    from attnlens.analyses import streaming
    from attnlens.cli import method_jobs

    asked = ["sinks", small_path(), "--file", corpus, "--lines", "--batch-size", 1]
    state = ["--state", tmp_path / "state"]
    run(*asked, "--out", tmp_path / "whole")
    measured, seen = method_jobs.sinks, []

    def interrupted(*given, progress, **named):
        def stop(done, total):
            progress(done, total)
            seen.append((done, total))
            if done == 18:  # past the first window of 16
                raise KeyboardInterrupt

        return measured(*given, progress=stop, **named)

    with monkeypatch.context() as patch:
        patch.setattr(method_jobs, "sinks", interrupted)
        patch.setattr(streaming, "SAVE_SECONDS", 0.0)
        code, _, told = run(*asked, *state, "--out", tmp_path / "parts")
    assert code == 130
    assert seen[-1] == (18, 20)
    assert f"{tmp_path / 'state.sinks'} holds what 16 texts gave." in told
    assert "goes on from there" in told
    assert not (tmp_path / "parts").exists()
    code, said, _ = run(*asked, *state, "--out", tmp_path / "parts")
    assert code == 0
    assert "Read: 20 texts." in said
    for name in ("sinks-by-head", "sinks-by-position"):
        whole, parts = (
            (tmp_path / run / "tables" / f"{name}.csv").read_bytes() for run in ("whole", "parts")
        )
        assert whole == parts


def test_an_interrupt_with_nothing_saved_says_so(run, corpus, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    asked = ["sinks", small_path(), "--file", corpus, "--lines", "--out", tmp_path / "out"]
    monkeypatch.setattr("attnlens.cli.method_jobs.sinks", interrupted)
    code, _, told = run(*asked)
    assert code == 130
    assert "give --state FILE" in told
    assert "Nothing was saved yet" in run(*asked, "--state", tmp_path / "state")[2]


def test_profile_reads_a_corpus_and_keeps_two_states(run, corpus, tmp_path):
    out = tmp_path / "report"
    code, said, _ = run(
        "profile", small_path(), "--file", corpus, "--lines", "--limit", 12, "--task", "none",
        "--state", tmp_path / "state", "--out", out,
    )  # fmt: skip
    assert code == 0
    assert (tmp_path / "state.profile").is_file()
    assert (tmp_path / "state.sinks").is_file()
    page = _whole(out, ("sinks-by-layer", "massive-activations", "massive-qk", "ranks",
                        "layer-similarity", "retrieval-heads", "recall"))  # fmt: skip
    assert "Means over 12 texts." in page
    assert "strong retrieval heads" in said
    heads = pd.read_csv(out / "heads.csv")
    assert {"retrieval", "qk_rank", "ov_rank", "query_peak", "retrieval_low"} <= set(heads.columns)
    assert len(heads) == 32


def test_a_model_that_answers_no_needle_is_said_to(small_model, run, text_file, tmp_path):
    code, said, _ = run(
        "profile", small_model, "--file", text_file, "--task", "none", "--out", tmp_path / "r"
    )
    assert code == 0
    assert "Retrieval heads are left out: the model answers none of" in said
    assert "Effective ranks, mean over heads" in said
    assert "Retrieval heads are left out" in (tmp_path / "r" / "index.html").read_text()


def test_retrieval_of_the_shipped_model(run, tmp_path):
    out = tmp_path / "retrieval"
    code, said, told = run(
        "retrieval", small_path(), "--lengths", "64,96", "--depths", "0,1", "--prompts", 1,
        "--steps", 8, "--out", out,
    )  # fmt: skip
    assert code == 0
    _whole(out, ("retrieval-heads", "recall", "runs"))
    assert "Asking for needles" in told
    places = pd.read_csv(out / "tables" / "recall.csv")
    assert places[["length", "depth"]].values.tolist() == [[64, 0], [64, 1], [96, 0], [96, 1]]
    found = al.retrieval_heads(
        al.load(small_path()), None, (64, 96), (0, 1), 1, al.RetrievalSettings(steps=8)
    )
    table = pd.read_csv(out / "tables" / "retrieval-heads.csv").set_index("head")["score"]
    scores = [table[str(head)] for head in found.heads]
    assert torch.allclose(torch.tensor(scores).double(), found["score"].mean)
    assert f"{found.prompts} of 4 runs count" in said
    assert f"{len(found.strong)} strong retrieval head" in said


def test_a_needle_of_ones_own(run, tmp_path):
    (tmp_path / "play.txt").write_text("\n\n".join(LINES))
    out = tmp_path / "own"
    code, said, _ = run(
        "retrieval", small_path(), "--lengths", 96, "--depths", "0.5", "--steps", 8,
        "--haystack", tmp_path / "play.txt", "--needle", "The name of the cat is <b>Tom</b>.",
        "--question", "The name of the cat is", "--answer", "<b>Tom</b>", "--repeat", "--out", out,
    )  # fmt: skip
    assert code == 0
    runs = pd.read_csv(out / "tables" / "runs.csv")
    assert runs["needle"].tolist() == ["<b>Tom</b>"]
    page = (out / "index.html").read_text()
    assert "<b>Tom</b>" not in page[page.index("<main") : page.index("<script", 0) + 1]
    assert "&lt;b&gt;Tom&lt;/b&gt;" in page
    assert "copies of it by the length of the needle" in page
    assert "of 1 run count" in said


def test_syntax_over_trees(run, trees, tmp_path):
    out = tmp_path / "syntax"
    code, said, told = run(
        "syntax", small_path(), trees, "--relations", "det,nsubj", "--least", 1, "--out", out
    )
    assert code == 0
    _whole(out, ("relations", "relations-by-head"))
    table = pd.read_csv(out / "tables" / "relations.csv")
    assert set(table["relation"]) == {"det", "nsubj"}
    assert {"head", "accuracy", "accuracy_low", "offset", "baseline"} <= set(table.columns)
    full = pd.read_csv(out / "tables" / "relations-by-head.csv")
    assert len(full) == len(table) * 32
    best = full.loc[full["relation"] == "det"].groupby("direction")["accuracy"].max()
    stated = table.loc[table["relation"] == "det"]
    assert best.max() == stated["accuracy"].max()
    assert "Syntax: 2 relations over" in said
    assert "sentences" in told


def test_times_and_counts_are_written_as_people_write_them():
    assert counts(1024, 4000) == "1,024/4,000"
    assert counts(1024, None) == "1,024"
    assert clock(200.7) == "0:03:20"
    assert clock(None) == "0:00:00"


def test_long_lines_are_read_in_pieces(run, tmp_path):
    (tmp_path / "long.txt").write_text(" ".join(LINES) + "\nA short one.\n")
    given = ["sinks", small_path(), "--file", tmp_path / "long.txt", "--lines", "--max-tokens", 40]
    code, said, _ = run(*given, "--cut", "--out", tmp_path / "pieces")
    assert code == 0
    count = int(re.search(r"Read: (\d+) texts", said)[1])
    tokens = len(al.load(small_path()).tokenizer(" ".join(LINES))["input_ids"])
    assert count > tokens / 40 + 1
    assert "were cut" not in said


def test_a_file_of_separated_texts_has_a_limit_too(run, tmp_path):
    (tmp_path / "texts.txt").write_text("<|endoftext|>".join(LINES))
    code, said, _ = run(
        "sinks", small_path(), "--file", tmp_path / "texts.txt", "--limit", 3,
        "--out", tmp_path / "few",
    )  # fmt: skip
    assert code == 0
    assert "Read: 3 texts." in said
