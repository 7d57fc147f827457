"""The model's own attention over packed documents, with the logsumexp that the teacher needs."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Packing(NamedTuple):
    """Where the documents of a batch lie once its rows are flattened into T tokens."""

    boundaries: tuple[int, ...]
    """First token of each document, and T at the end: cu_seqlens."""
    document_start: Tensor
    """int32 [T]: the first token of each token's document."""


def packing(position_ids: Tensor) -> Packing:
    """Documents of a batch: position_ids [B, L] restart wherever one begins; every row begins one."""
    rows, length = position_ids.shape
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    first = begins.flatten().nonzero().flatten()
    token = torch.arange(rows * length, device=position_ids.device)
    document_start = first[torch.searchsorted(first, token, right=True) - 1]
    return Packing((*first.tolist(), rows * length), document_start.int())


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, boundaries: tuple[int, ...], *, softmax_scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """out[t,h] = sum_s softmax(scale * q[t,h]·k[s,g(h)])[s] * v[s,g(h)] and lse[t,h], causal within each document.

    Args:
        q: [T, H, D]. k: [T, G, D]. v: [T, G, V]. boundaries: cu_seqlens as a tuple.
        softmax_scale: the model's own. window: a query sees at most this many keys, itself included; None all.

    Returns:
        out [T, H, V] in q's dtype and lse [T, H], natural logarithm, float32 (float64 for float64 inputs).
    """
    body = _flash_cuda if q.device.type == "cuda" else _flash_cpu
    width = max(q.shape[-1], v.shape[-1])  # flash attention wants one width; zeros change neither logits nor output
    query, key, value = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    out, lse = body(query, key, value, boundaries, softmax_scale, window)
    return out[..., : v.shape[-1]], lse


def _flash_cpu(
    q: Tensor, k: Tensor, v: Tensor, boundaries: tuple[int, ...], softmax_scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """One call of torch's CPU flash attention for each document."""
    per_group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for begin, end in itertools.pairwise(boundaries):
        query = q[begin:end].transpose(0, 1)[None]
        key, value = (x[begin:end].transpose(0, 1).repeat_interleave(per_group, 0)[None] for x in (k, v))
        mask = None
        if window is not None and window < end - begin:
            t = torch.arange(end - begin, device=q.device)
            seen = (t <= t[:, None]) & (t > t[:, None] - window)
            mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, mask is None, attn_mask=mask, scale=softmax_scale
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


def _flash_cuda(
    q: Tensor, k: Tensor, v: Tensor, boundaries: tuple[int, ...], softmax_scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """FlashAttention-2's variable-length form, all documents in one call."""
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=q.device)
    longest = max(end - begin for begin, end in itertools.pairwise(boundaries))
    options: dict[str, Any] = {} if window is None else dict(window_size_left=window - 1, window_size_right=0)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, True, False, scale=softmax_scale, **options
    )
    return out, lse.transpose(0, 1)
