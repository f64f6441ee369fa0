"""Values of a sweep on disk: a folder of Parquet parts and a manifest, safe at every moment.

    DIR/manifest.json          what was run (sweeps/manifest.py)
    DIR/rows/part-*.parquet    one row a (prompt, trial): prompt, trial, name, value

`pandas.read_parquet("DIR/rows")` reads it without attnlens. Trial -1, "clean", is the unedited run.

Each writer has one open part of its own and writes it anew, whole, whenever rows are waiting; when
the part is large it begins another. A part takes its place only when it is on disk, no two writers
share one, and none is ever deleted: at whatever moment a writer dies, each row that it flushed is
in exactly one whole part. Their number stays small, so parts never have to be merged.
"""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from attnlens.errors import FileError, InputError
from attnlens.sweeps.manifest import CLEAN, Manifest, versions_here
from attnlens.sweeps.parts import Part, Rows, write_durably

SECONDS = 1.0
"""Rows are written when so long has passed since the last time: a kill loses about as much work."""

_MANIFEST = "manifest.json"
_ROWS = "rows"
_LARGE = 20_000  # rows at which a part is closed: to write it anew takes some 10 ms


@dataclass
class _Open:
    """The part that a writer has open, with all rows that belong in it."""

    path: Path
    rows: list[Rows] = field(default_factory=list[Rows])
    waiting: int = 0
    process: int = field(default_factory=os.getpid)


