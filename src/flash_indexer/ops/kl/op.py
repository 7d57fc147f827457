"""The dense warm-up loss: public function, custom op, fake and autograd on one screen."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_indexer.ops import known, worklists
from flash_indexer.ops.blockwise import compute_dtype
from flash_indexer.ops.bodies import TORCH
from flash_indexer.ops.checks import check_indexer_kl, check_softcap, check_workspace
from flash_indexer.ops.kl import gpu_body
from flash_indexer.ops.kl.arithmetic import check_arithmetic, parts, stand_in
from flash_indexer.ops.kl.sums import body_of, indexer_kl_sums
from flash_indexer.ops.problem import LEAVES, Problem
from flash_indexer.ops.quantization import Quantized
from flash_indexer.ops.unseen import with_unseen
from flash_indexer.ops.weighted import among_all, weighted_part

_NAME = "flash_indexer::indexer_kl"


class IndexerKL(NamedTuple):
    """Result of `indexer_kl`: the scalar loss to differentiate, and per-token values for logging."""

    loss: Tensor
    kl: Tensor
    entropy: Tensor


def indexer_kl(
    q: Tensor | Quantized,
    k: Tensor | Quantized,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    *,
    softmax_scale: float,
    key_start: Tensor,
    key_end: Tensor,
    lse: Tensor | None = None,
    target: str = "mean",
    token_weight: Tensor | None = None,
    workspace_bytes: int = 2**30,
    index_dtype: str | None = None,
    teacher_dtype: str | None = None,
    softcap: float | None = None,
) -> IndexerKL:
    """loss = sum_t token_weight[t] * KL(p[t,:] || softmax(i[t,:])), in linear memory, with exact gradients.

        p[t,s] = sum_h exp(scale * q[t,h]·k[s,g(h)] - lse[t,h]), divided by its sum over s     (target="mean")
        i[t,s] = sum_j index_weights[t,j] * ReLU(index_q[t,j]·index_k[s])

    over the visible keys key_start[t] <= s < key_end[t]. "per_head" (I == H) distils index head h from teacher head h
    alone and averages over heads; "sum_logits" takes p = softmax(scale * sum_h q[t,h]·k[s,g(h)]).

    The gradients of index_q, index_k and index_weights are computed together with the loss, in one pass over the
    teacher ("per_head" on a GPU: one for the loss, one each for those of queries and of keys, no scores in memory);
    backward only scales them, in place, so it may run once.

    Args:
        q: teacher queries [T, H, D]. k: teacher keys [S, G, D], H % G == 0. Constants.
        index_q: [T, I, E]. index_k: [S, E]. index_weights: [T, I], the factors I^-0.5 and E^-0.5 included.
        softmax_scale: the model's own softmax scale.
        key_start, key_end: int32 [T], non-decreasing; an empty interval gives KL 0 and zero gradients.
        lse: [T, H], natural log of the sum of exp(scale * q·k) over all that the head's softmax counts; None computes
            it over the visible keys. More than these may be counted: a sink (log(exp(lse) + exp(sinks[h])) of gpt-oss),
            or keys that no indexer ranks. DeepSeek-V4's head has one softmax over a sink, the keys of a window and the
            compressed keys before it; with that softmax's lse and the compressed keys as k, p is what the heads give
            these keys: a head is weighed by the part of its attention that falls on them, and p sums to 1 over them.
            Not read by the kernels of "per_head", whose one pass yields it with the loss.
        target: "mean" (the paper's), "per_head" or "sum_logits".
        token_weight: [T]; None means 1/n for the n queries that see a key. Where a quarter of the rows or more have
            weight zero, these cost nothing: they are not read, and their kl, entropy and gradients are 0. The contents
            are read once for each tensor, as those of the intervals are, so make it once for all layers.
        workspace_bytes: bound on the memory for score tiles; query rows are processed in chunks that fit.
        index_dtype: "fp8" computes the loss of index_q and index_k as they are served, rotated and rounded to e4m3 with
            a scale a row (`quantize`); "fp8_unrotated" leaves the rotation out. Gradients go straight through: di
            of the rounded scores, times the derivatives of the scores of index_q and index_k as they are (with
            target="per_head" those with respect to the rounded tensors, rotated back).
        teacher_dtype: "fp8" takes the teacher's logits from q and k rotated and rounded to e4m3, a scale a row and
            head, whatever D is (docs/math.md, "Rows in e4m3"); "fp8_unrotated" leaves the rotation out. q and k may be
            handed over as `Quantized`, and are then taken as they are: rotate both alike or neither. An lse is read as
            given: the model's own is that of its own logits, so sum_s a[t,h,s] is 1 only as far as these agree
            (`flash-indexer check --fp8` reports it); lse=None is the rounded logits' own.

        softcap: c; the teacher's logits are c * tanh(scale * q·k / c) (Gemma 2's attn_logit_softcapping). Not in the
            kernels: on a GPU the blockwise torch body runs.

    Products in e4m3 run on the tensor cores with target="mean" ("sum_logits": the indexer's alone) where the kernels
    run, at up to twice bfloat16's rate; elsewhere the rounded tensors are multiplied in the wider dtype, the same up to
    the order of sums. Memory beside the workspace: the e4m3 of index_q, index_k, k and a chunk of q, of all of q
    with lse=None.

    Dtypes: on CUDA q, k, index_q, index_k bfloat16 and the rest float32; on the CPU float32 or float64 throughout.
    Kernels run on GPUs of compute capability 9.0 with tilelang installed, where D is 64, 96, 128, 192, 256 or 576, E is
    32, 64 or 128, H at most 128 and I at most 64 ("per_head": D up to 256, H/G up to 128; 64 with E = 128 or D > 192).
    Elsewhere on a GPU the blockwise torch body runs, in float32 and linear memory, with one warning that says why.

    Returns:
        loss: scalar, differentiable in index_q, index_k and index_weights.
        kl: [T] ([T, H] for "per_head"), nats, not differentiable.
        entropy: -sum_s p log p, shaped like kl; log(visible keys) - entropy is the uniform prediction's KL.

    NaN or inf in any input that a query sees shows in kl and loss; in index inputs of a token that nobody sees, in the
    loss alone, since it would reach gradients as 0 · NaN: pad with zeros.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it is.

    Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1, dense warm-up stage.
    """
    (q, q_scale), (k, k_scale) = parts("indexer_kl", "q", q), parts("indexer_kl", "k", k)
    check_arithmetic("indexer_kl", q, k, index_q, index_dtype, teacher_dtype)
    tensors = dict(
        q=stand_in(q, q_scale, index_q),
        k=stand_in(k, k_scale, index_q),
        index_q=index_q,
        index_k=index_k,
        index_weights=index_weights,
        lse=lse,
        token_weight=token_weight,
    )
    check_indexer_kl(tensors, key_start, key_end, target, softmax_scale)
    check_softcap("indexer_kl", softcap, target)
    check_workspace("indexer_kl", workspace_bytes)
    grad = torch.is_grad_enabled()
    needs = [grad and x.requires_grad for x in (index_q, index_k, index_weights)]
    problem = Problem(
        q, k, index_q, index_k, index_weights, lse, key_start, key_end, token_weight, softmax_scale, target,
        workspace_bytes, needs, q_scale, k_scale, index_dtype, teacher_dtype, softcap,
    )  # fmt: skip
    if known.is_followed(x for x in problem if isinstance(x, Tensor)):
        loss, kl, entropy, *_ = _indexer_kl(*problem)
        return IndexerKL(loss, kl, entropy)
    with torch.no_grad():
        loss, kl, entropy, *gradients = _compute(problem)
    if not any(needs):
        return IndexerKL(loss.detach(), kl, entropy)
    wanted = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return IndexerKL(known.known_loss("indexer_kl", body_of(problem), loss, wanted, problem.leaves), kl, entropy)


def _op(
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
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    index_dtype: str | None = None,
    teacher_dtype: str | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The schema of the custom operator: Problem's fields -> loss, kl, entropy and a gradient for each of LEAVES."""
    problem = Problem(
        q, k, index_q, index_k, index_weights, lse, key_start, key_end, token_weight, softmax_scale, target,
        workspace_bytes, needs, q_scale, k_scale, index_dtype, teacher_dtype, softcap,
    )  # fmt: skip
    return _compute(problem)


def _compute(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients are empty where not wanted."""
    body, index_k = body_of(problem), problem.index_k
    kernels = body != TORCH
    if problem.token_weight is None:
        mean = worklists.mean_weight(problem.key_start, problem.key_end, problem.k.shape[0])
        problem = problem._replace(token_weight=mean if kernels else mean_weight(problem))
    num_queries = problem.q.shape[0]
    problem, rows = weighted_part(problem)
    sums = indexer_kl_sums(problem)
    d_index_k = sums.d_index_k
    if kernels and problem.target != "per_head":
        loss, d_index_k = gpu_body.finish(d_index_k, problem.weight.contiguous(), sums.kl, index_k)
    else:
        kl = sums.kl if sums.kl.ndim == 2 else sums.kl[:, None]
        loss = (problem.weight.to(kl.dtype) * kl.mean(-1)).sum()
    loss = with_unseen(loss, problem.leaves, problem.key_start, problem.key_end)
    sums = among_all(sums._replace(d_index_k=d_index_k), rows, num_queries)
    gradients = sums.gradients
    a, b, c = (
        leaf.new_empty(0) if gradient is None else gradient.to(leaf.dtype)
        for leaf, gradient in zip(problem.leaves, gradients, strict=True)
    )
    return loss, sums.kl, sums.entropy, a, b, c


def mean_weight(problem: Problem) -> Tensor:
    """1/n for each of the n queries that see a key, 0 for the others: [T], in the dtype that torch computes in."""
    seen = problem.key_end > problem.key_start
    return seen.to(compute_dtype(problem.index_q)) / seen.sum().clamp_min(1)


# not torch.library.custom_op, whose first call imports torch._dynamo: seconds in which nothing is computed
torch.library.define(_NAME, torch.library.infer_schema(_op, mutates_args=()))
torch.library.impl(_NAME, "default", _op)
_indexer_kl = torch.ops.flash_indexer.indexer_kl.default
if tuple(inspect.signature(_op).parameters) != Problem._fields:
    raise TypeError("flash_indexer: the operator's arguments must be Problem's fields")


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = Problem(*arguments)
    q, dtype = problem.q, compute_dtype(problem.index_q)
    kl = q.new_empty(q.shape[:2] if problem.target == "per_head" else q.shape[:1], dtype=dtype)
    a, b, c = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for x, need in zip(problem.leaves, problem.needs, strict=True)
    )
    return q.new_empty((), dtype=dtype), kl, kl.new_empty(kl.shape), a, b, c


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    problem = Problem(*inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.wanted = dict(zip(LEAVES, problem.needs, strict=True))
    known.save(ctx, "indexer_kl", body_of(problem), output[3:])


def _backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradients = dict(zip(LEAVES, known.backward(ctx, d_loss), strict=True))
    return tuple(gradients[name] if ctx.wanted.get(name) else None for name in Problem._fields)


torch.library.register_fake(_NAME, _fake)
torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
