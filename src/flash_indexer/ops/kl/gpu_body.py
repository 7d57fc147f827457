"""The CUDA body of `indexer_kl`: chunks of query rows through the kernels, one pass over the teacher's logits.

Stages of a chunk, in order: `teacher_scores`, `index_scores`, `kl_rows`, `index_gradients`. Scores are tiles of 128
tokens by 128 keys, [tiles * 128, 128]; `ops.kl.plan` says which, and what each CTA works on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import (
    EXP,
    HEAD_WIDTHS,
    INDEX_WIDTHS,
    MAX_HEADS,
    MAX_INDEX_HEADS,
    PADDED_HEADS,
    RELU,
    SUM,
)
from flash_indexer.ops.kl.plan import TILE, Chunk, Plan, Sizes, plan

_SUMMED = 2**24  # elements of the float32 sums from which the terms are made: no second copy of a long chunk's queries
_TERMS = 3  # bfloat16 terms that hold a float32 sum of queries exactly enough: 8 bits each


class Gradients(NamedTuple):
    """Outputs of `index_gradients`: index_q's and the weights' (None: not wanted) and index_k's sum in float32."""

    index_q: Tensor | None
    index_k: Tensor | None
    weights: Tensor | None


def check_supported(q: Tensor, index_q: Tensor) -> None:
    """Raises ValueError naming what the kernels support where a size is outside of it."""
    H, D, (I, E) = q.shape[1], q.shape[2], index_q.shape[1:]
    for name, letter, value, allowed in (("q", "D", D, HEAD_WIDTHS), ("index_q", "E", E, INDEX_WIDTHS)):
        if value not in allowed:
            choice = ", ".join(map(str, allowed))
            raise ValueError(
                f"indexer_kl: {name} must have {letter} in {{{choice}}} on CUDA, got {letter}={value}; "
                "zero-pad the last dimension of queries and keys to the next of these (the products stay the same)"
            )
    for name, letter, value, most in (("q", "H", H, MAX_HEADS), ("index_q", "I", I, MAX_INDEX_HEADS)):
        if not 1 <= value <= most:
            raise ValueError(f"indexer_kl: {name} must have 1 to {most} heads ({letter}) on CUDA, got {letter}={value}")
    capability = torch.cuda.get_device_capability(q.device)
    if capability != (9, 0):
        raise ValueError(
            f"indexer_kl: q must be on a GPU of compute capability 9.0 (H100, H200, GH200), got {q.device} of "
            f"{capability[0]}.{capability[1]}; move the tensors to one, or to the CPU in float32"
        )


