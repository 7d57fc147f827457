"""The definition: every quantity of this package in plain torch, whole [T, S] matrices, differentiable by autograd.

It is written to be read and to be right, in float64 as in float32; nothing here is fast. All bodies of the operators
are judged by it (`flash_indexer.testing`).

Shape legend: T query tokens and S key tokens (packed, no padding); H teacher heads; G teacher key/value heads
(H % G == 0, head h reads key head h // (H/G)); D teacher head dim; V value dim; I index heads; E index dim.

The sparse stage stands below the dense one: a selection is a bool matrix [T, S] there, True where query t attends to
key s.

Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1 (lightning indexer, dense warm-up and sparse stage).
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible_keys(key_start: Tensor, key_end: Tensor, num_keys: int) -> Tensor:
    """visible[t,s] = key_start[t] <= s < key_end[t]: bool [T, S]."""
    s = torch.arange(num_keys, device=key_start.device)
    return (s >= key_start[:, None]) & (s < key_end[:, None])


def teacher_logits(q: Tensor, k: Tensor, softmax_scale: float, softcap: float | None = None) -> Tensor:
    """scale * q[t,h]·k[s,g(h)]: q [T, H, D], k [S, G, D] -> [T, H, S]; with a softcap c, c * tanh(that / c)."""
    per_group = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = softmax_scale * torch.einsum("thd,shd->ths", q, per_group)
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def teacher_lse(
    q: Tensor, k: Tensor, softmax_scale: float, key_start: Tensor, key_end: Tensor, softcap: float | None = None
) -> Tensor:
    """lse[t,h] = log sum over visible s of exp(scale * q[t,h]·k[s,g(h)]): [T, H]; -inf where t sees nothing."""
    visible = visible_keys(key_start, key_end, k.shape[0])
    return teacher_logits(q, k, softmax_scale, softcap).masked_fill(~visible[:, None], -torch.inf).logsumexp(-1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    key_start: Tensor,
    key_end: Tensor,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out[t,h] = sum_s exp(scale * q[t,h]·k[s,g(h)] - lse[t,h]) * v[s,g(h)]: [T, H, V], zeros where unseen; lse."""
    p = target_distribution(q, k, softmax_scale, key_start, key_end, "per_head", softcap)
    out = torch.einsum("ths,shv->thv", p, v.repeat_interleave(q.shape[1] // v.shape[1], dim=1))
    return out, teacher_lse(q, k, softmax_scale, key_start, key_end, softcap)


def target_distribution(
    q: Tensor,
    k: Tensor,
    softmax_scale: float,
    key_start: Tensor,
    key_end: Tensor,
    target: str = "mean",
    softcap: float | None = None,
) -> Tensor:
    """p[t,s], the distribution the indexer learns; zero where unseen, all zeros for a query that sees nothing.

    "mean": p = sum_h a[t,h,s] / sum_s sum_h a[t,h,s] with the softmax probabilities a -> [T, S].
    "per_head": a[t,h,s] itself -> [T, H, S].
    "sum_logits": softmax_s(scale * sum_h q[t,h]·k[s,g(h)]) -> [T, S].
    """
    visible = visible_keys(key_start, key_end, k.shape[0])
    logits = teacher_logits(q, k, softmax_scale, softcap)
    if target == "sum_logits":
        return _softmax(logits.sum(1), visible)
    probabilities = _softmax(logits, visible[:, None])
    if target == "per_head":
        return probabilities
    total = probabilities.sum(1)
    return total / total.sum(-1, keepdim=True).clamp_min(torch.finfo(total.dtype).tiny)


def indexer_scores(
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    target: str = "mean",
) -> Tensor:
    """i[t,s] = sum_j w[t,j] * ReLU(index_q[t,j]·index_k[s]), -inf where unseen: [T, S].

    "per_head" keeps the heads apart: i[t,j,s] = w[t,j] * ReLU(index_q[t,j]·index_k[s]): [T, I, S].
    """
    visible = visible_keys(key_start, key_end, index_k.shape[0])
    per_head = index_weights[:, :, None] * torch.einsum("tie,se->tis", index_q, index_k).relu()
    if target == "per_head":
        return per_head.masked_fill(~visible[:, None], -torch.inf)
    return per_head.sum(1).masked_fill(~visible, -torch.inf)


def divergence(p: Tensor, scores: Tensor, seen: Tensor) -> Tensor:
    """KL[t] = sum_s p (log p - log_softmax(scores)), 0 where t sees nothing: p, scores [T, ..., S], seen bool [T]."""
    row_seen = seen.view(-1, *[1] * (scores.ndim - 1))
    log_q = scores.masked_fill(~row_seen, 0.0).log_softmax(-1).masked_fill(p == 0, 0.0)
    return (torch.xlogy(p, p) - p * log_q).sum(-1)


def indexer_kl(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    *,
    softmax_scale: float,
    key_start: Tensor,
    key_end: Tensor,
    target: str = "mean",
    token_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """KL[t] = sum_s p[t,s] (log p[t,s] - log_softmax(i[t,:])[s]), with p log p = 0 at p = 0.

    Shapes as in `flash_indexer.indexer_kl`. A query that sees nothing has KL 0. "per_head" gives KL [T, H] and a
    token's loss is the mean over heads.

    Returns:
        loss: sum_t token_weight[t] * KL[t]; token_weight None means 1/n for the n queries that see a key.
        kl: [T], or [T, H] for "per_head".
    """
    scores = indexer_scores(index_q, index_k, index_weights, key_start, key_end, target)
    p = target_distribution(q, k, softmax_scale, key_start, key_end, target).detach()
    return _weighted(divergence(p, scores, key_end > key_start), key_end > key_start, token_weight)


def rounded_indexer_kl(
    q: Tensor,
    k: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    rounded: tuple[Tensor, Tensor],
    *,
    softmax_scale: float,
    key_start: Tensor,
    key_end: Tensor,
    target: str = "mean",
    token_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`indexer_kl` of the scores of rounded index_q and index_k, its gradient straight through at the scores.

    index: index_q, index_k and the weights as they are: the loss's gradient is that of their scores, as if rounding
    changed these by a constant.
    """
    scores = indexer_scores(*index, key_start, key_end, target)
    constant = indexer_scores(*rounded, index[2], key_start, key_end, target) - scores
    scores = scores + constant.masked_fill(scores == -torch.inf, 0.0).detach()
    p = target_distribution(q, k, softmax_scale, key_start, key_end, target).detach()
    return _weighted(divergence(p, scores, key_end > key_start), key_end > key_start, token_weight)


def _weighted(kl: Tensor, seen: Tensor, token_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss of KL [T] or [T, H], and KL without its graph."""
    if token_weight is None:
        token_weight = seen.to(kl.dtype) / seen.sum().clamp_min(1)
    per_token = kl.mean(-1) if kl.ndim > 1 else kl
    return (token_weight * per_token).sum(), kl.detach()


def selected_keys(
    scores: Tensor, key_start: Tensor, key_end: Tensor, topk: int, always: tuple[int, int] = (0, 0)
) -> Tensor:
    """S_t: the topk visible keys of largest score, of equal scores the lowest; all of at most topk: bool [T, S].

    scores: [T, S]. always: so many first and most recent keys of a query's interval are taken whatever their score;
    they count among the topk. -0.0 equals +0.0.
    """
    selected = torch.zeros_like(scores, dtype=torch.bool)
    for t, (start, end) in enumerate(zip(key_start.tolist(), key_end.tolist(), strict=True)):
        first, last = start + always[0], end - always[1]
        if end - start <= topk:
            selected[t, start:end] = True
            continue
        order = (scores[t, first:last] + 0.0).sort(descending=True, stable=True).indices
        selected[t, first + order[: topk - sum(always)]] = True
        selected[t, start:first] = selected[t, last:end] = True
    return selected


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selected: Tensor, softmax_scale: float, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out[t,h] = sum_{s in S_t} a[t,h,s] v[s,g(h)], a = softmax over S_t of scale * q[t,h]·k[s,g(h)]; lse over S_t.

    sinks: [H], a further logit of each head's softmax, whose value is zero; lse counts it.

    out [T, H, V] and lse [T, H]: zeros and -inf (the sink) for a query that selected nothing.
    """
    logits = teacher_logits(q, k, softmax_scale)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    out = torch.einsum("ths,shv->thv", selected_probabilities(logits, selected, sinks), values)
    lse = logits.masked_fill(~selected[:, None], -torch.inf).logsumexp(-1)
    return out, lse if sinks is None else torch.logaddexp(lse, sinks)


def selected_probabilities(logits: Tensor, selected: Tensor, sinks: Tensor | None = None) -> Tensor:
    """softmax over S_t, and the sinks [H] where there are some: logits [T, H, S] -> [T, H, S], zeros outside S_t.

    Rows that selected nothing have no gradient.
    """
    none = ~selected.any(-1)[:, None, None]
    outside = ~selected[:, None] & ~none
    logits = logits.masked_fill(outside, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks[None, :, None].expand(len(logits), -1, 1)], dim=-1)
    return logits.softmax(-1)[..., : selected.shape[-1]].masked_fill(~selected[:, None], 0.0)


def sparse_target(q: Tensor, k: Tensor, selected: Tensor, softmax_scale: float, sinks: Tensor | None = None) -> Tensor:
    """p[t,s] = sum_h a[t,h,s] / sum_{s in S_t} sum_h a[t,h,s]: [T, S], zeros outside S_t."""
    total = selected_probabilities(teacher_logits(q, k, softmax_scale), selected, sinks).sum(1)
    return total / total.sum(-1, keepdim=True).clamp_min(torch.finfo(total.dtype).tiny)


def sparse_indexer_kl(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    selected: Tensor,
    *,
    softmax_scale: float,
    token_weight: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """KL[t] = sum_{s in S_t} p[t,s] (log p[t,s] - log softmax over S_t of i[t,:]), with p log p = 0 at p = 0.

    Returns:
        loss: sum_t token_weight[t] * KL[t]; token_weight None means 1/n for the n queries that selected a key.
        kl: [T], 0 for a query that selected nothing.
    """
    p = sparse_target(q, k, selected, softmax_scale, sinks).detach()
    scores = (index_weights[:, :, None] * torch.einsum("tie,se->tis", index_q, index_k).relu()).sum(1)
    some = selected.any(-1)
    log_q = scores.masked_fill(~selected & some[:, None], -torch.inf).log_softmax(-1).masked_fill(p == 0, 0.0)
    kl = (torch.xlogy(p, p) - p * log_q).sum(-1)
    if token_weight is None:
        token_weight = some.to(kl.dtype) / some.sum().clamp_min(1)
    return (token_weight * kl).sum(), kl.detach()


def _softmax(logits: Tensor, visible: Tensor) -> Tensor:
    """softmax over the visible keys; zeros where unseen and for rows that see nothing."""
    return logits.masked_fill(~visible, -torch.inf).softmax(-1).masked_fill(~visible, 0.0)
