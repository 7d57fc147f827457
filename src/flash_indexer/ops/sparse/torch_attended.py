"""The keys that hold most of a query's attention, in torch, a chunk of query rows at a time, on any device.

    p[t,s] = sum_h softmax over the visible keys of (scale * q[t,h]·k[s,g(h)])
    S_t    = the K visible keys with the largest p[t,s]; all where at most K are visible; of equal p the lowest s

R query rows of a chunk, C the keys that any of them may see; further letters as in `flash_indexer.reference`.
Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1, the target of the indexer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_indexer.ops.blockwise import compute_dtype, local_intervals, plan_chunks
from flash_indexer.ops.sparse.selection import Selection
from flash_indexer.ops.sparse.torch_select import top_keys

_NUMBERS = 12  # of a (query, key) that are held at once: the sum over heads, a head's part, what ranking makes of it


@torch.no_grad()
def attended(
    q: Tensor,
    k: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    topk: int,
    softmax_scale: float,
    workspace_bytes: int,
) -> Selection:
    """S_t of checked arguments, K = min(topk, S) slots a query, with p as its scores: never [T, S]."""
    dtype, T, width = compute_dtype(q), q.shape[0], min(topk, k.shape[0])
    out = Selection(
        torch.full((T, width), -1, dtype=torch.int32, device=q.device),
        torch.zeros(T, dtype=torch.int32, device=q.device),
        torch.full((T, width), -torch.inf, dtype=dtype, device=q.device),
    )
    for chunk in plan_chunks(key_start, key_end, _NUMBERS, dtype.itemsize, workspace_bytes):
        rows = slice(chunk.begin, chunk.end)
        start, end = local_intervals(key_start, key_end, rows, chunk)
        p = head_sums(q[rows], k[chunk.first : chunk.last], start, end, softmax_scale)
        made = top_keys(p, start, end, topk)
        made.indices.add_(chunk.first).masked_fill_(made.indices < chunk.first, -1)
        slots = rows, slice(made.indices.shape[1])
        out.indices[slots], out.count[rows], out.scores[slots] = made
    return out


def head_sums(q: Tensor, k: Tensor, key_start: Tensor, key_end: Tensor, softmax_scale: float) -> Tensor:
    """p[t,s] of R queries and C keys, 0 where unseen but in rows that see nothing, which are NaN: [R, C]."""
    dtype, (rows, heads, _), groups = compute_dtype(q), q.shape, k.shape[1]
    columns = torch.arange(k.shape[0], device=q.device)
    unseen = (columns < key_start[:, None]) | (columns >= key_end[:, None])
    p = torch.zeros(rows, len(k), dtype=dtype, device=q.device)
    for h in range(heads):
        logits = torch.mm(q[:, h].to(dtype) * softmax_scale, k[:, h * groups // heads].to(dtype).T)
        p += logits.masked_fill_(unseen, -torch.inf).softmax(-1)
    return p
