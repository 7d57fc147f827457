"""A layer's attention and its indexer's loss from one call: public function, the per-head operator, fake, autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_indexer.ops.attention import gpu_body as heads
from flash_indexer.ops.attention.op import _attention
from flash_indexer.ops.checks import check_indexer_kl, check_value, check_workspace
from flash_indexer.ops.kl.gpu_body import aligned
from flash_indexer.ops.kl.op import indexer_kl

_NAME, _GRADIENTS = "flash_indexer::per_head_attention", "flash_indexer::per_head_gradients"


class WarmupAttention(NamedTuple):
    """Result of `warmup_attention`: the attention's output and logsumexp, the loss to differentiate, KL for logging."""

    out: Tensor
    lse: Tensor
    loss: Tensor
    kl: Tensor


def warmup_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    *,
    softmax_scale: float,
    key_start: Tensor,
    key_end: Tensor,
    target: str = "mean",
    token_weight: Tensor | None = None,
    workspace_bytes: int = 512 * 2**20,
    deterministic: bool = True,
) -> WarmupAttention:
    """out[t,h] = sum_s softmax_s(scale * q[t,h]·k[s,g(h)]) * v[s,g(h)], and `indexer_kl`'s loss of the same attention.

    With target="per_head" (I == H) on CUDA both come out of one pass over the keys:

        KL[t,h] = sum_s p (log p - log_softmax_s(x)),  p = softmax_s(scale * q·k),  x = w[t,h] * ReLU(index_q·index_k)
        loss    = sum_t token_weight[t] * mean_h KL[t,h]

    and backward is a second pass, which forms the logits again; it may run more than once. Other targets run the
    attention and then `indexer_kl` with its logsumexp.

    Args:
        q: [T, H, D], k: [S, G, D], v: [S, G, V]: the layer's own, H % G == 0. Constants.
        index_q: [T, I, E]. index_k: [S, E]. index_weights: [T, I], the factors I^-0.5 and E^-0.5 included.
        softmax_scale: the model's own softmax scale.
        key_start, key_end: int32 [T], non-decreasing; an empty interval gives out 0, lse -inf, KL 0, zero gradients.
        target, token_weight, workspace_bytes: as in `indexer_kl`.
        deterministic: True gives the same bits every time. With False the backward of "per_head" on CUDA forms the
            logits once, for D <= 128 and E <= 64 where index_k's and another gradient are wanted, and takes about three
            quarters of the time: it adds to the gradient of index_k in whatever order the tiles come. Without effect
            elsewhere, and under torch.use_deterministic_algorithms(True).

    Dtypes: on CUDA q, k, v, index_q, index_k bfloat16 and the rest float32; on the CPU float32 or float64 throughout.
    CUDA takes D and V up to 256, and with the other targets D=576 with v = k[..., :512] (MLA's absorbed form).

    Returns:
        out [T, H, V] in q's dtype; lse [T, H], natural log; loss, differentiable in index_q, index_k, index_weights;
        kl [T] ([T, H] for "per_head"), nats. Only the loss is differentiable.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it is.

    Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1, dense warm-up stage; docs/math.md.
    """
    tensors = dict(
        q=q, k=k, index_q=index_q, index_k=index_k, index_weights=index_weights, lse=None, token_weight=token_weight
    )
    check_indexer_kl(tensors, key_start, key_end, target, softmax_scale, "warmup_attention")
    check_value("warmup_attention", k, v)
    check_workspace("warmup_attention", workspace_bytes)
    if target == "per_head" and q.device.type != "cpu":
        out, lse, loss, kl, _, _ = _per_head(
            q, k, v, index_q, index_k, index_weights, key_start, key_end, token_weight, softmax_scale, deterministic
        )
        return WarmupAttention(out, lse, loss, kl)
    out, lse = _attention(q, k, v, key_start, key_end, softmax_scale)
    result = indexer_kl(
        q, k, index_q, index_k, index_weights, softmax_scale=softmax_scale, key_start=key_start, key_end=key_end,
        lse=None if target == "sum_logits" else lse, target=target, token_weight=token_weight,
        workspace_bytes=workspace_bytes,
    )  # fmt: skip
    return WarmupAttention(out, lse, result.loss, result.kl)


