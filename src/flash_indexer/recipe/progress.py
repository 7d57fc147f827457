"""What a person sees of a run: the progress bar, and the error that ended it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class StepProgress:
    """A bar with what `describe` says of a metrics row; plain lines where there is no terminal."""

    def __init__(
        self, console: Console, steps: int, done: int, *, quiet: bool = False, name: str = "warm-up",
        describe: Callable[[Mapping[str, Any]], str] | None = None,
    ) -> None:  # fmt: skip
        self._console, self._steps, self._quiet = console, steps, quiet
        self._mass, self._describe = "", describe or self._warm_up
        self._bar = Progress(
            TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=quiet or not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> StepProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, row: Mapping[str, Any]) -> None:
        """Shows a metrics row."""
        text = self._describe(row)
        self._bar.update(self._task, completed=row["step"], description=text)
        if not self._quiet and not self._console.is_terminal and (row["step"] % 10 == 0 or row["step"] == self._steps):
            self._console.print(f"step {row['step']}/{self._steps}  {text}  {row['seconds']:.0f} s", highlight=False)

    def _warm_up(self, row: Mapping[str, Any]) -> str:
        """KL, KL over the uniform prediction's and attention mass, the last one that was measured."""
        if row["mass"] is not None:
            self._mass = f"mass@64 {row['mass']:.1%}"
        ratio = row["kl_over_uniform"]
        ratio = "none" if ratio is None else f"{ratio:.3f}"
        return f"KL {row['loss']:.3f}  KL/uniform {ratio}  {self._mass}"


def print_error(error: Exception) -> None:
    """The message alone, on stderr."""
    print_end(f"[bold red]error[/bold red] {escape(str(error))}", markup=True)


def print_end(text: str, *, markup: bool = False) -> None:
    """On stderr, with the cursor, which a bar that nobody stopped leaves hidden."""
    console = Console(stderr=True)
    console.show_cursor()
    console.print(text, highlight=False, soft_wrap=True, markup=markup)
