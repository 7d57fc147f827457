"""Which kernels there are: by name and generation of GPUs, what builds each, and for which static sizes.

A generation is a folder beside this file; its `sizes.BUILDERS` has a row for each of its kernels, and nothing else
lists them. A kernel is (name, ((size, value), ...)) with the sizes in the order of their names; `title` writes it for
people.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from flash_indexer.kernels.sm_90 import sizes as sm_90

Kernel = tuple[str, tuple[tuple[str, int], ...]]

GENERATIONS = {"sm_90": sm_90}
GENERATION = "sm_90"  # the one that kernels are loaded for
TARGET = {"kind": "cuda", "arch": sm_90.ARCH}


def names() -> list[str]:
    """Of the generation's kernels."""
    return list(GENERATIONS[GENERATION].BUILDERS)


def kernel(name: str, **static: int) -> Kernel:
    """The kernel of this name with these sizes."""
    return name, tuple(sorted(static.items()))


def every_kernel() -> Iterator[Kernel]:
    """All that the package can ask for; of attention, common sizes with the tiles as shipped."""
    for name, row in GENERATIONS[GENERATION].BUILDERS.items():
        yield from (kernel(name, **static) for static in row.compiled)


def program(wanted: Kernel) -> tuple[Any, dict[Any, Any]]:
    """The kernel's TileLang program and its pass configuration. Imports TileLang."""
    name, static = wanted
    row = GENERATIONS[GENERATION].BUILDERS[name]
    module = importlib.import_module(f"flash_indexer.kernels.{GENERATION}.{row.module}")
    return getattr(module, row.function)(**dict(static)), module.PASS_CONFIGS


def title(wanted: Kernel) -> str:
    """name:SIZE=VALUE,..., as `parse` reads it."""
    name, static = wanted
    sizes = ",".join(f"{size}={value}" for size, value in static)
    return f"{name}:{sizes}" if sizes else name


def parse(text: str) -> Kernel:
    """The kernel of a title.

    Raises:
        ValueError: where the text is none.
    """
    name, _, sizes = text.partition(":")
    pairs = [pair.partition("=") for pair in sizes.split(",") if pair]
    if name not in names() or not all(size and value.isdecimal() for size, _, value in pairs):
        raise ValueError(
            f"kernels: a kernel is written name:SIZE=VALUE,... with a name of {', '.join(names())}, got {text!r}"
        )
    return kernel(name, **{size: int(value) for size, _, value in pairs})
