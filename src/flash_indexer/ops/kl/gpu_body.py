"""The kernels' side of `indexer_kl`: which sizes they take, and the launch of each stage of a chunk.

Stages, in order: `teacher_scores` or `summed_logits`, `index_scores`, `kl_rows`, `index_gradients`; then `finish`.
Scores are tiles of 128 tokens by 128 keys, [tiles * 128, 128]; `kl.plan` says which, and what each CTA works on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import (
    EXP,
    HEAD_WIDTHS,
    INDEX_WIDTHS,
    MASK_WORDS,
    MAX_HEADS,
    MAX_INDEX_HEADS,
    NARROW_STAGES,
    PADDED_HEADS,
    RELU,
    ROWS_CTAS,
    SUM,
)
from flash_indexer.ops import launch
from flash_indexer.ops.kl import gpu_fp8
from flash_indexer.ops.kl.plan import Plan, TileChunk
from flash_indexer.ops.kl.plan_sizes import PlanSizes
from flash_indexer.ops.problem import Problem
from flash_indexer.ops.worklists import TILE

NARROW = tuple(NARROW_STAGES)  # widths whose scores `score_narrow` forms
_SUMMED = 2**24  # elements of the float32 sums from which the terms are made: no second copy of a long chunk's queries
_USUAL_PAIRS = 2**29 // 10  # of a chunk of 512 MiB
_TERMS = 3  # bfloat16 terms that hold a float32 sum of queries exactly enough: 8 bits each


class IndexGradients(NamedTuple):
    """Outputs of `index_gradients`: index_q's and the weights', and index_k's sum in float32 (None: not wanted)."""

    index_q: Tensor
    index_k: Tensor | None
    weights: Tensor


class Masks(NamedTuple):
    """[logit > 0] in bits, [n, MASK_WORDS] int32 (`device/mask_words.cuh`), as `gradients_masked` takes them.

    first: of a score tile's first 4,096 rows (token, head). others: of the other ones, with more than 32 heads.
    pitch: 128-row masks from a tile's first to the next tile's, in both.
    """

    first: Tensor
    others: Tensor
    pitch: int
    padded_heads: int


class Rows(NamedTuple):
    """What belongs to each query: its interval and its weight in the loss, [T]."""

    key_start: Tensor
    key_end: Tensor
    weight: Tensor


def refusal(q: Tensor, index_q: Tensor) -> str | None:
    """Which size the kernels of "mean" and "sum_logits" don't take, what they take, and what to do; None: all."""
    H, D, (I, E) = q.shape[1], q.shape[2], index_q.shape[1:]
    for name, letter, value, allowed in (("q", "D", D, HEAD_WIDTHS), ("index_q", "E", E, INDEX_WIDTHS)):
        if value not in allowed:
            choice = ", ".join(map(str, allowed))
            return (
                f"{name} must have {letter} in {{{choice}}} on CUDA, got {letter}={value}; "
                "zero-pad the last dimension of queries and keys to the next of these (the products stay the same)"
            )
    for name, letter, value, most in (("q", "H", H, MAX_HEADS), ("index_q", "I", I, MAX_INDEX_HEADS)):
        if not 1 <= value <= most:
            return f"{name} must have 1 to {most} heads ({letter}) on CUDA, got {letter}={value}"
    return None


def plan_sizes(problem: Problem, fused: bool) -> PlanSizes:
    """What the plan depends on besides the intervals."""
    (S, G, D), (I, E) = problem.k.shape, problem.index_q.shape[1:]
    processors, narrow = launch.processors(problem.q.device), D in NARROW
    return PlanSizes(S, E, padded_heads(I), G > 1, problem.workspace_bytes, processors, narrow, fused)


