"""Texts from files, read as they are needed: lines, a Parquet column, a dataset saved on disk.

Each source is an iterable of texts that holds a small part of the file at a time and can be
iterated again. Blank lines, and cells that are empty or blank, are passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from attnlens.errors import FileError, InputError

_ROWS = 1024
"""Cells of a column that are read at a time."""

_DATASET_FILES = ("dataset_info.json", "state.json", "dataset_dict.json")


def open_texts(
    path: str | Path, column: str | None = None, split: str | None = None
) -> Iterable[str]:
    """The texts of a file or folder, by what it is.

    A folder of a Hugging Face dataset (`Dataset.save_to_disk`) gives a column of one split; a
    `.parquet` file, or a folder of them, gives a column; any other file gives its lines. `column`
    is "text" where none is named.

    Raises:
        FileError: nothing is there, or it is damaged.
        InputError: a column or split that is not there or not text, no text, bytes that are no
            UTF-8 (with the line); a column of a file of lines.

    """
    place = Path(path)
    if place.is_dir() and any((place / name).is_file() for name in _DATASET_FILES):
        return dataset_column(place, column or "text", split)
    if split is not None:
        raise InputError(f"{path} is no dataset and has no splits; leave split={split!r} out.")
    if place.is_dir() or place.suffix == ".parquet":
        return parquet_column(place, column or "text")
    if column is not None:
        raise InputError(
            f"{path} is read line by line and has no columns; leave column={column!r} out, or give "
            "a Parquet file or a dataset folder."
        )
    return text_lines(place)


def text_lines(path: str | Path) -> Lines:
    """The lines of a UTF-8 file that are not blank, without their ends.

    Raises:
        FileError: no such file.
        InputError: while reading, a line that is no UTF-8, or no text at all.

    """
    place = _present(path)
    if place.is_dir():
        raise FileError(f"{path} is a folder without Parquet files or a dataset; give a text file.")
    return Lines(place)


def parquet_column(path: str | Path, column: str) -> ParquetColumn:
    """The texts of one column of a Parquet file, or of all Parquet files in a folder by name.

    Raises:
        FileError: no such file, none in the folder, or one that is damaged.
        InputError: a column that is not there or not text; while reading, no text at all.

    """
    place = _present(path)
    files = sorted(place.glob("*.parquet")) if place.is_dir() else [place]
    if not files:
        raise FileError(f"{path} holds no .parquet file and no dataset: give a file or its folder.")
    for file in files:
        with _parquet(file) as opened:
            schema = opened.schema_arrow
        _check_column(column, schema.names, file)
        _check_arrow_text(schema.field(column).type, column, file)
    return ParquetColumn(tuple(files), column)


def dataset_column(source: Any, column: str, split: str | None = None) -> DatasetColumn:
    """The texts of one column of a `datasets.Dataset`, or of the folder in which one was saved.

    Raises:
        FileError: no such folder, or it holds no dataset.
        InputError: the library `datasets` is not installed; a split or column that is not there, or
            a column that is not text; while reading, no text at all.

    """
    datasets: Any = _datasets()
    name = str(source) if isinstance(source, str | Path) else "The dataset"
    if isinstance(source, str | Path):
        _present(source)
        try:
            source = datasets.load_from_disk(str(source))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileError(f"{name} holds no whole dataset: {error}.") from error
    if isinstance(source, datasets.DatasetDict):
        source = _split_of(source, split, name)
    elif split is not None:
        raise InputError(f"{name} is one dataset without splits; leave split={split!r} out.")
    if not isinstance(source, datasets.Dataset):
        raise InputError(
            f"A dataset column is read from a datasets.Dataset or its folder, not from "
            f"{type(source).__name__}."
        )
    _check_column(column, source.column_names, name)
    _check_arrow_text(source.data.schema.field(column).type, column, name)
    return DatasetColumn(name, source.select_columns([column]).with_format(None), column)


@dataclass(frozen=True)
class Lines:
    """Lines of a file."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        """Read the file from its beginning."""
        return _texts(self._lines(), str(self.path))

    def _lines(self) -> Iterator[str]:
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    yield self._decode(line, number)
        except OSError as error:
            raise FileError(f"{self.path} cannot be read: {error.strerror}.") from error

    def _decode(self, line: bytes, number: int) -> str:
        try:
            return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(
                f"Line {number} of {self.path} is no UTF-8 text (byte {error.start} of the line). "
                "Give a plain text file in UTF-8."
            ) from None


@dataclass(frozen=True)
class ParquetColumn:
    """One column of Parquet files."""

    files: tuple[Path, ...]
    column: str

    def __iter__(self) -> Iterator[str]:
        """Read the first file from its beginning."""
        name = str(self.files[0] if len(self.files) == 1 else self.files[0].parent)
        return _texts(self._cells(), f"The column {self.column!r} of {name}")

    def _cells(self) -> Iterator[str | None]:
        for path in self.files:
            try:
                # One row group after another, in slices: never the whole file.
                with _parquet(path) as file:
                    for part in file.iter_batches(batch_size=_ROWS, columns=[self.column]):
                        yield from part.column(0).to_pylist()
            except FileError:
                raise
            except (OSError, ValueError) as error:
                raise FileError(f"{path} is damaged: {error}.") from error


@dataclass(frozen=True)
class DatasetColumn:
    """One column of a dataset, whose rows stay on disk."""

    name: str
    dataset: Any
    column: str

    def __iter__(self) -> Iterator[str]:
        """Read the dataset from its first row."""
        return _texts(self._cells(), f"The column {self.column!r} of {self.name}")

    def _cells(self) -> Iterator[str | None]:
        for part in self.dataset.iter(batch_size=_ROWS):
            yield from part[self.column]


def _texts(cells: Iterator[str | None], name: str) -> Iterator[str]:
    """The cells that hold text; at least one."""
    found = False
    for cell in cells:
        if cell is not None and cell.strip():
            found = True
            yield cell
    if not found:
        raise InputError(f"{name} holds no text: give a source with at least one word.")


def _present(path: str | Path) -> Path:
    place = Path(path)
    if not place.exists():
        raise FileError(f"There is no file or folder {str(path)!r}.")
    return place


def _parquet(path: Path) -> Any:
    from pyarrow import parquet

    try:
        # Buffering ahead, which is the default, would hold much of the file.
        return parquet.ParquetFile(path, pre_buffer=False)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise FileError(f"{path} is no Parquet file, or damaged: {error}.") from error


def _check_column(column: str, there: Sequence[str], name: str | Path) -> None:
    if column not in there:
        raise InputError(f"{name} has no column {column!r}; there is {', '.join(there)}.")


def _check_arrow_text(kind: Any, column: str, name: str | Path) -> None:
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) else kind
    if not any(
        test(value) for test in (types.is_string, types.is_large_string, types.is_string_view)
    ):
        raise InputError(f"The column {column!r} of {name} holds {kind}, not text.")


def _split_of(splits: Any, split: str | None, name: str) -> Any:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        asked = "Name one with split=..." if split is None else f"There is no split {split!r}"
        raise InputError(f"{name} has the splits {', '.join(splits)}. {asked}.")
    return splits[split]


def _datasets() -> Any:
    try:
        return import_module("datasets")
    except ImportError:
        raise InputError(
            "Datasets are read by the library `datasets`, which is not installed: "
            "pip install datasets."
        ) from None
