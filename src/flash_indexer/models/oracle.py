"""The best choice of keys that a query can make by attention: what an indexer's choice is compared with.

    p[t,s] = sum_h softmax over the visible keys of (scale * q[t,h]·k[s,g(h)])
    S_t    = the K visible keys with the largest p[t,s]; all where at most K are visible; of equal p the lowest s

It reads the attention that it is to replace, so nothing is saved by it: a bound, not a way to serve.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_indexer.ops import Selection, sparse_attention, sparse_indexer_kl, teacher_lse, teacher_scores, top_keys
from flash_indexer.ops.blockwise import compute_dtype, plan_chunks

KEYS = ("indexer", "oracle")
"""Whose keys a layer attends to: those that its indexer ranks highest, or those of largest attention."""
_TILES = 12
"""Numbers of a (query, key) that are held at once: the sum over heads, a head's part, and what ranking makes of it."""


@torch.no_grad()
def oracle_keys(
    q: Tensor,
    k: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    topk: int,
    *,
    softmax_scale: float,
    workspace_bytes: int = 512 * 2**20,
) -> Selection:
    """S_t of every query, in torch, a chunk of rows at a time: never [T, S].

    Args:
        q: [T, H, D]. k: [S, G, D], H % G == 0.
        key_start, key_end: int32 [T], non-decreasing; a query sees key_start[t] <= s < key_end[t].
        topk: K, 1 or more.
        workspace_bytes: bound on the memory for [R, C] tiles.

    Returns:
        indices int32 [T, min(K, S)], ascending, -1 behind the last; count int32 [T]; scores p, -inf behind the last.

    Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1, the target of the indexer.
    """
    dtype, T, width = compute_dtype(q), q.shape[0], min(topk, k.shape[0])
    found = Selection(
        torch.full((T, width), -1, dtype=torch.int32, device=q.device),
        torch.zeros(T, dtype=torch.int32, device=q.device),
        torch.full((T, width), -torch.inf, dtype=dtype, device=q.device),
    )
    for begin, stop, first, last in plan_chunks(key_start, key_end, _TILES, dtype.itemsize, workspace_bytes):
        rows, some = slice(begin, stop), k[first:last]
        start, end = ((x[rows] - first).clamp(0, last - first) for x in (key_start, key_end))
        lse = teacher_lse(q[rows], some, start, end, softmax_scale=softmax_scale)
        p = teacher_scores(q[rows], some, lse, start, end, softmax_scale=softmax_scale)
        made = top_keys(p, start, end, topk)
        made.indices.add_(first).masked_fill_(made.indices < first, -1)
        slots = rows, slice(made.indices.shape[1])
        found.indices[slots], found.count[rows], found.scores[slots] = made
    return found


def attend_to_oracle_keys(
    tensors: tuple[Tensor, Tensor, Tensor | None],
    leaves: tuple[Tensor, Tensor, Tensor],
    visible: tuple[Tensor, Tensor],
    topk: int,
    *,
    softmax_scale: float,
    value_dim: int | None,
    token_weight: Tensor,
    kl_scale: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Selection]:
    """`sparse_attention` over `oracle_keys`, and `sparse_indexer_kl` of the indexer there.

    The gradients of kl_scale * sum_t token_weight[t] * KL[t] reach index_q, index_k and index_weights in the backward
    of the output; where that has no gradients, at once.

    Args:
        tensors: q, k, and v or None. leaves: index_q, index_k, index_weights. visible: key_start and key_end.
        value_dim, token_weight, kl_scale, deterministic: as in `flash_indexer.ops.dsa_attention`.

    Returns:
        out [T, H, V], KL [T] and the selection.
    """
    q, k, v = tensors
    chosen = oracle_keys(q.detach(), k.detach(), *visible, topk, softmax_scale=softmax_scale)
    out, lse = sparse_attention(
        q, k, v, chosen, softmax_scale=softmax_scale, value_dim=value_dim, deterministic=deterministic
    )
    with torch.enable_grad():
        loss, kl, _ = sparse_indexer_kl(
            q.detach(), k.detach(), *leaves, chosen, softmax_scale=softmax_scale, lse=lse.detach(),
            token_weight=token_weight, deterministic=deterministic,
        )  # fmt: skip
        loss = loss if kl_scale is None else loss * kl_scale
    if loss.requires_grad and torch.is_grad_enabled():
        out = _WithLoss.apply(out, loss)  # type: ignore[no-untyped-call]
    elif loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    return out, kl, chosen


class _WithLoss(torch.autograd.Function):
    """out, whose backward begins that of a scalar loss as well, with the gradient 1."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return d_out, torch.ones_like(loss)
