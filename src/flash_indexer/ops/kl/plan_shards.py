"""What the GPU kernels work on where several ranks hold shards of the teacher's heads.

All ranks form the scores of every tile of a chunk, over their own heads. The sum over ranks of a chunk's scores is
scattered: the chunk's 128-token blocks are cut into one run for each rank, near-equal in tiles, and the score tiles lie
in `world` pieces of `piece` tiles each, rank r's run at the front of piece r. What follows is done by each rank for its
run alone, by lists that count the tiles from the front of its piece.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flash_indexer.ops.kl.plan import GradientItems, Plan, TileChunk, narrow, plan, plan_spans, score_items
from flash_indexer.ops.kl.plan_sizes import SHARE_OF_PARTIALS, PlanSizes
from flash_indexer.ops.worklists import TILE, cached, to_device, visible_tiles

_BYTES_OF_SUMS = TILE * TILE * 4 * 2  # a tile's teacher scores, of the chunk under way and of the next
_BYTES_OF_OWN = TILE * TILE * (4 * 2 + 4 + 2)  # the scattered sums likewise, index scores, di


@dataclass(frozen=True)
class Shard:
    """One chunk: teacher holds all its score tiles (tiles = world * piece, some unused), own this rank's run or None.

    rows[r]: first row and end of rank r's run.
    """

    teacher: TileChunk
    piece: int
    rows: tuple[tuple[int, int], ...]
    own: TileChunk | None


@dataclass(frozen=True)
class ShardPlan:
    """The chunks in order, and the plan of this rank's runs, whose `blocks` its kernels read."""

    shards: tuple[Shard, ...]
    own: Plan


def shard_plan(key_start: Tensor, key_end: Tensor, sizes: PlanSizes, rank: int, world: int) -> ShardPlan:
    """The plan of these intervals for one of `world` ranks: cached, or made after reading and checking their contents.

    Raises:
        ValueError: as `check_intervals`, when the contents are no valid intervals.
    """
    if world == 1:
        whole = plan(key_start, key_end, sizes)
        shards = (Shard(chunk, chunk.tiles, ((chunk.begin, chunk.end),), chunk) for chunk in whole.chunks)
        return ShardPlan(tuple(shards), whole)
    return cached(
        key_start, key_end, sizes.S, (sizes, rank, world),
        lambda start, end: make_shard_plan(start, end, sizes, rank, world, key_start.device),
    )  # fmt: skip


def make_shard_plan(
    key_start: Tensor, key_end: Tensor, sizes: PlanSizes, rank: int, world: int, device: torch.device
) -> ShardPlan:
    """The plan of valid intervals on the CPU, its lists on `device`. All ranks cut alike."""
    first, end = visible_tiles(key_start, key_end, TILE)
    counts = end - first
    runs = cut_runs(counts.tolist(), sizes, world)
    pieces = [largest_run(counts.tolist(), bounds) for bounds in runs]
    base = torch.zeros_like(counts)
    for bounds, piece in zip(runs, pieces, strict=True):
        for r, (b, e) in enumerate(itertools.pairwise(bounds)):
            base[b:e] = r * piece + counts[b:e].cumsum(0) - counts[b:e] - first[b:e]
    blocks = torch.stack([base, first, end], 1)
    lists = [score_items(blocks, bounds[0], bounds[-1], sizes.grouped).reshape(-1) for bounds in runs]
    none = torch.empty(0, dtype=torch.int32)
    items = torch.split(to_device(torch.cat([none, *lists]).to(torch.int32), device), [x.numel() for x in lists])
    seen = [bool(counts[bounds[rank] : bounds[rank + 1]].any()) for bounds in runs]
    spans = [(bounds[rank], bounds[rank + 1]) for bounds, sees in zip(runs, seen, strict=True) if sees]
    own = plan_spans(key_start, key_end, sizes, device, spans)
    mine = iter(own.chunks)
    T, none = key_start.shape[0], none.to(device)
    shards = []
    for bounds, piece, sees, score in zip(runs, pieces, seen, items, strict=True):
        rows = tuple((min(b * TILE, T), min(e * TILE, T)) for b, e in itertools.pairwise(bounds))
        keys = min(int(end[bounds[0] : bounds[-1]].max()) * TILE, sizes.S)
        unused = partial(GradientItems, none, none, none, 0)
        runs_of_tiles = partial(narrow, blocks, bounds[0], bounds[-1], sizes, device)
        teacher = TileChunk(
            rows[0][0], rows[-1][1], world * piece, keys, partial(score.view, -1), runs_of_tiles, unused
        )
        shards.append(Shard(teacher, piece, rows, next(mine) if sees else None))
    return ShardPlan(tuple(shards), own)


def cut_runs(counts: list[int], sizes: PlanSizes, world: int) -> list[tuple[int, ...]]:
    """Cuts the blocks, whose tiles are counted, into chunks and each chunk into `world` runs: their bounds, world + 1.

    The tiles of a chunk, every piece as large as its largest, fit the workspace, or it has `world` blocks at most. A
    chunk that sees nothing is left out.
    """
    bytes_per_tile = _BYTES_OF_SUMS + -(-_BYTES_OF_OWN // world)
    limit = sizes.workspace_bytes * (SHARE_OF_PARTIALS - 1) // SHARE_OF_PARTIALS // bytes_per_tile
    chunks, begin, blocks = [], 0, len(counts)
    while begin < blocks:
        stop, area = begin, 0
        while stop < blocks and (stop < begin + world or area + counts[stop] <= limit):
            area += counts[stop]
            stop += 1
        bounds = even_runs(counts, begin, stop, world)
        while stop > begin + world and world * largest_run(counts, bounds) > limit:
            stop -= 1
            bounds = even_runs(counts, begin, stop, world)
        if any(counts[begin:stop]):
            chunks.append(bounds)
        begin = stop
    return chunks


def even_runs(counts: list[int], begin: int, stop: int, world: int) -> tuple[int, ...]:
    """Bounds of `world` runs of blocks begin .. stop - 1, each cut where the tiles before are nearest their share."""
    before = [0, *itertools.accumulate(counts[begin:stop])]
    bounds = [begin]
    for r in range(1, world):
        share = before[-1] * r / world
        at = bisect.bisect_left(before, share)
        if at > 0 and share - before[at - 1] < before[at] - share:
            at -= 1
        bounds.append(max(begin + at, bounds[-1]))
    return (*bounds, stop)


def largest_run(counts: list[int], bounds: tuple[int, ...]) -> int:
    """Tiles of the largest run."""
    return max(sum(counts[b:e]) for b, e in itertools.pairwise(bounds))
