"""One part of a store: rows as a Parquet file that tells whose they are and whether it is whole."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from pyarrow import parquet

from attnlens.errors import FileError, InputError
from attnlens.files import replacing

_KEY = b"attnlens"  # of a part's own facts among the file's metadata


class Rows(NamedTuple):
    """Prompt, trial and value of each row, in three columns of one length."""

    prompts: NDArray[np.int64]
    trials: NDArray[np.int64]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, prompts: ArrayLike, trials: ArrayLike, values: ArrayLike) -> Rows:
        """Rows of what is broadcast to one shape; copies, so that the caller's may change."""
        numbers = [np.asarray(column) for column in (prompts, trials)]
        if any(column.size and column.dtype.kind not in "iu" for column in numbers):
            raise InputError("Prompts and trials are told by their numbers: give integers.")
        columns = np.broadcast_arrays(*numbers, np.asarray(values, dtype=np.float64))
        prompt, trial, value = (column.ravel() for column in columns)
        return cls(prompt.astype(np.int64), trial.astype(np.int64), value.copy())

    @classmethod
    def join(cls, several: list[Rows]) -> Rows:
        """All rows of several, in their order."""
        prompts, trials, values = zip(*several, strict=True)
        return cls(np.concatenate(prompts), np.concatenate(trials), np.concatenate(values))

    def check(self, prompts: int, trials: int) -> None:
        """Raise InputError for a prompt or trial outside a sweep of so many."""
        outside = (self.prompts < 0) | (self.prompts >= prompts)
        outside |= (self.trials < -1) | (self.trials >= trials)
        if outside.any():
            where = int(outside.argmax())
            raise InputError(
                f"The sweep has no prompt {self.prompts[where]} under trial {self.trials[where]}: "
                f"prompts go from 0 to {prompts - 1}, trials from -1 (clean) to {trials - 1}."
            )


class Part(NamedTuple):
    """What a part holds, by which sweep, and the versions of the packages that made it."""

    rows: Rows
    sweep: str
    versions: Mapping[str, str]

    def to_bytes(self, names: Mapping[int, str]) -> bytes:
        """The part as a Parquet file, with the names of its trials for other readers."""
        prompts, trials, values = self.rows
        used, codes = np.unique(trials, return_inverse=True)
        spelled = pa.array([names[int(trial)] for trial in used], pa.string())
        columns = {
            "prompt": prompts,
            "trial": trials,
            "name": pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), spelled),
            "value": values,
        }
        facts = {"sweep": self.sweep, "versions": dict(self.versions), "sum": _sum(self.rows)}
        sink = pa.BufferOutputStream()
        parquet.write_table(
            pa.table(columns).replace_schema_metadata({_KEY: json.dumps(facts)}), sink
        )
        return sink.getvalue().to_pybytes()

    @classmethod
    def from_bytes(cls, content: bytes) -> Part:
        """The part that was written.

        Raises:
            ValueError: it is not whole, or no part of a sweep.

        """
        try:
            whole = parquet.ParquetFile(pa.BufferReader(content)).read(
                ["prompt", "trial", "value"], use_threads=False
            )
            facts: dict[str, Any] = json.loads((whole.schema.metadata or {})[_KEY])
            rows = Rows.of(*(whole[name].to_numpy() for name in ("prompt", "trial", "value")))
            part = cls(rows, facts["sweep"], facts["versions"])
            intact = facts["sum"] == _sum(rows)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise ValueError("it is not whole, or no part of a sweep") from error
        if not intact:
            raise ValueError("its check sum is wrong")
        return part


def write_durably(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, and return when it and its name are on disk.

    Raises:
        FileError: it cannot be written; what stood there before stays.

    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if os.name != "posix":  # a folder cannot be opened there
        return
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise FileError(f"{path} may not be on disk yet ({error.strerror}).") from error


def _sum(rows: Rows) -> str:
    found = 0
    for column in rows:
        found = zlib.crc32(np.ascontiguousarray(column).tobytes(), found)
    return f"{found:08x}"
