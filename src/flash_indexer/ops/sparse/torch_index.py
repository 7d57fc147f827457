"""The indexer at the selected keys in torch: scores, KL of each row, gradients; keys are gathered for each query.

    z[t,j,s] = index_q[t,j]·index_k[s]          i[t,s] = sum_j w[t,j] * ReLU(z[t,j,s])          s in S_t
    p[t,s]   = p_sum[t,s] / sum_{s in S_t} p_sum[t,s]
    KL[t]    = sum_{s in S_t} p (log p - i) + log sum_{s in S_t} exp(i)
    di[t,s]  = token_weight[t] * (softmax over S_t of i[t,:] - p[t,s])

R query rows of a chunk, W their largest number of selected keys. Sums are taken in float32, or float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_indexer.ops.blockwise import compute_dtype
from flash_indexer.ops.sparse.gathered import add_rows, chunks, gather_rows
from flash_indexer.ops.sparse.problem import Leaves
from flash_indexer.ops.sparse.selection import Selection


@torch.no_grad()
def index_scores(leaves: Leaves, selection: Selection, workspace_bytes: int) -> Tensor:
    """i[t,s] at the selected keys, -inf behind them: [T, K]."""
    index_q, index_k, weights = leaves
    dtype = compute_dtype(index_q)
    out = torch.full(selection.indices.shape, -torch.inf, dtype=dtype, device=index_q.device)
    for slots in chunks(selection, _numbers(index_q), dtype.itemsize, workspace_bytes):
        rows = slots.rows
        z = index_q[rows].to(dtype) @ gather_rows(index_k, slots, dtype).mT
        scores = (weights[rows, None].to(dtype) @ z.relu_())[:, 0]
        out[rows, : scores.shape[1]] = scores.masked_fill_(slots.absent, -torch.inf)
    return out


@torch.no_grad()
def kl_rows(p_sum: Tensor, scores: Tensor, count: Tensor, token_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL [T], the target's entropy [T] and di [T, K]; slots behind a row's count are not read, and di is 0 there.

    A row without keys has KL 0. A row whose every p_sum is 0, because of an lse that is not its own, is NaN.
    """
    absent = torch.arange(p_sum.shape[1], device=p_sum.device) >= count[:, None]
    empty = count == 0
    p = p_sum.masked_fill(absent, 0.0)
    p.div_(p.sum(-1, keepdim=True).masked_fill_(empty[:, None], 1.0))
    # log_softmax, not scores - logsumexp: the rounding of a large logsumexp would be the same error in the whole row
    log_softmax = scores.masked_fill(absent, torch.finfo(p.dtype).min).log_softmax(-1)
    entropy = torch.special.entr(p).sum(-1)
    kl = -entropy - torch.linalg.vecdot(p, log_softmax.masked_fill(absent, 0.0))
    di = log_softmax.exp_().sub_(p).mul_(token_weight[:, None])
    return kl.masked_fill_(empty, 0.0), entropy, di.masked_fill_(absent, 0.0)


@torch.no_grad()
def index_gradients(
    di: Tensor,
    leaves: Leaves,
    selection: Selection,
    needs: tuple[bool, bool, bool],
    d_index_k: Tensor | None,
    deterministic: bool,
    workspace_bytes: int,
) -> tuple[Tensor | None, Tensor | None]:
    """With m[t,j,s] = di[t,s] * [z[t,j,s] > 0]:

        d_index_q[t,j] = w[t,j] * sum_{s in S_t} m[t,j,s] * index_k[s]
        d_w[t,j]       = index_q[t,j] · sum_{s in S_t} m[t,j,s] * index_k[s]
        d_index_k[s]  += sum_t,j m[t,j,s] * w[t,j] * index_q[t,j]

    Args:
        di: [T, K]. needs: of index_q, index_k, index_weights. d_index_k: [S, E], added to.

    Returns:
        d_index_q, d_w in their input's dtype, zeros for a query without keys; None where not wanted.
    """
    index_q, index_k, weights = leaves
    dtype = compute_dtype(index_q)
    d_index_q, d_weights = (
        torch.zeros(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in ((index_q, needs[0]), (weights, needs[2]))
    )
    for slots in chunks(selection, _numbers(index_q), dtype.itemsize, workspace_bytes):
        rows, query, weight = slots.rows, index_q[slots.rows].to(dtype), weights[slots.rows, :, None].to(dtype)
        key = gather_rows(index_k, slots, dtype)
        z = query @ key.mT
        masked = torch.where(z <= 0, 0.0, di[rows, None, : key.shape[1]])  # NaN is neither
        if d_index_q is not None or d_weights is not None:
            unscaled = (masked @ key).masked_fill_((selection.count[rows] == 0)[:, None, None], 0.0)
            if d_weights is not None:
                d_weights[rows] = torch.linalg.vecdot(query, unscaled).to(d_weights.dtype)
            if d_index_q is not None:
                d_index_q[rows] = (unscaled * weight).to(d_index_q.dtype)
        if d_index_k is not None:
            add_rows(d_index_k, slots, masked.mT @ (query * weight), deterministic)
    return d_index_q, d_weights


def _numbers(index_q: Tensor) -> int:
    """Numbers that a chunk holds for a query and one of its keys."""
    return 3 * index_q.shape[2] + 4 * index_q.shape[1] + 2
