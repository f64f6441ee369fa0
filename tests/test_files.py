"""A file is written whole or not at all, and what stood there before stays."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from attnlens.errors import FileError
from attnlens.files import replacing, write_atomically


def test_writes_text_as_given_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    assert write_atomically(path, "ä\r\n🙂") == path
    assert path.read_bytes() == "ä\r\n🙂".encode()
    write_atomically(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(tmp_path.iterdir()) == [path]


def write_half(path: Path, error: Exception) -> None:
    with replacing(path) as temporary:
        assert temporary.suffix == path.suffix
        assert temporary.parent == path.parent
        temporary.write_text("half")
        raise error


def test_a_failing_block_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "a.html", "old")
    with pytest.raises(ZeroDivisionError):
        write_half(path, ZeroDivisionError())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "a.csv", "old")
    with pytest.raises(FileError, match=r"a.csv cannot be written; the disk is full: free"):
        write_half(path, OSError(errno.ENOSPC, "No space left on device"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_system_breaks_off_leaves_nothing_half_written(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "a.json", "old")
    with largest_file(1000), pytest.raises(FileError, match="larger than this system allows"):
        write_atomically(path, "x" * 5000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none/a.txt cannot be written; its folder does not exist"):
        write_atomically(tmp_path / "none" / "a.txt", "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="part of its folder is a file"):
        write_atomically(tmp_path / "file" / "a.txt", "x")
    with pytest.raises(FileError, match="it is a folder"):
        write_atomically(tmp_path, "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FileError, match="no permission: choose a folder"):
        write_atomically(tmp_path / "a.txt", "x")
    tmp_path.chmod(0o700)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_atomically(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    path = write_atomically(tmp_path / "a", "x")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
