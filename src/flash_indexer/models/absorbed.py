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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_indexer.ops import Selection, SparseSettings, recomputed_attention
from flash_indexer.ops.sparse.dsa_op import refuse_backward

WHOLE_BYTES, RUN_BYTES = 20 * 2**30, 2 * 2**30
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

    Held of a run at a time are its q' and latent output, of 2R + r numbers a head. The output and the gradients of q,
    index_q and index_weights are each made once, run after run. What all runs share, k, index_k and the weights, gets
    its gradient as one sum in float32.

    Args:
        q: [T, H, nope + r]. k: [S, 1, R + r]. leaves: index_q, index_k, index_weights.
        settings: of all queries, with their selection. sinks: [H] or None.
    """
    index_q, index_k, index_weights = leaves
    step = max(1, RUN_BYTES // _token_bytes(q, weights))
    assert settings.selection is not None
    out: Tensor = _InRuns.apply(  # type: ignore[no-untyped-call]
        settings._replace(selection=None), step, *settings.selection, q, index_q, index_weights, k, index_k, *weights,
        sinks,
    )  # fmt: skip
    return out


_OF_QUERIES = 3  # of the tensors of a run, the first are those of its queries, the others are shared


def _run(settings: SparseSettings, rows: slice, tensors: list[Tensor | None]) -> Tensor:
    """out of some queries. tensors: q, index_q, index_weights of these; k, index_k, w_k, w_v, b_v and sinks."""
    q, index_q, index_weights, k, index_k, w_k, w_v, b_v, sinks = tensors
    assert q is not None and k is not None and w_k is not None and w_v is not None and b_v is not None
    assert index_q is not None and index_k is not None and index_weights is not None
    leaves, own = (index_q, index_k, index_weights), absorbed_query(q, w_k)
    checked = settings.rows(rows).checked("attach", own, k, None, leaves)
    out, *_ = recomputed_attention(checked, own, k, None, sinks, leaves)
    return expanded_output(out, w_v, b_v)


class _InRuns(torch.autograd.Function):
    """Each run's graph lives while the run does: slices of q would each have a gradient as large as q's own.

    The selection travels as tensors, which activation checkpointing frees with the others.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: SparseSettings, step: int, indices: Tensor, count: Tensor, scores: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        q, w_v = tensors[0], tensors[6]
        assert q is not None and w_v is not None
        ctx.save_for_backward(indices, count, scores, *tensors)
        ctx.settings, ctx.consumed = settings, False
        settings = settings._replace(selection=Selection(indices, count, scores))
        ctx.runs = [slice(begin, begin + step) for begin in range(0, len(q), step)]
        out = q.new_empty(*q.shape[:2], w_v.shape[2])
        for rows in ctx.runs:
            out[rows] = _run(settings, rows, _of(tensors, rows))
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        refuse_backward(ctx, "attach")
        ctx.consumed = True
        indices, count, scores, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[5:]
        settings = ctx.settings._replace(selection=Selection(indices, count, scores))
        sums = {n: _room(x, n) for n, x in enumerate(tensors) if x is not None and wanted[n]}
        for rows in ctx.runs:
            some = [
                None if x is None else x.detach().requires_grad_(wanted[n]) for n, x in enumerate(_of(tensors, rows))
            ]
            with torch.enable_grad():
                out = _run(settings, rows, some)
            leaves = [x for x in some if x is not None and x.requires_grad]
            made = torch.autograd.grad(out, leaves, d_out[rows], allow_unused=True)
            for (n, room), gradient in zip(sums.items(), made, strict=True):
                if gradient is not None and n < _OF_QUERIES:
                    room[rows] = gradient
                elif gradient is not None:
                    room += gradient
        nothing = (None,) * 5
        return *nothing, *(sums[n].to(x.dtype) if n in sums else None for n, x in enumerate(tensors))


def _of(tensors: Sequence[Tensor | None], rows: slice) -> list[Tensor | None]:
    return [x if x is None or n >= _OF_QUERIES else x[rows] for n, x in enumerate(tensors)]


def _room(x: Tensor, place: int) -> Tensor:
    """For a gradient: zeros, of float32 at least where runs add to it."""
    dtype = x.dtype if place < _OF_QUERIES else torch.promote_types(x.dtype, torch.float32)
    return torch.zeros(x.shape, dtype=dtype, device=x.device)


def _token_bytes(q: Tensor, weights: Absorbed) -> int:
    """Of q' and the latent output of a token."""
    heads, rank, nope = weights.w_k.shape
    return heads * (2 * rank + q.shape[2] - nope) * q.element_size()
