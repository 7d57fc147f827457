"""What every command does: plain errors, exit codes, and a word where imports take time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from flash_indexer.recipe.progress import print_end, print_error

console = Console()

Queries = Annotated[
    float,
    typer.Option(
        help="Part of the queries that have a loss, drawn anew every step; 0.125 is recommended for sequences of 8,192 "
        "tokens or more, 0.25 for shorter ones."
    ),
]
"""The type of `warmup --queries`."""


def say_that_imports_take_time() -> None:
    """In one process: those of `torchrun -m flash_indexer` don't know yet which of them speaks."""
    if not sys.argv[0].endswith("__main__.py"):
        console.print("importing torch and transformers", highlight=False)


def was_typed(context: typer.Context, name: str) -> bool:
    """Whether the option of this name was given, not left to its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@contextmanager
def plain_errors() -> Iterator[None]:
    """Expected failures end with their message alone and exit code 1; bugs keep their traceback.

    Ctrl-C ends with 130 and SIGTERM with 143, as shells expect of what they end.
    """
    try:
        yield
    except (ValueError, OSError, ArithmeticError) as error:
        print_error(error)
        if isinstance(error, ConnectionError):
            _end_if_shared(1)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        code = 128 + int(getattr(error, "number", 2))
        if getattr(error, "speaks", True):
            print_end(str(error) or "interrupted")
        _end_if_shared(code)
        raise typer.Exit(code) from error


def _end_if_shared(code: int) -> None:
    """Interrupted before torch was imported, there is no group of processes."""
    if "torch" in sys.modules:
        from flash_indexer.recipe.processes import end_if_shared

        end_if_shared(code)
