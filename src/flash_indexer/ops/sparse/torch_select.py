"""Selection in torch, a chunk of query rows at a time, on any device.

    i[t,s] = sum_j w[t,j] * ReLU(index_q[t,j]·index_k[s])
    S_t    = the K visible keys with the largest score i[t,s]; all where at most K are visible; of equal scores the
             lowest s. -0.0 equals +0.0.

The selection depends on the scores alone: on no order in which a device happens to find equal values, and on no key
that the query does not see. So the scores themselves must be the same bits whatever chunk a row is computed in: a
library's matrix product rounds a row differently in a matrix of another shape. All products on a device have one shape.

R query rows of a chunk, C the keys that any of them may see; further letters as in `flash_indexer.reference`.
Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1, equation 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_indexer.ops.blockwise import compute_dtype, plan_chunks
from flash_indexer.ops.sparse.selection import Selection

TILES = {"cpu": (32, 256), "cuda": (128, 8192)}  # queries by keys of one product, without remainder in registers
_WIDTH = 16  # the tiles' inner dimension is padded to a multiple of this, for the same reason
_NUMBERS = 9  # of a score of a chunk: the score, and what `top_keys` makes of it


@torch.no_grad()
def select(
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    topk: int,
    always: tuple[int, int],
    workspace_bytes: int,
) -> Selection:
    """S_t of checked arguments, K = min(topk, S) slots a query; the same bits at any workspace_bytes.

    Scores of as many rows are held as fit workspace_bytes, one at least: never [T, S].
    """
    dtype, T, num_keys = compute_dtype(index_q), index_q.shape[0], index_k.shape[0]
    width, height = min(topk, num_keys), tile_of(index_q.device)[0]
    out = Selection(
        torch.full((T, width), -1, dtype=torch.int32, device=index_q.device),
        torch.zeros(T, dtype=torch.int32, device=index_q.device),
        torch.full((T, width), -torch.inf, dtype=dtype, device=index_q.device),
    )
    for chunk in plan_chunks(key_start, key_end, _NUMBERS, dtype.itemsize, workspace_bytes, height):
        rows, first = slice(chunk.begin, chunk.end), chunk.first
        scores = tiled_scores(index_q[rows], index_k[first : chunk.last], index_weights[rows])
        made = top_keys(scores, key_start[rows] - first, key_end[rows] - first, topk, always)
        made.indices.add_(first).masked_fill_(made.indices < first, -1)
        slots = rows, slice(made.indices.shape[1])
        out.indices[slots], out.count[rows], out.scores[slots] = made
    return out


def tile_of(device: torch.device) -> tuple[int, int]:
    """Queries and keys of one product on a device."""
    return TILES.get(device.type, TILES["cuda"])


def tiled_scores(index_q: Tensor, index_k: Tensor, index_weights: Tensor) -> Tensor:
    """i[t,s] of all pairs, [R, C]: a row's values depend on no other row and on no other key."""
    dtype, (height, width) = compute_dtype(index_q), tile_of(index_q.device)
    (rows, _, E), num_keys = index_q.shape, index_k.shape[0]
    pad, scores = -E % _WIDTH, index_q.new_empty(rows, num_keys, dtype=dtype)
    # padding copies, even by nothing, to where a product's alignment is always the same
    keys = torch.split(F.pad(index_k.to(dtype), (0, pad, 0, -num_keys % width)), width)
    products, tile = (torch.empty(height, width, dtype=dtype, device=index_q.device) for _ in range(2))
    for begin in range(0, rows, height):
        end = min(begin + height, rows)
        missing = height - (end - begin)
        queries = F.pad(index_q[begin:end].transpose(0, 1).to(dtype), (0, pad, 0, missing)).contiguous()
        weights = F.pad(index_weights[begin:end].T.to(dtype), (0, missing)).contiguous()[..., None]
        for n, some_keys in enumerate(keys):
            tile.zero_()
            for query, weight in zip(queries, weights, strict=True):
                tile.addcmul_(torch.mm(query, some_keys.T, out=products).relu_(), weight)
            part = scores[begin:end, n * width : (n + 1) * width]
            part.copy_(tile[: end - begin, : part.shape[1]])
    return scores


@torch.no_grad()
def top_keys(scores: Tensor, key_start: Tensor, key_end: Tensor, k: int, always: tuple[int, int] = (0, 0)) -> Selection:
    """S_t = the k largest of scores[t, key_start[t]:key_end[t]], of equal scores the lowest key; all of at most k.

    Args:
        scores: [R, C]. What lies outside a row's interval is not looked at. An infinite score is ranked like any other.
        key_start, key_end: [R], counted from the first of the C keys; they need not be ordered.
        k: 1 or more; K = min(k, C).
        always: the numbers of first and of last keys of the interval that are taken whatever their score, k at most
            together.
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
        begin, stop = start[many, None], end[many, None]
        first, last = steps[: always[0]], steps[: always[1]]
        between = _largest(scores[many], begin + always[0], stop - always[1], width - sum(always))
        keys[many] = torch.cat([begin + first, between, stop - always[1] + last], 1)
    values = scores.gather(1, keys).masked_fill_(absent, -torch.inf)
    has_nan = values.isnan().any(-1)
    if many.numel() and width == sum(always):  # nothing was ranked, which finds NaN
        columns = torch.arange(num_keys, device=scores.device)
        visible = (columns >= start[many, None]) & (columns < end[many, None])
        has_nan[many] |= (scores[many].isnan() & visible).any(-1)
    values.masked_fill_(has_nan[:, None], torch.nan)
    return Selection(keys.masked_fill_(absent, -1).int(), num_visible.clamp_max_(width).int(), values)


def _largest(scores: Tensor, start: Tensor, end: Tensor, k: int) -> Tensor:
    """Keys of the k largest scores of rows that see more than k, ascending: int64 [R, k]. NaN is above infinity.

    Which of several equal scores `topk` takes is up to the device, and whether -0.0 is below +0.0; so rows whose k-th
    score equals the next are chosen again, from their k-th score. start, end: [R, 1].
    """
    columns = torch.arange(scores.shape[1], device=scores.device)
    if k == 0:
        return columns.new_empty(len(scores), 0)
    visible = (columns >= start) & (columns < end)
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
