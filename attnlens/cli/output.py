"""A folder that appears whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from attnlens.errors import FileError

# What a report may hold; what an earlier report left of these is replaced or removed.
OWNED = ("heads.csv", "heads.parquet", "rollout.graphml", "rollout.json", "circuit.json",
         "circuit.graphml", "circuit.gexf", "circuit.graph.json", "circuit.cyjs", "circuit.dot",
         "circuit.gv", "circuit.csv", "tables", "figures", "index.html")  # fmt: skip


@contextmanager
def staged(out: Path) -> Generator[Path]:
    """A temporary folder beside `out`; when the block ends well, its files move to `out`.

    Where the block raises or is interrupted, `out` is as it was. Other files in `out` stay. Raises
    FileError where the folder cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise FileError(f"{out} is a file. Give a folder for the report, with --out.")
    beside = next(parent for parent in out.absolute().parents if parent.exists())
    try:
        holder = tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=beside)
    except OSError as error:
        raise FileError(f"Nothing can be written in {beside}: {error.strerror}.") from error
    with holder as temporary:
        fresh, old = Path(temporary, "new"), Path(temporary, "old")
        fresh.mkdir()
        old.mkdir()
        yield fresh
        try:
            _publish(fresh, out, old)
        except OSError as error:
            raise FileError(f"{out} cannot be written: {error.strerror}.") from error


def _publish(fresh: Path, out: Path, old: Path) -> None:
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh.replace(out)
        return
    try:
        for name in OWNED:  # the page last: what it names is there when it appears
            if (out / name).exists():
                (out / name).replace(old / name)
            if (fresh / name).exists():
                (fresh / name).replace(out / name)
    except BaseException:  # an interrupt too: what stood there comes back
        for name in OWNED:
            if (old / name).exists():
                if (out / name).exists():
                    (out / name).replace(fresh / name)
                (old / name).replace(out / name)
        raise
