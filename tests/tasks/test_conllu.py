from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnlens.errors import FileError, InputError
from attnlens.tasks import Sentence, read_conllu

# "We don't see it, they do": a contraction (2-3), and an empty node (7.1) for what is left out.
GOOD = """\
# newpar
# sent_id = first
# text = We don't see it, they do
1	We	we	PRON	_	_	4	nsubj	_	_
2-3	don't	_	_	_	_	_	_	_	_
2	do	do	AUX	_	_	4	aux	_	_
3	n't	not	PART	_	_	4	advmod	_	_
4	see	see	VERB	_	_	0	root	_	_
5	it	it	PRON	_	_	4	obj	_	_
6	,	,	PUNCT	_	_	8	punct	_	_
7	they	they	PRON	_	_	8	nsubj	_	_
7.1	see	see	VERB	_	_	_	_	4:conj	_
8	do	do	AUX	_	_	4	parataxis	_	_

1	Yes	yes	INTJ	_	_	0	root	_	_
"""
FIRST = 4  # the line of the first word


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "trees.conllu"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def changed(line: int, column: int, value: str) -> str:
    """GOOD with another value in one column of one line, both counted from 1."""
    lines = GOOD.split("\n")
    fields = lines[line - 1].split("\t")
    fields[column - 1] = value
    lines[line - 1] = "\t".join(fields)
    return "\n".join(lines)


def test_words_heads_and_relations(tmp_path: Path) -> None:
    first, second = read_conllu(written(tmp_path, GOOD))
    assert first.words == ("We", "do", "n't", "see", "it", ",", "they", "do")
    assert first.heads == (3, 3, 3, -1, 3, 7, 7, 3)
    assert first.relations[4] == "obj"
    assert first.id == "first"
    assert first.text == "We don't see it, they do"
    assert first.comments[0] == "# newpar"
    assert second == Sentence(("Yes",), (-1,), ("root",), id="line 15")


@pytest.mark.parametrize(
    "content",
    [
        GOOD.replace("\n", "\r\n"),
        "\ufeff" + GOOD,
        GOOD.rstrip("\n"),
        "\n\n" + GOOD.replace("\n\n", "\n \n\n") + "\n\n",
    ],
    ids=["windows", "byte order mark", "no end", "blank lines"],
)
def test_the_same_sentences_however_they_are_laid_out(tmp_path: Path, content: str) -> None:
    found = read_conllu(written(tmp_path, content))
    wanted = read_conllu(written(tmp_path, GOOD))
    assert [s.words for s in found] == [s.words for s in wanted]
    assert [s.heads for s in found] == [s.heads for s in wanted]


def test_a_word_may_hold_a_line_separator(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD.replace("Yes", "Ye\u2028s"))
    assert read_conllu(path)[1].words == ("Ye\u2028s",)


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (changed(FIRST, 9, "_\t_"), FIRST, ["11 columns", "has 10"]),
        (GOOD.replace("\t", "    "), FIRST, ["1 columns", "tabs turned into spaces"]),
        (changed(FIRST, 7, "9"), FIRST, ["the head (column 7) is 9", "8 words"]),
        (changed(FIRST, 7, "-1"), FIRST, ["'-1'", "no whole number"]),
        (changed(FIRST, 7, "_"), FIRST, ["'_'", "no whole number"]),
        (changed(FIRST, 7, "four"), FIRST, ["'four'"]),
        (changed(FIRST, 1, "one"), FIRST, ["the id (column 1) is 'one'"]),
        (changed(FIRST, 1, "2"), FIRST, ["the id (column 1) is 2 after 0"]),
        (changed(FIRST + 3, 1, "5"), FIRST + 3, ["5 after 2"]),
        (changed(FIRST + 1, 1, "4-5"), FIRST + 1, ["multiword token 4-5"]),
        (changed(FIRST + 8, 1, "3.1"), FIRST + 8, ["empty node 3.1"]),
        (changed(FIRST, 2, ""), FIRST, ["the form (column 2) is empty"]),
        (changed(FIRST, 8, " "), FIRST, ["the relation (column 8) is empty"]),
        (changed(FIRST + 4, 7, "1"), FIRST, ["no word of this sentence is its root"]),
        (changed(FIRST + 9, 7, "6"), FIRST + 6, ["6 -> 8 -> 6"]),
        (changed(FIRST, 7, "1"), FIRST, ["1 -> 1"]),
        (GOOD.replace("\n\n", "\n"), 14, ["is 1 after 8", "blank line"]),
        ("# sent_id = 1\n\n" + GOOD, 1, ["no words"]),
        ("1-2\tdon't" + "\t_" * 8 + "\n\n" + GOOD, 1, ["no words"]),
    ],
)
def test_damage_is_told_with_its_line(
    tmp_path: Path, content: str, line: int, words: list[str]
) -> None:
    path = written(tmp_path, content)
    with pytest.raises(InputError) as error:
        read_conllu(path)
    assert f"{path}, line {line}: " in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="There is no file"):
        read_conllu(tmp_path / "nowhere.conllu")
    with pytest.raises(FileError, match="cannot be read"):
        read_conllu(tmp_path)
    with pytest.raises(InputError, match="no UTF-8"):
        read_conllu(written(tmp_path, b"1\t\xff\xfe\n"))
    for nothing in ("", "\n\n"):
        with pytest.raises(InputError, match="holds no sentence"):
            read_conllu(written(tmp_path, nothing))


@given(st.data())
def test_any_tree_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, 12))
    order = data.draw(st.permutations(range(count)))
    heads = [-1] * count  # each word hangs on one that came before it in the order
    for place, word in enumerate(order[1:], start=1):
        heads[word] = order[data.draw(st.integers(0, place - 1))]
    rows = [f"{i + 1}\tw{i}\t_\t_\t_\t_\t{head + 1}\tr{i}\t_\t_" for i, head in enumerate(heads)]
    path = written(tmp_path_factory.mktemp("trees"), "\n".join(rows))
    (sentence,) = read_conllu(path)
    assert sentence.heads == tuple(heads)
    assert sentence.words == tuple(f"w{i}" for i in range(count))


def test_a_sentence_made_by_hand_is_checked() -> None:
    with pytest.raises(InputError, match="2 words, 1 heads"):
        Sentence(("a", "b"), (-1,), ("root", "x"))
    with pytest.raises(InputError, match="needs a word"):
        Sentence((), (), ())
    with pytest.raises(InputError, match="empty word"):
        Sentence((" ",), (-1,), ("root",))
    for head in (-2, 1, 2):
        with pytest.raises(InputError, match=f"the head {head}"):
            Sentence(("a", "b"), (-1, head), ("root", "x"))


def test_the_thousand_sentences(shared_data: Path) -> None:
    (path,) = (shared_data / "ud_english_pud").glob("*.conllu")
    sentences = read_conllu(path)
    relations = Counter(relation for own in sentences for relation in own.relations)
    assert len(sentences) == relations["root"] == 1000
    assert sum(relations.values()) == 21180
    assert (relations["obj"], relations["det"]) == (877, 2043)
    assert sentences[0].id == "n01001011"
    assert sentences[0].words[:3] == ("“", "While", "much")
    assert sentences[0].heads[28] == -1
