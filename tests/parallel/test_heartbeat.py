"""Signs of life: the loss of a process is noticed while main threads are stuck, and nobody is blamed wrongly."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import os, sys, time
os.environ.update(environment)
rank, sys.stderr = int(environment["RANK"]), open(f"{out}.{environment['RANK']}", "a")
os.dup2(sys.stderr.fileno(), 2)
from pathlib import Path
from flash_indexer.parallel.heartbeat import Heartbeat
from flash_indexer.recipe.processes import ParallelSettings, Processes
Heartbeat.GRACE, Heartbeat.PATIENCE = grace, patience
processes = Processes(ParallelSettings(timeout=timeout))
with processes.telling(Path(out)):
    Path(f"{out}.{rank}.began").touch()
    exec(bodies[rank])
time.sleep(after[rank])
"""
STUCK = "time.sleep(600)"
STUCK_WITH_THE_LOCK = "import ctypes; ctypes.PyDLL(None).sleep(600)"
GRACE, PATIENCE = 0.5, 1.0


def start(runs: Any, out: Path, count: int, *, code: str = PROGRAM, **names: Any) -> Any:
    """Processes which are all in the block that is watched."""
    common = dict(grace=GRACE, patience=PATIENCE, bodies=[STUCK] * count, after=[0.0] * count) | names
    processes = runs.ranks(count, None, out, codes=[code] * count, **common)
    end = time.monotonic() + 60
    while not all(Path(f"{out}.{rank}.began").exists() for rank in range(count)):
        assert time.monotonic() < end and all(process.is_alive() for process in processes)
        time.sleep(0.05)
    return processes


@pytest.mark.parametrize(
    ("count", "lost", "how", "named"),
    [
        (2, 1, signal.SIGKILL, "no sign of life from process 1"),
        (2, 0, signal.SIGKILL, "no answer from the store of the group, which process 0"),
        (2, 0, signal.SIGSTOP, "no answer from the store of the group, which process 0"),
        (4, 2, signal.SIGKILL, "no sign of life from process 2"),
        (4, 3, signal.SIGSTOP, "no sign of life from process 3"),
    ],
    ids=["killed", "with the store", "stopped with the store", "one of four", "one of four stopped"],
)
def test_who_is_stuck_ends_and_says_why(
    tmp_path: Path, runs: Any, count: int, lost: int, how: signal.Signals, named: str
) -> None:
    """In time: within the timeout, the grace, and an interval (timeout / 4) for each of three looks. No cascade."""
    timeout, out = 2.0, tmp_path / "run"
    processes = start(runs, out, count, timeout=timeout)
    others = [rank for rank in range(count) if rank != lost]
    os.kill(processes[lost].pid, how)
    began = time.monotonic()
    try:
        for rank in others:
            processes[rank].join(30)
        seconds = time.monotonic() - began
        assert [processes[rank].exitcode for rank in others] == [1] * len(others)
    finally:
        for process in processes:
            process.kill()
    assert timeout - 1 < seconds < timeout + GRACE + 3 * timeout / 4 + 2
    for rank in others:
        said = Path(f"{out}.{rank}").read_text()
        assert f"error warmup: process {rank} of {count} lost contact with another process, which" in said, said
        assert f"did not answer for 2 s ({named}" in said and "no checkpoint was written" in said, said
        assert said.count("lost contact") == 1 and "Traceback" not in said, said


def test_who_is_stuck_with_pythons_lock_is_ended_by_its_guard(tmp_path: Path, runs: Any) -> None:
    timeout, out = 2.0, tmp_path / "run"
    began = time.monotonic()
    first, second = start(runs, out, 2, timeout=timeout, bodies=[STUCK_WITH_THE_LOCK, STUCK])
    second.kill()
    first.join(timeout + PATIENCE + 3)
    try:
        assert first.exitcode == -signal.SIGABRT and time.monotonic() - began > timeout + PATIENCE
    finally:
        first.kill()
    said = Path(f"{out}.0").read_text()
    assert "error warmup: process 0 of 2 lost contact" in said and "lets no thread of it run" in said, said


def test_a_long_silence_of_all_main_threads_blames_nobody(tmp_path: Path, runs: Any) -> None:
    """All work for twice the timeout, with a stop of longer than it in between; then rank 1 ends first, or last."""
    timeout, everyone = 2.0, []
    work = "for _ in range({}): time.sleep(0.1)"  # one sleep would not stand still with a stopped process
    for late in (0, 1):
        after, bodies = [0.0, 0.0], [work.format(int(20 * timeout))] * 2
        after[late], bodies[late] = 1.5 * timeout, work.format(int(20 * timeout) + 5)
        everyone += start(runs, tmp_path / f"late {late}", 2, timeout=timeout, bodies=bodies, after=after)
    time.sleep(timeout / 2)
    for process in everyone:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2 * timeout)
    for process in everyone:
        os.kill(process.pid, signal.SIGCONT)
    runs.finish(everyone, within=60)
    said = {path.name: path.read_text() for path in tmp_path.glob("late ?.?")}
    assert len(said) == 4 and not any("lost contact" in text for text in said.values()), said


def test_an_error_that_the_block_raises_in_time_is_told_once(tmp_path: Path, runs: Any) -> None:
    """Within the grace: the error leaves the block as without a heartbeat, and the thread says and does nothing."""
    timeout, grace, out = 1.0, 2.0, tmp_path / "run"
    caught = (
        "except ConnectionError as error:\n    time.sleep(grace)\n    os._exit(3 if 'by peer' in str(error) else 4)"
    )
    raising = f"time.sleep({timeout + grace / 2})\nraise RuntimeError('gloo/transport: Connection closed by peer')"
    code = PROGRAM.replace("with proc", "try:\n  with proc").replace("time.sleep(after[rank])", caught)
    first, other = start(runs, out, 2, code=code, timeout=timeout, grace=grace, bodies=[raising, STUCK])
    other.kill()
    first.join(30)
    ended = first.exitcode
    first.kill()
    assert ended == 3
    assert "lost contact" not in Path(f"{out}.0").read_text()
