"""The dense warm-up loss: public function, custom op, fake and autograd on one screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_indexer.ops.checks import check_indexer_kl, check_workspace
from flash_indexer.ops.kl import gpu_body as cuda
from flash_indexer.ops.kl import per_head
from flash_indexer.ops.kl import torch_body as cpu
from flash_indexer.ops.kl.sums import Problem, blockwise, say_torch_body

_NAME = "flash_indexer::indexer_kl"


class IndexerKL(NamedTuple):
    """Result of `indexer_kl`: the scalar loss to differentiate, and per-token values for logging."""

    loss: Tensor
    kl: Tensor
    entropy: Tensor


def indexer_kl(
    q: Tensor,
    k: Tensor,
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
    workspace_bytes: int = 512 * 2**20,
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
        lse: [T, H], natural log of the sum of exp(scale * q·k) over exactly the visible keys; None computes it. Not
            read by the kernels of "per_head", whose one pass yields it with the loss.
        target: "mean" (the paper's), "per_head" or "sum_logits".
        token_weight: [T]; None means 1/n for the n queries that see a key.
        workspace_bytes: bound on the memory for score tiles; query rows are processed in chunks that fit.

    Dtypes: on CUDA q, k, index_q, index_k bfloat16 and the rest float32; on the CPU float32 or float64 throughout.
    Sizes on CUDA: the kernels' (an error names them); but "per_head" runs in torch, with a warning that says why, where
    D > 256, E is not 32, 64 or 128, H/G > 128 (> 64 with E = 128 or D > 192), the GPU is not of compute capability 9.0,
    or tilelang is not installed.

    Returns:
        loss: scalar, differentiable in index_q, index_k and index_weights.
        kl: [T] ([T, H] for "per_head"), nats, not differentiable.
        entropy: -sum_s p log p, shaped like kl; log(visible keys) - entropy is the uniform prediction's KL.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it is.

    Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1, dense warm-up stage.
    """
    tensors = dict(
        q=q,
        k=k,
        index_q=index_q,
        index_k=index_k,
        index_weights=index_weights,
        lse=lse,
        token_weight=token_weight,
    )
    check_indexer_kl(tensors, key_start, key_end, target, softmax_scale)
    check_workspace("indexer_kl", workspace_bytes)
    grad = torch.is_grad_enabled()
    needs = [grad and x.requires_grad for x in (index_q, index_k, index_weights)]
    loss, kl, entropy, *_ = _indexer_kl(
        q, k, index_q, index_k, index_weights, lse, key_start, key_end, token_weight,
        softmax_scale, target, workspace_bytes, needs,
    )  # fmt: skip
    return IndexerKL(loss, kl, entropy)


def _body(
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
    if q.device.type == "cuda":
        if target != "per_head":
            return cuda.indexer_kl(
                q, k, index_q, index_k, index_weights, lse, key_start, key_end, token_weight,
                softmax_scale, target, workspace_bytes, needs,
            )  # fmt: skip
        reason = per_head.refusal(q, k, index_q)
        if reason is None:
            return per_head.indexer_kl(
                q, k, (index_q, index_k, index_weights), key_start, key_end, token_weight, softmax_scale, needs
            )
        say_torch_body(reason)
    return torch_body(
        q, k, index_q, index_k, index_weights, lse, key_start, key_end, token_weight,
        softmax_scale, target, workspace_bytes, needs,
    )  # fmt: skip


def torch_body(
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
    """What `cuda.indexer_kl` returns, computed chunk by chunk in torch, on any device."""
    seen = key_end > key_start
    dtype = cpu.compute_dtype(q)
    weight = seen.to(dtype) / seen.sum().clamp_min(1) if token_weight is None else token_weight.to(dtype)
    sums = blockwise(
        Problem(
            q, k, index_q, index_k, index_weights, lse, key_start, key_end, weight,
            softmax_scale, target, workspace_bytes, needs,
        )
    )  # fmt: skip
    kl = sums.kl if target == "per_head" else sums.kl[:, None]
    gradients = (
        x.new_empty(0) if gradient is None else gradient.to(x.dtype)
        for x, gradient in zip((index_q, index_k, index_weights), sums[2:], strict=True)
    )
    d_index_q, d_index_k, d_weights = gradients
    return (weight * kl.mean(-1)).sum(), sums.kl, sums.entropy, d_index_q, d_index_k, d_weights


# not torch.library.custom_op, whose first call imports torch._dynamo: seconds in which nothing is computed
torch.library.define(_NAME, torch.library.infer_schema(_body, mutates_args=()))
torch.library.impl(_NAME, "default", _body)
_indexer_kl = torch.ops.flash_indexer.indexer_kl.default


def _empty_gradients(
    index_q: Tensor, index_k: Tensor, index_weights: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """One tensor for each gradient that is wanted, an empty one for each that is not. Unwritten rows are zero."""
    dq, dk, dw = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for x, need in zip((index_q, index_k, index_weights), needs, strict=True)
    )
    return dq, dk, dw


def _fake(
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
    dtype = cpu.compute_dtype(q)
    kl = q.new_empty(q.shape[:2] if target == "per_head" else q.shape[:1], dtype=dtype)
    return (
        q.new_empty((), dtype=dtype),
        kl,
        kl.new_empty(kl.shape),
        *_empty_gradients(index_q, index_k, index_weights, needs),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # the gradients of kl, entropy and of the gradients: zeros nobody reads
    ctx.save_for_backward(*output[3:])
    ctx.needs = inputs[-1]
    q, k, index_q, *_ = inputs  # a size that "per_head" has no kernels for ran in the torch body, on any GPU
    ctx.kernels = q.is_cuda and (inputs[10] != "per_head" or per_head.refusal(q, k, index_q) is None)
    ctx.consumed = False


def _backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("indexer_kl: the loss has no second derivative; call backward without create_graph=True")
    if ctx.consumed:
        raise RuntimeError(
            "indexer_kl: backward already ran and scaled the gradients in place; compute the loss again for a "
            "second backward, or add the losses and call backward once"
        )
    ctx.consumed = True
    gradients = [g if need else None for g, need in zip(_scaled(ctx, d_loss), ctx.needs, strict=True)]
    return None, None, *gradients, *[None] * 8


def _scaled(ctx: Any, d_loss: Tensor) -> Sequence[Tensor]:
    """In place, so that each gradient exists once; a compiler's tracing tensors want it functional."""
    gradients: Sequence[Tensor] = ctx.saved_tensors
    if any(type(gradient) is not Tensor for gradient in gradients):
        return [gradient * d_loss for gradient in gradients]
    scale_gradients(gradients, d_loss, ctx.kernels)
    return gradients


def scale_gradients(gradients: Sequence[Tensor], factor: Tensor, kernels: bool) -> None:
    """The gradients of index_q, index_k and index_weights (empty where not wanted) *= factor, in place.

    kernels: in one launch on a GPU of the kernels, else by torch.
    """
    if kernels:
        cuda.scale(gradients, factor)
    else:
        for gradient in gradients:
            gradient.mul_(factor)


torch.library.register_fake(_NAME, _fake)
torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
