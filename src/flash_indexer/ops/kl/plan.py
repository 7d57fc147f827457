"""What the GPU kernels work on: chunks of query rows that fit the workspace, and each kernel's list of work items.

Scores are held as 128 x 128 tiles, only those that some query of a 128-token block can see, tile after tile, so that a
chunk's memory is the area it sees, whatever the layout (causal, packed, sliding window).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.ops.kl.plan_sizes import NARROW_TILES, SHARE_OF_PARTIALS, PlanSizes, cut, narrow_runs
from flash_indexer.ops.worklists import TILE, balance, cached, deal, one_thread, ragged, to_device, visible_tiles

_SIDE_BY_SIDE = {False: 1, True: 8}  # token blocks whose tiles are computed together; one key head, many
_CACHED_BYTES = 16 * 2**20  # of w·index_q, which the L2 cache holds for good, whatever is read meanwhile
_QUARTERS = 4  # of a block of 128 tokens
_PARTS_PER_PROCESSOR = 3  # pieces of d_index_k's work for each multiprocessor: more have more partial sums


class GradientItems(NamedTuple):
    """Items of the gradients' kernels; slots: partial sums of d_index_k.

    query (token, key tile, count, tile base) · key (pair of tiles, quarter, end, slot or -1) · reduce (tile, slot, end)
    """

    query: Tensor
    key: Tensor
    reduce: Tensor
    slots: int


@dataclass(frozen=True)
class TileChunk:
    """Rows begin .. end - 1 (begin a multiple of 128) and `tiles` score tiles.

    Of the keys, those before `keys` are read, in whole tiles. Items are flat int32 tensors with four numbers each; item
    n belongs to the CTA n % grid. They are made once for all layers, when they are first asked for: while the GPU is at
    the chunk before, and those of gradients while it forms the scores. adds: d_index_k's items without a slot add to
    the sum; the first chunk's write it where they are of all keys, so that it needs no zeros beforehand.
    """

    begin: int
    end: int
    tiles: int
    keys: int
    make_score: Callable[[], Tensor]
    make_narrow: Callable[[], Tensor]
    make_gradients: Callable[[], GradientItems]
    adds: bool = True

    @cached_property
    @one_thread()
    def score(self) -> Tensor:
        """(token, key, tile, 0) of every tile."""
        return self.make_score()

    @cached_property
    @one_thread()
    def narrow(self) -> Tensor:
        """(token, key, tile, tiles): three neighbouring tiles at most, and half of the block's tokens."""
        return self.make_narrow()

    @cached_property
    @one_thread()
    def gradients(self) -> GradientItems:
        """Of the tiles' gradients."""
        return self.make_gradients()