def prepare(problem: Problem, fused: bool) -> None:
    """Has every kernel of the call and of its backward compiled, those that are missing side by side."""
    D, (I, E), needs = problem.q.shape[2], problem.index_q.shape[1:], problem.needs
    mean, index = problem.target == "mean", dict(E=E, IP=padded_heads(I))
    left = dict(left=1) if fused else {}
    wanted: list[launch.Wanted] = [] if fused else [(name, dict(logits=int(not mean))) for name in ROWS_CTAS]
    wanted += gpu_fp8.kernels(problem)
    if not gpu_fp8.has_fp8_teacher(problem):
        wanted.append((score_kernel(D), dict(D=D, mode=EXP if mean else SUM) | left))
        if mean and problem.lse is None:
            wanted.append(("lse", dict(D=D)))
    if problem.index_dtype is None:
        wanted.append((score_kernel(E), dict(D=E, mode=RELU) | left))
    if fused:
        wanted.append(("kl_gradients", index))
    elif any(needs):
        wanted.append(query_gradient(**index, masks=needs[1]))
    if needs[1]:
        wanted += [("gradients_key_masked", index), ("gradients_reduce", dict(E=E))]
    wanted.append(("finish", dict(E=E)))
    if any(needs):
        wanted.append(("scale", {}))
    launch.prepare(wanted)


