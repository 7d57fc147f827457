"""What the torch bodies share: dtypes, chunks of query rows with the keys that they see, and what lies outside."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TILE_BYTES = 2**20  # of one head's [R, C] tile on a CPU: larger tiles leave the second-level cache


class Chunk(NamedTuple):
    """Query rows begin .. end - 1, and the keys first .. last - 1 that any of them may see."""

    begin: int
    end: int
    first: int
    last: int


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 stays float64; everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def fill_unseen(x: Tensor, key_start: Tensor, key_end: Tensor, value: float) -> Tensor:
    """x[r, c] = value where c < key_start[r] or c >= key_end[r], in place; x is [R, C].

    The intervals do not decrease, so only columns below the last start and from the first end on can be unseen.
    """
    if x.shape[0] == 0:
        return x
    last_start, first_end = int(key_start[-1]), int(key_end[0])
    columns = torch.arange(x.shape[1], device=x.device)
    if last_start > 0:
        x[:, :last_start].masked_fill_(columns[:last_start] < key_start[:, None], value)
    if first_end < x.shape[1]:
        x[:, first_end:].masked_fill_(columns[first_end:] >= key_end[:, None], value)
    return x


def plan_chunks(
    key_start: Tensor, key_end: Tensor, tiles: int, itemsize: int, workspace_bytes: int, cached_rows: int = 16
) -> list[Chunk]:
    """Cuts the queries into chunks whose `tiles` tiles [R, C] fit workspace_bytes; at least one row each.

    C counts the keys from the chunk's first key_start to its last key_end. On a CPU one tile stays in the second-level
    cache as well, unless that leaves fewer than `cached_rows` rows. Where queries are missing in between, a chunk of so
    many rows ends before its first row sees an eighth fewer keys than its last: rows far apart share few columns.

    Returns:
        The chunks that see a key, in order.
    """
    starts, ends = key_start.tolist(), key_end.tolist()
    limit = workspace_bytes // (tiles * itemsize)
    cached = _TILE_BYTES // itemsize if key_start.device.type == "cpu" else limit
    chunks, begin = [], 0
    while begin < len(starts):
        end = begin + 1
        while end < len(starts):
            area = (end + 1 - begin) * (ends[end] - starts[begin])
            if area > limit or (area > cached and end - begin >= cached_rows):
                break
            far = 8 * (ends[end] - ends[begin]) > ends[begin] - starts[begin]
            if far and ends[end] > ends[end - 1] + 1 and end - begin >= cached_rows:
                break
            end += 1
        if ends[end - 1] > starts[begin]:
            chunks.append(Chunk(begin, end, starts[begin], ends[end - 1]))
        begin = end
    return chunks


def local_intervals(key_start: Tensor, key_end: Tensor, rows: slice, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """The intervals of some rows of the chunk, counted from its first key."""
    keys = chunk.last - chunk.first
    starts, ends = key_start[rows] - chunk.first, key_end[rows] - chunk.first
    return starts.clamp_(0, keys), ends.clamp_(0, keys)


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """c * tanh(logits / c) in place; None leaves them."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
