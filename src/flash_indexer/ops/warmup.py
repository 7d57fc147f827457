"""A layer's attention and its indexer's loss from one call."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from flash_indexer.ops.attention import per_head_op
from flash_indexer.ops.attention.op import attention_op
from flash_indexer.ops.bodies import TORCH
from flash_indexer.ops.checks import check_indexer_kl, check_value, check_workspace
from flash_indexer.ops.kl.op import indexer_kl


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
        target, token_weight, workspace_bytes: as in `indexer_kl`; rows of weight zero cost with target="per_head" on
            CUDA what others do, since attention and KL are one pass, and have their KL.
        deterministic: True gives the same bits every time. With False the backward of "per_head" on CUDA forms the
            logits once, for D <= 128 and E <= 64 where index_k's and another gradient are wanted, and takes about three
            quarters of the time: it adds to the gradient of index_k in whatever order the tiles come. Without effect
            elsewhere, and under torch.use_deterministic_algorithms(True).

    Dtypes: on CUDA q, k, v, index_q, index_k bfloat16 and the rest float32; on the CPU float32 or float64 throughout.
    Kernels take D and V up to 256, and with the other targets D=576 with v = k[..., :512] (MLA's absorbed form); for
    other sizes and on other GPUs the blockwise torch body runs, with one warning that says why.

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
    if target == "per_head" and (q.is_meta or per_head_op.body_of("warmup_attention", q, k, index_q, v) != TORCH):
        out, lse, loss, kl, _, _ = per_head_op.per_head_attention(
            q, k, v, index_q, index_k, index_weights, key_start, key_end, token_weight, softmax_scale, deterministic
        )
        return WarmupAttention(out, lse, loss, kl)
    out, lse = attention_op(q, k, v, key_start, key_end, softmax_scale)
    result = indexer_kl(
        q, k, index_q, index_k, index_weights, softmax_scale=softmax_scale, key_start=key_start, key_end=key_end,
        lse=None if target == "sum_logits" else lse, target=target, token_weight=token_weight,
        workspace_bytes=workspace_bytes,
    )  # fmt: skip
    return WarmupAttention(out, lse, result.loss, result.kl)
