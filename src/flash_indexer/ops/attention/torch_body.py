"""Attention with its logsumexp in torch, a chunk of query rows at a time, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_indexer.ops.blockwise import cap_logits, compute_dtype, fill_unseen, local_intervals, plan_chunks


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    softmax_scale: float,
    workspace_bytes: int,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out[t,h] = sum_s exp(scale * q[t,h]·k[s,g(h)] - lse[t,h]) * v[s,g(h)] and lse, over the visible keys.

    Args:
        q: [T, H, D]. k: [S, G, D]. v: [S, G, V]. key_start, key_end: [T].

    Returns:
        out [T, H, V] in q's dtype, zeros for a query that sees nothing; lse [T, H], -inf there.
    """
    dtype = compute_dtype(q)
    (T, H), per_group = q.shape[:2], q.shape[1] // k.shape[1]
    out = torch.zeros(T, H, v.shape[2], dtype=q.dtype, device=q.device)
    lse = torch.full((T, H), -torch.inf, dtype=dtype, device=q.device)
    for chunk in plan_chunks(key_start, key_end, 2, dtype.itemsize, workspace_bytes):
        rows, keys = slice(chunk.begin, chunk.end), slice(chunk.first, chunk.last)
        starts, ends = local_intervals(key_start, key_end, rows, chunk)
        unseen = (ends <= starts)[:, None]
        for h in range(H):
            query, key = q[rows, h].to(dtype) * softmax_scale, k[keys, h // per_group].to(dtype)
            logits = fill_unseen(cap_logits(query @ key.T, softcap), starts, ends, torch.finfo(dtype).min)
            row = logits.logsumexp(-1, keepdim=True)
            p = fill_unseen(logits.sub_(row).exp_(), starts, ends, 0.0)
            out[rows, h] = (p @ v[keys, h // per_group].to(dtype)).to(out.dtype)
            lse[rows, h] = row.masked_fill(unseen, -torch.inf)[:, 0]
    return out, lse