class Store:
    """The values of one sweep in a folder; made by `Store.create`, `open` or `resume`.

    A store is used by one thread; other processes add to the same folder with stores of their own.
    As a context manager it flushes at the end, after an exception too.

    Attributes:
        folder: where it lies.
        manifest: what was run.
        notes: what a reader should know of what was read last: parts that were left out, rows that
            were computed twice and differ, versions that differ.

    """

    def __init__(self, folder: Path, manifest: Manifest, seconds: float | None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.notes: tuple[str, ...] = ()
        self._names = dict(enumerate(manifest.names)) | {-1: CLEAN}
        self._versions = versions_here()
        self._seconds = seconds  # None for a reader
        self._last = float("-inf")  # the first rows are written at once: a bad disk shows early
        self._open = self._begin()

    @classmethod
    def create(cls, folder: str | Path, manifest: Manifest, *, seconds: float = SECONDS) -> Store:
        """A new store in an absent or empty folder.

        Raises:
            FileError: a sweep is there already, or other files; the folder cannot be written.

        """
        place = Path(folder)
        if _holds_sweep(place):
            raise FileError(
                f"{place} holds a sweep already: add --resume (resume=True) to go on with it, or "
                "choose another folder."
            )
        try:
            (place / _ROWS).mkdir(parents=True, exist_ok=True)
            found = [*place.iterdir(), *(place / _ROWS).iterdir()]
        except OSError as error:
            raise FileError(
                f"{place} cannot be made a folder for a sweep ({error.strerror}): choose another."
            ) from error
        others = [path.name for path in found if path.name != _ROWS and path.name[0] != "."]
        if others:
            raise FileError(
                f"{place} holds {others[0]!r} and no manifest of a sweep: choose an empty folder, "
                "or one that does not exist."
            )
        write_durably(place / _MANIFEST, manifest.to_json().encode())
        return cls(place, manifest, seconds)

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """The store in a folder, for reading; no model is needed.

        Raises:
            FileError: there is none, or its manifest is damaged.

        """
        return cls(Path(folder), _read_manifest(Path(folder)), None)

    @classmethod
    def resume(cls, folder: str | Path, manifest: Manifest, *, seconds: float = SECONDS) -> Store:
        """The store in a folder, to be added to; a new one in an absent or empty folder.

        Raises:
            FileError: the store is of another sweep (the message names what differs) or damaged;
                the folder cannot be written.

        """
        place = Path(folder)
        if not _holds_sweep(place):
            try:
                return cls.create(place, manifest, seconds=seconds)
            except FileError:
                if not _holds_sweep(place):  # else another process has just made it
                    raise
        saved = _read_manifest(place)
        manifest.check_same(place, saved)
        return cls(place, saved, seconds)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *raised: object) -> None:
        self.flush()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, in whatever process, is a writer of its own, with a part of its own.
        return Store, (self.folder, self.manifest, self._seconds)

    def append(self, prompts: ArrayLike, trials: ArrayLike, values: ArrayLike) -> None:
        """Add rows, broadcast to one shape: written now, or with later ones a second from now.

        Raises:
            InputError: a prompt or trial that the manifest does not have, or a value that is NaN;
                nothing of the call is kept.
            FileError: the rows cannot be written; they are kept for the next attempt.

        """
        if self._seconds is None:
            raise FileError(f"{self.folder} was opened for reading: resume it to add to it.")
        rows = Rows.of(prompts, trials, values)
        rows.check(self.manifest.prompts, len(self.manifest.trials))
        self._refuse_nan(rows)
        part = self._own()
        part.rows.append(rows)
        part.waiting += len(rows.values)
        if part.waiting >= _LARGE or time.monotonic() - self._last >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are waiting; afterwards they are safe.

        Raises:
            FileError: they cannot be written; they are kept for the next attempt.

        """
        part = self._own()
        if not part.waiting:
            return
        rows = Rows.join(part.rows)
        content = Part(rows, self.manifest.identity, self._versions).to_bytes(self._names)
        try:
            write_durably(part.path, content)
        except FileError as error:
            raise FileError(
                f"{error} What was written before is safe: resume to go on from there."
            ) from error
        part.rows, part.waiting = [rows], 0
        self._last = time.monotonic()
        if len(rows.values) >= _LARGE:
            self._open = self._begin()

    def values(self) -> NDArray[np.float64]:
        """Values `[trial + 1, prompt]` on disk, NaN where there is none; the last row is clean.

        So `values()[trial]` is right for trial -1 too. A part that cannot be read is left out, and
        of two values for one place the older part's counts; `notes` tells of both.

        Raises:
            FileError: the folder cannot be read.

        """
        grid = np.full((len(self.manifest.trials) + 1, self.manifest.prompts), np.nan)
        versions = [self.manifest.versions, *([] if self._seconds is None else [self._versions])]
        notes: list[str] = []
        apart: list[float] = []
        for path in self._paths():
            try:
                part = self._read(path)
            except (OSError, ValueError) as error:
                notes.append(
                    f"{path} was left out ({getattr(error, 'strerror', None) or error}): its rows "
                    "count as not done. It may be deleted."
                )
                continue
            versions.append(part.versions)
            prompts, trials, values = part.rows
            new = np.isnan(grid[trials, prompts])
            grid[trials[new], prompts[new]] = values[new]
            kept = grid[trials, prompts]
            apart += np.abs(kept - values)[kept != values].tolist()
        if apart:
            notes.append(
                f"{len(apart)} rows were computed twice and differ, by {max(apart):.3g} at most; "
                "those of the older part count."
            )
        self.notes = (*notes, *_versions_notes(versions))
        return grid

    def done(self) -> NDArray[np.bool_]:
        """Which rows are on disk, `[trial + 1, prompt]`; the last row is clean, trial -1."""
        return ~np.isnan(self.values())

    def table(self) -> pd.DataFrame:
        """The rows on disk: prompt, trial, name, value; clean first, then trials by number."""
        grid = np.roll(self.values(), 1, axis=0)
        rows, prompts = np.nonzero(~np.isnan(grid))
        return pd.DataFrame(
            {
                "prompt": prompts,
                "trial": rows - 1,
                "name": pd.Categorical.from_codes(rows, [CLEAN, *self.manifest.names]),
                "value": grid[rows, prompts],
            }
        )

    def _own(self) -> _Open:
        """The open part; a process that was forked leaves it to the one that began it."""
        if self._open.process != os.getpid():
            self._open = self._begin()
        return self._open

    def _begin(self) -> _Open:
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        return _Open(self.folder / _ROWS / f"part-{now}-{secrets.token_hex(4)}.parquet")

    def _refuse_nan(self, rows: Rows) -> None:
        bad = np.isnan(rows.values)
        if bad.any():
            where = int(bad.argmax())
            raise InputError(
                f"The value of prompt {rows.prompts[where]} under trial "
                f"{self._names[int(rows.trials[where])]} is NaN: the model's logits are NaN there. "
                "Nothing of this batch was stored; what was stored before is safe."
            )

    def _paths(self) -> list[Path]:
        """The parts, oldest first; files that begin with a dot are unfinished."""
        folder = self.folder / _ROWS
        try:
            found = [path for path in folder.iterdir() if path.suffix == ".parquet"]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FileError(f"{folder} cannot be read ({error.strerror}).") from error
        return sorted(path for path in found if path.name[0] != ".")

    def _read(self, path: Path) -> Part:
        """A part of this sweep; ValueError where it is none, or not whole."""
        part = Part.from_bytes(path.read_bytes())
        if part.sweep != self.manifest.identity:
            raise ValueError("it is of another sweep")
        part.rows.check(self.manifest.prompts, len(self.manifest.trials))
        return part


def _holds_sweep(folder: Path) -> bool:
    try:
        return (folder / _MANIFEST).exists()
    except OSError:  # no such folder can be; to make it tells why
        return False


def _read_manifest(folder: Path) -> Manifest:
    path = folder / _MANIFEST
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileError(f"{folder} holds no sweep: it has no {_MANIFEST}.") from error
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror}).") from error
    return Manifest.from_json(text, path)


def _versions_notes(found: list[Any]) -> list[str]:
    """A note for each package of which several versions took part."""
    notes: list[str] = []
    for package in dict.fromkeys(name for versions in found for name in versions):
        seen = sorted({str(versions[package]) for versions in found if package in versions})
        if len(seen) > 1:
            notes.append(f"The rows are of several versions of {package}: {', '.join(seen)}.")
    return notes
