"""The folder of a run: whose it is, and that one run at a time writes into it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flash_indexer.files.atomic import readable_directory
from flash_indexer.files.native import read_native
from flash_indexer.recipe.run_record import CHECKPOINT, RUN_FILE

LOCK_FILE = ".lock"
OWN_LEFTOVERS = frozenset({LOCK_FILE, f".{RUN_FILE}.partial"})
"""What a run that was killed before its first step leaves; a new run may begin beside it."""
REPORT_FILE = "report.json"
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})


def check_new(out: Path, command: str = "warmup") -> None:
    """Raises ValueError where a new run would write into a folder that holds another's files, or no folder can be."""
    check_folder(f"{command}: --out", out)
    others = sorted({path.name for path in out.iterdir()} - OWN_LEFTOVERS) if out.exists() else []
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ValueError(
            f"{command}: --out must be a new folder or that of a run, got {out}, which holds {others[0]}{more} and no "
            f"{RUN_FILE}; nothing was written: choose another --out"
        )


def check_folder(option: str, path: Path) -> None:
    """Raises ValueError naming the option where no folder can be at `path`, because of a file."""
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise ValueError(f"{option} must be a folder, got {path}, where {part} is a file; choose another")


def check_report_folder(option: str, path: Path) -> None:
    """Raises ValueError where a report would be written into a folder that holds something else than a report."""
    check_folder(option, path)
    if not path.exists() or not any(path.iterdir()):
        return
    with suppress(OSError, ValueError, TypeError):
        report = json.loads((path / REPORT_FILE).read_text(encoding="utf-8"))
        if {"verdict", "evaluation"} <= set(report):
            return
    raise ValueError(
        f"{option} must be a new or empty folder or that of an earlier report, got {path}, which holds "
        f"{min(entry.name for entry in path.iterdir())} and no {REPORT_FILE} of ours; nothing was written: choose "
        "another"
    )


def indexer_folder(path: Path) -> Path:
    """A run's checkpoint, or the folder itself where it is a native indexer directory (docs/format.md)."""
    native = (readable_directory(path) / "indexer_config.json").exists() and not (path / RUN_FILE).exists()
    return path if native else path / CHECKPOINT


def sizes_of_indexers(path: Path) -> dict[str, Any]:
    """The settings of a run that goes on from trained indexers: their layers, sizes and target."""
    config = read_native(indexer_folder(path)).config
    every = config.layers == tuple(range(config.base_num_layers))
    names = ("num_heads", "head_dim", "rope_dim", "target", "indexers", "teachers")
    return {"layers": None if every else config.layers, **{name: getattr(config, name) for name in names}}


@contextmanager
def locked_folder(out: Path, warn: Callable[[str], None], command: str = "warmup") -> Iterator[None]:
    """Makes the folder `out`, and holds it for one run while the block runs.

    The lock is the kernel's (flock on a file in `out`), so it ends with the process, however that ends. Where the file
    system has no locks, `warn` is told and nothing is locked. At the end the file is removed, and with it the folders
    that were made here and are empty.

    Raises:
        ValueError: another process holds the folder; names it. OSError: the folder can't be written.
    """
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        descriptor = _take(out / LOCK_FILE, command)
    except OSError as error:  # no permission, a read-only or full disk, /proc
        raise type(error)(
            f"{command}: --out must be a folder that can be written, got {out} ({error.strerror}: "
            f"{error.filename or out}); choose another --out"
        ) from error
    if descriptor is None:
        warn(
            f"{command}: the file system of {out} has no locks, so a second run with this --out is not kept out: start "
            "only one"
        )
    try:
        yield
    finally:
        (out / LOCK_FILE).unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _take(file: Path, command: str) -> int | None:
    """A descriptor that holds the lock as long as it is open; None where there are no locks."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # another run ended, and took its folder away
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace") or "an unnamed process"
            os.close(descriptor)
            if error.errno in NO_LOCKS:
                return None
            if not isinstance(error, BlockingIOError):
                raise
            raise ValueError(
                f"{command}: --out must be a folder that no other run writes into, got {file.parent}, which {holder} "
                "writes into now; wait until it ends, end it, or choose another --out"
            ) from error
        if _is_at(descriptor, file):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
        os.close(descriptor)  # its last holder removed the file between our opening and locking it


def _is_at(descriptor: int, file: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    return False
