"""Files are written whole or not at all: beside their place first, then moved into it."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from attnlens.errors import FileError

_WAYS_OUT = {
    errno.ENOENT: "its folder does not exist: create it first",
    errno.ENOTDIR: "part of its folder is a file: give another path",
    errno.EISDIR: "it is a folder: give the name of a file in it",
    errno.EACCES: "no permission: choose a folder that you may write to",
    errno.EPERM: "no permission: choose a folder that you may write to",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOSPC: "the disk is full: free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
    errno.EFBIG: "it is larger than this system allows: choose another folder or write less",
    errno.ENAMETOOLONG: "its name is too long: give a shorter one",
}


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """Write text (UTF-8, line ends as given) or bytes to `path`, whole or not at all.

    Raises:
        FileError: a missing or read-only folder, a full disk; what stood at `path` stays there.

    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


@contextmanager
def replacing(path: str | Path) -> Generator[Path]:
    """A new empty file to write to; when the block ends well it takes the place of `path`.

    It lies in the same folder and has the same suffix, for writers that go by the suffix. When the
    block raises, it is removed and what stood at `path` stays there.

    Raises:
        FileError: in place of any OSError of the block, with the path and the way out.

    """
    place = Path(path).resolve()  # through a link, which stays a link
    temporary = place.with_name(f".attnlens-{secrets.token_hex(8)}{place.suffix}")
    try:
        if place.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        temporary.touch(exist_ok=False)
        yield temporary
        os.replace(temporary, place)  # noqa: PTH105 - atomic on every system, as its name says
    except FileError:
        raise
    except OSError as error:
        reason = _WAYS_OUT.get(error.errno or 0, error.strerror or str(error))
        raise FileError(f"{path} cannot be written; {reason}.") from error
    finally:
        _remove(temporary)


def _remove(temporary: Path) -> None:
    """Remove what was begun, where there is something to remove."""
    try:
        temporary.unlink(missing_ok=True)
    except OSError:  # the folder itself cannot be reached: nothing was begun, and that was said
        return
