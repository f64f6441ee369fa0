"""Prompts of one's own as a task: clean and corrupt texts with their answers, from a file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from attnlens.errors import FileError, InputError, TaskError
from attnlens.tasks.needle import token_offsets
from attnlens.tasks.prompts import check_context, encode, following
from attnlens.tasks.task import Task, TaskModel

NEEDED = ("clean", "corrupt", "answer", "wrong")
READ = "read"
"""The column that may be left out."""


@dataclass(frozen=True)
class _Row:
    """A prompt of the file, with the line on which it begins."""

    line: int
    clean: str
    corrupt: str
    answer: str
    wrong: str
    read: int


@dataclass(frozen=True)
class _Graded:
    """A row in tokens."""

    clean: list[int]
    corrupt: list[int]
    read: int
    answer: int
    wrong: int


def read_task(
    path: str | Path,
    model: TaskModel,
    metric: str = "logit_difference",
    *,
    first_token: bool = False,
) -> Task:
    """A task from a CSV file (with a header) or a JSONL file (an object a line), in UTF-8.

    Columns or keys: `clean` and `corrupt`, two texts of equally many tokens; `answer` and `wrong`,
    what comes next in each of them, with the space that it begins with (" Paris"); and, where the
    answer is not due at the end, `read`, the number of the token after which it is (from 0, the
    start token counted, or from -1 at the end). Others are passed over. An answer is one token;
    with `first_token` longer ones are graded on their first. Nothing in the file is run.

    Raises:
        FileError: the file is missing or cannot be read.
        InputError: it is damaged; the message names the line and what is wrong with it.
        TaskError: a line does not fit the model's tokenizer or context, or there is no tokenizer.

    """
    path = Path(path)
    rows = list(_rows(path))
    if not rows:
        raise InputError(f"{path} holds no prompt: give a header and a row at least, or an object.")
    name = path.stem
    graded: list[_Graded] = []
    for row in rows:
        try:
            graded.append(_graded(model, row, name, first_token))
        except _MisfitError as error:
            raise TaskError(f"{path}, line {row.line}: {error}") from None
    return Task.from_prompts(
        name,
        [one.clean for one in graded],
        [one.corrupt for one in graded],
        [[one.read] for one in graded],
        [[one.answer] for one in graded],
        [[one.wrong] for one in graded],
        metric=metric,
        texts=[row.clean for row in rows],
    )


class _MisfitError(Exception):
    """Why a row does not fit the model."""


def _graded(model: TaskModel, row: _Row, name: str, first_token: bool) -> _Graded:
    clean, corrupt = (encode(model, text, name) for text in (row.clean, row.corrupt))
    if not clean or len(clean) != len(corrupt):
        raise _MisfitError(
            f"clean has {len(clean)} tokens and corrupt {len(corrupt)}; write both with words of "
            "the same number of tokens"
        )
    if clean == corrupt:
        raise _MisfitError("clean and corrupt are the same tokens; they should differ")
    if not -len(clean) <= row.read < len(clean):
        raise _MisfitError(
            f"read is {row.read} and the prompt has {len(clean)} tokens; it lies between "
            f"{-len(clean)} and {len(clean) - 1}"
        )
    try:
        check_context(model, [clean], name)
    except TaskError as error:
        raise _MisfitError(str(error)) from None
    read = row.read % len(clean)
    answer, wrong = (
        _answer(model, text, ids[: read + 1], said, what, name, first_token)
        for text, ids, said, what in (
            (row.clean, clean, row.answer, "answer"),
            (row.corrupt, corrupt, row.wrong, "wrong"),
        )
    )
    if answer == wrong:
        raise _MisfitError(
            f"answer {row.answer!r} and wrong {row.wrong!r} are graded by the same token; give "
            "words that begin differently"
        )
    return _Graded(clean, corrupt, read, answer, wrong)


def _answer(
    model: TaskModel,
    text: str,
    before: list[int],
    said: str,
    what: str,
    name: str,
    first_token: bool,
) -> int:
    """The token of an answer after the prompt's tokens up to the read."""
    whole = encode(model, text, name)
    if len(before) < len(whole):
        text = text[: token_offsets(model, text, name)[len(before) - 1][1]]
    if encode(model, text, name) != before:
        raise _MisfitError(
            f"read is a token inside of a word or a character, after {text[-20:]!r}, where this "
            "tokenizer cannot part the text; give the last token of a word"
        )
    if _cased(text[-1:]) and _cased(said[0]):
        raise _MisfitError(
            f"{what} {said!r} would go on the word that {text[-20:]!r} ends with; write the space "
            f"that a word begins with: {' ' + said!r}. (Task.from_prompts takes any ids.)"
        )
    ids = following(model, text, said, name)
    if not ids:
        raise _MisfitError(
            f"{what} {said!r} has no token of its own after {text[-20:]!r}, which this tokenizer "
            "writes otherwise when it follows"
        )
    if len(ids) > 1 and not first_token:
        pieces = [model.tokenizer.decode([token]) for token in ids] if model.tokenizer else []
        raise _MisfitError(
            f"{what} {said!r} is {len(ids)} tokens, {pieces}; give an answer of one token, or "
            "grade the first of them by first_token=True"
        )
    return ids[0]


