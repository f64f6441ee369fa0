"""Prompts of one's own: what a file may hold, and what is said of one that does not fit."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnlens as al
from attnlens.errors import FileError, InputError, TaskError
from attnlens.tasks import indirect_object, read_task, words
from attnlens.zoo import small_path
from tests.tasks import models

MODEL = models.gpt2_like()
ROW = {"clean": "a fox was gold", "corrupt": "a oak was gold", "answer": " red", "wrong": " old"}


def as_csv(rows, columns=None):
    out = io.StringIO()
    writer = csv.DictWriter(out, columns or list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_jsonl(rows):
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


FORMATS = {".csv": as_csv, ".jsonl": as_jsonl}
formats = pytest.mark.parametrize("suffix", FORMATS)


def written(folder: Path, content: str | bytes, suffix: str = ".csv") -> Path:
    path = folder / f"mine{suffix}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def token(model, text):
    """The one id of a text that begins with a space."""
    (found,) = model.tokenizer(f"a{text}")["input_ids"][len(model.tokenizer("a")["input_ids"]) :]
    return found


@formats
def test_rows_become_prompts(tmp_path, suffix):
    rows = [ROW, ROW | {"clean": "a dog, a cat and", "corrupt": "a cat, a dog and", "note": "x"}]
    rows[0] = rows[0] | {"note": "y"}
    path = written(tmp_path, FORMATS[suffix](rows), suffix)
    task = read_task(path, MODEL)
    assert task.name == "mine"
    assert task.metric == "logit_difference"
    assert task.texts == tuple(row["clean"] for row in rows)
    for i, row in enumerate(rows):
        assert task.clean[i][task.mask[i]].tolist() == MODEL.tokenizer(row["clean"])["input_ids"]
        assert (
            task.corrupt[i][task.mask[i]].tolist() == (MODEL.tokenizer(row["corrupt"])["input_ids"])
        )
    assert task.reads[:, 0].tolist() == (task.mask.sum(1) - 1).tolist()
    assert task.answers.tolist() == [[token(MODEL, " red")]] * 2
    assert task.wrong.tolist() == [[token(MODEL, " old")]] * 2
    assert read_task(path, MODEL, "accuracy").metric == "accuracy"


def test_a_built_in_task_goes_through_a_file(any_model, tmp_path):
    """Written as texts and read again it is the same task, wherever its answers are one token."""
    task = indirect_object(any_model, prompts=12)
    decode = any_model.tokenizer.decode
    rows = []
    for i, text in enumerate(task.texts):
        names = [name for name in words.NAMES if f" {name} " in f" {text.replace(',', '')} "]
        twice = next(name for name in names if text.count(name) == 2)
        once = next(name for name in names if name != twice)
        head, _, tail = text.rpartition(twice)
        rows.append({"clean": text, "corrupt": f"{head}{once}{tail}"})
        rows[-1] |= {"answer": f" {once}", "wrong": f" {twice}"}
        assert decode([int(task.answers[i, 0])])
    again = read_task(written(tmp_path, as_csv(rows)), any_model, first_token=True)
    for name in ("clean", "corrupt", "mask", "reads", "answers", "wrong", "texts"):
        one, other = getattr(task, name), getattr(again, name)
        assert one == other if name == "texts" else torch.equal(one, other)


@formats
@pytest.mark.parametrize("read", [1, "1", -3, "-3", " 1 "])
def test_a_read_before_the_end(tmp_path, suffix, read):
    """After `a fox` comes ` was`; what stands behind the read has no say in it."""
    row = ROW | {"answer": " red", "wrong": " gold", "read": read}
    task = read_task(written(tmp_path, FORMATS[suffix]([row]), suffix), MODEL)
    assert MODEL.tokenizer.decode(task.clean[0, : task.reads[0, 0] + 1]) == "a fox"
    assert task.answers.tolist() == [[token(MODEL, " red")]]
    assert task.wrong.tolist() == [[token(MODEL, " gold")]]


@formats
def test_reads_that_are_left_empty_are_the_last(tmp_path, suffix):
    empty = "" if suffix == ".csv" else None
    rows = [ROW | {"read": 1}, ROW | {"read": empty}]
    task = read_task(written(tmp_path, FORMATS[suffix](rows), suffix), MODEL)
    assert task.reads.tolist() == [[1], [3]]


ODD = st.text(
    st.characters(codec="utf-8", exclude_characters="\r\0", exclude_categories=("Cs",)),
    max_size=20,
)


@pytest.mark.parametrize(
    "odd",
    ['a "quoted" word', "a,b;c\td", "two\nlines\n\nmore", "\U0001f98a\U0001f3fd and é",
     "ls\u2028ps\u2029", "=1+1", "__import__('os')", "{}", "%s {0}"],
)  # fmt: skip
@formats
def test_odd_texts_come_through(tmp_path, suffix, odd):
    check_odd(tmp_path, suffix, odd)


@given(odd=ODD, suffix=st.sampled_from(sorted(FORMATS)))
def test_any_text_comes_through(tmp_path_factory, odd, suffix):
    check_odd(tmp_path_factory.mktemp("own"), suffix, odd)


def check_odd(folder, suffix, odd):
    row = ROW | {"clean": f"{odd} the fox was", "corrupt": f"{odd} the oak was"}
    task = read_task(written(folder, FORMATS[suffix]([row, ROW]), suffix), MODEL)
    assert task.texts[0] == row["clean"]
    assert task.clean[0][task.mask[0]].tolist() == MODEL.tokenizer(row["clean"])["input_ids"]


@pytest.mark.parametrize(
    "content",
    [
        as_csv([ROW]).replace("\r\n", "\n"),
        "\ufeff" + as_csv([ROW]),
        as_csv([ROW]).rstrip(),
        "\r\n\r\n" + as_csv([ROW]) + "\r\n\r\n",
        as_csv([ROW], ["wrong", "answer", "corrupt", "clean"]),
        "clean , corrupt,answer,wrong\na fox was gold,a oak was gold, red, old\n",
    ],
    ids=["unix", "byte order mark", "no end", "blank lines", "order", "spaces"],
)
def test_the_same_task_however_it_is_laid_out(tmp_path, content):
    task = read_task(written(tmp_path, content), MODEL)
    assert task.texts == ("a fox was gold",)
    assert task.answers.tolist() == [[token(MODEL, " red")]]


@formats
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"corrupt": "a oak tree was gold"}, ["clean has 4 tokens and corrupt 5"]),
        ({"corrupt": ROW["clean"]}, ["the same tokens"]),
        ({"answer": "red"}, ["answer 'red'", "the space that a word begins with: '"]),
        ({"wrong": "old"}, ["wrong 'old'", "the space that a word begins with: '"]),
        ({"answer": " gold coin"}, ["answer ' gold coin' is 2 tokens", "first_token=True"]),
        ({"answer": " old"}, ["answer ' old' and wrong ' old'", "same token"]),
        ({"read": 4}, ["read is 4", "between -4 and 3"]),
        ({"read": -5}, ["read is -5"]),
        ({"clean": "a " * 600, "corrupt": "b " * 600}, ["context is 512"]),
    ],
)
def test_a_row_that_does_not_fit_the_model(tmp_path, suffix, change, said):
    line = {".csv": 3, ".jsonl": 2}[suffix]
    rows = [ROW | {"read": 3}, ROW | {"read": 3} | change]
    path = written(tmp_path, FORMATS[suffix](rows), suffix)
    with pytest.raises(TaskError) as error:
        read_task(path, MODEL)
    assert str(error.value).startswith(f"{path}, line {line}: ")
    for words_of in said:
        assert words_of in str(error.value)


def test_no_space_where_none_is_due(tmp_path):
    """After a line end, a digit or a bracket, and in scripts without capitals."""
    for end, answer, wrong in (("\n", "gold", "old"), ("17", "4", "3"), ("是", "金", "红")):
        row = {"clean": f"a fox{end}", "corrupt": f"a oak{end}", "answer": answer, "wrong": wrong}
        path = written(tmp_path, as_csv([row]))
        task = read_task(path, MODEL, first_token=True)
        ids = MODEL.tokenizer(row["clean"] + answer)["input_ids"]
        assert ids[task.reads[0, 0] + 1] == task.answers[0, 0]
    for end, answer in (("é", "or"), ("Ж", "я")):
        row = ROW | {"clean": f"a fox{end}", "corrupt": f"a oak{end}", "answer": answer}
        with pytest.raises(TaskError, match="write the space"):
            read_task(written(tmp_path, as_csv([row])), MODEL)


def test_a_longer_answer_on_its_first_token(tmp_path):
    path = written(tmp_path, as_csv([ROW | {"answer": " gold coin"}]))
    task = read_task(path, MODEL, first_token=True)
    assert task.answers.tolist() == [[token(MODEL, " gold")]]


def test_a_read_inside_a_character_is_refused(tmp_path):
    row = ROW | {"clean": "a \U0001f98a was", "corrupt": "a \U0001f98b was", "read": 3}
    with pytest.raises(TaskError, match="line 2: read is a token inside of a word or a character"):
        read_task(written(tmp_path, as_csv([row])), MODEL)


GOOD = as_csv([ROW]).replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("content", "suffix", "line", "said"),
    [
        ("clean,corrupt,answer\n", ".csv", 1, "no column wrong"),
        ("\nclean;corrupt;answer;wrong\n", ".csv", 2, "Columns are parted by commas"),
        ("clean,corrupt,answer,wrong,clean\n", ".csv", 1, "column clean twice"),
        (GOOD + "a,b\n", ".csv", 3, "2 fields, where the header has 4"),
        (GOOD + '"a\nb",c\n', ".csv", 3, "2 fields"),
        (GOOD + '"a\nb\n",c,d,e\n' + "x\n", ".csv", 6, "1 fields"),
        (GOOD + '"open,c,d,e\n', ".csv", 3, "no row of a CSV file"),
        (GOOD + 'a,"b"c,d,e\n', ".csv", 3, "no row of a CSV file"),
        (GOOD + ",b, c, d\n", ".csv", 3, "'clean' is ''"),
        ("clean,corrupt,answer,wrong,read\na,b, c, d,1.5\n", ".csv", 2, "'read' is '1.5'"),
        ("{\n", ".jsonl", 1, "no JSON"),
        ("\n[1]\n", ".jsonl", 2, "no object"),
        ("[" * 100000, ".jsonl", 1, "no JSON"),
        (json.dumps({"clean": "a"}), ".jsonl", 1, "no 'corrupt'"),
        (json.dumps(ROW | {"answer": 3}), ".jsonl", 1, "'answer' is 3"),
        (json.dumps(ROW | {"read": True}), ".jsonl", 1, "'read' is True"),
        (json.dumps(ROW | {"read": 1.0}), ".jsonl", 1, "'read' is 1.0"),
        (json.dumps(ROW | {"read": [1]}), ".jsonl", 1, "'read' is [1]"),
    ],
)  # fmt: skip
def test_damage_is_told_with_its_line(tmp_path, content, suffix, line, said):
    path = written(tmp_path, content, suffix)
    with pytest.raises(InputError) as error:
        read_task(path, MODEL)
    assert f"{path}, line {line}: " in str(error.value)
    assert said in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileError, match="There is no file"):
        read_task(tmp_path / "none.csv", MODEL)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(FileError, match="cannot be read"):
        read_task(tmp_path / "folder.csv", MODEL)
    with pytest.raises(InputError, match="no UTF-8"):
        read_task(written(tmp_path, b"clean\xff"), MODEL)
    with pytest.raises(InputError, match=r"neither .csv nor .jsonl"):
        read_task(written(tmp_path, GOOD, ".txt"), MODEL)
    for suffix in FORMATS:
        with pytest.raises(InputError, match="holds no prompt"):
            read_task(written(tmp_path, "", suffix), MODEL)
    with pytest.raises(TaskError, match="this model has no tokenizer"):
        read_task(written(tmp_path, GOOD), models.Model())
    with pytest.raises(TaskError, match="unknown metric"):
        read_task(written(tmp_path, GOOD), MODEL, "f1")


def test_a_model_is_ablated_on_it(tmp_path):
    rows = [
        {"clean": "The king is", "corrupt": "The book is", "answer": " not", "wrong": " in"},
        {"clean": "She was a", "corrupt": "He was a", "answer": " man", "wrong": " king"},
    ]
    lens = al.load(small_path())
    task = read_task(written(tmp_path, as_csv(rows)), lens)
    found = al.ablate(lens, task, heads="L0H0")
    assert len(found.to_frame()) == 1
