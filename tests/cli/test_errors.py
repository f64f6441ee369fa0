"""Bad input at the command line: exit code 2, one clear message, no traceback, nothing written."""

import pandas as pd
import pytest

from attnlens.cli import main
from tests.cli.trees import TREES


@pytest.fixture
def refused(capsys, tmp_path):
    """Run a command that must be refused; gives what it said."""

    def run(*arguments) -> str:
        capsys.readouterr()
        before = sorted(tmp_path.rglob("*"))
        assert main([str(part) for part in arguments]) == 2
        assert sorted(tmp_path.rglob("*")) == before
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        assert "Written" not in said.out
        return said.err

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "report"


def test_a_model_that_is_not_there(refused, out):
    assert "no model folder './nowhere'" in refused("profile", "./nowhere", "--out", out)
    assert "no model folder" in refused("doctor", "./nowhere")


def test_a_text_file_that_is_not_there(refused, small_model, out):
    said = refused("profile", small_model, "--file", "/no/such.txt", "--out", out)
    assert said.splitlines()[-1] == "attnlens: There is no file '/no/such.txt'."


@pytest.mark.parametrize("content", [b"", b" \n\t\n", b"<|endoftext|>\n"])
def test_an_empty_text(refused, small_model, out, tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    said = refused("profile", small_model, "--file", tmp_path / "empty.txt", "--out", out)
    assert "holds no text" in said


def test_a_file_that_is_no_text(refused, small_model, out, tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    said = refused("profile", small_model, "--file", tmp_path / "image.png", "--out", out)
    assert "no UTF-8 text" in said


def test_a_text_longer_than_the_context(refused, small_model, out, tmp_path):
    (tmp_path / "long.txt").write_text("word and word " * 90)
    said = refused("profile", small_model, "--file", tmp_path / "long.txt", "--out", out)
    assert "reads at most 96" in said
    assert "--cut" in said


def test_a_missing_tokenizer(refused, wired_model, text_file, out):
    said = refused("profile", wired_model, "--file", text_file, "--out", out)
    assert "no tokenizer" in said
    assert "--tokenizer" in said


def test_a_tokenizer_of_another_model(refused, wired_model, small_model, text_file, out):
    said = refused(
        "profile", wired_model, "--tokenizer", small_model, "--file", text_file, "--out", out
    )
    assert "vocabulary is 0 to 31" in said


def test_a_pickle_only_folder(refused, pickle_only, out):
    said = refused("profile", pickle_only, "--out", out)
    assert "pickle only" in said
    assert "save_pretrained" in said


def test_code_from_strangers(refused, remote_code, out):
    assert "does not run code" in refused("profile", remote_code, "--out", out)


def test_nan_weights(refused, nan_weights, out):
    said = refused("doctor", nan_weights)
    assert "model.layers.1.self_attn.q_proj.weight" in said


def test_an_unknown_head(refused, small_model, out):
    said = refused("profile", small_model, "--heads", "L1H9", "--out", out)
    assert "L1H9" in said
    assert "L0..1 with 4 heads" in said


def test_over_budget(refused, small_model, out):
    said = refused("profile", small_model, "--budget", "1kB", "--out", out)
    assert "1" in said
    assert "kB" in said or "bytes" in said


def test_an_unknown_task(refused, small_model, out):
    assert "repeat" in refused("profile", small_model, "--task", "chess", "--out", out)


def test_a_task_that_the_tokens_do_not_allow(refused, wired_model, out):
    said = refused("profile", wired_model, "--task", "ioi", "--out", out)
    assert "no tokenizer" in said


@pytest.mark.parametrize("option", [("--device", "cuda:77"), ("--dtype", "float31")])
def test_a_device_or_dtype_that_is_not_there(refused, small_model, out, option):
    assert option[1] in refused("profile", small_model, *option, "--out", out)


def test_a_report_where_a_file_is(refused, small_model, tmp_path):
    (tmp_path / "file").write_text("mine")
    said = refused("profile", small_model, "--out", tmp_path / "file")
    assert "is a file" in said
    assert (tmp_path / "file").read_text() == "mine"


def test_an_interrupt_leaves_nothing_and_says_so(small_model, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("attnlens.cli.main_job.ablate", interrupted)
    assert main(["profile", str(small_model), "--out", str(tmp_path / "report")]) == 130
    assert list(tmp_path.iterdir()) == []
    assert "interrupted" in capsys.readouterr().err


def test_an_unexpected_error_keeps_its_traceback_and_writes_nothing(
    small_model, tmp_path, monkeypatch
):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("attnlens.cli.main_job.write_report", broken)
    with pytest.raises(ZeroDivisionError):
        main(["profile", str(small_model), "--out", str(tmp_path / "report")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["sinks", "retrieval", "syntax"])
def test_a_model_that_is_not_there_for_every_command(refused, command, out, tmp_path):
    given = {"sinks": ["--file", tmp_path], "retrieval": [], "syntax": [tmp_path / "t.conllu"]}
    (tmp_path / "t.conllu").write_text(TREES)
    if command == "sinks":
        (tmp_path / "t.txt").write_text("one\ntwo\n")
        given["sinks"] = ["--file", tmp_path / "t.txt", "--lines"]
    said = refused(command, "./nowhere", *given[command], "--out", out)
    assert "no model folder './nowhere'" in said


def test_a_column_that_is_missing(refused, small_model, out, tmp_path):
    pd.DataFrame({"id": [1], "said": ["Ann went home."]}).to_parquet(tmp_path / "t.parquet")
    said = refused("sinks", small_model, "--file", tmp_path / "t.parquet", "--out", out)
    assert "has no column 'text'; there is id, said" in said
    said = refused(
        "profile", small_model, "--file", tmp_path / "t.parquet", "--column", "id", "--out", out
    )
    assert "int64, not text" in said


def test_a_damaged_line_of_a_corpus_is_named_before_the_model_runs(
    refused, small_model, out, tmp_path
):
    (tmp_path / "t.txt").write_bytes(b"one\ntwo\n\xff\xfe\n")
    said = refused("sinks", small_model, "--file", tmp_path / "t.txt", "--lines", "--out", out)
    assert "Line 3" in said
    assert "Finding sinks" not in said


def test_options_of_texts_need_a_file(refused, small_model, out):
    assert "--file" in refused("profile", small_model, "--limit", 3, "--out", out)


def test_more_tokens_than_the_context(refused, small_model, out, text_file):
    said = refused("sinks", small_model, "--file", text_file, "--max-tokens", 97, "--out", out)
    assert "--max-tokens 97 is over the model's context of 96" in said


def test_a_sink_threshold_out_of_range(refused, small_model, out, text_file):
    said = refused("sinks", small_model, "--file", text_file, "--epsilon", 2, "--out", out)
    assert "epsilon=2.0 is out of range" in said


def test_a_needle_longer_than_the_context(refused, small_model, out):
    said = refused("retrieval", small_model, "--lengths", 97, "--out", out)
    assert "97" in said
    assert "96" in said
    assert "take" in refused("retrieval", small_model, "--lengths", 5, "--out", out)


def test_a_haystack_that_is_too_short(refused, small_model, out, tmp_path):
    (tmp_path / "hay.txt").write_text("Some few words.")
    said = refused(
        "retrieval", small_model, "--lengths", 80, "--depths", 0.5, "--steps", 4,
        "--haystack", tmp_path / "hay.txt", "--needle", "The cat is Tom.",
        "--question", "The cat is", "--out", out,
    )  # fmt: skip
    assert "give a longer text, or lengths up to" in said


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--lengths", "12x"], "--lengths takes whole numbers"),
        (["--depths", "deep"], "--depths takes numbers"),
        (["--depths", ","], "--depths is empty"),
        (["--depths", "2"], "between 0 and 1"),
        (["--needle", "Tom is a cat."], "missing: --haystack, --question"),
        (["--answer", "Tom"], "missing: --haystack, --needle, --question"),
    ],
)
def test_needles_that_cannot_be_hidden(refused, small_model, out, given, wanted):
    assert wanted in refused("retrieval", small_model, *given, "--out", out)


def test_a_model_that_does_not_decode(refused, encoder_model, out):
    said = refused("retrieval", encoder_model, "--lengths", 40, "--out", out)
    assert said.count("\n") < 8


def test_damaged_trees_are_told_by_line(refused, small_model, out, tmp_path):
    lines = TREES.splitlines()
    lines[3] = lines[3].replace("\t", " ")
    (tmp_path / "t.conllu").write_text("\n".join(lines) + "\n\n")
    said = refused("syntax", small_model, tmp_path / "t.conllu", "--out", out)
    assert "line 4" in said.lower()
    assert "were tabs turned into spaces" in said
    assert "Opening" not in said


def test_relations_that_are_not_there(refused, small_model, out, tmp_path):
    (tmp_path / "t.conllu").write_text(TREES)
    given = ["syntax", small_model, tmp_path / "t.conllu", "--out", out]
    assert "No arc of these sentences is a 'subject'" in refused(*given, "--relations", "subject")
    assert "No relation has 50 arcs" in refused(*given)
    assert "--relations is empty" in refused(*given, "--relations", " ,")
