"""What the GPU kernels work on: chunks of query rows that fit the workspace, and each kernel's list of work items.

Scores are held as 128 x 128 tiles, only those that some query of a 128-token block can see, tile after tile, so that a
chunk's memory is the area it sees, whatever the layout (causal, packed, sliding window). The lists are made on the host
from the intervals' contents; they are kept as long as the interval tensors live unchanged, so that the layers of a
model, which share their intervals, wait for the device once a batch.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from flash_indexer.intervals import check_intervals

Made = TypeVar("Made")
_GREEDY_ROUNDS = 16
TILE = 128
BYTES_PER_TILE = TILE * TILE * (4 + 4 + 2)  # teacher scores, index scores, di
_SIDE_BY_SIDE = {False: 1, True: 8}  # token blocks whose tiles are computed together; one key head, many
_PARTS_PER_PROCESSOR = 12  # pieces of d_index_k's work for each multiprocessor: small enough to balance them
_SHARE_OF_PARTIALS = 8  # at most this fraction of the workspace holds partial sums of d_index_k


class Sizes(NamedTuple):
    """What a plan depends on besides the intervals."""

    S: int
    E: int
    padded_heads: int
    grouped: bool
    workspace_bytes: int
    processors: int


@dataclass(frozen=True)
class Chunk:
    """Rows begin .. end - 1 (begin a multiple of 128), `tiles` score tiles, `slots` partial sums of d_index_k.

    Of the keys, those before `keys` are read, in whole tiles.

    Items are flat int32 tensors with four numbers each; item n belongs to the CTA n % grid.
    score (token, key, tile, 0) · query (token, key tile, count, tile base) · key (key tile, block, end, slot or -1) ·
    reduce (key tile, slot, end, 0)
    """

    begin: int
    end: int
    tiles: int
    slots: int
    keys: int
    score: Tensor
    query: Tensor
    key: Tensor
    reduce: Tensor


@dataclass(frozen=True)
class Plan:
    """blocks: int32 [blocks * 4], (tile base, first key tile, end, 0) of every 128-token block, bases counted in its
    chunk. weight: float32 [T], 1/n for the n queries that see a key, else 0. complete: every token is in some query
    item, so that outputs need no zeros beforehand."""

    chunks: tuple[Chunk, ...]
    blocks: Tensor
    weight: Tensor
    complete: bool


class _Kept(NamedTuple):
    """What was made from a key_start tensor, with what must be unchanged for it to hold."""

    key_end: Tensor
    versions: tuple[int, int]
    made: dict[Hashable, Any]


_kept: Any = WeakTensorKeyDictionary()


def plan(key_start: Tensor, key_end: Tensor, sizes: Sizes) -> Plan:
    """The plan of these intervals: kept, or made after reading (and checking) their contents.

    Raises:
        ValueError: as `check_intervals`, when the contents are no valid intervals.
    """
    return kept(key_start, key_end, sizes.S, sizes, lambda start, end: make_plan(start, end, sizes, key_start.device))


def kept(
    key_start: Tensor, key_end: Tensor, num_keys: int, sizes: Hashable, make: Callable[[Tensor, Tensor], Made]
) -> Made:
    """make(key_start, key_end) of intervals checked and copied to the CPU; kept while the tensors live unchanged."""
    versions = None if key_start.is_inference() or key_end.is_inference() else (key_start._version, key_end._version)
    old: _Kept | None = _kept.get(key_start) if versions is not None else None
    if old is not None and (old.key_end is not key_end or old.versions != versions):
        old = None
    if old is not None and sizes in old.made:
        return cast("Made", old.made[sizes])
    check_intervals(key_start, key_end, num_keys)
    made = make(key_start.cpu(), key_end.cpu())
    if versions is not None:
        if old is None:
            old = _kept[key_start] = _Kept(key_end, versions, {})
        old.made[sizes] = made
    return made


def make_plan(key_start: Tensor, key_end: Tensor, sizes: Sizes, device: torch.device) -> Plan:
    """The plan of valid intervals on the CPU, its lists on `device`."""
    return plan_spans(key_start, key_end, sizes, device, cut(*visible_tiles(key_start, key_end, TILE), sizes))


def plan_spans(
    key_start: Tensor, key_end: Tensor, sizes: Sizes, device: torch.device, spans: list[tuple[int, int]]
) -> Plan:
    """The plan whose chunks are these runs of 128-token blocks, each of which sees a key."""
    first, end = visible_tiles(key_start, key_end, TILE)
    base = torch.zeros_like(first)
    lists: list[Tensor] = []
    shapes = []
    for begin, stop in spans:
        count = end[begin:stop] - first[begin:stop]
        base[begin:stop] = count.cumsum(0) - count - first[begin:stop]
    blocks = torch.stack([base, first, end, torch.zeros_like(base)], 1)
    tokens = TILE // sizes.padded_heads
    group_first, group_end = visible_tiles(key_start, key_end, tokens)
    for begin, stop in spans:
        lists.append(score_items(blocks, begin, stop, sizes.grouped))
        lists.append(query_items(group_first, group_end, blocks, begin, stop, tokens, sizes.processors))
        items, reduce, slots = key_items(first, end, begin, stop, sizes)
        lists += [items, reduce]
        keys = min(int(end[begin:stop].max()) * TILE, sizes.S)
        shapes.append((begin, stop, int((end - first)[begin:stop].sum()), slots, keys))
    flat = torch.cat([*(x.reshape(-1) for x in lists), blocks.reshape(-1)]).to(torch.int32)
    flat = sent(flat, device)
    pieces = torch.split(flat, [*(x.numel() for x in lists), blocks.numel()])
    T = key_start.shape[0]
    chunks = tuple(
        Chunk(b * TILE, min(e * TILE, T), tiles, slots, keys, *pieces[4 * n : 4 * n + 4])
        for n, (b, e, tiles, slots, keys) in enumerate(shapes)
    )
    return Plan(
        chunks, pieces[-1], mean_weight(key_start, key_end).to(device), T > 0 and bool((group_end > group_first).all())
    )


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on the device, without waiting for it."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def mean_weight(key_start: Tensor, key_end: Tensor) -> Tensor:
    """float32 [T]: 1/n for the n queries that see a key, else 0."""
    seen = key_end > key_start
    return (seen.double() / seen.sum().clamp_min(1)).float()


def visible_tiles(key_start: Tensor, key_end: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """First and end key tile that any query of each group of `rows` tokens sees; equal where none sees a key."""
    T = key_start.shape[0]
    groups = -(-T // rows)
    seen = key_end > key_start
    big = torch.iinfo(torch.int32).max
    low = torch.full((groups * rows,), big, dtype=torch.int64)
    high = torch.zeros(groups * rows, dtype=torch.int64)
    low[:T] = torch.where(seen, key_start.long(), big)
    high[:T] = torch.where(seen, key_end.long(), 0)
    first = low.view(groups, rows).amin(1) // TILE
    end = (high.view(groups, rows).amax(1) + TILE - 1) // TILE
    return torch.where(end > 0, first, 0), end


def cut(first: Tensor, end: Tensor, sizes: Sizes) -> list[tuple[int, int]]:
    """Runs of blocks whose tiles fit the workspace, one block at least. A run that sees nothing is left out.

    A run shorter than the workspace allows is taken where its items fill the processors' rounds better.
    """
    limit = max(sizes.workspace_bytes * (_SHARE_OF_PARTIALS - 1) // _SHARE_OF_PARTIALS // BYTES_PER_TILE, 1)
    counts = (end - first).tolist()
    spans, begin, blocks = [], 0, len(counts)
    while begin < blocks:
        stop, area = begin, 0
        while stop < blocks and (stop == begin or area + counts[stop] <= limit):
            area += counts[stop]
            stop += 1
        if stop < blocks:
            stop = begin + _even(counts[begin:stop], sizes)
        if any(counts[begin:stop]):
            spans.append((begin, stop))
        begin = stop
    return spans


def _even(counts: list[int], sizes: Sizes) -> int:
    """The number of blocks, at least half of those given, whose items fill whole rounds of the processors best.

    Scores take about three quarters of the time, each pass over index_q an eighth.
    """

    def filled(items: int) -> float:
        return items / sizes.processors / max(-(-items // sizes.processors), 1)

    tiles = list(itertools.accumulate(counts))

    def share(n: int) -> float:
        return 0.75 * filled(tiles[n - 1]) + 0.25 * filled(n * sizes.padded_heads)

    return max(range(max(len(counts) // 2, 1), len(counts) + 1), key=lambda n: (round(share(n), 3), n))


def score_items(blocks: Tensor, begin: int, stop: int, grouped: bool) -> Tensor:
    """(token, key, tile, 0) of every tile of blocks begin .. stop - 1.

    One key head: block after block, so that the queries of one or two blocks are read from the L2 cache. Many key
    heads: 8 blocks side by side, so that queries and keys of the tiles under way are read equally often.
    """
    base, first, end = blocks[begin:stop, 0], blocks[begin:stop, 1], blocks[begin:stop, 2]
    block, place = ragged(end - first)
    key_tile = first[block] + place
    items = torch.stack([(begin + block) * TILE, key_tile * TILE, base[block] + key_tile, torch.zeros_like(block)], 1)
    side = _SIDE_BY_SIDE[grouped]
    return items[torch.argsort((block // side * (1 << 40)) + key_tile * side + block % side)]


def query_items(
    group_first: Tensor, group_end: Tensor, blocks: Tensor, begin: int, stop: int, tokens: int, processors: int
) -> Tensor:
    """(token, first key tile, count, tile base) of every group of `tokens` tokens that sees a key, longest first."""
    groups = torch.arange(begin * TILE // tokens, min(stop * TILE // tokens, group_first.shape[0]))
    count = group_end[groups] - group_first[groups]
    groups, count = groups[count > 0], count[count > 0]
    base = blocks[groups * tokens // TILE, 0]
    return balanced(torch.stack([groups * tokens, group_first[groups], count, base], 1), count, processors)


def key_items(first: Tensor, end: Tensor, begin: int, stop: int, sizes: Sizes) -> tuple[Tensor, Tensor, int]:
    """Items (key tile, block, end, slot), reductions (key tile, slot, end, 0), and the number of slots.

    The blocks that see a key tile are a run, which is cut at multiples of some length and where a block sees no key at
    all; the first part adds to d_index_k itself (slot -1), every other writes a partial sum to a slot of its own. Parts
    of the same blocks come one after the other, so that the CTAs under way read the same queries.
    """
    f, e = first[begin:stop], end[begin:stop]
    seen = e > f
    low, high = int(f[seen].min()), int(e.max())
    tiles = torch.arange(low, high)
    # intervals do not decrease: a tile's blocks are those with first <= tile < end, from the first such to the last
    number = torch.arange(begin, stop)[seen]
    f, e = f[seen].contiguous(), e[seen].contiguous()
    left = torch.searchsorted(e, tiles, right=True)
    right = torch.searchsorted(f, tiles, right=True)
    tiles, left, right = tiles[right > left], left[right > left], right[right > left]
    slots = sizes.workspace_bytes // _SHARE_OF_PARTIALS // (TILE * sizes.E * 4)
    longest = max(int((right - left).sum()) // (_PARTS_PER_PROCESSOR * sizes.processors), 1)
    segments, starts = _segments(number, longest)
    while int((segments[right - 1] - segments[left]).sum()) > slots and longest < number.shape[0]:
        longest *= 2
        segments, starts = _segments(number, longest)
    parts = segments[right - 1] - segments[left] + 1
    owner, place = ragged(parts)
    segment = segments[left][owner] + place
    item_begin = number[torch.maximum(left[owner], starts[segment])]
    item_end = number[torch.minimum(right[owner], starts[segment + 1]) - 1] + 1
    used = (parts - 1).cumsum(0)
    slot = torch.where(place == 0, -1, used[owner] - parts[owner] + place)
    items = torch.stack([tiles[owner], item_begin, item_end, slot], 1)
    split = parts > 1
    reduce = torch.stack([tiles[split], (used - parts + 1)[split], used[split], torch.zeros_like(used[split])], 1)
    order = torch.argsort(segment, descending=True, stable=True)
    return dealt(items[order], (item_end - item_begin)[order], sizes.processors), reduce, int(used[-1])


def _segments(number: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Cuts the blocks that see a key into runs of neighbours, `longest` at most: each one's run, the runs' starts."""
    place = torch.arange(number.shape[0])
    new = place % longest == 0
    new[1:] |= number[1:] != number[:-1] + 1
    return new.cumsum(0) - 1, torch.cat([place[new], torch.tensor([number.shape[0]])])


