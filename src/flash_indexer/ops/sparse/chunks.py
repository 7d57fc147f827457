"""Runs of query rows with their selected keys, in torch: gathered, or a range of keys under a mask.

Where the selected keys of the rows are spread thinly, each query's keys are gathered: tiles are [R, W]. Elsewhere the
rows share the range of keys that holds them, under a mask: tiles are [R, C], and a product needs no copies of keys. A
mask multiplies by zero, so it is for operands that are finite; where they are not, keys are gathered. Both ways a key
that a query did not select has no part in its results.

R query rows of a chunk, W their largest number of selected keys, C the keys of a range, P heads taken together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.ops.sparse.selection import Selection

THIN = 16.0  # a range of more keys than this for each selected one: on a CPU gathering is faster than a mask
_GATHERED, _GATHERED_HEAD, _MASKED = 16.0, 0.15, 0.7  # ns on an H100, docs/kernels.md: of a selected key for each key
# head and each head, and of a key in the range for each head
_CPU_ROWS = 128  # queries of a chunk, so that its tiles stay near the cache


class Chunk(NamedTuple):
    """Some query rows and their selected keys.

    keys: int64 [R, W], 0 where absent (bool [R, W]). near: the range that holds them all, where they are under a mask.
    unselected: bool [R, C] in that range, else `absent`.
    """

    rows: slice
    keys: Tensor
    absent: Tensor
    near: slice | None
    unselected: Tensor

    def tile(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of x [S, N] in `dtype`: [C, N] of the range, else [R, W, N] with zeros where absent."""
        if self.near is not None:
            return x[self.near].to(dtype)
        return x[self.keys].to(dtype).masked_fill_(self.absent[..., None], 0.0)

    def outer(self, weights: Tensor, rows: Tensor) -> Tensor:
        """A tile: sum over p, r of a range, of weights[r,p,s] * rows[r,p]; weights [R, P, C or W], rows [R, P, N]."""
        if self.near is None:
            return torch.bmm(weights.mT, rows)
        return torch.mm(weights.flatten(0, 1).T, rows.flatten(0, 1))

    def add(self, out: Tensor, tile: Tensor, deterministic: bool) -> None:
        """out[s] += the tile's rows of s; out [S, N].

        On the CPU additions are in one order anyway; elsewhere `deterministic` sorts gathered ones first.
        """
        if self.near is not None:
            out[self.near] += tile
            return
        present = ~self.absent
        keys, values = self.keys[present], tile[present]
        if deterministic and out.device.type != "cpu":
            out.index_put_((keys,), values, accumulate=True)
        else:
            out.index_add_(0, keys, values)

    def head_runs(self, heads: slice) -> Iterator[slice]:
        """Heads that are taken together: all of `heads` where keys were gathered, else one, whose tile is small."""
        step = heads.stop - heads.start if self.near is None else 1
        yield from (slice(h, h + step) for h in range(heads.start, heads.stop, step))

    def from_slots(self, x: Tensor) -> Tensor:
        """x [T, K] at the chunk's tile, zeros where not selected: [R, C] or [R, W]."""
        values = x[self.rows, : self.keys.shape[1]].masked_fill(self.absent, 0.0)
        if self.near is None:
            return values
        C = self.unselected.shape[1]
        wide = values.new_zeros(len(values), C + 1).scatter_(1, self._local(), values)
        return wide[:, :C]

    def to_slots(self, values: Tensor, out: Tensor, absent: float) -> None:
        """out [T, K] at the chunk's slots = values of the tile, `absent` behind the selected ones."""
        if self.near is not None:
            values = values.gather(1, self._local().clamp_max_(values.shape[1] - 1))
        out[self.rows, : self.keys.shape[1]] = values.masked_fill(self.absent, absent)

    def _local(self) -> Tensor:
        """Keys counted from the first of the range; C where absent."""
        if self.near is None:
            raise ValueError("Chunk: near must be a range here, got None")
        first, last = int(self.near.start), int(self.near.stop)
        return (self.keys - first).masked_fill_(self.absent, last - first)


def thin(device: torch.device, heads: int, key_heads: int) -> float:
    """Keys of a range for each selected one, above which gathering them is faster than a mask.

    A mask is taken a head at a time, a gathered key serves all heads of its own: on a GPU, where small steps take as
    long as their launches, this decides.
    """
    if device.type == "cpu":
        return THIN
    return (key_heads * _GATHERED + heads * _GATHERED_HEAD) / (heads * _MASKED)


def chunks(
    selection: Selection,
    numbers: int,
    workspace_bytes: int,
    by_key: tuple[Tensor, ...],
    by_row: tuple[Tensor, ...],
    most_keys: float = THIN,
) -> Iterator[Chunk]:
    """Runs of rows, one at least, whose `numbers` numbers a slot fit workspace_bytes; those without keys not.

    numbers: of a query and one of its keys where they are gathered, in by_key[0]'s compute dtype. by_key [S, ...],
    by_row [T, ...]: what the tiles' products read, and a mask may multiply by zero. most_keys: as `thin` says.
    """
    indices, count, T = selection.indices, selection.count, len(selection.indices)
    itemsize = max(by_key[0].element_size(), 4)
    most = int(count.max()) if T else 0
    step = max(1, workspace_bytes // (max(1, most) * max(numbers, 5 * math.ceil(most_keys)) * itemsize))
    if indices.device.type == "cpu":
        step = min(step, _CPU_ROWS)
    for begin in range(0, T, step):
        rows = slice(begin, min(begin + step, T))
        width = int(count[rows].max())
        if not width:
            continue
        absent = torch.arange(width, device=count.device) >= count[rows, None]
        keys = indices[rows, :width].long().masked_fill_(absent, 0)
        last = int(keys.max()) + 1
        first = int(keys.masked_fill(absent, last).min())
        near = slice(first, last)
        operands = (*(x[near] for x in by_key), *(x[rows] for x in by_row))
        if last - first > most_keys * width or not all(bool(x.isfinite().all()) for x in operands):
            yield Chunk(rows, keys, absent, None, absent)
            continue
        unselected = torch.ones(len(keys), last - first + 1, dtype=torch.bool, device=keys.device)
        unselected.scatter_(1, (keys - first).masked_fill_(absent, last - first), False)
        yield Chunk(rows, keys, absent, near, unselected[:, : last - first])


def total(sum_so_far: Tensor | None, tile: Tensor) -> Tensor:
    """A sum over heads within a chunk, so that what adds up over all queries has one term a chunk: fewer roundings."""
    return tile if sum_so_far is None else sum_so_far.add_(tile)


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y, x [R, P, N] and y [N, M] or [R, N, M], in one way: matmul's depends on what requires a gradient."""
    if y.ndim == 3:
        return torch.bmm(x, y)
    return torch.mm(x.flatten(0, 1), y).view(*x.shape[:2], y.shape[1])
