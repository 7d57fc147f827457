"""Loading kernels, and what a launch needs of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

Wanted = tuple[str, Mapping[str, int]]
"""A kernel by its name and its static sizes."""


@cache
def load(name: str, **static: int) -> Any:
    """The compiled kernel with these static sizes, a callable."""
    from flash_indexer.kernels import cache

    return cache.load(name, **static)


def prepare(kernels: Sequence[Wanted]) -> None:
    """Has these kernels compiled, those that are missing side by side."""
    from flash_indexer.kernels import cache

    cache.prepare(*((name, tuple(static.items())) for name, static in kernels))


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream for kernels beside those of the current stream.

    Whoever launches on it has it wait for the current stream before, also before memory is taken on it, and the current
    stream for it after. All callers share it: what one of them waits for, those behind it wait for too.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def aligned(x: Tensor) -> Tensor:
    """Contiguous, and beginning at a multiple of 16 bytes, as the copy engine wants it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def on_its_way(x: Tensor) -> tuple[Tensor, torch.Event]:
    """A copy of x on the host, there once the event has come. Work that is launched meanwhile is not waited for."""
    here = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    here.copy_(x, non_blocking=True)
    known = torch.Event("cuda")
    known.record()
    return here, known


def scale(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """gradients *= factor, in place, in one launch: of index_q, index_k and index_weights, empty where not wanted.

    A factor of 1 costs no memory traffic. Contiguous; factor [] on the same device.
    """
    tables = [x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(1, 1) for x in gradients]
    rows = [table.shape[0] if x.numel() else 0 for table, x in zip(tables, gradients, strict=True)]
    if any(rows):
        load("scale")(*tables, factor.float().reshape(1), *rows)
