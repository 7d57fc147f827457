"""Rows of keys read and added to by index, in torch: what the sparse bodies share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.ops.sparse.selection import Selection

_CPU_ROWS = 128  # queries of a chunk, so that its tiles stay near the cache


class Slots(NamedTuple):
    """The selected keys of some query rows: int64 [R, W], 0 where absent (bool [R, W]); W is their largest count."""

    rows: slice
    keys: Tensor
    absent: Tensor


def chunks(selection: Selection, numbers: int, itemsize: int, workspace_bytes: int) -> Iterator[Slots]:
    """Runs of query rows, one at least, whose `numbers` numbers a slot fit workspace_bytes; those without keys not."""
    indices, count = selection.indices, selection.count
    T = indices.shape[0]
    most = int(count.max()) if T else 0
    step = max(1, workspace_bytes // (max(1, most) * numbers * itemsize))
    if indices.device.type == "cpu":
        step = min(step, _CPU_ROWS)
    for begin in range(0, T, step):
        rows = slice(begin, min(begin + step, T))
        width = int(count[rows].max())
        if width:
            absent = torch.arange(width, device=count.device) >= count[rows, None]
            yield Slots(rows, indices[rows, :width].long().masked_fill_(absent, 0), absent)


def gather_rows(x: Tensor, slots: Slots, dtype: torch.dtype) -> Tensor:
    """x[keys] in `dtype`, zeros where absent: x [S, N] -> [R, W, N]."""
    return x[slots.keys].to(dtype).masked_fill_(slots.absent[..., None], 0.0)


def add_rows(out: Tensor, slots: Slots, rows: Tensor, deterministic: bool) -> None:
    """out[keys] += rows, but for those that are absent: rows [R, W, N], out [S, N].

    On the CPU additions are in one order anyway; elsewhere `deterministic` sorts them first.
    """
    present = ~slots.absent
    keys, values = slots.keys[present], rows[present]
    if deterministic and out.device.type != "cpu":
        out.index_put_((keys,), values, accumulate=True)
    else:
        out.index_add_(0, keys, values)
