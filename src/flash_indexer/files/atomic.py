"""Directories written as a whole: a reader finds the old content or the new, never a part of either.

Three siblings are involved, all in one parent folder: `NAME` (what readers open), `.NAME.new` (being written)
and `.NAME.old` (being replaced). A replacement runs

    1  write .NAME.new, fsync its files and folders
    2  rename NAME to .NAME.old            (only where NAME exists)
    3  rename .NAME.new to NAME, fsync the parent
    4  delete .NAME.old

Renames are atomic, so wherever a kill strikes, one of three things holds: up to 2, NAME is the old content;
between 2 and 3, NAME is missing and .NAME.old is the whole old content; from 3 on, NAME is the new content,
whole. Hence one rule for readers (`readable_directory`): NAME where it holds something, else .NAME.old. The
next writer applies the same rule before its step 1, and only then deletes what is stale, so .NAME.old is never
deleted while it is the only copy. The fsyncs carry this over to a power loss.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "disk quota used up",
    errno.EFBIG: "file size limit hit",
}


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a directory as a whole: yields an empty folder that takes `path`'s place when the block ends.

    What is at `path` already is replaced, all of it, and stays untouched until the new content is complete
    and on disk. If the block raises, the new content is removed and `path` stays as it was. Parents of `path`
    are made where missing. One writer per path at a time: in a distributed run, one rank.

    Args:
        path: the directory to write; a symbolic link to a directory is followed.

    Raises:
        ValueError: `path` has no name of its own (such as "/"), or the block wrote nothing.
        NotADirectoryError: `path` is a file.
        OSError: the disk is full (errno ENOSPC, EDQUOT or EFBIG, with a message that names `path`), or any
            other failure to write, as it came.
    """
    target, new, old = _siblings(path)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"atomic_directory: path must be a directory or not exist, got the file {target}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _recover(target, new, old)
        new.mkdir()
        yield new
        if not any(new.iterdir()):
            raise ValueError(f"atomic_directory: nothing was written for {target}; write a file into the folder")
        _sync_tree(new)
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
        _sync(target.parent)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not target.exists():
            os.rename(old, target)
        _name_full_disk(error, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """An error of the system that names no file, as that of a full disk, names `path`.

    Raises:
        OSError: of the same type and errno.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def shared_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the folder that another process's `atomic_directory` of the same path has yielded, and still holds.

    Raises:
        FileNotFoundError: this process doesn't see it, or it was taken away meanwhile. OSError: as `atomic_directory`.
    """
    target, new, _ = _siblings(path)
    try:
        if not new.is_dir():
            raise FileNotFoundError(errno.ENOENT, "No such folder", str(new))
        yield new
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"shared_directory: {target} must be on a disk that all processes see, and all must have written their "
            f"part of it within --timeout; this one does not find {error.filename or new}: the process that made it "
            "is on another disk, or took it away when it had waited for too long; use a shared disk or a longer "
            "--timeout"
        ) from error
    except BaseException as error:
        _name_full_disk(error, target)
        raise


def readable_directory(path: str | os.PathLike[str]) -> Path:
    """The folder that holds `path`'s content: `path`, or `.NAME.old` where a kill left only that.

    Reads only, so it may be called where nothing may be written. Returns `path` also where neither exists.
    """
    target, _, old = _siblings(path)
    return old if _is_empty(target) and old.is_dir() else target


def _siblings(path: str | os.PathLike[str]) -> tuple[Path, Path, Path]:
    target = Path(os.path.realpath(path))
    if not target.name:
        raise ValueError(f"atomic_directory: path must name a directory below a parent, got {os.fspath(path)!r}")
    return target, target.parent / f".{target.name}.new", target.parent / f".{target.name}.old"


def _recover(target: Path, new: Path, old: Path) -> None:
    """Undo what a killed writer left: restore the only copy first, then delete the stale ones."""
    if old.is_dir() and _is_empty(target):
        os.rename(old, target)
        _sync(target.parent)
    for stale in (old, new):
        if stale.exists():
            shutil.rmtree(stale)


def _is_empty(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name_full_disk(error: BaseException, target: Path) -> None:
    """Raises OSError where `error` came of a full disk."""
    if (number := _full_disk(error)) is not None:
        raise OSError(
            number,
            f"{_FULL[number]} while writing {target}; the unfinished copy was removed and an earlier one "
            "there, if any, is untouched; free some space or choose a path on another disk",
        ) from error


def _full_disk(error: BaseException) -> int | None:
    """The errno of a full disk behind `error`, which safetensors gives in its message only."""
    if isinstance(error, OSError):
        number = error.errno
    elif type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found.group(1))
    else:
        return None
    return number if number in _FULL else None
