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

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flash_indexer.ops import SparseSettings, recomputed_attention

WHOLE_BYTES, RUN_BYTES = 20 * 2**30, 4 * 2**30
"""Of q' and the latent output: above the first, queries are taken in runs of the second."""
Leaves = tuple[Tensor, Tensor, Tensor]

EXPAND = "expand_kv"
"""The method of an MLA module that makes keys and values of the latents, and that a sparse layer does without."""


def is_absorbable(module: Any) -> bool:
    """Whether the module caches latents and expands them by a method of its own."""
    return hasattr(module, EXPAND) and hasattr(module, "kv_b_proj")


def keep_latents(kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """In the place of EXPAND: the attention function then gets latents [B, 1, S, R] and rotated keys [B, 1, S, r]."""
    return kv_nope, k_rot


class Absorbed(NamedTuple):
    """The projection of latents by head. w_k: [H, R, nope], w_v: [H, R, V], b_v: [H, V]."""

    w_k: Tensor
    w_v: Tensor
    b_v: Tensor

    def to(self, dtype: torch.dtype) -> Absorbed:
        """In another dtype."""
        return Absorbed(*(x.to(dtype) for x in self))


def absorbed(module: Any, heads: int) -> Absorbed:
    """Of an MLA module's kv_b_proj, which gets gradients through all three.

    The projection is applied to the unit vectors and to zero, so that one which adapters wrap counts with them.
    """
    weight = next(module.kv_b_proj.parameters())
    unit = torch.eye(module.kv_lora_rank, dtype=weight.dtype, device=weight.device)
    added = module.kv_b_proj(torch.zeros_like(unit[:1]))  # zeros where the projection has no bias
    by_head = (module.kv_b_proj(unit) - added).view(len(unit), heads, -1).transpose(0, 1)  # [H, R, nope + V]
    nope = module.qk_nope_head_dim
    return Absorbed(by_head[..., :nope], by_head[..., nope:], added.view(heads, -1)[:, nope:])


def absorbed_query(q: Tensor, w_k: Tensor) -> Tensor:
    """q' [T, H, R + r] of q [T, H, nope + r] and w_k [H, R, nope]."""
    nope = w_k.shape[-1]
    return torch.cat([torch.einsum("thn,hrn->thr", q[..., :nope], w_k), q[..., nope:]], dim=-1)


def expanded_output(out: Tensor, w_v: Tensor, b_v: Tensor) -> Tensor:
    """out[t,h] = W_v[h]^T latent out + b_v[h]: [T, H, R], [H, R, V] and [H, V] to [T, H, V]."""
    return torch.einsum("thr,hrv->thv", out, w_v) + b_v


def needs_runs(q: Tensor, weights: Absorbed) -> bool:
    """Whether q' and the latent output of q [T, H, nope + r] are more than is held at once."""
    return len(q) * _token_bytes(q, weights) > WHOLE_BYTES


def absorbed_in_runs(
    weights: Absorbed, q: Tensor, k: Tensor, leaves: Leaves, settings: SparseSettings, sinks: Tensor | None
) -> Tensor:
    """out [T, H, V] of a run of queries at a time, which is absorbed, attends and is expanded, again in the backward.

    Held of a run at a time are its q' and latent output, of 2R + r numbers a head. What all runs share, k, index_k and
    the weights, gets its gradient as one sum in float32.

    Args:
        q: [T, H, nope + r]. k: [S, 1, R + r]. leaves: index_q, index_k, index_weights.
        settings: of all queries, with their selection. sinks: [H] or None.
    """
    dtype, step = q.dtype, max(1, RUN_BYTES // _token_bytes(q, weights))
    index_q, index_k, index_weights = leaves
    shared = tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in (k, index_k, *weights))

    def run(rows: slice, q: Tensor, index_q: Tensor, index_weights: Tensor, *shared: Tensor) -> Tensor:
        k, index_k, *weights = (x.to(dtype) for x in shared)
        w_k, w_v, b_v = weights
        of_run, own = (index_q, index_k, index_weights), absorbed_query(q, w_k)
        out, *_ = recomputed_attention(
            settings.rows(rows).checked("attach", own, k, None, of_run), own, k, None, sinks, of_run
        )
        return expanded_output(out, w_v, b_v)

    runs = [slice(begin, begin + step) for begin in range(0, len(q), step)]
    made = [
        checkpoint(run, rows, q[rows], index_q[rows], index_weights[rows], *shared, use_reentrant=False)
        for rows in runs
    ]  # fmt: skip
    return torch.cat(made)


def _token_bytes(q: Tensor, weights: Absorbed) -> int:
    """Of q' and the latent output of a token."""
    heads, rank, nope = weights.w_k.shape
    return heads * (2 * rank + q.shape[2] - nope) * q.element_size()
