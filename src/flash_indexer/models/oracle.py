"""The best choice of keys that a query can make by attention: what an indexer's choice is compared with.

    p[t,s] = sum_h softmax over the visible keys of (scale * q[t,h]·k[s,g(h)])
    S_t    = the K visible keys with the largest p[t,s]; all where at most K are visible; of equal p the lowest s

It reads the attention that it is to replace, so nothing is saved by it: a bound, not a way to serve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_indexer.ops import (
    Selection,
    SparseSettings,
    attended_rows,
    recomputed_attention,
    sparse_attention,
    sparse_index_scores,
    sparse_indexer_kl,
)

KEYS = ("indexer", "oracle")
"""Whose keys a layer attends to: those that its indexer ranks highest, or those of largest attention."""
_WORKSPACE_BYTES = 512 * 2**20


def oracle_keys(
    q: Tensor,
    k: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    topk: int,
    *,
    softmax_scale: float,
    workspace_bytes: int = _WORKSPACE_BYTES,
) -> Selection:
    """S_t of every query, a chunk of rows at a time: never [T, S]. Not differentiable.

    Args:
        q: [T, H, D]. k: [S, G, D], H % G == 0.
        key_start, key_end: int32 [T], non-decreasing; a query sees key_start[t] <= s < key_end[t].
        topk: K, 1 or more.
        workspace_bytes: bound on the memory for [R, C] tiles.

    Returns:
        indices int32 [T, min(K, S)], ascending, -1 behind the last; count int32 [T]; scores p, -inf behind the last.

    Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1, the target of the indexer.
    """
    return attended_rows(q.detach(), k.detach(), key_start, key_end, topk, softmax_scale, workspace_bytes)


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
    kl_out: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor | None, Selection]:
    """Attention over `oracle_keys`, and the indexer's loss there.

    The gradients of kl_scale * sum_t token_weight[t] * KL[t] reach index_q, index_k and index_weights in the backward
    of the output, from the probabilities that it forms; where that has no gradients, at once.

    Args:
        tensors: q, k, and v or None. leaves: index_q, index_k, index_weights. visible: key_start and key_end.
        value_dim, token_weight, kl_scale, kl_out, deterministic: as in `flash_indexer.ops.dsa_attention`.

    Returns:
        out [T, H, V], KL [T] (kl_out, where there are gradients) and the selection, with the attention as its scores.
    """
    q, k, v = tensors
    chosen = oracle_keys(q, k, *visible, topk, softmax_scale=softmax_scale)
    if torch.is_grad_enabled():
        index_q, index_k, weights = (x.detach() for x in leaves)
        scores = sparse_index_scores((index_q, index_k, weights), chosen, _WORKSPACE_BYTES)
        settings = SparseSettings(
            softmax_scale, *visible, topk, value_dim, (0, 0), token_weight, "backward", kl_scale, kl_out, deterministic,
            True, _WORKSPACE_BYTES, chosen._replace(scores=scores),
        ).checked("attach", q, k, v, leaves)  # fmt: skip
        out, *_ = recomputed_attention(settings, q, k, v, None, leaves)
        return out, kl_out, chosen
    out, lse = sparse_attention(
        q, k, v, chosen, softmax_scale=softmax_scale, value_dim=value_dim, deterministic=deterministic
    )
    with torch.enable_grad():
        loss, kl, _ = sparse_indexer_kl(
            q, k, *leaves, chosen, softmax_scale=softmax_scale, lse=lse, token_weight=token_weight,
            deterministic=deterministic,
        )  # fmt: skip
        if loss.requires_grad:
            loss = loss if kl_scale is None else loss * kl_scale
            loss.backward()  # type: ignore[no-untyped-call]
    return out, kl, chosen
