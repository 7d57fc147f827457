"""Attention over selected keys in torch, forward and backward, a chunk of query rows at a time, on any device.

    logit[t,h,s] = scale * q[t,h]·k[s,g(h)]       lse[t,h] = log sum_{s in S_t} exp(logit)
    a[t,h,s]     = exp(logit - lse)               out[t,h] = sum_{s in S_t} a v[s,g(h)]          p_sum[t,s] = sum_h a
    dS[t,h,s]    = a * (d_out[t,h]·v[s,g(h)] - d_out[t,h]·out[t,h])
    dq[t,h]      = scale * sum_{s in S_t} dS k[s,g(h)]
    dk[s,g]     += scale * sum_{t, h of g} dS q[t,h]       dv[s,g] += sum_{t, h of g} a d_out[t,h]

Where the chunk's selected keys are spread thinly, keys and values are gathered for each query; elsewhere the chunk
attends to the range of keys that holds them under a mask, head by head. Both ways a key that a query did not select
has no part in its results, whether it is finite or not. Products and sums are taken in float32 (float64 for float64
inputs).

R query rows of a chunk, W their largest number of selected keys, C the keys of a range, P heads taken together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.ops.blockwise import compute_dtype
from flash_indexer.ops.sparse.gathered import Slots, add_rows, chunks, gather_rows
from flash_indexer.ops.sparse.problem import KeySums, Needs, SparseProblem

_THIN = 16  # a range of more keys than this for each selected one: gathering them is faster than a mask


class _Chunk(NamedTuple):
    """slots of some rows; near: the range that holds all of their keys, where it is attended to under a mask.

    unselected: bool [R, C] in that range, else [R, W].
    """

    slots: Slots
    near: slice | None
    unselected: Tensor


@torch.no_grad()
def forward(problem: SparseProblem) -> tuple[Tensor, Tensor]:
    """out [T, H, V] in q's dtype and lse [T, H]: zeros and -inf for a query without keys, NaN where its scores are."""
    q, dtype = problem.q, compute_dtype(problem.q)
    out = q.new_zeros(*q.shape[:2], problem.value_dim)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
    for chunk in _chunks(problem, ()):
        rows = chunk.slots.rows
        for g, heads in _units(problem, chunk):
            query, key = q[rows, heads].to(dtype) * problem.softmax_scale, _tile(problem.k[:, g], chunk, dtype)
            logits = _product(query, key.mT).masked_fill_(chunk.unselected[:, None], -torch.inf)
            result, row_lse = _softmax(logits, _value(problem, chunk, g, key))
            out[rows, heads], lse[rows, heads] = result.to(out.dtype), row_lse
    has_nan = problem.selection.scores.isnan().any(-1)
    out[has_nan], lse[has_nan] = torch.nan, torch.nan
    return out, lse


@torch.no_grad()
def target(problem: SparseProblem, lse: Tensor | None) -> Tensor:
    """p_sum[t,s] = sum_h a[t,h,s] at the selected keys, 0 behind them: [T, K]. lse [T, H]; None computes it."""
    q, dtype = problem.q, compute_dtype(problem.q)
    p_sum = torch.zeros(problem.selection.indices.shape, dtype=dtype, device=q.device)
    for chunk in _chunks(problem, ()):
        rows, total = chunk.slots.rows, q.new_zeros(chunk.unselected.shape, dtype=dtype)
        for g, heads in _units(problem, chunk):
            query, key = q[rows, heads].to(dtype) * problem.softmax_scale, _tile(problem.k[:, g], chunk, dtype)
            logits = _product(query, key.mT).masked_fill_(chunk.unselected[:, None], -torch.inf)
            row_lse = logits.logsumexp(-1) if lse is None else lse[rows, heads].to(dtype)
            total += logits.sub_(row_lse[..., None]).exp_().masked_fill_(chunk.unselected[:, None], 0.0).sum(1)
        _write_slots(p_sum, chunk, total)
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
        rows, total = chunk.slots.rows, q.new_zeros(chunk.unselected.shape, dtype=dtype)
        for g, heads in _units(problem, chunk):
            query, key = q[rows, heads].to(dtype) * problem.softmax_scale, _tile(k[:, g], chunk, dtype)
            upstream, value = d_out[rows, heads].to(dtype), _value(problem, chunk, g, key)
            unselected = chunk.unselected[:, None]
            a = _product(query, key.mT).sub_(lse[rows, heads, None]).exp_().masked_fill_(unselected, 0.0)
            ds = _product(upstream, value.mT).sub_(delta[rows, heads, None]).mul_(a).masked_fill_(unselected, 0.0)
            if needs.p_sum:
                total += a.sum(1)
            if dq is not None:
                dq[rows, heads] = (_product(ds, key) * problem.softmax_scale).to(dq.dtype)
            if sums.dk is not None:
                _add(sums.dk[:, g], chunk, ds, query, problem.deterministic)
            into = sums.dv if problem.v is not None else sums.dk
            if into is not None:
                _add(into[:, g, : problem.value_dim], chunk, a, upstream, problem.deterministic)
        if p_sum is not None:
            _write_slots(p_sum, chunk, total)
    return dq, p_sum


