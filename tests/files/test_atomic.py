"""Directories written as a whole: kills, full disks, and what readers find."""

from __future__ import annotations

import errno
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flash_indexer.files import atomic
from flash_indexer.files.atomic import atomic_directory, readable_directory, shared_directory

FILES = ("a", "sub/b", "c")


def write(folder: Path, text: str) -> None:
    (folder / "sub").mkdir()
    for name in FILES:
        (folder / name).write_text(text)


def content(path: Path) -> set[str]:
    """The texts of a whole checkpoint; anything unfinished raises or gives more than one text."""
    return {(readable_directory(path) / name).read_text() for name in FILES}


def siblings(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


# A writer that SIGKILLs itself before the n-th file system operation. It loads atomic.py alone: no torch to import.
KILLED_WRITER = """
import importlib.util, os, signal, sys
from pathlib import Path
source, target, text, last = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
spec = importlib.util.spec_from_file_location("atomic", source)
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
events = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}
seen = 0
def count(event, args):
    global seen
    if event in events:
        seen += 1
        if seen == last:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
with atomic.atomic_directory(target) as folder:
    (folder / "sub").mkdir()
    for name in ("a", "sub/b", "c"):
        (folder / name).write_text(text)
"""


def killed_write(path: Path, text: str, last: int) -> int:
    command = [sys.executable, "-I", "-S", "-c", KILLED_WRITER, atomic.__file__, str(path), text, str(last)]
    return subprocess.run(command, check=False).returncode


@pytest.mark.parametrize("earlier", [False, True])
def test_a_kill_before_any_operation_leaves_the_old_or_the_new(tmp_path: Path, earlier: bool) -> None:
    found, last = [], 0
    while True:
        last += 1
        path = tmp_path / str(last) / "checkpoint"
        path.parent.mkdir()
        if earlier:
            with atomic_directory(path) as folder:
                write(folder, "old")
        code = killed_write(path, "new", last)
        assert code in (0, -9)
        if earlier or readable_directory(path).exists():
            texts = content(path)
            assert len(texts) == 1
            found += texts
        with atomic_directory(path) as folder:
            write(folder, "next")
        assert content(path) == {"next"}
        assert siblings(path) == ["checkpoint"]
        if code == 0:
            break
    assert last > 15
    assert set(found) == ({"old", "new"} if earlier else {"new"})


def test_a_second_kill_while_recovering_loses_nothing(tmp_path: Path) -> None:
    last = 0
    while True:
        last += 1
        path = tmp_path / str(last) / "checkpoint"
        old = path.parent / ".checkpoint.old"
        old.mkdir(parents=True)
        write(old, "old")  # the state between the two renames
        (path.parent / ".checkpoint.new").mkdir()
        (path.parent / ".checkpoint.new" / "a").write_text("unfinished")
        code = killed_write(path, "new", last)
        assert content(path) in ({"old"}, {"new"})
        if code == 0:
            break
    assert last > 15


def test_an_empty_folder_made_after_a_kill_does_not_hide_the_only_copy(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint.old").mkdir()
    write(tmp_path / ".checkpoint.old", "old")
    path = tmp_path / "checkpoint"
    path.mkdir()
    assert content(path) == {"old"}
    with pytest.raises(RuntimeError), atomic_directory(path):
        raise RuntimeError
    assert content(path) == {"old"}
    assert siblings(path) == ["checkpoint"]


def test_nothing_is_visible_before_the_block_ends_and_parents_are_made(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "1" / "checkpoint"
    with atomic_directory(path) as folder:
        write(folder, "new")
        assert not path.exists()
    assert content(path) == {"new"}
    assert siblings(path) == ["checkpoint"]


def test_old_files_do_not_survive_a_replacement(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with atomic_directory(path) as folder:
        write(folder, "old")
        (folder / "extra").write_text("old")
    with atomic_directory(path) as folder:
        write(folder, "new")
    assert not (path / "extra").exists()


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk")
    with atomic_directory(link) as folder:
        write(folder, "new")
    assert link.is_symlink()
    assert (tmp_path / "disk" / "a").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_block_leaves_the_old_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "checkpoint"
    with atomic_directory(path) as folder:
        write(folder, "old")
    with pytest.raises(error), atomic_directory(path) as folder:
        (folder / "a").write_text("unfinished")
        raise error
    assert content(path) == {"old"}
    assert siblings(path) == ["checkpoint"]


def test_a_failing_last_rename_puts_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint"
    with atomic_directory(path) as folder:
        write(folder, "old")
    rename = atomic.os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(source).name == ".checkpoint.new":
            raise PermissionError(errno.EACCES, "denied")
        rename(source, target)

    monkeypatch.setattr(atomic.os, "rename", failing)
    with pytest.raises(PermissionError), atomic_directory(path) as folder:
        write(folder, "new")
    assert path.is_dir()
    assert content(path) == {"old"}
    assert siblings(path) == ["checkpoint"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_found_by_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    path = tmp_path / "checkpoint"
    with atomic_directory(path) as folder:
        write(folder, "old")

    def full(descriptor: int) -> None:
        raise OSError(number, "full")

    monkeypatch.setattr(atomic.os, "fsync", full)
    message = rf"(no space left|disk quota used up) while writing {path}; .* untouched; free some space"
    with pytest.raises(OSError, match=message) as caught, atomic_directory(path) as folder:
        write(folder, "new")
    assert caught.value.errno == number
    assert content(path) == {"old"}
    assert siblings(path) == ["checkpoint"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes past `size` bytes fail with EFBIG, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_the_system_refuses(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with atomic_directory(path) as folder:
        write(folder, "old")
    with (
        pytest.raises(OSError, match=r"file size limit hit while writing"),
        largest_file(1 << 16),
        atomic_directory(path) as folder,
    ):
        (folder / "big").write_bytes(bytes(1 << 17))
    assert content(path) == {"old"}
    assert siblings(path) == ["checkpoint"]


def test_everything_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced, at_rename = tmp_path / "checkpoint", set(), []
    fsync, rename = atomic.os.fsync, atomic.os.rename

    def recorded_fsync(descriptor: int) -> None:
        synced.add(atomic.os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def recorded_rename(source: Path, target: Path) -> None:
        at_rename.append(set(synced))
        rename(source, target)

    monkeypatch.setattr(atomic.os, "fsync", recorded_fsync)
    monkeypatch.setattr(atomic.os, "rename", recorded_rename)
    with atomic_directory(path) as folder:
        write(folder, "new")
    assert at_rename == [{p.stat().st_ino for p in (path, path / "sub", *(path / name for name in FILES))}]
    assert tmp_path.stat().st_ino in synced


def test_other_errors_come_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^\[Errno 5\] broken$"), atomic_directory(tmp_path / "checkpoint"):
        raise OSError(errno.EIO, "broken")


def test_rejections(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with (
        pytest.raises(NotADirectoryError, match=r"must be a directory or not exist, got the file"),
        atomic_directory(file),
    ):
        raise AssertionError
    with pytest.raises(ValueError, match="must name a directory below a parent, got '/'"), atomic_directory("/"):
        raise AssertionError
    with pytest.raises(ValueError, match="nothing was written"), atomic_directory(tmp_path / "empty"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_missing_path_is_returned_as_it_is(tmp_path: Path) -> None:
    assert readable_directory(tmp_path / "missing") == tmp_path / "missing"
    shutil.rmtree(tmp_path)
    assert readable_directory(tmp_path / "missing") == tmp_path / "missing"


def test_another_process_writes_into_the_folder_while_it_is_held(tmp_path: Path) -> None:
    """And says what a person can do where it is not there, or no longer, and where the disk is full."""
    target = tmp_path / "run"
    with atomic_directory(target) as folder:
        (folder / "mine").write_text("1")
        with shared_directory(target) as seen:
            (seen / "other").write_text("2")
        full = f"no space left while writing {target}; .*; free some space"
        with pytest.raises(OSError, match=full) as raised, shared_directory(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert raised.value.errno == errno.ENOSPC
        with pytest.raises(ZeroDivisionError), shared_directory(target):
            raise ZeroDivisionError
    assert sorted(path.name for path in target.iterdir()) == ["mine", "other"]
    message = (
        f"{target} must be on a disk that all processes see, .* within --timeout; this one does not find {tmp_path}"
    )
    with pytest.raises(FileNotFoundError, match=message), shared_directory(target):
        pass
    with atomic_directory(target) as folder:
        (folder / "mine").write_text("1")
        with pytest.raises(FileNotFoundError, match=message), shared_directory(target) as seen:
            shutil.rmtree(seen)
            (seen / "other").write_text("2")
        folder.mkdir()
        (folder / "mine").write_text("1")
