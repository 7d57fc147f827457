"""What the attention kernels work on: row tiles of a few tokens with their runs of key tiles, and the other way round.

A row tile holds R rows: the H/G heads of one key head, of R // (H/G) tokens. Lists are int32, eight numbers an item, as
`kernels.device.items` describes them; item n belongs to the CTA n % grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.ops.worklists import TILE, balance, cached, ragged, to_device

_LATENT = 64  # rows of an item and keys of a tile where the attention is latent (MLA)
_PARTS_PER_PROCESSOR = (5, 16)  # pieces of d_index_k's work for each multiprocessor: from, to
_LENGTHS = 24  # of pieces, from which the best is taken
_ITEM_STEPS = 1.5  # what an item costs besides its tiles, in tiles
_SLOT_STEPS = 0.012  # what a partial sum costs, written and read, in tiles of a multiprocessor


class GradientItems(NamedTuple):
    """query, key: items. reduce: (key tile, slot, end, 0). slots: partial sums of d_index_k."""

    query: Tensor
    key: Tensor
    reduce: Tensor
    slots: int


class Tiles(NamedTuple):
    """Key heads, tokens of a row tile and keys of a key tile; the GPU's multiprocessors."""

    groups: int
    tokens: int
    keys: int
    processors: int


def attention_items(key_start: Tensor, key_end: Tensor, num_keys: int, tiles: Tiles) -> Tensor:
    """Items of every row tile, `RowItem`; cached with the intervals."""

    def make(start: Tensor, end: Tensor) -> Tensor:
        return to_device(row_items(start, end, tiles).reshape(-1), key_start.device)

    return cached(key_start, key_end, num_keys, ("attention", tiles), make)


def latent_items(key_start: Tensor, key_end: Tensor, num_keys: int, heads: int, processors: int) -> Tensor:
    """Items of attention in MLA's form, `LatentItem`; cached with the intervals."""

    def make(start: Tensor, end: Tensor) -> Tensor:
        return to_device(latent_rows(start, end, heads, processors).reshape(-1), key_start.device)

    return cached(key_start, key_end, num_keys, ("latent", heads, processors), make)