def _chunks(problem: SparseProblem, by_row: tuple[Tensor, ...]) -> Iterator[_Chunk]:
    """by_row: further tensors [T, ...] that a mask multiplies by zero, so that they must be finite."""
    q, k, values = problem.q, problem.k, problem.values
    per_group, width = q.shape[1] // k.shape[1], q.shape[2] + problem.value_dim
    numbers = max(3 * width + 4 * per_group + 2, 5 * _THIN)  # for a query and one of its keys, in either way
    for slots in chunks(problem.selection, numbers, compute_dtype(q).itemsize, problem.workspace_bytes):
        last = int(slots.keys.max()) + 1
        first = int(slots.keys.masked_fill(slots.absent, last).min())
        near = slice(first, last)
        operands = (k[near], values[near], *(x[slots.rows] for x in by_row))
        if last - first > _THIN * slots.keys.shape[1] or not all(bool(x.isfinite().all()) for x in operands):
            yield _Chunk(slots, None, slots.absent)
            continue
        local = (slots.keys - first).masked_fill_(slots.absent, last - first)
        unselected = torch.ones(len(local), last - first + 1, dtype=torch.bool, device=q.device)
        yield _Chunk(slots, near, unselected.scatter_(1, local, False)[:, : last - first])


def _units(problem: SparseProblem, chunk: _Chunk) -> Iterator[tuple[int, slice]]:
    """Key heads with the query heads that are taken together: all of a group where its keys were gathered, else one."""
    heads, groups = problem.q.shape[1], problem.k.shape[1]
    per_group = heads // groups
    step = per_group if chunk.near is None else 1
    for h in range(0, heads, step):
        yield h // per_group, slice(h, h + step)


def _tile(x: Tensor, chunk: _Chunk, dtype: torch.dtype) -> Tensor:
    """Rows of x [S, N] for the chunk: [C, N] of a range, else [R, W, N]."""
    return gather_rows(x, chunk.slots, dtype) if chunk.near is None else x[chunk.near].to(dtype)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y, x [R, P, N] and y [N, M] or [R, N, M], in one way: matmul's depends on what requires a gradient."""
    if y.ndim == 3:
        return torch.bmm(x, y)
    return torch.mm(x.flatten(0, 1), y).view(*x.shape[:2], y.shape[1])


def _value(problem: SparseProblem, chunk: _Chunk, g: int, key: Tensor) -> Tensor:
    return key[..., : problem.value_dim] if problem.v is None else _tile(problem.v[:, g], chunk, key.dtype)


def _add(out: Tensor, chunk: _Chunk, weights: Tensor, rows: Tensor, deterministic: bool) -> None:
    """out[s] += sum over rows r and heads p of weights[r,p,s] * rows[r,p]; weights [R, P, C or W], rows [R, P, N]."""
    if chunk.near is None:
        add_rows(out, chunk.slots, torch.bmm(weights.mT, rows), deterministic)
    else:
        out[chunk.near].addmm_(weights.flatten(0, 1).T, rows.flatten(0, 1))


def _write_slots(out: Tensor, chunk: _Chunk, values: Tensor) -> None:
    """values, [R, C] of a range or [R, W], to the chunk's slots of out [T, K]; zeros where absent."""
    slots = chunk.slots
    if chunk.near is not None:
        local = (slots.keys - chunk.near.start).masked_fill_(slots.absent, 0)
        values = values.gather(1, local).masked_fill_(slots.absent, 0.0)
    out[slots.rows, : values.shape[1]] = values


def _softmax(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(logits) @ values and logsumexp(logits): 0 and -inf where every logit is -inf. Overwrites logits."""
    largest = logits.amax(-1, keepdim=True)
    empty = largest == -torch.inf
    p = logits.sub_(largest.masked_fill(empty, 0.0)).exp_()
    total = p.sum(-1, keepdim=True)
    return _product(p, values).div_(total.masked_fill(empty, 1.0)), (largest + total.log())[..., 0]
