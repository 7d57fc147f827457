"""Attention of a sparse model's layers that have no indexer: they attend to all keys that they may see."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from flash_indexer.models.capture import AttentionForm
from flash_indexer.models.sparse_forward import SparseForward


def attend_densely(forward: SparseForward, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
    """A layer without an indexer: [B, H, L, D] against [B, G, S, D] to [B * L, H, V]."""
    k, v = forward.all_keys(k), forward.all_keys(v)
    is_whole = forward.packing is None
    if not is_whole:
        q = q.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]
    is_first = forward.past == 0 and forward.positions is not None
    is_plain = form.window is None and is_whole and is_first and not forward.is_packed and form.sinks is None
    mask = None if is_plain else forward.mask(k.shape[2], form.window)
    if form.sinks is not None:
        assert mask is not None
        q, k, v = _with_sink_key(q, k, v, form.sinks / form.softmax_scale)
        mask = torch.cat([mask, mask.new_ones(*mask.shape[:-1], 1)], dim=-1)
    scale = form.softmax_scale
    out = scaled_dot_product_attention(q, k, v, mask, is_causal=is_plain, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _with_sink_key(q: Tensor, k: Tensor, v: Tensor, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q and k with columns more, k and v with a last key, whose product with q is `product` [H] and whose value is 0.

    The product is written as a sum of two numbers of q's dtype, to be as exact as in float32; kernels of attention want
    widths that are multiples of 8.
    """
    high = product.to(q.dtype)
    low = (product - high).to(q.dtype)
    columns = torch.stack([high, low, *[torch.zeros_like(high)] * 6], dim=-1)
    q = torch.cat([q, columns[None, :, None].expand(q.shape[0], -1, q.shape[2], -1)], dim=-1)
    k, v = pad(k, (0, 8, 0, 1)), pad(v, (0, 0, 0, 1))
    last = torch.zeros_like(k[:, :, -1:])
    last[..., -8:-6] = 1.0
    return q, torch.cat([k[:, :, :-1], last], dim=2), v