def _cased(letter: str) -> bool:
    """Whether it is a letter of a script that has capitals: those part words by spaces."""
    return letter.lower() != letter.upper()


def _rows(path: Path) -> Iterator[_Row]:
    kinds: dict[str, Callable[[str], Iterator[tuple[int, dict[str, Any]]]]] = {
        ".csv": _csv_rows,
        ".jsonl": _jsonl_rows,
    }
    read = kinds.get(path.suffix.lower())
    if read is None:
        raise InputError(f"{path} is neither .csv nor .jsonl: give it one of these endings.")
    try:
        for line, values in read(_content(path)):
            yield _row(line, values)
    except _DamageError as damage:
        raise InputError(f"{path}, line {damage.line}: {damage}") from None


class _DamageError(Exception):
    """What is wrong with a line."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line = line


def _content(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise FileError(f"There is no file {str(path)!r}.") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is no UTF-8 text (byte {error.start}); save it as such."
        ) from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from error


def _csv_rows(content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            if fields and header is None:
                header = _header(line, fields)
            elif fields and header is not None:
                if len(fields) != len(header):
                    raise _DamageError(
                        line,
                        f"{len(fields)} fields, where the header has {len(header)}. A text with a "
                        'comma, a quote or a line end stands in "quotes", a quote in it doubled.',
                    )
                yield line, dict(zip(header, fields, strict=True))
            line = reader.line_num + 1  # a quoted text may go on over several lines
    except csv.Error as error:
        raise _DamageError(line, f"this is no row of a CSV file: {error}.") from None


def _header(line: int, fields: list[str]) -> list[str]:
    header = [field.strip() for field in fields]
    missing = [name for name in NEEDED if name not in header]
    if missing:
        hint = " Columns are parted by commas." if len(header) == 1 else ""
        raise _DamageError(line, f"the header has no column {', '.join(missing)}.{hint}")
    twice = [name for name in (*NEEDED, READ) if header.count(name) > 1]
    if twice:
        raise _DamageError(line, f"the header has the column {twice[0]} twice.")
    return header


def _jsonl_rows(content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Only line ends part lines: a text may hold others that splitlines() would split at.
    for number, line in enumerate(content.replace("\r\n", "\n").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _DamageError(number, f"this is no JSON ({error}).") from None
        if not isinstance(found, dict):
            raise _DamageError(number, "this is JSON, but no object: write {...}.")
        yield number, cast("dict[str, Any]", found)


def _row(line: int, values: dict[str, Any]) -> _Row:
    for name in NEEDED:
        if name not in values:
            raise _DamageError(line, f"there is no {name!r}.")
        if not isinstance(values[name], str) or not values[name]:
            raise _DamageError(line, f"{name!r} is {values[name]!r}; it is a text of your own.")
    return _Row(line, *(values[name] for name in NEEDED), read=_read(line, values.get(READ)))


def _read(line: int, given: Any) -> int:
    """The number of the graded token; the last where none is given."""
    if given is None or given == "":
        return -1
    try:
        if isinstance(given, (bool, float)):
            raise ValueError
        return int(given)
    except (TypeError, ValueError):
        raise _DamageError(
            line, f"{READ!r} is {given!r}; it is a whole number of a token, or left out."
        ) from None
