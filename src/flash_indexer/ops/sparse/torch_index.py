"""The indexer at the selected keys in torch: scores, KL of each row, gradients, a chunk of query rows at a time.

    z[t,j,s] = index_q[t,j]·index_k[s]          i[t,s] = sum_j w[t,j] * ReLU(z[t,j,s])          s in S_t
    p[t,s]   = p_sum[t,s] / sum_{s in S_t} p_sum[t,s]
    KL[t]    = sum_{s in S_t} p (log p - i) + log sum_{s in S_t} exp(i)
    di[t,s]  = token_weight[t] * (softmax over S_t of i[t,:] - p[t,s])

Sums are taken in float32 (float64 for float64 inputs). `chunks` says how a chunk's keys are held.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flash_indexer.ops.blockwise import compute_dtype
from flash_indexer.ops.sparse.chunks import Chunk, chunks, product, thin, total
from flash_indexer.ops.sparse.problem import Leaves
from flash_indexer.ops.sparse.selection import Selection


@torch.no_grad()
def index_scores(leaves: Leaves, selection: Selection, workspace_bytes: int) -> Tensor:
    """i[t,s] at the selected keys, -inf behind them: [T, K]."""
    index_q, index_k, weights = leaves
    dtype = compute_dtype(index_q)
    out = torch.full(selection.indices.shape, -torch.inf, dtype=dtype, device=index_q.device)
    for chunk in _chunks(leaves, selection, workspace_bytes, (index_q, weights)):
        key, summed = chunk.tile(index_k, dtype), index_q.new_zeros(chunk.unselected.shape, dtype=dtype)
        for heads in chunk.head_runs(slice(0, index_q.shape[1])):
            z = product(index_q[chunk.rows, heads].to(dtype), key.mT)
            summed += (z.relu_() * weights[chunk.rows, heads, None].to(dtype)).sum(1)
        chunk.to_slots(summed, out, absent=-torch.inf)
    return out


@torch.no_grad()
def kl_rows(p_sum: Tensor, scores: Tensor, count: Tensor, token_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL [T], the target's entropy [T] and di [T, K]; slots behind a row's count are not read, and di is 0 there.

    A row without keys has KL 0. A row whose every p_sum is 0, because of an lse that is not its own, is NaN.
    """
    absent = torch.arange(p_sum.shape[1], device=p_sum.device) >= count[:, None]
    p = p_sum.masked_fill(absent, 0.0)
    p.div_(p.sum(-1, keepdim=True).masked_fill_((count == 0)[:, None], 1.0))
    # log_softmax, not scores - logsumexp: the rounding of a large logsumexp would be the same error in the whole row
    log_softmax = scores.masked_fill(absent, torch.finfo(p.dtype).min).log_softmax(-1)
    entropy = torch.special.entr(p).sum(-1)
    kl = -entropy - torch.linalg.vecdot(p, log_softmax.masked_fill(absent, 0.0))
    di = log_softmax.exp_().sub_(p).mul_(token_weight[:, None])
    return kl, entropy, di.masked_fill_(absent, 0.0)


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
    for chunk in _chunks(leaves, selection, workspace_bytes, (index_q, weights, di)):
        rows, key, d_scores = chunk.rows, chunk.tile(index_k, dtype), chunk.from_slots(di)[:, None]
        no_key, d_key = (selection.count[rows] == 0)[:, None, None], None
        for heads in chunk.head_runs(slice(0, index_q.shape[1])):
            query, weight = index_q[rows, heads].to(dtype), weights[rows, heads, None].to(dtype)
            masked = torch.where(product(query, key.mT) <= 0, 0.0, d_scores)  # NaN is not
            if d_index_q is not None or d_weights is not None:
                unscaled = product(masked, key)
                if d_weights is not None:
                    made = (query * unscaled).sum(-1).masked_fill_(no_key[..., 0], 0.0)
                    d_weights[rows, heads] = made.to(d_weights.dtype)
                if d_index_q is not None:
                    d_index_q[rows, heads] = (unscaled * weight).masked_fill_(no_key, 0.0).to(d_index_q.dtype)
            if d_index_k is not None:
                d_key = total(d_key, chunk.outer(masked, query * weight))
        if d_index_k is not None and d_key is not None:
            chunk.add(d_index_k, d_key, deterministic)
    return d_index_q, d_weights


def _chunks(leaves: Leaves, selection: Selection, workspace_bytes: int, by_row: tuple[Tensor, ...]) -> Iterator[Chunk]:
    index_q, index_k, _ = leaves
    numbers = 3 * index_q.shape[2] + 4 * index_q.shape[1] + 2
    most = thin(index_q.device, index_q.shape[1], 1)
    return chunks(selection, numbers, workspace_bytes, (index_k,), by_row, most)
