"""Selection and attention over selected keys in torch, blockwise, on any device.

    S_t      = the K visible keys with the largest score i[t,s]; all where at most K are visible; of equal scores the
               lowest s. -0.0 equals +0.0.
    o[t,h]   = sum_{s in S_t} a[t,h,s] v[s,g(h)],   a[t,h,:] = softmax over S_t of scale * q[t,h]·k[s,g(h)]
    lse[t,h] = log sum_{s in S_t} exp(scale * q[t,h]·k[s,g(h)])

The selection depends on the scores alone: on no order in which a device happens to find equal values, and on no key
that the query does not see. Products and sums are taken in float32 (float64 for float64 inputs).

Shape legend: T queries, S keys, R query rows of a chunk, C the keys that any of them may see, K selected keys of a
query, H heads, G key/value heads (head h reads g(h) = h // (H/G)), D head dim, V value dim.

Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1, equation 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_THIN = 16  # a range of more keys than this for each selected one: gathering them is faster than a mask
_CPU_ROWS = 128  # queries of a chunk, so that its tiles stay near the cache


class Selection(NamedTuple):
    """The keys of each query in ascending order, their number, and their scores.

    indices: int32 [T, K], -1 behind the last. count: int32 [T]. scores: [T, K], -inf behind the last; NaN in the whole
    row of a query that sees a score that is NaN.
    """

    indices: Tensor
    count: Tensor  # type: ignore[assignment]
    scores: Tensor


@torch.no_grad()
def top_keys(scores: Tensor, key_start: Tensor, key_end: Tensor, k: int) -> Selection:
    """S_t = the k largest of scores[t, key_start[t]:key_end[t]], of equal scores the lowest key; all of at most k.

    Args:
        scores: [R, C]. What lies outside a row's interval is not looked at. An infinite score is ranked like any other.
        key_start, key_end: [R], counted from the first of the C keys; they need not be ordered.
        k: 1 or more; K = min(k, C).
    """
    num_keys = scores.shape[1]
    start, end = (x.clamp(0, num_keys).long() for x in (key_start, key_end))
    num_visible = (end - start).clamp_min_(0)
    width = min(k, num_keys)
    steps = torch.arange(width, device=scores.device)
    absent = steps >= num_visible[:, None]
    keys = (start[:, None] + steps).masked_fill_(absent, 0)
    many = (num_visible > width).nonzero()[:, 0]
    if many.numel():
        keys[many] = _largest(scores[many], start[many], end[many], width)
    values = scores.gather(1, keys).masked_fill_(absent, -torch.inf)
    values.masked_fill_(values.isnan().any(-1, keepdim=True), torch.nan)
    return Selection(keys.masked_fill_(absent, -1).int(), num_visible.clamp_max_(width).int(), values)


def _largest(scores: Tensor, start: Tensor, end: Tensor, k: int) -> Tensor:
    """Keys of the k largest scores of rows that see more than k, ascending: int64 [R, k]. NaN is above infinity.

    Which of several equal scores `topk` takes is up to the device, and whether -0.0 is below +0.0; so rows whose k-th
    score equals the next are chosen again, from their k-th score.
    """
    columns = torch.arange(scores.shape[1], device=scores.device)
    visible = (columns >= start[:, None]) & (columns < end[:, None])
    ranked = torch.where(visible, scores, -torch.inf)
    values, keys = ranked.topk(k + 1)
    keys = keys[:, :k].sort(-1).values
    has_nan = values[:, 0].isnan()
    rows = (has_nan | (values[:, k - 1] == values[:, k])).nonzero()[:, 0]
    if rows.numel():
        ranked, last, visible = ranked[rows], values[rows, k - 1 : k], visible[rows]
        finite = dict(nan=torch.inf, posinf=torch.finfo(scores.dtype).max, neginf=-torch.inf)  # the order stays
        ranked, last = (torch.where(has_nan[rows, None], x.nan_to_num(**finite), x) for x in (ranked, last))
        above, equal = ranked > last, (ranked == last) & visible
        room = k - above.sum(-1, keepdim=True)
        equal &= equal.cumsum(-1, dtype=torch.int32) <= room
        keys[rows] = (above | equal).nonzero()[:, 1].view(-1, k)
    return keys


@torch.no_grad()
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    *,
    softmax_scale: float,
    workspace_bytes: int = 512 * 2**20,
) -> tuple[Tensor, Tensor]:
    """out[t,h] = sum_{s in S_t} softmax over S_t (scale * q[t,h]·k[s,g(h)]) v[s,g(h)], and its logsumexp.

    A chunk of queries at a time: where their selected keys are spread thinly, keys and values are gathered for each
    query; elsewhere the chunk attends to a range of keys under a mask. Keys and values that a query did not select have
    no part in its result, whether they are finite or not.

    Args:
        q: [T, H, D]. k: [S, G, D]. v: [S, G, V], H % G == 0.
        selection: of the T queries; distinct keys from 0 to S - 1 in its first `count` slots.
        softmax_scale: the model's own softmax scale.
        workspace_bytes: bound on the memory for gathered keys, values and logits; one query at least is processed.

    Returns:
        out [T, H, V] in v's dtype and lse [T, H] in float32 (float64 for float64 inputs): zeros and -inf for a query
        without keys, NaN for one whose selection's scores are.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    (T, H, D), V = q.shape, v.shape[2]
    out = v.new_zeros(T, H, V)
    lse = torch.full((T, H), -torch.inf, dtype=dtype, device=q.device)
    most = int(selection.count.max()) if T else 0
    numbers = max(2 * (D + V) + 3 * (H // k.shape[1]) + 2, 4 * _THIN)  # for a query and one of its keys, in either way
    step = max(1, workspace_bytes // (max(1, most) * numbers * dtype.itemsize))
    if q.device.type == "cpu":
        step = min(step, _CPU_ROWS)
    for begin in range(0, T, step):
        rows = slice(begin, min(begin + step, T))
        width = int(selection.count[rows].max())
        if not width:
            continue
        keys = selection.indices[rows, :width].long()
        absent = keys < 0
        last = int(keys.max()) + 1
        first = int(keys.masked_fill(absent, last).min())
        query = q[rows].to(dtype) * softmax_scale
        near = slice(first, last)
        thin = last - first > _THIN * width
        if thin or not bool(k[near].isfinite().all() and v[near].isfinite().all()):
            chunk = _gathered(query, k, v, keys.clamp_min_(0), absent)
        else:
            chunk = _masked(query, k[near], v[near], (keys - first).masked_fill_(absent, last - first))
        out[rows], lse[rows] = chunk[0].to(out.dtype), chunk[1]
    has_nan = selection.scores.isnan().any(-1)
    out[has_nan], lse[has_nan] = torch.nan, torch.nan
    return out, lse


def _gathered(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
    """out [R, H, V] and lse [R, H] over keys [R, K] of all S, without those that are absent; q is scaled."""
    per_group = q.shape[1] // k.shape[1]
    out, lse = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2])
    for g in range(k.shape[1]):
        heads = slice(g * per_group, (g + 1) * per_group)
        logits = q[:, heads] @ k[:, g][keys].to(q.dtype).transpose(1, 2)
        logits.masked_fill_(absent[:, None], -torch.inf)
        value = v[:, g][keys].to(q.dtype).masked_fill_(absent[..., None], 0.0)
        out[:, heads], lse[:, heads] = _softmax(logits, value)
    return out, lse


def _masked(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The same over keys [R, K] of the C that k and v hold, C itself standing for none; all must be finite."""
    num_keys, per_group = k.shape[0], q.shape[1] // k.shape[1]
    unselected = torch.ones(len(q), num_keys + 1, dtype=torch.bool, device=q.device).scatter_(1, keys, False)
    out, lse = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2])
    for h in range(q.shape[1]):
        g = h // per_group
        logits = (q[:, h] @ k[:, g].to(q.dtype).T).masked_fill_(unselected[:, :num_keys], -torch.inf)
        out[:, h], lse[:, h] = _softmax(logits, v[:, g].to(q.dtype))
    return out, lse


def _softmax(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(logits) @ values and logsumexp(logits): 0 and -inf where every logit is -inf. Overwrites logits."""
    largest = logits.amax(-1, keepdim=True)
    empty = largest == -torch.inf
    p = logits.sub_(largest.masked_fill(empty, 0.0)).exp_()
    total = p.sum(-1, keepdim=True)
    return (p @ values).div_(total.masked_fill(empty, 1.0)), (largest + total.log())[..., 0]