def latent_rows(key_start: Tensor, key_end: Tensor, heads: int, processors: int) -> Tensor:
    """int32 [items, 8], (row, first key, pairs of key tiles, last start, first end, 0, 0, 0), longest first."""
    row = torch.arange(0, key_start.shape[0] * heads, _LATENT)
    first, last = row // heads, (row + _LATENT - 1).clamp(max=key_start.shape[0] * heads - 1) // heads
    start, end = key_start.long(), key_end.long()
    pairs = -(-(end[last] - start[first]) // (2 * _LATENT))
    zero = torch.zeros_like(row)
    pairs = pairs.clamp(min=1)
    items = torch.stack([row, end[last] - _LATENT, pairs, start[last], end[first], zero, zero, zero], 1)
    return balance(items, pairs, processors).to(torch.int32)


def gradient_items(
    key_start: Tensor, key_end: Tensor, num_keys: int, query: Tiles, key_tokens: int, max_slots: int
) -> GradientItems:
    """Items of the two gradient kernels; row tiles of `key_tokens` tokens where the keys are stationary."""

    def make(start: Tensor, end: Tensor) -> GradientItems:
        rows = row_items(start, end, query)
        keys, reduce, slots = key_items(start, end, num_keys, key_tokens, max_slots, query.processors)
        flat = to_device(torch.cat([x.reshape(-1).to(torch.int32) for x in (rows, keys, reduce)]), key_start.device)
        a, b, c = torch.split(flat, [rows.numel(), keys.numel(), reduce.numel()])
        return GradientItems(a, b, c, slots)

    return cached(key_start, key_end, num_keys, ("gradients", query, key_tokens, max_slots), make)


class RowTiles(NamedTuple):
    """Of each row tile: first and last interval's ends, [tiles] each. Nothing decreases."""

    first_start: Tensor
    last_start: Tensor
    first_end: Tensor
    last_end: Tensor


def row_tiles(key_start: Tensor, key_end: Tensor, tokens: int) -> RowTiles:
    """Groups of `tokens` tokens; the last may be short."""
    T = key_start.shape[0]
    first = torch.arange(0, T, tokens)
    last = (first + tokens - 1).clamp(max=T - 1)
    start, end = key_start.long(), key_end.long()
    return RowTiles(*(x.contiguous() for x in (start[first], start[last], end[first], end[last])))


def row_items(key_start: Tensor, key_end: Tensor, tiles: Tiles) -> Tensor:
    """int32 [items, 8], longest first. Key tiles are counted from the right.

    Where all rows see the same first key, the leftmost tile begins there and needs no mask; elsewhere the rightmost one
    ends at the last key that a row sees.
    """
    rows = row_tiles(key_start, key_end, tiles.tokens)
    length, keys = rows.last_end - rows.first_start, tiles.keys
    count = ((length + keys - 1) // keys).clamp(min=1)
    aligned = rows.first_start == rows.last_start
    end = torch.where(aligned, rows.first_start + count * keys, rows.last_end)
    right = torch.minimum((end - rows.first_end) // keys + 1, count)
    left = torch.minimum(torch.maximum((end - rows.last_start) // keys, right), count)
    zero = torch.zeros_like(count)
    token = torch.arange(count.shape[0]) * tiles.tokens
    seen = rows.last_end - end + keys
    items = torch.stack([token, zero, end - keys, count, right, left, seen, zero], 1)
    items = items.repeat_interleave(tiles.groups, 0)
    items[:, 1] = torch.arange(tiles.groups).repeat(count.shape[0])
    return balance(items, items[:, 3] + 1, tiles.processors).to(torch.int32)


def key_items(
    key_start: Tensor, key_end: Tensor, num_keys: int, tokens: int, max_slots: int, processors: int
) -> tuple[Tensor, Tensor, int]:
    """Items (key tile, row tile, end, first whole, end of whole, slot, 0, 0), reductions, and the number of slots.

    The row tiles that see some of a key tile are a run, cut into parts of some length; the first part adds to d_index_k
    itself (slot -1), every other writes a partial sum to a slot of its own.
    """
    rows = row_tiles(key_start, key_end, tokens)
    tile = torch.arange(-(-num_keys // TILE))
    low, high = tile * TILE, (tile * TILE + TILE).clamp(max=num_keys)
    begin = torch.searchsorted(rows.last_end, low, right=True)
    end = torch.searchsorted(rows.first_start, high)
    whole = torch.minimum(torch.maximum(torch.searchsorted(rows.first_end, high), begin), end)
    stop = torch.minimum(torch.maximum(torch.searchsorted(rows.last_start, low, right=True), whole), end)
    seen = end > begin
    tile, begin, end, whole, stop = (x[seen] for x in (tile, begin, end, whole, stop))
    if tile.numel() == 0:
        return torch.empty(0, 8, dtype=torch.int32), torch.empty(0, 4, dtype=torch.int32), 0
    parts = part_counts(end - begin, max_slots, processors)
    owner, place = ragged(parts)
    size = (end - begin)[owner]
    first = begin[owner] + size * place // parts[owner]
    last = begin[owner] + size * (place + 1) // parts[owner]
    middle = torch.minimum(torch.maximum(whole[owner], first), last)
    finish = torch.minimum(torch.maximum(stop[owner], middle), last)
    used = (parts - 1).cumsum(0)
    slot = torch.where(place == 0, -1, used[owner] - parts[owner] + place)
    zero = torch.zeros_like(slot)
    items = torch.stack([tile[owner], first, last, middle, finish, slot, zero, zero], 1)
    split = parts > 1
    reduce = torch.stack([tile[split], (used - parts + 1)[split], used[split], torch.zeros_like(used[split])], 1)
    return balance(items, (last - first) + _ITEM_STEPS, processors), reduce, int(used[-1])


def part_counts(runs: Tensor, max_slots: int, processors: int) -> Tensor:
    """Into how many parts to cut runs of row tiles, at most max_slots more than there are runs if that can be.

    Small parts even out what the multiprocessors get, large ones write fewer partial sums: the length for which the
    busiest one ends first.
    """
    best, chosen = float("inf"), torch.ones_like(runs)
    longest, shortest = (max(int(runs.sum()) // (number * processors), 1) for number in _PARTS_PER_PROCESSOR)
    for length in range(shortest, longest + 1, (longest - shortest) // _LENGTHS + 1):
        parts = -(-runs // length)
        slots = int((parts - 1).sum())
        if slots > max_slots:
            continue
        owner, _ = ragged(parts)
        cost = torch.sort(runs[owner] / parts[owner] + _ITEM_STEPS, descending=True).values
        rounds = -(-cost.numel() // processors)
        table = torch.nn.functional.pad(cost, (0, rounds * processors - cost.numel())).view(rounds, processors)
        table[1::2] = table[1::2].flip(1)
        total = float(table.sum(0).max()) + _SLOT_STEPS * slots
        if total < best:
            best, chosen = total, parts
    return chosen
