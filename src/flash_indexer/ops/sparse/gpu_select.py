"""Selection by kernels: score tiles of a chunk of rows, then the K largest of each row. See `torch_select`.

The scores are the indexer's (`select`), or the attention's own probabilities summed over heads (`attended`).

A score is the same bits in whatever tile, chunk or call it is computed: each is one accumulator's sum over heads in
their order, and an accumulator's value does not depend on its place in a tile. So is the selection.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import EXP, HEAD_WIDTHS, INDEX_WIDTHS, MAX_HEADS, RELU
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
    device = index_q.device
    with torch.cuda.device(device):
        leaves = launch.aligned(index_q), launch.aligned(index_k), index_weights.contiguous()
        launch.prepare([("score", dict(D=index_q.shape[2], mode=RELU)), ("select", {})])
        plan = score_plan(key_start, key_end, index_k.shape[0], workspace_bytes)
        out = _new_selection(len(index_q), min(topk, index_k.shape[0]), device)
        return _best(plan, (key_start, key_end), always, out, lambda chunk, room: index_scores(leaves, chunk, room))


def attended_refusal(q: Tensor, softmax_scale: float) -> str | None:
    """Why `attended` doesn't take an attention; None where it does."""
    _, H, D = q.shape
    if D not in HEAD_WIDTHS or q.dtype != torch.bfloat16:
        widths = ", ".join(map(str, HEAD_WIDTHS))
        return f"the keys of largest attention have kernels for bfloat16 of D in {{{widths}}}, got {q.dtype}, D={D}"
    if not 1 <= H <= MAX_HEADS:
        return f"the keys of largest attention have kernels for 1 to {MAX_HEADS} heads, got H={H}; split the heads"
    if not softmax_scale > 0:
        return f"the keys of largest attention have kernels for a positive softmax_scale, got {softmax_scale}"
    return None


@torch.no_grad()
def attended(
    q: Tensor,
    k: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    topk: int,
    softmax_scale: float,
    workspace_bytes: int,
) -> Selection:
    """S_t of `torch_attended`, K = min(topk, S) slots a query; the same bits at any workspace_bytes.

    Raises:
        ValueError: as `check_intervals`, when the contents are no valid intervals.
    """
    (T, H, D), (S, G, _) = q.shape, k.shape
    with torch.cuda.device(q.device):
        plan = score_plan(key_start, key_end, S, workspace_bytes)
        out = _new_selection(T, min(topk, S), q.device)
        if not out.indices.numel():
            return out._replace(count=out.count.zero_())
        launch.prepare([("lse", dict(D=D)), ("score", dict(D=D, mode=EXP)), ("select", {})])
        queries, keys = launch.aligned(q).view(T, H * D), launch.aligned(k).view(S, G * D)
        lse, ctas = torch.empty(T * H, device=q.device), launch.processors(q.device)
        intervals = key_start.contiguous(), key_end.contiguous()
        launch.load("lse", D=D)(
            queries, keys, *intervals, lse, H, H // G, softmax_scale, min(-(-T // TILE) * H, ctas)
        )  # fmt: skip

        def score(chunk: ScoreChunk, room: Tensor) -> None:
            if chunk.tiles:
                launch.load("score", D=D, mode=EXP)(
                    queries, keys, lse, room, chunk.score, H, H // G, softmax_scale, 0, chunk.tiles,
                    min(chunk.tiles, ctas),
                )  # fmt: skip

        return _best(plan, intervals, (0, 0), out, score)


def _new_selection(T: int, width: int, device: torch.device) -> Selection:
    return Selection(
        torch.empty(T, width, dtype=torch.int32, device=device),
        torch.empty(T, dtype=torch.int32, device=device),
        torch.empty(T, width, device=device),
    )


def _best(
    plan: ScorePlan,
    intervals: tuple[Tensor, Tensor],
    always: tuple[int, int],
    out: Selection,
    score: Callable[[ScoreChunk, Tensor], None],
) -> Selection:
    """`out`, all of it written, from the tiles that `score` writes, chunk by chunk, to the same room."""
    if not out.indices.numel():
        return out._replace(count=out.count.zero_())
    tiles = max(chunk.tiles for chunk in plan.chunks)
    scores = torch.empty(max(tiles, 1) * TILE, TILE, device=out.indices.device)
    start, end = intervals
    contiguous = start.contiguous(), end.contiguous()
    for chunk in plan.chunks:
        score(chunk, scores)
        top_rows(scores, plan, chunk, contiguous, always, out)
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