def dealt(items: Tensor, cost: Tensor, processors: int) -> Tensor:
    """Each item in turn to the CTA with the least work so far; CTAs that get fewer items than others get empty ones."""
    grid = min(processors, items.shape[0])
    loads = [(0, cta) for cta in range(grid)]
    hands: list[list[int]] = [[] for _ in range(grid)]
    for item, work in enumerate(cost.tolist()):
        load, cta = loads[0]
        hands[cta].append(item)
        heapq.heapreplace(loads, (load + work, cta))
    rounds = max(len(hand) for hand in hands)
    flat = torch.tensor([hand + [items.shape[0]] * (rounds - len(hand)) for hand in hands]).T.reshape(-1)
    empty = torch.tensor([[0, 0, 0, -1]], dtype=items.dtype)
    return torch.cat([items, empty])[flat]


def balanced(items: Tensor, cost: Tensor, processors: int) -> Tensor:
    """Items in an order in which item n is CTA n % processors' and each CTA's cost about the same.

    Longest first, every second round of `processors` items backwards; in the last rounds the longest go to those CTAs
    that have least.
    """
    count, rounds = items.shape[0], -(-items.shape[0] // processors)
    order = torch.full((rounds * processors,), -1)
    order[:count] = torch.argsort(cost, descending=True, stable=True)
    order = order.view(rounds, processors)
    dealt = max(rounds - _GREEDY_ROUNDS, 0)
    order[1:dealt:2] = order[1:dealt:2].flip(1)
    load = cost[order[:dealt].flatten()].view(dealt, processors).sum(0)
    for n in range(dealt, rounds):
        here = order[n][order[n] >= 0]
        place = torch.argsort(load, stable=True)[: here.numel()]
        order[n] = -1
        order[n, place] = here
        load[place] += cost[here]
    if rounds:
        order = order[:, torch.argsort(order[-1] < 0, stable=True)]  # who has none of the last round comes last
    return items[order[order >= 0]]


def ragged(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For each unit of counts, its owner and its place among the owner's units."""
    owner = torch.repeat_interleave(torch.arange(counts.shape[0]), counts)
    return owner, torch.arange(owner.shape[0]) - (counts.cumsum(0) - counts)[owner]
