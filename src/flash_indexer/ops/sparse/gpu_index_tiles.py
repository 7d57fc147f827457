"""Index gradients from dense tiles: di is scattered into tiles of 128 tokens by 128 keys, the rest of which is zero.

Nothing is added in memory, and tensor cores multiply zeros as well: faster than gathering where a query selects a good
part of the keys between its block's first and last, or where heads are few. The work lists are made on the device,
from a selection whose contents the host does not know.

Keys that are not finite are zeros here: a product with zero would spread them. Who selects one has NaN in its di.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import PADDED_HEADS
from flash_indexer.ops import launch
from flash_indexer.ops.sparse.problem import Leaves
from flash_indexer.ops.sparse.selection import Selection
from flash_indexer.ops.worklists import TILE

_SHARE_OF_PARTIALS = 8  # at most this fraction of the workspace holds partial sums of d_index_k
_PARTS_PER_PROCESSOR = 8  # pieces of d_index_k's work for each multiprocessor: small enough to balance them


class Spans(NamedTuple):
    """First and end key tile of what each group of tokens selects, int64; equal where it selects nothing."""

    first: Tensor
    end: Tensor


class Lists(NamedTuple):
    """Items of four int32 each, as `device/items.py` describes them; slots: of partial sums."""

    blocks: Tensor
    query: Tensor
    key: Tensor
    reduce: Tensor
    slots: int


def padded_heads(heads: int) -> int:
    """The number of index heads that the gradient kernels are built for, at least `heads`."""
    return next(padded for padded in PADDED_HEADS if padded >= heads)


def spans(selection: Selection, num_keys: int, tokens: int) -> Spans:
    """Of groups of so many tokens; keys ascend in a row."""
    indices, count, _ = selection
    groups = -(-len(count) // tokens)
    last = indices.gather(1, (count.long() - 1).clamp_min(0)[:, None])[:, 0]
    none = count <= 0
    low = F.pad(indices[:, 0].masked_fill(none, num_keys - 1), (0, groups * tokens - len(count)), value=num_keys - 1)
    high = F.pad(last.masked_fill(none, -1), (0, groups * tokens - len(count)), value=-1)
    end = high.view(groups, tokens).amax(1).clamp(-1, num_keys - 1).long().add_(TILE).div_(TILE, rounding_mode="floor")
    first = low.view(groups, tokens).amin(1).clamp(0, num_keys - 1).long().div_(TILE, rounding_mode="floor")
    return Spans(torch.minimum(first, end), end)


def lists(selection: Selection, sizes: tuple[int, int, int], workspace_bytes: int, processors: int) -> Lists:
    """Work on all rows of a selection. sizes: S, E and the padded number of heads."""
    S, E, IP = sizes
    device, key_tiles, tokens = selection.count.device, -(-S // TILE), TILE // IP
    first, end = spans(selection, S, TILE)
    number = torch.arange(len(first), device=device)
    base = number * key_tiles
    blocks = torch.stack([base, first, end, torch.zeros_like(base)], 1)

    first_of_group, end_of_group = spans(selection, S, tokens)
    token = torch.arange(len(first_of_group), device=device) * tokens
    at = first_of_group.clamp_max(key_tiles - 1)
    count = (end_of_group - at).clamp_min(1)  # of a group without keys: a tile of zeros
    query = torch.stack([token, at, count, token // TILE * key_tiles], 1)
    query = query[count.argsort(descending=True, stable=True)]

    most = workspace_bytes // _SHARE_OF_PARTIALS // (key_tiles * TILE * E * 4) + 1
    parts = max(1, min(_PARTS_PER_PROCESSOR * processors // key_tiles, most, len(first)))
    length = -(-len(first) // parts)
    parts = -(-len(first) // length)
    tile = torch.arange(key_tiles, device=device)
    seen = F.pad((first[:, None] <= tile) & (tile < end[:, None]), (0, 0, 0, parts * length - len(first)))
    seen = seen.view(parts, length, key_tiles)
    place = torch.arange(parts * length, device=device).view(parts, length, 1)
    begin = place.expand_as(seen).masked_fill(~seen, parts * length).amin(1)
    stop = (place + 1).expand_as(seen).masked_fill(~seen, 0).amax(1)
    begin = torch.minimum(begin, stop)  # an empty item
    slot = tile * (parts - 1) + torch.arange(-1, parts - 1, device=device)[:, None]
    slot[0] = -1
    key = torch.stack([tile.expand_as(begin), begin, stop, slot], -1).view(-1, 4)
    key = key[(stop - begin).view(-1).argsort(descending=True, stable=True)]
    reduce = torch.stack([tile, tile * (parts - 1), (tile + 1) * (parts - 1), torch.zeros_like(tile)], 1)
    blocks, query, key, reduce = (x.to(torch.int32).flatten() for x in (blocks, query, key, reduce))
    return Lists(blocks, query, key, reduce, key_tiles * (parts - 1))


def index_gradients(
    di: Tensor,
    leaves: Leaves,
    selection: Selection,
    out: tuple[Tensor | None, Tensor | None, Tensor | None],
    workspace_bytes: int,
) -> None:
    """Gradients of index_q, index_k and the weights: written, index_k's added. None: not wanted.

    Args:
        di: [T, K]. leaves: aligned, bfloat16, of 1 to 64 heads.
        out: d_index_q and d_index_weights are both given or both None.
    """
    index_q, index_k, weights = leaves
    T, S = index_q.shape[0], index_k.shape[0]
    key_tiles = -(-S // TILE)
    finite = index_k.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    rows_at_once = max(workspace_bytes * (_SHARE_OF_PARTIALS - 1) // _SHARE_OF_PARTIALS // (key_tiles * TILE * 2), TILE)
    rows_at_once = min(rows_at_once // TILE * TILE, -(-T // TILE) * TILE)
    tiles = torch.empty(rows_at_once * key_tiles, TILE, dtype=index_q.dtype, device=di.device)
    for begin in range(0, T, rows_at_once):
        rows = slice(begin, min(begin + rows_at_once, T))
        part = (None if out[0] is None else out[0][rows], out[1], None if out[2] is None else out[2][rows])
        _rows(di[rows], (index_q[rows], finite, weights[rows]), selection.rows(rows), part, tiles, workspace_bytes)


def _rows(
    di: Tensor,
    leaves: Leaves,
    selection: Selection,
    out: tuple[Tensor | None, Tensor | None, Tensor | None],
    tiles: Tensor,
    workspace_bytes: int,
) -> None:
    """Of rows whose tiles fit `tiles`."""
    (index_q, index_k, weights), (d_index_q, d_index_k, d_weights) = leaves, out
    (T, I, E), S, K = index_q.shape, index_k.shape[0], di.shape[1]
    IP, ctas = padded_heads(I), launch.processors(di.device)
    work = lists(selection, (S, E, IP), workspace_bytes, ctas)
    launch.load("sparse_scatter")(
        di.view(-1), selection.indices.view(-1), selection.count, tiles, K, -(-S // TILE)
    )  # fmt: skip
    if IP != I:
        index_q, weights = F.pad(index_q, (0, 0, 0, IP - I)), F.pad(weights, (0, IP - I))
    queries, weights = index_q.reshape(-1, E), weights.reshape(-1)
    if d_index_q is not None and d_weights is not None:
        count, unread = work.query.numel() // 4, tiles.view(torch.int32)
        launch.load("gradients_query", E=E, IP=IP)(
            queries, index_k, weights, tiles, d_index_q.view(-1, E), d_weights.view(-1), work.query, queries, unread,
            unread, I, 0, T, count, min(count, ctas), 0,
        )  # fmt: skip
    if d_index_k is not None:
        count = work.key.numel() // 4
        partials = torch.zeros(max(work.slots, 1) * TILE, E, device=di.device)
        launch.load("gradients_key", E=E, IP=IP)(
            queries, index_k, weights, tiles, d_index_k, partials, work.blocks, work.key, 0, count, min(count, ctas)
        )
        if work.slots:
            launch.load("gradients_reduce", E=E)(d_index_k, partials, work.reduce, work.reduce.numel() // 4)
