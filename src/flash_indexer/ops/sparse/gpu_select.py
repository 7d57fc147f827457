"""Selection by kernels: score tiles of a chunk of rows, then the K largest of each row. See `torch_select`.

A score is the same bits in whatever tile, chunk or call it is computed: each is one accumulator's sum over heads in
their order, and an accumulator's value does not depend on its place in a tile. So is the selection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import INDEX_WIDTHS, RELU, SELECT_TILES
from flash_indexer.ops import launch
from flash_indexer.ops.sparse import torch_select
from flash_indexer.ops.sparse.plan import ScoreChunk, ScorePlan, score_plan
from flash_indexer.ops.sparse.problem import Leaves
from flash_indexer.ops.sparse.selection import Selection
from flash_indexer.ops.worklists import TILE

_SORT_BYTES = 36  # of a score that `sort_rows` sorts


def refusal(leaves: Leaves) -> str | None:
    """Why the kernels don't take an indexer; None where they do."""
    E = leaves[0].shape[2]
    if E not in INDEX_WIDTHS:
        widths = sorted(INDEX_WIDTHS)
        return f"index_q has kernels for E in {widths}, got E={E}; zero-pad it and index_k: the products stay the same"
    return None


@torch.no_grad()
def select(
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    topk: int,
    always: tuple[int, int],
    workspace_bytes: int,
) -> Selection:
    """S_t of checked arguments, K = min(topk, S) slots a query; the same bits at any workspace_bytes.

    Raises:
        ValueError: as `check_intervals`, when the contents are no valid intervals.
    """
    T, S = index_q.shape[0], index_k.shape[0]
    device = index_q.device
    out = Selection(
        torch.empty(T, min(topk, S), dtype=torch.int32, device=device),
        torch.empty(T, dtype=torch.int32, device=device),
        torch.empty(T, min(topk, S), device=device),
    )
    with torch.cuda.device(device):
        plan = score_plan(key_start, key_end, S, workspace_bytes)
        if not out.indices.numel():
            return out._replace(count=out.count.zero_())
        leaves = launch.aligned(index_q), launch.aligned(index_k), index_weights.contiguous()
        launch.prepare([("score", dict(D=index_q.shape[2], mode=RELU)), ("select", {})])
        tiles = max(chunk.tiles for chunk in plan.chunks)
        scores = torch.empty(max(tiles, 1) * TILE, TILE, device=device)
        intervals = key_start.contiguous(), key_end.contiguous()
        for chunk in plan.chunks:
            index_scores(leaves, chunk, scores)
            if max(end - first for first, end in chunk.keys) <= SELECT_TILES:
                top_rows(scores, plan, chunk, intervals, always, out)
            else:
                sort_rows(scores, chunk, intervals, topk, always, out, workspace_bytes)
    return out


def index_scores(leaves: Leaves, chunk: ScoreChunk, out: Tensor) -> None:
    """out[t,s] = sum_j w[t,j] * ReLU(index_q[t,j]·index_k[s]) in the chunk's tiles, unmasked: [tiles * 128, 128]."""
    if not chunk.tiles:
        return
    index_q, index_k, weights = leaves
    T, I, E = index_q.shape
    launch.load("score", D=E, mode=RELU)(
        index_q.view(T, I * E), index_k, weights.view(-1), out, chunk.score, I, I, 1.0, 0, chunk.tiles,
        min(chunk.tiles, launch.processors(index_q.device)),
    )  # fmt: skip


def top_rows(
    scores: Tensor,
    plan: ScorePlan,
    chunk: ScoreChunk,
    intervals: tuple[Tensor, Tensor],
    always: tuple[int, int],
    out: Selection,
) -> None:
    """The chunk's rows of `out`, all of them written, from its score tiles; of a block SELECT_TILES at most."""
    launch.load("select")(
        scores, plan.blocks, *intervals, out.indices.view(-1), out.count, out.scores.view(-1), chunk.begin,
        chunk.end - chunk.begin, out.indices.shape[1], *always,
    )  # fmt: skip


def sort_rows(
    scores: Tensor,
    chunk: ScoreChunk,
    intervals: tuple[Tensor, Tensor],
    topk: int,
    always: tuple[int, int],
    out: Selection,
    workspace_bytes: int,
) -> None:
    """As `top_rows`, for blocks of any number of tiles, in torch: slower. Rows at a time as fit workspace_bytes."""
    base = 0
    for number, (first, end) in enumerate(chunk.keys):
        begin = chunk.begin + number * TILE
        rows, keys = slice(begin, min(begin + TILE, chunk.end)), (end - first) * TILE
        tiles = scores[base * TILE : (base + end - first) * TILE].view(end - first, TILE, TILE)
        base += end - first
        out.indices[rows], out.count[rows], out.scores[rows] = -1, 0, -torch.inf
        step = max(1, workspace_bytes // (max(keys, 1) * _SORT_BYTES))
        for at in range(rows.start, rows.stop if keys else rows.start, step):
            some = slice(at, min(at + step, rows.stop))
            wide = tiles[:, some.start - begin : some.stop - begin].transpose(0, 1).reshape(-1, keys)
            start, stop = (x[some] - first * TILE for x in intervals)
            made = torch_select.top_keys(wide, start, stop, topk, always)
            made.indices.add_(first * TILE).masked_fill_(made.indices < first * TILE, -1)
            slots = some, slice(min(made.indices.shape[1], out.indices.shape[1]))
            for whole, part in ((out.indices, made.indices), (out.scores, made.scores)):
                whole[slots] = part[:, : whole.shape[1]]  # the last tile's columns may be more than keys
            out.count[some] = made.count
