"""The folder of a run: locked while a run writes into it, refused where it holds something else."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flash_indexer.files.native import save_native
from flash_indexer.recipe.run_folder import (
    LOCK_FILE,
    check_new,
    check_report_folder,
    indexer_folder,
    locked_folder,
    sizes_of_indexers,
)
from flash_indexer.recipe.run_record import read_record

SAY_WHY = """
import os
os.environ.update(environment)
from flash_indexer.recipe import warmup
original = warmup.warm_up
def caught(*args, **options):
    try:
        original(*args, **options)
    except Exception as error:
        open(f"{said}.{environment.get('RANK', 0)}", "w").write(f"{type(error).__name__}: {error}")
warmup.warm_up = caught
"""
WAIT_IN_STEP_3 = """
import os
from flash_indexer.recipe import loop
forward, calls = loop.forward, []
def waiting(handle, batch):
    calls.append(1)
    if len(calls) == 3:
        os.mkfifo(gate)
        open(gate).read()
    forward(handle, batch)
loop.forward = waiting
"""
LOCK_AND_DIE = """
import os, signal
from pathlib import Path
from flash_indexer.recipe.run_folder import locked_folder
with locked_folder(Path(out), print):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def never(text: str) -> None:
    raise AssertionError(text)


def test_the_second_is_refused_and_told_who_is_first(tmp_path: Path) -> None:
    out = tmp_path / "a" / "run"
    first = f"process {os.getpid()} on {socket.gethostname()}"
    with locked_folder(out, never):
        with (
            pytest.raises(ValueError, match=rf"no other run writes into, got {out}, which {first} writes into now"),
            locked_folder(out, never),
        ):
            never("both hold it")
        assert (out / LOCK_FILE).exists(), "refusing the second took the first one's file away"
    assert list(tmp_path.iterdir()) == []  # folders made for nothing
    with locked_folder(out, never):
        (out / "file").touch()
    assert [path.name for path in out.iterdir()] == ["file"]


def test_the_lock_ends_with_a_process_that_is_killed(tmp_path: Path, runs: Any, recipe: Any) -> None:
    out = tmp_path / "run"
    runs.finish([runs.start(LOCK_AND_DIE, None, out)], -signal.SIGKILL)
    assert [path.name for path in out.iterdir()] == [LOCK_FILE]
    recipe(out, steps=1)  # takes the folder for new, too
    assert not (out / LOCK_FILE).exists()


def test_a_file_that_its_last_holder_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between our opening the file and our locking it; a third process may then have made and locked a new one."""
    original, calls = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / LOCK_FILE).unlink()
        original(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        locked_folder(tmp_path, never),
        pytest.raises(ValueError, match="no other run"),
        locked_folder(tmp_path, never),
    ):
        never("both hold it")
    assert len(calls) == 3


def test_without_locks_a_run_is_warned_and_goes_on(
    tmp_path: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    recipe(tmp_path / "run", steps=1)
    assert f"the file system of {tmp_path / 'run'} has no locks" in recipe.printed
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint", "metrics.jsonl", "run.json"]


def test_two_runs_at_once_leave_one_runs_rows(
    tmp_path: Path, runs: Any, tiny_settings: Any, metrics: Callable[..., Any]
) -> None:
    out, gate = tmp_path / "run", tmp_path / "gate"
    first = runs.start(WAIT_IN_STEP_3, tiny_settings(), out, gate=str(gate))
    while not gate.exists():
        assert first.exitcode is None
        first.join(0.05)
    second = runs.start(SAY_WHY, tiny_settings(seed=1), out, said=str(tmp_path / "said"))
    runs.finish([second])
    said = (tmp_path / "said.0").read_text()
    assert said.startswith("ValueError: warmup: --out must be a folder that no other run writes into"), said
    assert f"process {first.pid} on {socket.gethostname()}" in said
    gate.write_text("go")
    runs.finish([first])
    assert [row["step"] for row in metrics(out)] == list(range(1, 13))


def test_the_first_of_many_processes_holds_the_folder_and_all_are_told(
    tmp_path: Path, runs: Any, tiny_settings: Any
) -> None:
    with locked_folder(tmp_path / "run", never):
        runs.finish(runs.ranks(2, tiny_settings(), tmp_path / "run", codes=[SAY_WHY] * 2, said=str(tmp_path / "said")))
    said = [(tmp_path / f"said.{rank}").read_text() for rank in (0, 1)]
    assert f"which process {os.getpid()} on" in said[0], said
    assert said[1] == "ValueError: warmup: process 0 could not begin; see its message, in its output"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def denied(path: Any, *args: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", denied)
    said = f"--out must be a folder that can be written, got .*{os.strerror(number)}"
    with pytest.raises(PermissionError if number == errno.EACCES else OSError, match=said):
        locked_folder(tmp_path / "run", never).__enter__()
    monkeypatch.undo()


def test_a_folder_where_none_can_be_made() -> None:
    with pytest.raises(FileNotFoundError, match="--out must be a folder that can be written, got /proc/no/run"):
        locked_folder(Path("/proc/no/run"), never).__enter__()


@pytest.mark.parametrize("names", [["model.safetensors"], ["a.txt", "b"], ["report"], [".git"]])
def test_a_folder_that_holds_something_else_is_no_new_one(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"got {tmp_path}, which holds {names[0]}.* nothing was written: choose"):
        check_new(tmp_path)
    for name in names:
        (tmp_path / name).rmdir()
    for name in (LOCK_FILE, ".run.json.partial"):  # of a run that was killed at its start
        (tmp_path / name).touch()
    check_new(tmp_path)


def test_a_report_goes_into_an_empty_folder_or_over_an_earlier_report(tmp_path: Path) -> None:
    check_report_folder("evaluate: --report", tmp_path / "new")
    check_report_folder("evaluate: --report", tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="--report must be a new or empty folder .* holds model.safetensors and no"):
        check_report_folder("evaluate: --report", tmp_path)
    (tmp_path / "report.json").write_text('{"by": "another program"}')
    with pytest.raises(ValueError, match="nothing was written"):
        check_report_folder("evaluate: --report", tmp_path)
    (tmp_path / "report.json").write_text('{"verdict": "good", "evaluation": {}}')
    check_report_folder("evaluate: --report", tmp_path)


def test_where_the_indexers_are_and_how_large(tmp_path: Path, recipe: Any) -> None:
    handle = recipe(tmp_path / "run", steps=1, layers=(0, 2), target="sum_logits")
    save_native(handle, tmp_path / "native", base_name="tiny")
    sizes = dict(
        layers=(0, 2), num_heads=4, head_dim=32, rope_dim=16, target="sum_logits", indexers="fresh", teachers="shared"
    )
    for path in (tmp_path / "run", tmp_path / "native"):
        assert sizes_of_indexers(path) == sizes
    assert indexer_folder(tmp_path / "native") == tmp_path / "native"
    shutil.copytree(tmp_path / "native", tmp_path / "run", dirs_exist_ok=True)
    assert indexer_folder(tmp_path / "run") == tmp_path / "run" / "checkpoint"
    assert read_record(tmp_path / "run", True) is not None
