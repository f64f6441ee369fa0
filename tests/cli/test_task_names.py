"""Tasks on the command line: by name, or prompts of one's own in a file."""

import json

import pytest
from click.testing import Result
from typer.testing import CliRunner

from attnlens.cli import main, options
from attnlens.cli.app import app
from attnlens.cli.main_job import TASKS
from attnlens.zoo import small_path

ROWS = [
    {"clean": "The king is", "corrupt": "The book is", "answer": " not", "wrong": " in"},
    {"clean": "She was a", "corrupt": "He was a", "answer": " man", "wrong": " king"},
    {"clean": "The man is the", "corrupt": "The book is the", "answer": " king", "wrong": " man"},
]


def ask(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return path


def test_both_commands_know_the_same_tasks():
    assert [*TASKS, "none"] == [task.value for task in options.TaskName]
    assert list(TASKS) == [task.value for task in options.SweepTask]


@pytest.mark.parametrize("command", ["ablate", "circuit", "faithfulness", "patch"])
def test_a_name_that_is_no_task_is_refused_with_those_there_are(command, tmp_path):
    asked = ask(command, small_path(), "--task", "chess", "--out", tmp_path / "out")
    assert asked.exit_code == 2
    for name in ("chess", *TASKS, "FILE.jsonl"):
        assert name in asked.output


def test_heads_are_ablated_on_prompts_of_a_file(mine, tmp_path):
    out = tmp_path / "out"
    told = ["ablate", small_path(), "--task", mine, "--prompts", 1, "--heads", "L2H0", "--out", out]
    assert main([str(word) for word in told]) == 0
    page = (out / "results" / "index.html").read_text()
    assert "mine" in page
    assert "3 prompts" in page  # all of the file, whatever --prompts says


def test_methods_are_judged_on_prompts_of_a_file(mine, tmp_path):
    out = tmp_path / "out"
    told = ["faithfulness", small_path(), "--task", mine, "--methods", "rollout", "--out", out]
    assert main([str(word) for word in told]) == 0
    assert "mine" in (out / "index.html").read_text()


def test_a_file_that_does_not_fit_is_told_with_its_line(mine, tmp_path, capsys):
    mine.write_text(json.dumps(ROWS[0] | {"answer": "not"}))
    for path in (mine, tmp_path / "none.csv"):
        told = ["ablate", small_path(), "--task", path, "--out", tmp_path / "out"]
        assert main([str(word) for word in told]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "line 1: answer 'not' would go on the word" in said
    assert "There is no file" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["greater-than", "coloured-objects", "docstring", "capitals"])
def test_the_shipped_model_is_ablated_on_a_task(task, tmp_path):
    told = ["ablate", small_path(), "--task", task, "--prompts", 2, "--heads", "L2H0"]
    assert main([str(word) for word in [*told, "--out", tmp_path / "out"]]) == 0