class Groups(NamedTuple):
    """First and end key tile that any query of each group of `tokens` neighbours sees, as `token_groups` makes them."""

    first: Tensor
    end: Tensor
    tokens: int

    @property
    def quarters(self) -> int:
        """Quarters of blocks, from token 0 on, that hold a token: of whole groups."""
        return -(-self.first.shape[0] * self.tokens // (TILE // _QUARTERS))


@dataclass(frozen=True)
class Plan:
    """blocks: int32 [blocks * 4], (tile base, first key tile, end, 0) of every 128-token block, bases counted in its
    chunk. complete: every token is in some query item, so that outputs need no zeros beforehand."""

    chunks: tuple[TileChunk, ...]
    blocks: Tensor
    complete: bool

    @cached_property
    def tiles(self) -> int:
        """Of all chunks."""
        return sum(chunk.tiles for chunk in self.chunks)

    @property
    def writes_keys(self) -> bool:
        """Whether d_index_k is written and not only added to."""
        return bool(self.chunks) and not self.chunks[0].adds


def plan(key_start: Tensor, key_end: Tensor, sizes: PlanSizes) -> Plan:
    """The plan of these intervals: cached, or made after reading (and checking) their contents.

    Raises:
        ValueError: as `check_intervals`, when the contents are no valid intervals.
    """
    return cached(key_start, key_end, sizes.S, sizes, lambda start, end: make_plan(start, end, sizes, key_start.device))


def make_plan(key_start: Tensor, key_end: Tensor, sizes: PlanSizes, device: torch.device) -> Plan:
    """The plan of valid intervals on the CPU, its lists on `device`."""
    return plan_spans(key_start, key_end, sizes, device, cut(*visible_tiles(key_start, key_end, TILE), sizes))


def plan_spans(
    key_start: Tensor, key_end: Tensor, sizes: PlanSizes, device: torch.device, spans: list[tuple[int, int]]
) -> Plan:
    """The plan whose chunks are these runs of 128-token blocks, each of which sees a key."""
    first, end = visible_tiles(key_start, key_end, TILE)
    base = torch.zeros_like(first)
    for begin, stop in spans:
        count = end[begin:stop] - first[begin:stop]
        base[begin:stop] = count.cumsum(0) - count - first[begin:stop]
    blocks = torch.stack([base, first, end, torch.zeros_like(base)], 1)
    groups = token_groups(key_start, key_end, sizes.group_tokens)
    T = key_start.shape[0]
    chunks = tuple(
        TileChunk(
            begin * TILE,
            min(stop * TILE, T),
            int((end - first)[begin:stop].sum()),
            min(int(end[begin:stop].max()) * TILE, sizes.S),
            partial(_score, blocks, begin, stop, sizes, device),
            partial(narrow, blocks, begin, stop, sizes, device),
            partial(_gradients, blocks, groups, begin, stop, sizes, device),
            adds=n > 0 or not _of_all_keys(first[begin:stop], end[begin:stop], sizes.S),
        )
        for n, (begin, stop) in enumerate(spans)
    )
    on_device = to_device(blocks.reshape(-1).to(torch.int32), device)
    return Plan(chunks, on_device, T > 0 and bool((groups.end > groups.first).all()))


def token_groups(key_start: Tensor, key_end: Tensor, tokens: int) -> Groups:
    """The groups; a last one that is not full has all tiles of its block.

    Its rows past the last token have di that nothing writes. They count for nothing where their masks are zero, as they
    are in the tiles that the group's query item visits: masks of other tiles are not written either.
    """
    first, end = visible_tiles(key_start, key_end, tokens)
    if key_start.shape[0] % tokens:
        first_of_block, end_of_block = visible_tiles(key_start, key_end, TILE)
        first[-1], end[-1] = first_of_block[-1], end_of_block[-1]
    return Groups(first, end, tokens)


def _score(blocks: Tensor, begin: int, stop: int, sizes: PlanSizes, device: torch.device) -> Tensor:
    return to_device(score_items(blocks, begin, stop, sizes.grouped).reshape(-1).to(torch.int32), device)


def narrow(blocks: Tensor, begin: int, stop: int, sizes: PlanSizes, device: torch.device) -> Tensor:
    """`narrow_items` on the device, flat."""
    items = narrow_items(blocks, begin, stop, sizes.grouped, sizes.processors)
    return to_device(items.reshape(-1).to(torch.int32), device)


def _gradients(
    blocks: Tensor, groups: Groups, begin: int, stop: int, sizes: PlanSizes, device: torch.device
) -> GradientItems:
    """In one copy to the device."""
    query = query_items(groups, blocks, begin, stop, sizes.processors)
    key, reduce, slots = key_items(blocks[:, 1], blocks[:, 2], begin, stop, sizes, groups.quarters)
    lists = [x.reshape(-1) for x in (query, key, reduce)]
    flat = to_device(torch.cat(lists).to(torch.int32), device)
    a, b, c = torch.split(flat, [x.numel() for x in lists])
    return GradientItems(a, b, c, slots)


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


def narrow_items(blocks: Tensor, begin: int, stop: int, grouped: bool, processors: int) -> Tensor:
    """(token, key, tile, tiles) of the tiles of blocks begin .. stop - 1: runs of up to three, for each half of tokens.

    In the order of `score_items`, so that what is under way reads the same queries and keys.
    """
    base, first, end = blocks[begin:stop, 0], blocks[begin:stop, 1], blocks[begin:stop, 2]
    block, place = ragged(narrow_runs(end - first))
    half, run = place % 2, place // 2
    key_tile = first[block] + NARROW_TILES * run
    tiles = (end[block] - key_tile).clamp_max(NARROW_TILES)
    token = (begin + block) * TILE + half * (TILE // 2)
    items = torch.stack([token, key_tile * TILE, base[block] + key_tile, tiles], 1)
    side = _SIDE_BY_SIDE[grouped]
    order = torch.argsort((block // side * (1 << 40)) + (run * side + block % side) * 2 + half)
    cost = tiles[order] + NARROW_TILES  # a run of one tile is taken to last two thirds as long as one of three
    return balance(items[order], cost, processors)


def query_items(groups: Groups, blocks: Tensor, begin: int, stop: int, processors: int) -> Tensor:
    """(token, first key tile, count, tile base) of every group of tokens that sees a key, longest first."""
    tokens = groups.tokens
    chosen = torch.arange(begin * TILE // tokens, min(stop * TILE // tokens, groups.first.shape[0]))
    count = groups.end[chosen] - groups.first[chosen]
    chosen, count = chosen[count > 0], count[count > 0]
    base = blocks[chosen * tokens // TILE, 0]
    return balance(torch.stack([chosen * tokens, groups.first[chosen], count, base], 1), count, processors)


def _of_all_keys(first: Tensor, end: Tensor, keys: int) -> bool:
    """Whether the blocks, whose intervals don't decrease, see every pair of key tiles."""
    f, e = (first // 2)[end > first], ((end + 1) // 2)[end > first]
    reached = f.numel() > 0 and int(f[0]) == 0 and int(e[-1]) == -(-keys // (2 * TILE))
    return reached and bool((f[1:] <= e[:-1]).all())


def key_items(
    first: Tensor, end: Tensor, begin: int, stop: int, sizes: PlanSizes, quarters: int
) -> tuple[Tensor, Tensor, int]:
    """Items (pair, quarter, end, slot), reductions (key tile, slot, end, 0), and the number of slots.

    A pair are the key tiles 2 pair and 2 pair + 1. The blocks that see one of them are a run, which is cut into parts,
    in quarters of blocks. The first part is d_index_k's own (slot -1), every other writes partial sums: the first
    tile's to a slot of the first half, the second tile's to the same one of the other half. Quarters from `quarters` on
    hold no token and are in no part: one of nothing else would leave its slots unwritten.
    """
    f, e = first[begin:stop] // 2, (end[begin:stop] + 1) // 2
    seen = e > f
    pairs = torch.arange(int(f[seen].min()), int(e.max()))
    # intervals do not decrease: a pair's blocks are those with f <= pair < e, from the first such to the last
    number = torch.arange(begin, stop)[seen]
    f, e = f[seen].contiguous(), e[seen].contiguous()
    left = torch.searchsorted(e, pairs, right=True)
    right = torch.searchsorted(f, pairs, right=True)
    pairs, left, right = pairs[right > left], left[right > left], right[right > left]
    most = sizes.workspace_bytes // SHARE_OF_PARTIALS // (2 * TILE * sizes.E * 4)
    read = (stop - begin) * TILE * sizes.padded_heads * sizes.E * 2
    neighbours = int(number[-1] - number[0]) == number.shape[0] - 1
    cached = neighbours and read <= _CACHED_BYTES and sizes.processors <= most
    if cached:
        run_end = (number[right - 1] * _QUARTERS + _QUARTERS).clamp_max(quarters)
        owner, cut, cut_end, cta = _shares(number[left] * _QUARTERS, run_end, sizes.processors)
    else:
        owner, cut, cut_end, segment = _parts(number, left, right, sizes.processors, most)
        cut_end = cut_end.clamp_max(quarters)
    later = torch.zeros_like(owner)
    later[1:] = owner[1:] == owner[:-1]
    used = later.cumsum(0)
    slots = int(used[-1])
    items = torch.stack([pairs[owner], cut, cut_end, torch.where(later > 0, used - 1, -1)], 1)
    count = torch.zeros_like(pairs).index_add_(0, owner, later)
    high, split = count.cumsum(0), count > 0
    reduce = torch.stack([2 * pairs, high - count, high, torch.zeros_like(high)], 1)[split]
    reduce = torch.cat([reduce, reduce + torch.tensor([1, slots, slots, 0])])
    if cached:
        return _by_cta(items, cta), reduce, 2 * slots
    order = torch.argsort(segment, descending=True, stable=True)
    return deal(items[order], (cut_end - cut)[order], sizes.processors), reduce, 2 * slots


def _parts(
    number: Tensor, left: Tensor, right: Tensor, processors: int, most: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs of blocks cut at multiples of some length and where a block sees no key at all; `most` cuts at most.

    Of each part its run, begin and end in quarters of blocks, and which multiple. Parts of the same blocks are to come
    one after the other, so that the CTAs under way read the same queries.
    """
    longest = max(int((right - left).sum()) // (_PARTS_PER_PROCESSOR * processors), 1)
    segments, starts = _segments(number, longest)
    while int((segments[right - 1] - segments[left]).sum()) > most and longest < number.shape[0]:
        longest *= 2
        segments, starts = _segments(number, longest)
    owner, place = ragged(segments[right - 1] - segments[left] + 1)
    segment = segments[left][owner] + place
    cut = number[torch.maximum(left[owner], starts[segment])]
    cut_end = number[torch.minimum(right[owner], starts[segment + 1]) - 1] + 1
    return owner, cut * _QUARTERS, cut_end * _QUARTERS, segment


def _shares(begin: Tensor, end: Tensor, processors: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs of quarters of blocks, one after the other, cut so that every CTA has as much of them in one piece.

    Of each part its run, its begin and end, and its CTA.
    """
    length = end - begin
    start, total = length.cumsum(0) - length, int(length.sum())
    grid = min(processors, total)
    share = torch.arange(grid) * total // grid
    cuts = torch.cat([start, share]).sort().values
    cuts = cuts[torch.diff(cuts, prepend=torch.tensor([-1])) > 0]
    owner = torch.searchsorted(start, cuts, right=True) - 1
    cut = begin[owner] + cuts - start[owner]
    cut_end = cut + torch.diff(cuts, append=torch.tensor([total]))
    return owner, cut, cut_end, torch.searchsorted(share, cuts, right=True) - 1


def _by_cta(items: Tensor, cta: Tensor) -> Tensor:
    """Items, which ascend by CTA, in an order in which item n is CTA n % grid's; who has fewer gets empty ones."""
    count = torch.bincount(cta)
    place = torch.arange(cta.shape[0]) - (count.cumsum(0) - count)[cta]
    order = torch.full((int(count.max()), count.shape[0]), cta.shape[0])
    order[place, cta] = torch.arange(cta.shape[0])
    return torch.cat([items, torch.tensor([[0, 0, 0, -1]])])[order.flatten()]


def _segments(number: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Cuts the blocks that see a key into runs of neighbours, `longest` at most: each one's run, the runs' starts."""
    place = torch.arange(number.shape[0])
    new = place % longest == 0
    new[1:] |= number[1:] != number[:-1] + 1
    return new.cumsum(0) - 1, torch.cat([place[new], torch.tensor([number.shape[0]])])
