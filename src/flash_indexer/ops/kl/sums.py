"""What `indexer_kl` is made of before anything is rounded: KL of each query and the gradients, index_k's as a sum.

Whoever adds the gradients of index_k of several processes, or computes while keys still arrive, starts from here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.intervals import check_intervals
from flash_indexer.ops.kl import gpu_body as cuda
from flash_indexer.ops.kl import per_head
from flash_indexer.ops.kl import torch_body as cpu


class Problem(NamedTuple):
    """Checked arguments of `indexer_kl`, shapes as there; needs: which gradients (index_q, index_k, index_weights)."""

    q: Tensor
    k: Tensor
    index_q: Tensor
    index_k: Tensor
    index_weights: Tensor
    lse: Tensor | None
    key_start: Tensor
    key_end: Tensor
    token_weight: Tensor
    softmax_scale: float
    target: str
    workspace_bytes: int
    needs: Sequence[bool]


class Sums(NamedTuple):
    """kl, entropy: [T] ([T, H] for "per_head"), float32 at least. Gradients of sum_t token_weight[t] * kl[t], None
    where not wanted: d_index_q and d_index_weights in their input's dtype, d_index_k in float32 at least."""

    kl: Tensor
    entropy: Tensor
    d_index_q: Tensor | None
    d_index_k: Tensor | None
    d_index_weights: Tensor | None


def indexer_kl_sums(problem: Problem, before: Callable[[int], object] | None = None) -> Sums:
    """`indexer_kl`'s KL and gradients, the sum over queries in d_index_k not yet rounded. Without autograd.

    before: called with n ahead of each step that reads the teacher's keys k before the n-th, and no others. k must be
    contiguous then, and aligned as new tensors are.
    """
    if problem.q.device.type == "cuda":
        if problem.target != "per_head":
            out, _, kl, entropy = cuda.sums(*problem, before)
            needs = problem.needs
            return Sums(kl, entropy, out.index_q if needs[0] else None, out.index_k, out.weights if needs[2] else None)
        reason = per_head.refusal(problem.q, problem.k, problem.index_q)
        if reason is None:
            index = problem.index_q, problem.index_k, problem.index_weights
            kl, entropy, gradients = per_head.sums(
                problem.q, problem.k, index, problem.key_start, problem.key_end, problem.token_weight,
                problem.softmax_scale, problem.needs, before,
            )  # fmt: skip
            return Sums(kl, entropy, *gradients)
        say_torch_body(reason)
    return blockwise(problem, before)


def blockwise(problem: Problem, before: Callable[[int], object] | None = None) -> Sums:
    """`indexer_kl_sums` in torch, chunk by chunk; "per_head" is the "mean" problem of every pair of heads."""
    q, k, index_q, index_k, index_weights, lse, key_start, key_end, token_weight, *_ = problem
    needs, target = problem.needs, problem.target
    check_intervals(key_start, key_end, k.shape[0])
    T, H = q.shape[:2]
    dtype = cpu.compute_dtype(q)
    weight = token_weight.to(dtype)
    per_head = target == "per_head"
    problems = [(h, h + 1) for h in range(H)] if per_head else [(0, H)]
    kl = torch.zeros(T, len(problems), dtype=dtype, device=q.device)
    entropy = torch.zeros_like(kl)
    d_index_q, d_index_w = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) if need else None
        for x, need in ((index_q, needs[0]), (index_weights, needs[2]))
    )
    d_keys = torch.zeros(index_k.shape, dtype=dtype, device=q.device) if needs[1] else None
    index_heads = 1 if per_head else index_q.shape[1]
    tiles = 2 + (index_heads if any(needs) else 1)
    temporary = 1  # tile that logsumexp and entropy allocate
    chunks = cpu.plan_chunks(key_start, key_end, tiles + temporary, dtype.itemsize, problem.workspace_bytes)
    largest = max(((end - begin) * (last - first) for begin, end, first, last in chunks), default=0)
    flat = torch.empty(tiles * largest, dtype=dtype, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for begin, end, first, last in chunks:
            if before is not None:
                before(last)
            here, keys = slice(begin, end), slice(first, last)
            starts = (key_start[here] - first).clamp_(0, last - first)
            ends = (key_end[here] - first).clamp_(0, last - first)
            elements = tiles * (end - begin) * (last - first)
            buffers = flat[:elements].view(tiles, end - begin, last - first)
            p, scores, terms = buffers[0], buffers[1], buffers[2:]
            for column, (low, high) in enumerate(problems):
                groups = slice(low * k.shape[1] // H, (high - 1) * k.shape[1] // H + 1)
                query, key = q[here, low:high], k[keys, groups]
                row_lse = lse[here, low:high].to(dtype) if lse is not None else None
                scale = problem.softmax_scale
                if row_lse is None and target != "sum_logits":
                    row_lse = cpu.teacher_lse(query, key, starts, ends, softmax_scale=scale, scratch=terms[0])
                cpu.teacher_scores(
                    query, key, row_lse, starts, ends, softmax_scale=scale, target=target, out=p, scratch=terms[0]
                )
                heads = slice(low, high) if per_head else slice(None)
                iq, iw, ik = index_q[here, heads], index_weights[here, heads], index_k[keys]
                relu = terms[:index_heads] if any(needs) else terms[:1]
                cpu.index_scores(iq, ik, iw, starts, ends, out=scores, relu=relu)
                share = weight[here] / len(problems)
                kl[here, column], entropy[here, column], di = cpu.kl_rows(p, scores, share, starts, ends)
                if any(needs):
                    cpu.index_gradients(
                        di, relu, iq, ik, iw,
                        d_index_q=d_index_q[here, heads] if d_index_q is not None else None,
                        d_index_k=d_keys[keys] if d_keys is not None else None,
                        d_index_w=d_index_w[here, heads] if d_index_w is not None else None,
                    )  # fmt: skip
    if not per_head:
        kl, entropy = kl[:, 0], entropy[:, 0]
    return Sums(kl, entropy, d_index_q, d_keys, d_index_w)


_said: set[str] = set()


def say_torch_body(reason: str) -> None:
    """Says once a process for each reason that target="per_head" on CUDA runs the blockwise torch body."""
    if reason not in _said:
        _said.add(reason)
        warnings.warn(
            'flash_indexer: target="per_head" runs the blockwise torch body (exact, not near the GPU\'s peak) here: '
            f"{reason}",
            stacklevel=4,
        )
