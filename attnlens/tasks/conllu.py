"""Sentences with dependency trees, from CoNLL-U files (universaldependencies.org/format.html)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from attnlens.errors import FileError, InputError

COLUMNS = 10
Line = tuple[int, str]
"""A line and its number in the file, from 1."""


@dataclass(frozen=True)
class Sentence:
    """Words, and for each the word it depends on and how.

    Attributes:
        words: the syntactic words; of a contraction its parts (`do` and `n't`).
        heads: for each word the index of its head among the words, from 0; -1 for a root.
        relations: for each word its relation to its head (`obj`, `nmod:poss`).
        id: what the file calls the sentence, else the line on which it begins.
        text: the sentence as it was written; "" where the file does not say.
        comments: the lines before the sentence that begin with `#`, as they are.

    Raises:
        InputError: no words, an empty word, unequal lengths, or a head that is no other word.

    """

    words: tuple[str, ...]
    heads: tuple[int, ...]
    relations: tuple[str, ...]
    id: str = ""
    text: str = ""
    comments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.words)
        if not count or not len(self.heads) == len(self.relations) == count:
            raise InputError(
                f"A sentence needs a word at least, and a head and a relation a word; {self.id!r} "
                f"has {count} words, {len(self.heads)} heads, {len(self.relations)} relations."
            )
        if not all(word.strip() for word in self.words):
            raise InputError(f"Sentence {self.id!r} has an empty word.")
        for word, head in enumerate(self.heads):
            if not -1 <= head < count or head == word:
                raise InputError(
                    f"Sentence {self.id!r} gives word {word} the head {head}; a head is another "
                    f"word from 0 to {count - 1}, or -1 for a root."
                )


def read_conllu(path: str | Path) -> tuple[Sentence, ...]:
    """The sentences of a CoNLL-U file: words, heads from 0 with -1 for roots, relations.

    Lines of multiword tokens (`3-4`) and of empty nodes (`5.1`) are checked and passed over: the
    tree is one of the words.

    Raises:
        FileError: the file is missing or cannot be read.
        InputError: it is damaged; the message names the line and what is wrong with it.

    """
    path = Path(path)
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise FileError(f"There is no file {str(path)!r}.") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is no UTF-8 text (byte {error.start}). Give a CoNLL-U file, which is UTF-8."
        ) from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        sentences = tuple(map(_sentence, _blocks(content)))
    except _DamageError as damage:
        raise InputError(f"{path}, line {damage.line}: {damage}") from None
    if not sentences:
        raise InputError(f"{path} holds no sentence: give a CoNLL-U file with at least one.")
    return sentences


class _DamageError(Exception):
    """What is wrong with a line."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line = line


def _blocks(content: str) -> Iterator[list[Line]]:
    """The lines of one sentence after another, which blank lines part."""
    block: list[Line] = []
    # Only line ends part lines: a word may hold other characters that splitlines() would split at.
    for number, line in enumerate(content.replace("\r\n", "\n").split("\n"), start=1):
        if line.strip():
            block.append((number, line))
        elif block:
            yield block
            block = []
    if block:
        yield block


def _sentence(block: Sequence[Line]) -> Sentence:
    comments = tuple(line for _, line in block if line.startswith("#"))
    rows = [(number, _fields(number, line)) for number, line in block if line[0] != "#"]
    if not rows:
        raise _DamageError(block[0][0], "these comments are followed by no words.")
    words: list[tuple[int, list[str]]] = []
    for number, fields in rows:
        if _is_word(number, fields[0], len(words)):
            words.append((number, fields))
    if not words:
        raise _DamageError(rows[0][0], "this sentence has no words.")
    heads = [_head(number, fields[6], len(words)) for number, fields in words]
    _check_tree([number for number, _ in words], heads)
    said = dict(_comment(line) for line in comments)
    return Sentence(
        words=tuple(fields[1] for _, fields in words),
        heads=tuple(heads),
        relations=tuple(fields[7] for _, fields in words),
        id=said.get("sent_id") or f"line {block[0][0]}",
        text=said.get("text", ""),
        comments=comments,
    )


def _fields(number: int, line: str) -> list[str]:
    """The columns of a line: id, form, lemma, tags, features, head, relation, and two more."""
    fields = line.split("\t")
    if len(fields) != COLUMNS:
        hint = " It holds no tab: were tabs turned into spaces?" if len(fields) == 1 else ""
        raise _DamageError(
            number, f"{len(fields)} columns, where CoNLL-U has {COLUMNS} parted by tabs.{hint}"
        )
    for place, name in ((1, "form"), (7, "relation")):
        if not fields[place].strip():
            raise _DamageError(number, f"the {name} (column {place + 1}) is empty.")
    return fields


def _is_word(number: int, name: str, words: int) -> bool:
    """Whether a line is the next word; False for multiword tokens and empty nodes."""
    start, dash, end = name.partition("-")
    if dash and start.isdecimal() and end.isdecimal():
        if int(start) != words + 1 or int(end) < int(start):
            raise _DamageError(number, f"the multiword token {name} does not begin at the word.")
        return False
    start, dot, end = name.partition(".")
    if dot and start.isdecimal() and end.isdecimal():
        if int(start) != words:
            raise _DamageError(number, f"the empty node {name} does not follow word {start}.")
        return False
    if not name.isdecimal():
        raise _DamageError(number, f"the id (column 1) is {name!r}, which is no whole number.")
    if int(name) != words + 1:
        hint = " Is the blank line between two sentences missing?" if int(name) == 1 else ""
        raise _DamageError(number, f"the id (column 1) is {name} after {words}.{hint}")
    return True


def _head(number: int, given: str, words: int) -> int:
    """A head counted from 0; the file counts from 1, and 0 is the root."""
    if not given.isdecimal():
        raise _DamageError(number, f"the head (column 7) is {given!r}, which is no whole number.")
    if int(given) > words:
        raise _DamageError(
            number, f"the head (column 7) is {given}, and the sentence has {words} words."
        )
    return int(given) - 1


def _check_tree(numbers: Sequence[int], heads: Sequence[int]) -> None:
    """Every word must reach a root."""
    if -1 not in heads:
        raise _DamageError(numbers[0], "no word of this sentence is its root (head 0).")
    safe = {-1}
    for word in range(len(heads)):
        path: list[int] = []
        while word not in safe:
            if word in path:
                circle = " -> ".join(str(step + 1) for step in [*path[path.index(word) :], word])
                raise _DamageError(numbers[word], f"the heads run in a circle: {circle}.")
            path.append(word)
            word = heads[word]
        safe.update(path)


def _comment(line: str) -> tuple[str, str]:
    """`sent_id` and its value, of `# sent_id = value`."""
    name, _, value = line[1:].partition("=")
    return name.strip(), value.strip()
