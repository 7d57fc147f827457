""" "per_head" by kernels: attention and KL in one pass, gradients in a second, as an operator and for `indexer_kl`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flash_indexer.ops import bodies, launch, worklists
from flash_indexer.ops.attention import gpu_body
from flash_indexer.ops.attention.gpu_gradients import kernels, per_head_gradients
from flash_indexer.ops.problem import LEAVES, Problem, Sums, WaitForKeys
from flash_indexer.ops.recomputed import Recomputed
from flash_indexer.ops.unseen import with_unseen

_NAME, _GRADIENTS = "flash_indexer::per_head_attention", "flash_indexer::per_head_gradients"
_TARGET, _ALL = "per_head", (True, True, True)
_OUTPUTS = ("out", "lse", "loss", "kl", "lse_index", "weight")


def body_of(op: str, q: Tensor, k: Tensor, index_q: Tensor, v: Tensor | None = None) -> str:
    """The body that runs target="per_head"; v: None where the attention's output is not wanted."""

    def refusal() -> str | None:
        return gpu_body.per_head_refusal(q, k, index_q) or gpu_body.refusal(q, k, k if v is None else v)

    return bodies.choose(op, q.device, refusal)


def per_head_sums(problem: Problem, wait_for_keys: WaitForKeys | None = None) -> Sums:
    """KL and entropy [T, H], and the gradients of sum_t,h token_weight[t] / H * KL[t,h], index_k's in float32.

    One pass reads all keys; it waits for them at its start.
    """
    launch.prepare(kernels(problem, V=0))
    if wait_for_keys is not None:
        wait_for_keys(problem.k.shape[0])
    problem = _aligned(problem)
    made = gpu_body.statistics(
        problem.q, problem.k, problem.leaves, problem.key_start, problem.key_end, problem.softmax_scale
    )
    if not any(problem.needs):
        return Sums(made.kl, made.entropy, None, None, None)
    share = problem.weight.contiguous() / problem.q.shape[1]
    gradients = per_head_gradients(problem._replace(lse=made.lse, token_weight=share), made.lse_index)
    return Sums(made.kl, made.entropy, *gradients)


def _aligned(problem: Problem) -> Problem:
    """With index inputs and intervals as the kernels read them."""
    index_q, index_k, index_weights = map(launch.aligned, problem.leaves)
    return problem._replace(
        index_q=index_q,
        index_k=index_k,
        index_weights=index_weights,
        key_start=problem.key_start.contiguous(),
        key_end=problem.key_end.contiguous(),
    )


def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    token_weight: Tensor | None,
    softmax_scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, lse, loss, kl, and what backward needs besides: the indexer's logsumexp and each token's weight."""
    problem = Problem(
        q, k, index_q, index_k, index_weights, None, key_start, key_end, token_weight, softmax_scale, _TARGET, 0, _ALL
    )
    problem = _aligned(problem)
    launch.prepare(kernels(problem, v.shape[2], deterministic))
    if token_weight is None:
        token_weight = worklists.mean_weight(key_start, key_end, k.shape[0])
    made = gpu_body.attention_with_kl(q, k, v, problem.leaves, problem.key_start, problem.key_end, softmax_scale)
    weight = token_weight.contiguous()
    loss = with_unseen(torch.dot(weight, made.kl.mean(1)), problem.leaves, key_start, key_end)
    return made.out, made.lse, loss, made.kl, made.lse_index, weight.clone()


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = dict(zip(_INPUTS, arguments, strict=True))
    q, v = x["q"], x["v"]
    lse, kl, lse_index = (q.new_empty(q.shape[:2], dtype=torch.float32) for _ in range(3))
    return q.new_empty(*q.shape[:2], v.shape[2]), lse, lse.new_empty(()), kl, lse_index, lse.new_empty(q.shape[0])


def _backward(values: Mapping[str, Any], d_loss: Tensor, wanted: list[bool]) -> Sequence[Tensor]:
    x = dict(values)
    factor = x.pop("weight") * (d_loss / x["q"].shape[1])
    gradients: Sequence[Tensor] = torch.ops.flash_indexer.per_head_gradients.default(**x, factor=factor, needs=wanted)
    return gradients


def _gradient_op(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    lse: Tensor,
    lse_index: Tensor,
    factor: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    softmax_scale: float,
    needs: list[bool],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of index_q, index_k, index_weights, empty where not in `needs`."""
    problem = Problem(
        q, k, index_q, index_k, index_weights, lse, key_start, key_end, factor, softmax_scale, _TARGET, 0, needs
    )
    problem = _aligned(problem)
    gradients = per_head_gradients(problem, lse_index, deterministic=deterministic)
    a, b, c = (
        x.new_empty(0) if gradient is None else gradient.to(x.dtype)
        for gradient, x in zip(gradients, problem.leaves, strict=True)
    )
    return a, b, c


def _fake_gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = dict(zip(inspect.signature(_gradient_op).parameters, arguments, strict=True))
    a, b, c = (x[name].new_empty(x[name].shape if need else 0) for name, need in zip(LEAVES, x["needs"], strict=True))
    return a, b, c


_INPUTS = tuple(inspect.signature(_op).parameters)
_AUTOGRAD = Recomputed(
    op="warmup_attention",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    saved=("q", "k", *LEAVES, "lse", "lse_index", "weight", "key_start", "key_end"),
    constants=("softmax_scale", "deterministic"),
    gradients=_backward,
)

# not torch.library.custom_op, whose first call imports torch._dynamo: seconds in which nothing is computed
torch.library.define(_NAME, torch.library.infer_schema(_op, mutates_args=()))
torch.library.impl(_NAME, "default", _op)
torch.library.register_fake(_NAME, _fake)
torch.library.register_autograd(_NAME, _AUTOGRAD.backward, setup_context=_AUTOGRAD.setup_context)
torch.library.define(_GRADIENTS, torch.library.infer_schema(_gradient_op, mutates_args=()))
torch.library.impl(_GRADIENTS, "default", _gradient_op)
torch.library.register_fake(_GRADIENTS, _fake_gradients)
per_head_attention = torch.ops.flash_indexer.per_head_attention.default
"""out, lse, loss, kl, lse_index, weight of checked arguments, in the order of `_op`; differentiable in LEAVES."""
