"""What the selection's kernels work on: chunks of query rows whose score tiles fit the workspace.

Scores are held as tiles of 128 tokens by 128 keys, only those that some query of a block of 128 tokens can see, tile
after tile. The lists are made on the host and kept as long as the interval tensors live unchanged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.ops.worklists import TILE, cached, ragged, to_device, visible_tiles

TILE_BYTES = TILE * TILE * 4


class ScoreChunk(NamedTuple):
    """Rows begin .. end - 1 (begin a multiple of 128) and their `tiles` score tiles.

    keys: of each 128-token block its first and end key tile; its tiles are one after the other.
    score: int32 [tiles * 4], (token, key, tile, 0) of each.
    """

    begin: int
    end: int
    tiles: int
    keys: tuple[tuple[int, int], ...]
    score: Tensor


class ScorePlan(NamedTuple):
    """chunks: of all rows, in order. blocks: int32 [blocks * 4], (tile base, first key tile, end, 0) of every 128-token
    block, bases counted in its chunk."""

    chunks: tuple[ScoreChunk, ...]
    blocks: Tensor


def score_plan(key_start: Tensor, key_end: Tensor, num_keys: int, workspace_bytes: int) -> ScorePlan:
    """The plan of these intervals: cached, or made after reading (and checking) their contents.

    Raises:
        ValueError: as `check_intervals`, when the contents are no valid intervals.
    """
    return cached(
        key_start, key_end, num_keys, ("score_plan", workspace_bytes),
        lambda start, end: make_plan(start, end, workspace_bytes, key_start.device),
    )  # fmt: skip


def make_plan(key_start: Tensor, key_end: Tensor, workspace_bytes: int, device: torch.device) -> ScorePlan:
    """The plan of valid intervals on the CPU, its lists on `device`."""
    first, end = visible_tiles(key_start, key_end, TILE)
    counts, base = end - first, torch.zeros_like(first)
    spans = _cut(counts.tolist(), max(workspace_bytes // TILE_BYTES, 1))
    lists = []
    for begin, stop in spans:
        count = counts[begin:stop]
        base[begin:stop] = count.cumsum(0) - count - first[begin:stop]
        block, place = ragged(count)
        key_tile = first[begin:stop][block] + place
        number = base[begin:stop][block] + key_tile
        lists.append(torch.stack([(begin + block) * TILE, key_tile * TILE, number, torch.zeros_like(number)], 1))
    spans_of_blocks = list(zip(first.tolist(), end.tolist(), strict=True))
    blocks = torch.stack([base, first, end, torch.zeros_like(base)], 1)
    flat = to_device(torch.cat([*(x.reshape(-1) for x in lists), blocks.reshape(-1)]).to(torch.int32), device)
    pieces = torch.split(flat, [*(x.numel() for x in lists), blocks.numel()])
    chunks = tuple(
        ScoreChunk(b * TILE, min(e * TILE, len(key_start)), len(items), tuple(spans_of_blocks[b:e]), piece)
        for (b, e), items, piece in zip(spans, lists, pieces[:-1], strict=True)
    )
    return ScorePlan(chunks, pieces[-1])


def _cut(counts: list[int], limit: int) -> list[tuple[int, int]]:
    """Runs of blocks, of `limit` tiles at most but one block at least; together all blocks."""
    spans, begin, area = [], 0, 0
    for block, tiles in enumerate(counts):
        if block > begin and area + tiles > limit:
            spans.append((begin, block))
            begin, area = block, 0
        area += tiles
    return [*spans, (begin, len(counts))] if counts else []
