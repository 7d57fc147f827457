"""Signs of life: the loss of a process is noticed while main threads are stuck, and nobody is blamed wrongly."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import os, sys, time
os.environ.update(environment)
rank, sys.stderr = int(environment["RANK"]), open(f"{out}.{environment['RANK']}", "a")
os.dup2(sys.stderr.fileno(), 2)
from pathlib import Path
from flash_indexer.parallel import heartbeat
from flash_indexer.recipe import processes as module
class Known(heartbeat.Heartbeat):
    GRACE, PATIENCE = grace, patience
    def __init__(self, *arguments):
        super().__init__(*arguments)
        Known.last = self
class Counted(heartbeat._Still):
    def looks(self, number):
        unchanged = super().looks(number)
        if Known.last._reason is None:
            with open(f"{out}.{rank}.looks", "a") as file:
                file.write(f"{unchanged} ")
        return unchanged
module.Heartbeat, heartbeat._Still = Known, Counted
processes = module.Processes(module.ParallelSettings(timeout=timeout))
with processes.telling(Path(out)):
    Path(f"{out}.{rank}.began").touch()
    exec(bodies[rank])
time.sleep(after[rank])
"""
STUCK = "time.sleep(600)"
STUCK_WITH_THE_LOCK = "import ctypes; ctypes.PyDLL(None).sleep(600)"
GRACE, PATIENCE = 0.5, 1.0
HANG = 240.0  # seconds after which a process is taken to hang


def start(runs: Any, out: Path, count: int, *, code: str = PROGRAM, **names: Any) -> Any:
    """Processes which are all in the block that is watched."""
    common = dict(grace=GRACE, patience=PATIENCE, bodies=[STUCK] * count, after=[0.0] * count) | names
    processes = runs.ranks(count, None, out, codes=[code] * count, **common)
    while not all(Path(f"{out}.{rank}.began").exists() for rank in range(count)):
        assert all(process.is_alive() for process in processes), "one ended before all had begun"
        time.sleep(0.05)
    return processes


def most_unchanged(out: Path, ranks: Sequence[int]) -> int:
    """The most looks in a row that found something standing still, of these ranks, before they knew of the loss."""
    return max(int(word) for rank in ranks for word in Path(f"{out}.{rank}.looks").read_text().split())


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
    """After a whole timeout of looks: four, since they are a quarter of it apart, no fewer and no more. No cascade."""
    timeout, out = 2.0, tmp_path / "run"
    processes = start(runs, out, count, timeout=timeout)
    others = [rank for rank in range(count) if rank != lost]
    os.kill(processes[lost].pid, how)
    try:
        for rank in others:
            processes[rank].join(HANG)
        assert [processes[rank].exitcode for rank in others] == [1] * len(others)
    finally:
        for process in processes:
            process.kill()
    assert most_unchanged(out, others) == 4
    for rank in others:
        said = Path(f"{out}.{rank}").read_text()
        assert f"error warmup: process {rank} of {count} lost contact with another process, which" in said, said
        assert f"did not answer for 2 s ({named}" in said and "no checkpoint was written" in said, said
        assert said.count("lost contact") == 1 and "Traceback" not in said, said


def test_who_is_stuck_with_pythons_lock_is_ended_by_its_guard(tmp_path: Path, runs: Any) -> None:
    timeout, out = 2.0, tmp_path / "run"
    first, second = start(runs, out, 2, timeout=timeout, bodies=[STUCK_WITH_THE_LOCK, STUCK])
    second.kill()
    first.join(HANG)
    try:
        assert first.exitcode == -signal.SIGABRT
    finally:
        first.kill()
    said = Path(f"{out}.0").read_text()
    assert "error warmup: process 0 of 2 lost contact" in said and "lets no thread of it run" in said, said


@pytest.mark.slow
def test_a_long_silence_of_all_main_threads_blames_nobody(tmp_path: Path, runs: Any) -> None:
    """All work for twice the timeout, with a stop of longer than it in between; then rank 1 ends first, or last."""
    timeout, everyone = 3.0, []
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
    runs.finish(everyone)
    said = {path.name: path.read_text() for path in tmp_path.glob("late ?.?")}
    assert len(said) == 4 and not any("lost contact" in text for text in said.values()), said


def test_an_error_that_the_block_raises_in_time_is_told_once(tmp_path: Path, runs: Any) -> None:
    """Within the grace: the error leaves the block as without a heartbeat, and no thread of it goes on.

    It is raised when the heartbeat has noticed the loss, and the grace is so long that it is not over then.
    """
    out = tmp_path / "run"
    block = """
try:
  with proc"""
    caught = """
except ConnectionError as error:
    import threading
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("heartbeat")]
    os._exit(5 if left else 3 if "by peer" in str(error) else 4)
"""
    raising = """
while Known.last._reason is None:
    time.sleep(0.01)
raise RuntimeError("gloo/transport: Connection closed by peer")
"""
    code = PROGRAM.replace("\nwith proc", block).replace("time.sleep(after[rank])", caught)
    first, other = start(runs, out, 2, code=code, timeout=1.0, grace=HANG, bodies=[raising, STUCK])
    other.kill()
    first.join(HANG)
    ended = first.exitcode
    first.kill()
    assert ended == 3
    assert "lost contact" not in Path(f"{out}.0").read_text()