def teacher_lse(q: Tensor, k: Tensor, key_start: Tensor, key_end: Tensor, softmax_scale: float) -> Tensor:
    """lse[t,h] = log sum over visible s of exp(scale * q[t,h]·k[s,g(h)]): float32 [T, H], -inf where none is."""
    T, H, D = q.shape
    lse = torch.empty(T, H, device=q.device)
    grid = min(-(-T // TILE) * H, launch.processors(q.device))
    launch.load("lse", D=D)(
        q.view(T, -1), k.view(k.shape[0], -1), key_start, key_end, lse.view(-1), H, H // k.shape[1], softmax_scale, grid
    )  # fmt: skip
    return lse


def teacher_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    chunk: TileChunk,
    out: Tensor,
    softmax_scale: float,
    left: tuple[Tensor, ...] = (),
) -> None:
    """out[t,s] = sum_h exp(scale * q[t,h]·k[s,g(h)] - lse[t,h]) in the chunk's tiles, unmasked and not normalised.

    Args:
        q: [T, H, D], k: [S, G, D] bfloat16. lse: [T, H] float32. out: float32 [tiles * 128, 128].
        left: key_start, key_end and what `score_narrow` then leaves of each tile: sums of rows.
    """
    if lse is None:
        raise ValueError("teacher_scores: lse must be [T, H], got None; take it from teacher_lse")
    _score(EXP, q, k, lse, chunk, out, softmax_scale, left=left)


def summed_logits(q: Tensor, k: Tensor, chunk: TileChunk, out: Tensor, softmax_scale: float) -> None:
    """out[t,s] = scale * sum_h q[t,h]·k[s,g(h)], the heads of a group summed first (three bfloat16 terms)."""
    rows, groups = q[chunk.begin : chunk.end], k.shape[1]
    rows = rows.view(rows.shape[0], groups, -1, q.shape[2])
    terms = torch.empty(rows.shape[0], groups, _TERMS, q.shape[2], dtype=q.dtype, device=q.device)
    step = max(_SUMMED // (groups * q.shape[2]), 1)
    for few_rows, their_terms in zip(torch.split(rows, step), torch.split(terms, step), strict=True):
        rest = few_rows.sum(2, dtype=torch.float32)
        for n in range(_TERMS):
            their_terms[:, :, n] = rest
            rest -= their_terms[:, :, n]
    unread = q.new_empty(1, dtype=torch.float32)
    _score(SUM, terms.flatten(1, 2), k, unread, chunk, out, softmax_scale, first_row=chunk.begin)


def index_scores(
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    chunk: TileChunk,
    out: Tensor,
    left: tuple[Tensor, ...] = (),
) -> None:
    """out[t,s] = sum_j w[t,j] * ReLU(index_q[t,j]·index_k[s]) in the chunk's tiles, unmasked.

    left: key_start, key_end and what `score_narrow` then leaves of each tile: maxima and sums of rows, masks.
    """
    _score(RELU, index_q, index_k[:, None], index_weights, chunk, out, 1.0, left=left)


def kl_rows(
    p: Tensor,
    scores: Tensor,
    work: Plan,
    chunk: TileChunk,
    rows: Rows,
    out: tuple[Tensor, Tensor, Tensor],
    logits: bool,
) -> None:
    """KL[t], entropy[t] and di = (softmax(i) - p) * weight; p is divided by its row sum (logits: its softmax).

    Args:
        p, scores: the chunk's tiles. out: di (tiles), kl [T], entropy [T].
    """
    count, kernel = chunk.end - chunk.begin, row_kernel(work)
    grid = min(count, ROWS_CTAS[kernel] * launch.processors(p.device))
    launch.load(kernel, logits=int(logits))(p, scores, work.blocks, *rows, *out, chunk.begin, count, grid)


def row_kernel(work: Plan) -> str:
    """A warp to a row, where chunks of the usual workspace have half as many rows as the mean row has keys; else a CTA.

    Chunks of any workspace get the same kernel, for a row's sums are in the order of its kernel.
    """
    rows, pairs = work.blocks.numel() // 4 * TILE, work.tiles * TILE**2
    return "rows_warp" if pairs**2 <= 2 * min(pairs, _USUAL_PAIRS) * rows**2 else "rows"


def index_gradients(
    di: Tensor,
    leaves: tuple[Tensor, Tensor, Tensor],
    work: Plan,
    chunk: TileChunk,
    out: IndexGradients,
    scores: tuple[Tensor, Tensor],
) -> None:
    """With m[t,j,s] = di[t,s] * [index_q[t,j]·index_k[s] > 0]:

        index_q[t,j] = w[t,j] * sum_s m[t,j,s] * index_k[s]
        weights[t,j] = index_q[t,j] · sum_s m[t,j,s] * index_k[s]
        index_k[s]  += sum_t,j m[t,j,s] * w[t,j] * index_q[t,j]

    Args:
        di: the chunk's tiles, bfloat16. leaves: index_q, index_k, index_weights.
        scores: float32 of di's shape, both overwritten: they take the masks [logit > 0] from the kernel of index_q's
            gradient to that of index_k's, which therefore always has the other's work done.
    """
    (T, I, E), padded = leaves[0].shape, padded_heads(leaves[0].shape[1])
    queries, weights, base = padded_queries(leaves[0], leaves[2], chunk)
    items, wants_keys = chunk.gradients.query, out.index_k is not None
    first, others = (x.view(torch.int32).view(-1, MASK_WORDS) for x in scores)
    masks = Masks(first, others, min(padded, 32), padded)
    scaled = queries  # not looked at where index_k's gradient is not wanted
    if wants_keys:
        scaled = _place(scores[1].view(di.dtype).view(-1, E) if padded <= 32 else di[:0].view(-1, E), chunk, padded)
        if not work.complete:
            scaled.zero_()
    count = items.numel() // 4
    name, static = query_gradient(E, padded, wants_keys)
    launch.load(name, **static)(
        queries, leaves[1], weights, di, out.index_q.view(-1, E), out.weights.view(-1), items, scaled, masks.first,
        masks.others, I, base, T, count, min(count, launch.processors(di.device)), chunk.begin,
    )  # fmt: skip
    if out.index_k is not None:
        key_gradient(out.index_k, scaled, di, masks, work, chunk, T)


def padded_queries(index_q: Tensor, index_weights: Tensor, chunk: TileChunk) -> tuple[Tensor, Tensor, int]:
    """index_q [n, E] and weights [n] with padded heads, at least of the chunk's rows, and the first row's token."""
    I, E = index_q.shape[1:]
    padded, base = padded_heads(I), 0
    if padded != I:
        rows, base = slice(chunk.begin, chunk.end), chunk.begin
        index_q, index_weights = (
            F.pad(index_q[rows], (0, 0, 0, padded - I)),
            F.pad(index_weights[rows], (0, padded - I)),
        )
    return index_q.view(-1, E), index_weights.view(-1), base


def key_gradient(
    out: Tensor, scaled: Tensor, di: Tensor, masks: Masks, work: Plan, chunk: TileChunk, num_queries: int
) -> None:
    """Adds index_k's gradient to out, or writes it (`TileChunk.adds`), from w·index_q (`scaled`), di and masks."""
    items, E = chunk.gradients, out.shape[1]
    partials = out.new_empty(max(items.slots, 1) * TILE, E)
    count = items.key.numel() // 4
    launch.load("gradients_key_masked", E=E, IP=masks.padded_heads)(
        scaled, di, masks.first, masks.others, out, partials, work.blocks, items.key, chunk.begin, num_queries,
        items.slots // 2, count, min(count, launch.processors(di.device)), masks.pitch, int(chunk.adds),
    )  # fmt: skip
    if items.slots:
        launch.load("gradients_reduce", E=E)(out, partials, items.reduce, items.reduce.numel() // 4)


def _place(room: Tensor, chunk: TileChunk, padded: int) -> Tensor:
    """[rows, E] for the chunk's w·index_q: in `room`, which no mask needs, or new where that is too small."""
    rows = -(-(chunk.end - chunk.begin) * padded // TILE) * TILE
    return room[:rows] if room.shape[0] >= rows else room.new_empty(rows, room.shape[1])


def finish(d_index_k: Tensor | None, weight: Tensor, kl: Tensor, index_k: Tensor) -> tuple[Tensor, Tensor]:
    """loss = sum_t weight[t] * kl[t], and index_k's gradient rounded to its dtype (empty where not wanted)."""
    E, loss = index_k.shape[1], weight.new_empty(1)
    out = index_k.new_empty(0) if d_index_k is None else torch.empty_like(index_k)
    if kl.numel() == 0:
        return loss.zero_().view(()), out.zero_()
    if d_index_k is None or out.numel() == 0:
        wide, narrow, rows = loss.new_empty(1, E), index_k.new_empty(1, E), 0
    else:
        wide, narrow, rows = d_index_k, out, out.shape[0]
    with torch.cuda.device(index_k.device):
        launch.load("finish", E=E)(wide, narrow, weight, kl, loss, rows)
    return loss.view(()), out


def _score(
    mode: int,
    q: Tensor,
    k: Tensor,
    low: Tensor,
    chunk: TileChunk,
    out: Tensor,
    scale: float,
    first_row: int = 0,
    left: tuple[Tensor, ...] = (),
) -> None:
    """low: [rows, H], what is subtracted (lse) or multiplied with (the index weights)."""
    H, D = q.shape[1:]
    items = score_items(chunk, D)
    count, static = items.numel() // 4, dict(left=1) if left else {}
    heads = (padded_heads(H),) if left and mode == RELU else ()
    launch.load(score_kernel(D), D=D, mode=mode, **static)(
        q.view(q.shape[0], -1), k.view(k.shape[0], -1), low.view(-1), out, *left, items,
        H, H // k.shape[1], scale, first_row, count, min(count, launch.processors(q.device)), *heads,
    )  # fmt: skip


def score_items(chunk: TileChunk, D: int) -> Tensor:
    """The chunk's items for scores of heads of D columns, made on the current stream when they are first asked for."""
    return chunk.narrow if D in NARROW else chunk.score


def score_kernel(D: int) -> str:
    """The kernel that forms scores of heads of D columns."""
    return "score_narrow" if D in NARROW else "score"


def query_gradient(E: int, IP: int, masks: bool) -> launch.Wanted:
    """The kernel of index_q's gradient and of the weights'."""
    return "gradients_query", dict(E=E, IP=IP) | (dict(masks=1) if masks else {})


def padded_heads(heads: int) -> int:
    """The number of index heads that the gradient kernels are built for, at least `heads`."""
    return next(padded for padded in PADDED_HEADS if padded >= heads)
