"""Bad input at the command line: exit code 2, one clear message, no traceback, nothing written."""

import pytest

from attnlens.cli import main


@pytest.fixture
def refused(capsys, tmp_path):
    """Run a command that must be refused; gives what it said."""

    def run(*arguments) -> str:
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
