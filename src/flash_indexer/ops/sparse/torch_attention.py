"""Attention over selected keys in torch, forward and backward, a chunk of query rows at a time, on any device.

    logit[t,h,s] = scale * q[t,h]·k[s,g(h)]       lse[t,h] = log sum_{s in S_t} exp(logit)
    a[t,h,s]     = exp(logit - lse)               out[t,h] = sum_{s in S_t} a v[s,g(h)]          p_sum[t,s] = sum_h a
    dS[t,h,s]    = a * (d_out[t,h]·v[s,g(h)] - d_out[t,h]·out[t,h])
    dq[t,h]      = scale * sum_{s in S_t} dS k[s,g(h)]
    dk[s,g]     += scale * sum_{t, h of g} dS q[t,h]       dv[s,g] += sum_{t, h of g} a d_out[t,h]

Products and sums are taken in float32 (float64 for float64 inputs). `chunks` says how a chunk's keys are held.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flash_indexer.ops.blockwise import compute_dtype
from flash_indexer.ops.sparse.chunks import Chunk, chunks, product, thin, total
from flash_indexer.ops.sparse.problem import KeySums, Needs, SparseProblem


@torch.no_grad()
def forward(problem: SparseProblem) -> tuple[Tensor, Tensor]:
    """out [T, H, V] in q's dtype and lse [T, H]: zeros and -inf for a query without keys, NaN where its scores are."""
    q, dtype = problem.q, compute_dtype(problem.q)
    out = q.new_zeros(*q.shape[:2], problem.value_dim)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
    for chunk in _chunks(problem, ()):
        for g, group in _groups(problem):
            key = chunk.tile(problem.k[:, g], dtype)
            value = _value(problem, chunk, g, key)
            for heads in chunk.head_runs(group):
                query = q[chunk.rows, heads].to(dtype) * problem.softmax_scale
                logits = product(query, key.mT).masked_fill_(chunk.unselected[:, None], -torch.inf)
                result, row_lse = _softmax(logits, value)
                out[chunk.rows, heads], lse[chunk.rows, heads] = result.to(out.dtype), row_lse
    has_nan = problem.selection.scores.isnan().any(-1)
    out[has_nan], lse[has_nan] = torch.nan, torch.nan
    return out, lse


@torch.no_grad()
def target(problem: SparseProblem, lse: Tensor | None) -> Tensor:
    """p_sum[t,s] = sum_h a[t,h,s] at the selected keys, 0 behind them: [T, K]. lse [T, H]; None computes it."""
    q, dtype = problem.q, compute_dtype(problem.q)
    p_sum = torch.zeros(problem.selection.indices.shape, dtype=dtype, device=q.device)
    for chunk in _chunks(problem, ()):
        unselected, summed = chunk.unselected[:, None], q.new_zeros(chunk.unselected.shape, dtype=dtype)
        for g, group in _groups(problem):
            key = chunk.tile(problem.k[:, g], dtype)
            for heads in chunk.head_runs(group):
                query = q[chunk.rows, heads].to(dtype) * problem.softmax_scale
                logits = product(query, key.mT).masked_fill_(unselected, -torch.inf)
                row_lse = logits.logsumexp(-1) if lse is None else lse[chunk.rows, heads].to(dtype)
                summed += logits.sub_(row_lse[..., None]).exp_().masked_fill_(unselected, 0.0).sum(1)
        chunk.to_slots(summed, p_sum, absent=0.0)
    return p_sum


@torch.no_grad()
def backward(
    problem: SparseProblem, d_out: Tensor, out: Tensor, lse: Tensor, needs: Needs, sums: KeySums
) -> tuple[Tensor | None, Tensor | None]:
    """dq and p_sum, and dk and dv added to `sums`. Without v, dk takes the values' part as well.

    Args:
        d_out: [T, H, V]. out, lse: what `forward` returned. sums: buffers with a row for each key.

    Returns:
        dq [T, H, D] in q's dtype and p_sum [T, K], None where not wanted.
    """
    q, k, dtype = problem.q, problem.k, compute_dtype(problem.q)
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device) if needs.q else None
    p_sum = torch.zeros(problem.selection.indices.shape, dtype=dtype, device=q.device) if needs.p_sum else None
    delta = (d_out.to(dtype) * out.to(dtype)).sum(-1)
    for chunk in _chunks(problem, (q, d_out)):
        rows, unselected = chunk.rows, chunk.unselected[:, None]
        summed = q.new_zeros(chunk.unselected.shape, dtype=dtype)
        for g, group in _groups(problem):
            key, d_key, d_value = chunk.tile(k[:, g], dtype), None, None
            value = _value(problem, chunk, g, key)
            for heads in chunk.head_runs(group):
                query, upstream = q[rows, heads].to(dtype) * problem.softmax_scale, d_out[rows, heads].to(dtype)
                a = product(query, key.mT).sub_(lse[rows, heads, None]).exp_().masked_fill_(unselected, 0.0)
                ds = product(upstream, value.mT).sub_(delta[rows, heads, None]).mul_(a).masked_fill_(unselected, 0.0)
                if needs.p_sum:
                    summed += a.sum(1)
                if dq is not None:
                    dq[rows, heads] = (product(ds, key) * problem.softmax_scale).to(dq.dtype)
                if sums.dk is not None:
                    d_key = total(d_key, chunk.outer(ds, query))
                if (sums.dk if problem.v is None else sums.dv) is not None:
                    d_value = total(d_value, chunk.outer(a, upstream))
            if d_key is not None and d_value is not None and problem.v is None:
                d_key[..., : problem.value_dim] += d_value
            for out_sum, tile in ((sums.dk, d_key), (sums.dv, d_value)):
                if out_sum is not None and tile is not None:
                    chunk.add(out_sum[:, g], tile, problem.deterministic)
        if p_sum is not None:
            chunk.to_slots(summed, p_sum, absent=0.0)
    return dq, p_sum


def _chunks(problem: SparseProblem, by_row: tuple[Tensor, ...]) -> Iterator[Chunk]:
    q, k = problem.q, problem.k
    per_group, width = q.shape[1] // k.shape[1], q.shape[2] + problem.value_dim
    numbers = 3 * width + 4 * per_group + 2
    most = thin(q.device, q.shape[1], k.shape[1])
    return chunks(problem.selection, numbers, problem.workspace_bytes, (k, problem.values), by_row, most)


def _groups(problem: SparseProblem) -> Iterator[tuple[int, slice]]:
    """Key heads, and the query heads that read each."""
    per_group = problem.q.shape[1] // problem.k.shape[1]
    yield from ((g, slice(g * per_group, (g + 1) * per_group)) for g in range(problem.k.shape[1]))


def _value(problem: SparseProblem, chunk: Chunk, g: int, key: Tensor) -> Tensor:
    return key[..., : problem.value_dim] if problem.v is None else chunk.tile(problem.v[:, g], key.dtype)


def _softmax(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(logits) @ values and logsumexp(logits): 0 and -inf where every logit is -inf. Overwrites logits."""
    largest = logits.amax(-1, keepdim=True)
    empty = largest == -torch.inf
    p = logits.sub_(largest.masked_fill(empty, 0.0)).exp_()
    total = p.sum(-1, keepdim=True)
    return product(p, values).div_(total.masked_fill(empty, 1.0)), (largest + total.log())[..., 0]
