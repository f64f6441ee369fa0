import sys
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from attnlens.errors import FileError, InputError
from attnlens.lens.sources import dataset_column, open_texts, parquet_column, text_lines

TEXTS = ["One cat.", "Zwei Kätzchen – schön.", "三匹の猫。"]


def twice(texts: Iterable[str]) -> list[str]:
    """What a source gives, the same each time."""
    found = list(texts)
    assert list(texts) == found
    return found


def test_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(TEXTS).encode() + b"\n   \n")
    assert twice(text_lines(path)) == TEXTS
    assert twice(open_texts(str(path))) == TEXTS


def test_lines_are_read_as_they_are_needed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n" * 20_000 + b"broken \xff here\n")
    reading = iter(text_lines(path))
    assert next(reading) == "fine"
    with pytest.raises(InputError, match=r"Line 20001 of .*a\.txt is no UTF-8 text \(byte 7"):
        list(reading)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_text_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match="holds no text"):
        list(open_texts(path))


def test_what_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    for source in (open_texts, text_lines):
        with pytest.raises(FileError, match="There is no file"):
            source(tmp_path / "none.txt")
    with pytest.raises(FileError, match="There is no file"):
        parquet_column(tmp_path / "none.parquet", "text")
    with pytest.raises(FileError, match="There is no file"):
        dataset_column(tmp_path / "none", "text")
    with pytest.raises(FileError, match=r"no \.parquet file and no dataset"):
        open_texts(tmp_path)
    with pytest.raises(FileError, match="is a folder"):
        text_lines(tmp_path)


def test_a_column_over_row_groups_and_files(tmp_path: Path) -> None:
    many = [f"text {i}" for i in range(2_500)]
    cells = [*many, None, "  "]
    table = pa.table({"id": range(len(cells)), "body": pa.array(cells, pa.large_string())})
    parquet.write_table(table, tmp_path / "b.parquet", row_group_size=300)
    parquet.write_table(pa.table({"body": TEXTS}), tmp_path / "c.parquet")
    assert twice(parquet_column(tmp_path / "b.parquet", "body")) == many
    assert twice(open_texts(tmp_path, "body")) == [*many, *TEXTS]


def test_a_column_of_repeated_texts_is_text_too(tmp_path: Path) -> None:
    column = pa.array(["a", "b", "a"]).dictionary_encode()
    parquet.write_table(pa.table({"text": column}), tmp_path / "d.parquet")
    assert twice(open_texts(tmp_path / "d.parquet")) == ["a", "b", "a"]


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "b.parquet"
    pd.DataFrame({"id": [1, 2], "body": ["a", "b"]}).to_parquet(path)
    with pytest.raises(InputError, match=r"has no column 'text'; there is id, body"):
        open_texts(path)
    with pytest.raises(InputError, match=r"'id' of .* holds int64, not text"):
        parquet_column(path, "id")
    lines = tmp_path / "a.txt"
    lines.write_text("one")
    with pytest.raises(InputError, match="has no columns"):
        open_texts(lines, "body")
    with pytest.raises(InputError, match="has no splits"):
        open_texts(lines, split="train")


def test_damaged_and_empty_parquet_files(tmp_path: Path) -> None:
    path = tmp_path / "b.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(FileError, match="is no Parquet file, or damaged"):
        open_texts(path)
    pd.DataFrame({"text": pd.Series([], dtype=str)}).to_parquet(path)
    with pytest.raises(InputError, match="holds no text"):
        list(open_texts(path))
    parquet.write_table(pa.table({"text": ["word " * 500] * 64}), path, compression="none",
                        use_dictionary=False)  # fmt: skip
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + b"\xff" * 400 + whole[middle + 400 :])
    with pytest.raises(FileError, match="is damaged"):
        list(open_texts(path))


def test_a_dataset_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict({"text": [*TEXTS, "", None], "label": [0, 1, 2, 3, 4]})
    whole.save_to_disk(tmp_path / "one")
    assert twice(open_texts(tmp_path / "one")) == TEXTS
    assert twice(dataset_column(whole, "text")) == TEXTS
    turned = whole.select([2, 0]).with_format("numpy")  # rows through an index, cells as arrays
    assert twice(dataset_column(turned, "text")) == [TEXTS[2], TEXTS[0]]
    with pytest.raises(InputError, match=r"has no column 'body'; there is text, label"):
        open_texts(tmp_path / "one", "body")
    with pytest.raises(InputError, match=r"'label' of .* holds int64, not text"):
        dataset_column(whole, "label")
    with pytest.raises(InputError, match="without splits"):
        open_texts(tmp_path / "one", split="train")
    with pytest.raises(InputError, match="not from dict"):
        dataset_column({"text": TEXTS}, "text")


def test_splits_of_a_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    assert twice(open_texts(tmp_path / "two", split="test")) == ["test"]
    with pytest.raises(InputError, match=r"has the splits train, test\. Name one"):
        open_texts(tmp_path / "two")
    with pytest.raises(InputError, match="There is no split 'dev'"):
        open_texts(tmp_path / "two", split="dev")
    only = datasets.DatasetDict({"train": parts["train"]})
    assert twice(dataset_column(only, "text")) == ["train"]


def test_a_damaged_dataset_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(FileError, match="holds no whole dataset"):
        open_texts(tmp_path / "one")


def test_without_the_library_the_way_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)  # what Python does for a missing module
    with pytest.raises(InputError, match="pip install datasets"):
        open_texts(tmp_path)


def test_a_column_is_never_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "b.parquet"
    table = pa.table({"text": [f"text {i}" * 10 for i in range(50_000)]})
    parquet.write_table(table, path, row_group_size=1_000, compression="none")
    size = path.stat().st_size
    del table
    before = pa.total_allocated_bytes()
    reading = iter(open_texts(path))
    assert next(reading) == "text 0" * 10
    assert pa.total_allocated_bytes() - before < size / 10
    assert sum(1 for _ in reading) == 49_999