def indexer_kl(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    lse: Tensor | None,
    key_start: Tensor,
    key_end: Tensor,
    token_weight: Tensor | None,
    softmax_scale: float,
    target: str,
    workspace_bytes: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, kl [T], entropy [T] and the gradients of index_q, index_k, index_weights (empty where not in `needs`)."""
    out, weight, kl, entropy = sums(
        q, k, index_q, index_k, index_weights, lse, key_start, key_end, token_weight,
        softmax_scale, target, workspace_bytes, needs,
    )  # fmt: skip
    with torch.cuda.device(q.device):
        loss, d_index_k = finish(out.index_k, weight, kl, index_k)
    d_index_q = out.index_q if needs[0] and out.index_q is not None else index_q.new_empty(0)
    d_weights = out.weights if needs[2] and out.weights is not None else index_weights.new_empty(0)
    return loss, kl, entropy, d_index_q, d_index_k, d_weights


def sums(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    lse: Tensor | None,
    key_start: Tensor,
    key_end: Tensor,
    token_weight: Tensor | None,
    softmax_scale: float,
    target: str,
    workspace_bytes: int,
    needs: Sequence[bool],
    before: Callable[[int], object] | None = None,
) -> tuple[Gradients, Tensor, Tensor, Tensor]:
    """The gradients, index_k's still the sum in float32; the token weights used; kl [T]; entropy [T].

    before: called with n ahead of each step that reads the teacher's keys before the n-th, and no others.
    """
    check_supported(q, index_q)
    E = index_q.shape[2]
    with torch.cuda.device(q.device):
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
        work = plan(key_start, key_end, plan_sizes(k, index_q, workspace_bytes, processors))
        prepare_kernels(q, index_q, target == "mean", lse is None, tuple(needs))
        q, k, index_q, index_k, index_weights = map(aligned, (q, k, index_q, index_k, index_weights))
        key_start, key_end = key_start.contiguous(), key_end.contiguous()
        weight = work.weight if token_weight is None else token_weight.contiguous()
        if target == "mean" and work.chunks:
            if lse is None and before is not None:
                before(k.shape[0])
            lse = teacher_lse(q, k, key_start, key_end, softmax_scale) if lse is None else lse.contiguous()
        make = torch.empty_like if work.complete else torch.zeros_like
        kl, entropy = (make(weight) for _ in range(2))
        out = Gradients(
            make(index_q) if needs[0] or needs[2] else None,
            torch.zeros_like(index_k, dtype=torch.float32) if needs[1] else None,
            make(index_weights) if needs[0] or needs[2] else None,
        )
        largest = max((chunk.tiles for chunk in work.chunks), default=0)
        slots = max((chunk.slots for chunk in work.chunks), default=0)
        partials = index_k.new_empty(max(slots, 1) * TILE, E, dtype=torch.float32)
        p, scores = (torch.empty(largest * TILE, TILE, device=q.device) for _ in range(2))
        di = torch.empty_like(p, dtype=torch.bfloat16)
        for chunk in work.chunks:
            if before is not None:
                before(chunk.keys)
            if target == "mean":
                teacher_scores(q, k, lse, chunk, p, softmax_scale, processors)
            else:
                summed_logits(q, k, chunk, p, softmax_scale, processors)
            index_scores(index_q, index_k, index_weights, chunk, scores, processors)
            kl_rows(p, scores, work, chunk, (key_start, key_end, weight), (di, kl, entropy), target == "sum_logits")
            if any(needs):
                index_gradients(di, index_q, index_k, index_weights, work, chunk, partials, out, processors)
    return out, weight, kl, entropy


def plan_sizes(k: Tensor, index_q: Tensor, workspace_bytes: int, processors: int) -> Sizes:
    """What the plan depends on besides the intervals."""
    I, E = index_q.shape[1:]
    return Sizes(k.shape[0], E, _padded_heads(I), k.shape[1] > 1, workspace_bytes, processors)


def teacher_lse(q: Tensor, k: Tensor, key_start: Tensor, key_end: Tensor, softmax_scale: float) -> Tensor:
    """lse[t,h] = log sum over visible s of exp(scale * q[t,h]·k[s,g(h)]): float32 [T, H], -inf where none is."""
    T, H, D = q.shape
    lse = torch.empty(T, H, device=q.device)
    kernel = load_kernel("lse", D=D)
    heads = H // k.shape[1]
    grid = min(-(-T // TILE) * H, torch.cuda.get_device_properties(q.device).multi_processor_count)
    kernel(
        q.view(T, -1), k.view(k.shape[0], -1), key_start, key_end, lse.view(-1), H, heads, softmax_scale, grid
    )  # fmt: skip
    return lse


def teacher_scores(
    q: Tensor, k: Tensor, lse: Tensor | None, chunk: Chunk, out: Tensor, softmax_scale: float, processors: int
) -> None:
    """out[t,s] = sum_h exp(scale * q[t,h]·k[s,g(h)] - lse[t,h]) in the chunk's tiles, unmasked and not normalised.

    Args:
        q: [T, H, D], k: [S, G, D] bfloat16. lse: [T, H] float32. out: float32 [tiles * 128, 128].
    """
    if lse is None:
        raise ValueError("teacher_scores: lse must be [T, H], got None; take it from teacher_lse")
    _score(EXP, q, k, lse, chunk, out, softmax_scale, 0, processors)


def summed_logits(q: Tensor, k: Tensor, chunk: Chunk, out: Tensor, softmax_scale: float, processors: int) -> None:
    """out[t,s] = scale * sum_h q[t,h]·k[s,g(h)], the heads of a group summed first (three bfloat16 terms)."""
    rows, groups = q[chunk.begin : chunk.end], k.shape[1]
    rows = rows.view(rows.shape[0], groups, -1, q.shape[2])
    terms = torch.empty(rows.shape[0], groups, _TERMS, q.shape[2], dtype=q.dtype, device=q.device)
    step = max(_SUMMED // (groups * q.shape[2]), 1)
    for few, found in zip(torch.split(rows, step), torch.split(terms, step), strict=True):
        rest = few.sum(2, dtype=torch.float32)
        for n in range(_TERMS):
            found[:, :, n] = rest
            rest -= found[:, :, n]
    unread = q.new_empty(1, dtype=torch.float32)
    _score(SUM, terms.flatten(1, 2), k, unread, chunk, out, softmax_scale, chunk.begin, processors)


def index_scores(
    index_q: Tensor, index_k: Tensor, index_weights: Tensor, chunk: Chunk, out: Tensor, processors: int
) -> None:
    """out[t,s] = sum_j w[t,j] * ReLU(index_q[t,j]·index_k[s]) in the chunk's tiles, unmasked."""
    _score(RELU, index_q, index_k[:, None], index_weights, chunk, out, 1.0, 0, processors)


def kl_rows(
    p: Tensor,
    scores: Tensor,
    work: Plan,
    chunk: Chunk,
    rows: tuple[Tensor, Tensor, Tensor],
    out: tuple[Tensor, Tensor, Tensor],
    logits: bool,
) -> None:
    """KL[t], entropy[t] and di = (softmax(i) - p) * token_weight; p is divided by its row sum (logits: its softmax).

    Args:
        p, scores: the chunk's tiles. rows: key_start, key_end, token_weight [T]. out: di (tiles), kl [T], entropy [T].
    """
    key_start, key_end, weight = rows
    di, kl, entropy = out
    count = chunk.end - chunk.begin
    kernel = load_kernel("rows", logits=int(logits))
    kernel(p, scores, work.blocks, key_start, key_end, weight, di, kl, entropy, chunk.begin, count)


def index_gradients(
    di: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    work: Plan,
    chunk: Chunk,
    partials: Tensor,
    out: Gradients,
    processors: int,
) -> None:
    """With m[t,j,s] = di[t,s] * [index_q[t,j]·index_k[s] > 0]:

        index_q[t,j] = w[t,j] * sum_s m[t,j,s] * index_k[s]
        weights[t,j] = index_q[t,j] · sum_s m[t,j,s] * index_k[s]
        index_k[s]  += sum_t,j m[t,j,s] * w[t,j] * index_q[t,j]

    Args:
        di: the chunk's tiles, bfloat16. partials: float32 [slots * 128, E] scratch.
    """
    T, I, E = index_q.shape
    padded, base = _padded_heads(I), 0
    queries, weights = index_q, index_weights
    if padded != I:
        rows, base = slice(chunk.begin, chunk.end), chunk.begin
        queries = torch.nn.functional.pad(index_q[rows], (0, 0, 0, padded - I))
        weights = torch.nn.functional.pad(index_weights[rows], (0, padded - I))
    queries, weights = queries.view(-1, E), weights.view(-1)
    if out.index_q is not None and out.weights is not None:
        count = chunk.query.numel() // 4
        load_kernel("gradients_query", E=E, IP=padded)(
            queries, index_k, weights, di, out.index_q.view(-1, E), out.weights.view(-1), chunk.query,
            I, base, T, count, min(count, processors),
        )  # fmt: skip
    if out.index_k is not None:
        count = chunk.key.numel() // 4
        load_kernel("gradients_key", E=E, IP=padded)(
            queries, index_k, weights, di, out.index_k, partials, work.blocks, chunk.key, base, count,
            min(count, processors),
        )  # fmt: skip
        if chunk.slots:
            load_kernel("gradients_reduce", E=E)(out.index_k, partials, chunk.reduce, chunk.reduce.numel() // 4)


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
    load_kernel("finish", E=E)(wide, narrow, weight, kl, loss, rows)
    return loss.view(()), out


def scale(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """gradients *= factor, in place: those of index_q, index_k and the weights, empty where not wanted.

    A factor of 1 costs no memory traffic. Contiguous; factor [] on the same device.
    """
    given = [x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(1, 1) for x in gradients]
    rows = [x.shape[0] if gradient.numel() else 0 for x, gradient in zip(given, gradients, strict=True)]
    if any(rows):
        load_kernel("scale")(*given, factor.float().reshape(1), *rows)


def _score(
    mode: int,
    q: Tensor,
    k: Tensor,
    low: Tensor,
    chunk: Chunk,
    out: Tensor,
    scale: float,
    first_row: int,
    processors: int,
) -> None:
    H, D = q.shape[1:]
    count = chunk.score.numel() // 4
    load_kernel("score", D=D, mode=mode)(
        q.view(q.shape[0], -1), k.view(k.shape[0], -1), low.view(-1), out, chunk.score,
        H, H // k.shape[1], scale, first_row, count, min(count, processors),
    )  # fmt: skip


def prepare_kernels(q: Tensor, index_q: Tensor, mean: bool, without_lse: bool, needs: tuple[bool, ...]) -> None:
    """Has every kernel of the call compiled, those that are missing side by side."""
    from flash_indexer.kernels.cache import prepare

    D, (I, E) = q.shape[2], index_q.shape[1:]
    wanted: list[tuple[str, tuple[tuple[str, int], ...]]] = [
        ("score", (("D", D), ("mode", EXP if mean else SUM))),
        ("score", (("D", E), ("mode", RELU))),
        ("rows", (("logits", int(not mean)),)),
    ]
    if mean and without_lse:
        wanted.append(("lse", (("D", D),)))
    index = (("E", E), ("IP", _padded_heads(I)))
    if needs[0] or needs[2]:
        wanted.append(("gradients_query", index))
    if needs[1]:
        wanted += [("gradients_key", index), ("gradients_reduce", (("E", E),))]
    wanted.append(("finish", (("E", E),)))
    if any(needs):
        wanted.append(("scale", ()))
    prepare(*wanted)


def load_kernel(name: str, **static: int) -> Any:
    """The compiled kernel with these sizes."""
    from flash_indexer.kernels.cache import load

    return load(name, **static)


def _padded_heads(heads: int) -> int:
    return next(padded for padded in PADDED_HEADS if padded >= heads)


def aligned(x: Tensor) -> Tensor:
    """Contiguous, and beginning at a multiple of 16 bytes, as the copy engine wants it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
