"""MLA in its absorbed form: attention over the latents that are cached, one key head for all query heads.

    expanded   q[t,h]·k[s,h],  k[s,h] = [W_k[h] c[s], k_rot[s]],  v[s,h] = W_v[h] c[s],  c[s]: kv_lora_rank latents
    absorbed   q'[t,h]·k'[s],  q'[t,h] = [W_k[h]^T q_nope[t,h], q_rot[t,h]],  k'[s] = [c[s], k_rot[s]]
               out[t,h] = W_v[h] (sum_s a[t,h,s] c[s])

The logits are the same. Where the projection adds [b_k[h], b_v[h]], as some adapters do, b_k adds the same to all
logits of a query and head, which changes nothing, and b_v is added to out. A key is one row of kv_lora_rank +
qk_rope_head_dim numbers, so gathering it pays.

Source: DeepSeek-V2 technical report (2024), section 2.1; DeepSeek-V3.2 trains its sparse stage so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EXPAND = "expand_kv"
"""The method of an MLA module that makes keys and values of the latents, and that a sparse layer does without."""


def is_absorbable(module: Any) -> bool:
    """Whether the module caches latents and expands them by a method of its own."""
    return hasattr(module, EXPAND) and hasattr(module, "kv_b_proj")


def keep_latents(kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """In the place of EXPAND: the attention function then gets latents [B, 1, S, R] and rotated keys [B, 1, S, r]."""
    return kv_nope, k_rot


def absorbed_query(module: Any, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q' [T, H, R + r] of q [T, H, nope + rope], W_v [H, R, V] and b_v [H, V]. Gradients reach kv_b_proj through all.

    The projection is applied to the unit vectors and to zero, so that one which adapters wrap counts with them.
    """
    rank, nope = module.kv_lora_rank, module.qk_nope_head_dim
    unit = torch.eye(rank, dtype=next(module.kv_b_proj.parameters()).dtype, device=q.device)
    added = module.kv_b_proj(torch.zeros_like(unit[:1]))  # zeros where the projection has no bias
    weights = (module.kv_b_proj(unit) - added).to(q.dtype).view(rank, q.shape[1], -1).transpose(0, 1)
    w_k, w_v = weights[..., :nope], weights[..., nope:]  # of [H, R, nope + V]
    b_v = added.to(q.dtype).view(q.shape[1], -1)[:, nope:]
    q_nope, q_rot = q[..., :nope], q[..., nope:]
    latent = torch.einsum("thn,hrn->thr", q_nope, w_k)
    return torch.cat([latent, q_rot], dim=-1), w_v, b_v


def expanded_output(out: Tensor, w_v: Tensor, b_v: Tensor) -> Tensor:
    """out[t,h] = W_v[h]^T latent out + b_v[h]: [T, H, R], [H, R, V] and [H, V] to [T, H, V]."""
    return torch.einsum("thr,hrv->thv", out, w_v) + b_v
