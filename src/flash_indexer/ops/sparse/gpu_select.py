"""Selection by kernels: score tiles of a chunk of rows, then the K largest of each row. See `torch_select`.

A score is the same bits in whatever tile, chunk or call it is computed: each is one accumulator's sum over heads in
their order, and an accumulator's value does not depend on its place in a tile. So is the selection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import INDEX_WIDTHS, RELU
from flash_indexer.ops import launch
from flash_indexer.ops.sparse.plan import ScoreChunk, ScorePlan, score_plan
from flash_indexer.ops.sparse.problem import Leaves
from flash_indexer.ops.sparse.selection import Selection
from flash_indexer.ops.worklists import TILE


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
            top_rows(scores, plan, chunk, intervals, always, out)
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
    """The chunk's rows of `out`, all of them written, from its score tiles."""
    launch.load("select")(
        scores, plan.blocks, *intervals, out.indices.view(-1), out.count, out.scores.view(-1), chunk.begin,
        chunk.end - chunk.begin, out.indices.shape[1], *always,
    )  # fmt: skip
