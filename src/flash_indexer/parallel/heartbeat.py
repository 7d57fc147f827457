"""Signs of life between the processes of a group, for where no collective operation can fail.

A thread that waits for NCCL waits for a GPU, and nothing raises there when another process dies. So two threads of each
process look elsewhere, in the store that the group was made with:

- one adds to this process's counter, and looks whether the next rank's grows (a ring: each process sends the same few
  messages a round however many there are). Who finds it still for too long reports it to all by the store.
- one looks whether the first gets on, which hangs or fails when the process that keeps the store hangs or is dead.

A call that waits for the GPU with Python's lock in hand stops all threads. So the second thread gives signs of life to
a process of its own, a guard, which ends this one where they stay away.

All count their own looks and no seconds, so a process that was stopped or starved itself blames nobody.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Thread
from types import TracebackType

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

LONGEST_INTERVAL = 5.0
GUARD = """
import os, select, signal, sys
watched, interval, most, words = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
signal.signal(signal.SIGINT, signal.SIG_IGN)
unchanged = 0
while unchanged < most:
    if select.select([0], [], [], interval)[0]:
        if not os.read(0, 4096):
            sys.exit()  # the block or the process ended
        unchanged = 0
    else:
        with open(f"/proc/{watched}/stat") as file:
            stopped = file.read().rpartition(")")[2].split()[0] in "tT"
        unchanged = 0 if stopped else unchanged + 1
print(words, file=sys.stderr, flush=True)
os.kill(watched, signal.SIGABRT)
"""


class Heartbeat:
    """While its block runs, every process of the default group must give signs of life. Two processes at least.

    Args:
        timeout: seconds without one, counted in looks at intervals of min(timeout / 4, 5), after which a process is
            given up by all others.
        lost: called with the reason, once, from a thread, unless the block ended within GRACE seconds. It is to end
            the process: one that goes on is itself still alive to the others.
        stuck: what the guard prints before it ends this process by SIGABRT, where no thread of it ran for `timeout` and
            PATIENCE seconds.

    Raises:
        RuntimeError: from torch.distributed, on entering, where the group's store does not answer.
    """

    GRACE = 5.0
    """Seconds for the block to raise an error of its own, as gloo does."""
    PATIENCE = 30.0
    """Seconds beyond the timeout in which a thread of this process must have run."""

    def __init__(self, timeout: float, lost: Callable[[str], None], stuck: str) -> None:
        self._interval = min(timeout / 4, LONGEST_INTERVAL)
        self._most = math.ceil(timeout / self._interval)
        self._lost, self._stuck = lost, stuck
        self._silent = math.ceil((timeout + self.PATIENCE) / self._interval)
        self._ended = Event()
        self._rounds = 0
        self._reason: str | None = None

    def __enter__(self) -> Heartbeat:
        own: Store = _get_default_store().clone()  # type: ignore[attr-defined]  # a connection that no other thread holds
        store = PrefixStore("flash_indexer.heartbeat", own)
        before = store.add("reports", 0)  # of an earlier block
        self._threads = [
            Thread(target=self._beat, args=(store, before), name="heartbeat", daemon=True),
            Thread(target=self._watch, name="heartbeat watch", daemon=True),
        ]
        numbers = (os.getpid(), self._interval, self._silent)
        self._guard = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", GUARD, *map(str, numbers), self._stuck], stdin=subprocess.PIPE
        )
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(self._interval)  # not for ever: the store may hang
        with suppress(BrokenPipeError):
            self._guard.communicate()

    def _beat(self, store: Store, before: int) -> None:
        rank, following = dist.get_rank(), (dist.get_rank() + 1) % dist.get_world_size()
        still = _Still()
        while not self._ended.wait(self._interval):
            try:
                store.add(f"beats of {rank}", 1)
                if still.looks(store.add(f"beats of {following}", 0)) == self._most:
                    store.set("silent", str(following))
                    store.add("reports", 1)
                if store.add("reports", 0) != before:
                    self._reason = f"no sign of life from process {int(store.get('silent'))}"
            except RuntimeError:
                return
            self._rounds += 1

    def _watch(self) -> None:
        still, guard = _Still(), self._guard.stdin
        assert guard is not None
        while not self._ended.wait(self._interval):
            with suppress(BrokenPipeError):  # nobody guards any more
                os.write(guard.fileno(), b".")
            if still.looks(self._rounds) >= self._most and self._reason is None:
                self._reason = "no answer from the store of the group, which process 0 or its launcher keeps"
            if self._reason is not None and not self._ended.wait(self.GRACE):
                self._lost(self._reason)
                return


@dataclass
class _Still:
    """How often in a row a number was found unchanged."""

    last: int = -1
    unchanged: int = 0

    def looks(self, number: int) -> int:
        self.unchanged = self.unchanged + 1 if number == self.last else 0
        self.last = number
        return self.unchanged
