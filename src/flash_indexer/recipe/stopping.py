"""Ctrl-C, and the SIGTERM that schedulers send: the step under way is finished and saved, then the run ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
SHOW_CURSOR = "\x1b[?25h"


class Interrupted(KeyboardInterrupt):
    """A run was asked to end, and ended after a step; the message says where its state is.

    Attributes:
        number: the signal that asked. speaks: false in all processes of a run but one.
    """

    def __init__(self, message: str, number: int, *, speaks: bool = True) -> None:
        super().__init__(message)
        self.number, self.speaks = number, speaks


class StopSignals:
    """While its block runs, the first SIGINT or SIGTERM is noted in `number`; a second one ends the process at once.

    Only Python's main thread can receive signals; elsewhere the block changes nothing. A signal that was ignored
    before, as behind nohup, stays ignored.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.number = 0
        self._quiet = quiet
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in NAMES:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def told(self) -> list[float]:
        """For each of NAMES 1 if it came to this process, else 0: summed over processes, what `signal_of` reads."""
        return [float(number == self.number) for number in NAMES]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for handled in self._before:
            signal.signal(handled, signal.SIG_DFL)  # so that a second one needs no thread of Python's to run
        if not self._quiet:
            name = NAMES[signal.Signals(number)]
            text = f"\n{name}: finishing this step, then saving; once more ends at once, without saving\n"
            cursor = SHOW_CURSOR if sys.stderr.isatty() else ""  # which a process that is killed leaves hidden
            os.write(2, (cursor + text).encode())  # past Python's buffers, in the middle of which this may be called


def signal_of(sums: Sequence[float]) -> int:
    """The signal that came to any of the processes whose `told` were summed, SIGTERM if both did; 0: none came."""
    return max((number for number, count in zip(NAMES, sums, strict=True) if count > 0), default=0)
