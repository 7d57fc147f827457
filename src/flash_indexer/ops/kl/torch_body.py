"""Blockwise closed form in torch: a chunk of query rows at a time, loss and gradients in one pass.

Each stage takes a chunk of R query rows and the C keys that any of them may see, with key_start and key_end counted
from the first of those keys. Scores of a chunk are [R, C]; nothing here is ever [T, S]. Products and sums are taken in
float32 (float64 for float64 inputs) whatever the inputs' dtype.

Every stage works head by head, so that one head's [R, C] tile is still in the cache when the next step reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_indexer.ops.blockwise import cap_logits, compute_dtype, fill_unseen


def teacher_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    key_start: Tensor,
    key_end: Tensor,
    *,
    softmax_scale: float,
    target: str = "mean",
    softcap: float | None = None,
    out: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """p[t,s] = sum_h exp(scale * q[t,h]·k[s,g(h)] - lse[t,h]) ("mean"), not yet divided by its row sum.

    softcap c: c * tanh(scale * q·k / c) in the place of scale * q·k.

    "sum_logits": p[t,s] = exp(x - max_s x) with x = scale * sum_h q[t,h]·k[s,g(h)]; lse is not read.

    Args:
        q: [R, H, D]. k: [C, G, D]. lse: [R, H]. key_start, key_end: [R], counted from k's first row.
        out, scratch: [R, C] buffers to write to and to compute in; None allocates them.

    Returns:
        [R, C], 0 where unseen.
    """
    dtype = compute_dtype(q)
    rows, heads = q.shape[:2]
    per_group = heads // k.shape[1]
    out = torch.empty(rows, k.shape[0], dtype=dtype, device=q.device) if out is None else out
    out.zero_()
    if target == "sum_logits":
        summed_logits(q, k, softmax_scale=softmax_scale, out=out)
        exp_logits(out, key_start, key_end)
    elif lse is None:
        raise ValueError('teacher_scores: lse must be [R, H] for target="mean", got None; take it from teacher_lse')
    else:
        scratch = torch.empty_like(out) if scratch is None else scratch
        for h in range(heads):
            torch.mm(q[:, h].to(dtype) * softmax_scale, k[:, h // per_group].to(dtype).T, out=scratch)
            cap_logits(scratch, softcap)
            out.add_(scratch.sub_(lse[:, h : h + 1]).exp_())
    return fill_unseen(out, key_start, key_end, 0.0)


def summed_logits(q: Tensor, k: Tensor, *, softmax_scale: float, out: Tensor) -> None:
    """out[t,s] += scale * sum_h q[t,h]·k[s,g(h)], the heads of a group summed first; out is [R, C]."""
    per_group = q.shape[1] // k.shape[1]
    for g in range(k.shape[1]):
        summed = q[:, g * per_group : (g + 1) * per_group].to(out.dtype).sum(1)
        out.addmm_(summed.mul_(softmax_scale), k[:, g].to(out.dtype).T)


def exp_logits(logits: Tensor, key_start: Tensor, key_end: Tensor) -> None:
    """exp(x - max_s x) of the visible logits, 0 elsewhere, in place: what "sum_logits" calls p before normalisation."""
    fill_unseen(logits, key_start, key_end, torch.finfo(logits.dtype).min)
    logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    fill_unseen(logits, key_start, key_end, 0.0)


def teacher_lse(
    q: Tensor,
    k: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    *,
    softmax_scale: float,
    softcap: float | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """lse[t,h] = log sum over visible s of exp(scale * q[t,h]·k[s,g(h)]): [R, H], very negative where none is.

    scratch: [R, C] buffer to compute in; None allocates it.
    """
    dtype = compute_dtype(q)
    per_group = q.shape[1] // k.shape[1]
    lse = torch.empty(q.shape[:2], dtype=dtype, device=q.device)
    for h in range(q.shape[1]):
        logits = torch.mm(q[:, h].to(dtype) * softmax_scale, k[:, h // per_group].to(dtype).T, out=scratch)
        cap_logits(logits, softcap)
        lse[:, h] = fill_unseen(logits, key_start, key_end, torch.finfo(dtype).min).logsumexp(-1)
    return lse


def index_scores(
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    *,
    out: Tensor | None = None,
    relu: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """i[t,s] = sum_j w[t,j] * ReLU(index_q[t,j]·index_k[s]).

    Args:
        index_q: [R, I, E]. index_k: [C, E]. index_weights: [R, I].
        out: [R, C] buffer. relu: [I, R, C] buffer, or [1, R, C] when the ReLU terms are not wanted afterwards.

    Returns:
        scores [R, C], the dtype's lowest value where unseen, and the buffer of ReLU terms.
    """
    dtype = compute_dtype(index_q)
    rows, heads = index_q.shape[:2]
    shape = (rows, index_k.shape[0])
    out = torch.empty(shape, dtype=dtype, device=index_q.device) if out is None else out
    relu = torch.empty(heads, *shape, dtype=dtype, device=index_q.device) if relu is None else relu
    out.zero_()
    keys = index_k.to(dtype).T
    weights = index_weights.to(dtype)
    for j in range(heads):
        tile = relu[j % relu.shape[0]]
        torch.mm(index_q[:, j].to(dtype), keys, out=tile)
        out.addcmul_(tile.relu_(), weights[:, j : j + 1])
    return fill_unseen(out, key_start, key_end, torch.finfo(dtype).min), relu


def kl_rows(
    p: Tensor, scores: Tensor, token_weight: Tensor, key_start: Tensor, key_end: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """KL[t] = sum_s p (log p - i) + logsumexp(i) and di = (softmax(i) - p) * token_weight, after p /= its row sum.

    Args:
        p: [R, C] target scores, 0 where unseen; normalised in place.
        scores: [R, C] index scores, the dtype's lowest value where unseen; overwritten with di.
        token_weight: [R].

    Returns:
        kl [R], entropy [R] = -sum_s p log p (so that the uniform prediction's KL is log(visible keys) - entropy),
        and di [R, C], which is `scores`. Rows that see nothing have KL 0 and di 0. A row whose every p is 0, because of
        an lse that is not its own, is NaN.
    """
    seen = (key_end > key_start).to(p.dtype)
    p.div_(p.sum(-1, keepdim=True).masked_fill_(seen[:, None] == 0, 1.0))
    lse = scores.logsumexp(-1)
    entropy = torch.special.entr(p).sum(-1)
    kl = seen * (lse - entropy - torch.linalg.vecdot(p, scores))
    di = scores.sub_(lse[:, None]).exp_().sub_(p).mul_((seen * token_weight)[:, None])
    return kl, entropy, fill_unseen(di, key_start, key_end, 0.0)


def index_gradients(
    di: Tensor,
    relu: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    *,
    d_index_q: Tensor | None,
    d_index_k: Tensor | None,
    d_index_w: Tensor | None,
) -> None:
    """With m[t,j,s] = di[t,s] * [index_q[t,j]·index_k[s] > 0]:

        d_index_q[t,j] = w[t,j] * sum_s m[t,j,s] * index_k[s]
        d_index_w[t,j] = index_q[t,j] · sum_s m[t,j,s] * index_k[s]     (d_index_q before its scaling by w)
        d_index_k[s]  += sum_t,j m[t,j,s] * w[t,j] * index_q[t,j]

    Args:
        di: [R, C]. relu: [I, R, C], the ReLU terms of `index_scores`; overwritten.
        d_index_q: [R, I, E], d_index_w: [R, I], written. d_index_k: [C, E], accumulated. None: not wanted.
    """
    dtype = di.dtype
    keys = index_k.to(dtype)
    for j in range(index_q.shape[1]):
        masked = torch.ops.aten.threshold_backward.grad_input(di, relu[j], 0, grad_input=relu[j])
        query = index_q[:, j].to(dtype)
        weight = index_weights[:, j : j + 1].to(dtype)
        if d_index_q is not None or d_index_w is not None:
            unscaled = masked @ keys
            if d_index_w is not None:
                d_index_w[:, j] = torch.linalg.vecdot(query, unscaled)
            if d_index_q is not None:
                d_index_q[:, j] = unscaled.mul_(weight)
        if d_index_k is not None:
            d_index_k.addmm_(masked.T, query * weight)
