"""Attention over key intervals, with the logsumexp that the teacher needs. Not differentiable: the model is frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_indexer.intervals import check_intervals
from flash_indexer.ops import bodies
from flash_indexer.ops.attention import gpu_body, torch_body
from flash_indexer.ops.blockwise import compute_dtype
from flash_indexer.ops.checks import check_attention, check_softcap, softcap_refusal
from flash_indexer.ops.known import is_followed

_NAME = "flash_indexer::attention"
_WORKSPACE_BYTES = 64 * 2**20


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    key_start: Tensor,
    key_end: Tensor,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out[t,h] = sum_s exp(scale * q[t,h]·k[s,g(h)] - lse[t,h]) * v[s,g(h)],  lse[t,h] = log sum_s exp(scale * q·k).

    Sums over the visible keys key_start[t] <= s < key_end[t], in linear memory.

    Args:
        q: [T, H, D]. k: [S, G, D], H % G == 0. v: [S, G, V]. Constants.
        softmax_scale: the model's own softmax scale.
        key_start, key_end: int32 [T], non-decreasing.
        softcap: c; c * tanh(scale * q·k / c) stands for scale * q·k (Gemma 2). Not in the kernels.

    Dtypes: on CUDA bfloat16; on the CPU float32 or float64 throughout. Kernels take D and V up to 256, or D=576 with
    v = k[..., :512] (MLA's absorbed form); for other sizes and on other GPUs the blockwise torch body runs, with one
    warning that says why.

    Returns:
        out [T, H, V] in q's dtype and lse [T, H], natural log, float32 (float64 for float64 inputs); zeros and -inf for
        a query that sees nothing.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it is.

    Source: Milakov and Gimelshein (2018), online softmax; Dao et al. (2022), FlashAttention.
    """
    check_attention("attention_forward", q, k, v, key_start, key_end, softmax_scale)
    check_softcap("attention_forward", softcap)
    tensors, options = (q, k, v, key_start, key_end), (softmax_scale, softcap)
    out, lse = (attention_op if is_followed(tensors) else _op)(*tensors, *options)
    return out, lse


def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    softmax_scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    body = bodies.choose("attention_forward", q.device, lambda: softcap_refusal(softcap) or gpu_body.refusal(q, k, v))
    if body != bodies.TORCH:
        return gpu_body.attention(q, k, v, key_start.contiguous(), key_end.contiguous(), softmax_scale)
    check_intervals(key_start, key_end, k.shape[0])
    with torch.autocast(q.device.type, enabled=False):
        return torch_body.attention(q, k, v, key_start, key_end, softmax_scale, _WORKSPACE_BYTES, softcap)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    softmax_scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=compute_dtype(q))


# not torch.library.custom_op, whose first call imports torch._dynamo: seconds in which nothing is computed
torch.library.define(_NAME, torch.library.infer_schema(_op, mutates_args=()))
torch.library.impl(_NAME, "default", _op)
torch.library.register_fake(_NAME, _fake)
attention_op = torch.ops.flash_indexer.attention.default
"""`attention_forward` of checked arguments, in the order of its signature."""