def _body(
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
    heads.check_attention("warmup_attention", q, k, v)
    heads.check_per_head("warmup_attention", q, k, index_q)
    heads.prepare(q, k, v.shape[2], index_q.shape[2], deterministic=deterministic)
    weight = heads.weight_of(token_weight, key_start, key_end, k.shape[0])
    index = tuple(aligned(x) for x in (index_q, index_k, index_weights))
    starts, ends = key_start.contiguous(), key_end.contiguous()
    result = heads.per_head(q, k, v, (index[0], index[1], index[2]), starts, ends, softmax_scale)
    assert result.kl is not None and result.lse_index is not None
    loss = torch.dot(weight, result.kl.mean(1))
    return result.out, result.lse, loss, result.kl, result.lse_index, weight.clone()


def _fake(
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
    rows = [q.new_empty(q.shape[:2], dtype=torch.float32) for _ in range(3)]
    weight = rows[0].new_empty(q.shape[0])
    return q.new_empty(*q.shape[:2], v.shape[2]), rows[0], weight.new_empty(()), rows[1], rows[2], weight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*(output[i] for i in (0, 1, 3, 4, 5)))
    ctx.set_materialize_grads(False)
    q, k, _, index_q, index_k, index_weights, key_start, key_end, _, scale, ctx.deterministic = inputs
    lse, lse_index, weight = output[1], output[4], output[5]
    ctx.save_for_backward(q, k, index_q, index_k, index_weights, lse, lse_index, weight, key_start, key_end)
    ctx.softmax_scale = scale


def _backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, d_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "warmup_attention: the loss has no second derivative; call backward without create_graph=True"
        )
    q, k, *index, lse, lse_index, weight, key_start, key_end = ctx.saved_tensors
    gradients = torch.ops.flash_indexer.per_head_gradients.default(
        q, k, *index, lse, lse_index, weight * (d_loss / q.shape[1]), key_start, key_end, ctx.softmax_scale,
        list(ctx.needs_input_grad[3:6]), ctx.deterministic,
    )  # fmt: skip
    wanted = [g if need else None for g, need in zip(gradients, ctx.needs_input_grad[3:6], strict=True)]
    return None, None, None, *wanted, None, None, None, None, None


def _gradients(
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
    index = tuple(aligned(x) for x in (index_q, index_k, index_weights))
    found = heads.per_head_gradients(
        q, k, (index[0], index[1], index[2]), (lse, lse_index), factor, key_start.contiguous(), key_end.contiguous(),
        softmax_scale, (needs[0], needs[1], needs[2]), deterministic=deterministic,
    )  # fmt: skip
    a, b, c = (x.new_empty(0) if g is None else g.to(x.dtype) for g, x in zip(found, index, strict=True))
    return a, b, c


def _fake_gradients(
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
    index = (index_q, index_k, index_weights)
    a, b, c = (x.new_empty(x.shape if need else 0) for x, need in zip(index, needs, strict=True))
    return a, b, c


# not torch.library.custom_op, whose first call imports torch._dynamo: seconds in which nothing is computed
torch.library.define(_NAME, torch.library.infer_schema(_body, mutates_args=()))
torch.library.impl(_NAME, "default", _body)
torch.library.register_fake(_NAME, _fake)
torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
torch.library.define(_GRADIENTS, torch.library.infer_schema(_gradients, mutates_args=()))
torch.library.impl(_GRADIENTS, "default", _gradients)
torch.library.register_fake(_GRADIENTS, _fake_gradients)
_per_head = torch.ops.flash_indexer.per_head_attention.default
