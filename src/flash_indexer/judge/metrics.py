"""How well an indexer predicts its attention: KL over uniform, mass and recall at k, sparse attention.

Everything is computed for a chunk of R query rows and the C keys that any of them may see, never for [T, S]
at once, and summed in float64 into `MetricSums`, so that chunks, sequences and ranks simply add up.

    p[t,s]   the target: the head-summed attention of query t, divided by its sum over s
    mass@k   sum of p[t,s] over k chosen keys: the indexer's top k, p's own top k ("oracle"), or the first
             `sink` visible keys and the k - sink most recent ones ("window")
    recall   |indexer's top k ∩ oracle's top k| / k

Shape legend: T queries, S keys, H teacher heads, G teacher key/value heads, D teacher head dim, V value dim,
I index heads, E index dim.

Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1; sink and window: StreamingLLM (2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flash_indexer.ops import indexer_scores, teacher_scores
from flash_indexer.ops.kl.torch_body import plan_chunks

SELECTIONS = ("indexer", "oracle", "window")
SINK = 4
VISIBLE_PER_K = 4
_TILES = 6
_WORKSPACE = 512 * 2**20


class AttentionCapture(Protocol):
    """What one layer's attention saw, for T queries and S keys of packed documents."""

    @property
    def q(self) -> Tensor: ...  # [T, H, D]
    @property
    def k(self) -> Tensor: ...  # [S, G, D]
    @property
    def v(self) -> Tensor: ...  # [S, G, V]
    @property
    def lse(self) -> Tensor: ...  # [T, H], nats
    @property
    def index_q(self) -> Tensor: ...  # [T, I, E]
    @property
    def index_k(self) -> Tensor: ...  # [S, E]
    @property
    def index_weights(self) -> Tensor: ...  # [T, I]
    @property
    def softmax_scale(self) -> float: ...
    @property
    def key_start(self) -> Tensor: ...  # int32 [T]
    @property
    def key_end(self) -> Tensor: ...  # int32 [T]


@dataclass(frozen=True)
class MassSums:
    """Sums over the `queries` queries that see at least `min_visible` keys; divided by `queries`: means."""

    queries: int
    min_visible: int
    indexer: float
    oracle: float
    window: float
    recall: float

    def __add__(self, other: MassSums) -> MassSums:
        if self.min_visible != other.min_visible:
            raise ValueError(
                f"MassSums: min_visible must agree to be added, got {self.min_visible} and "
                f"{other.min_visible}; measure every part with the same min_visible"
            )
        return MassSums(
            self.queries + other.queries,
            self.min_visible,
            self.indexer + other.indexer,
            self.oracle + other.oracle,
            self.window + other.window,
            self.recall + other.recall,
        )


@dataclass(frozen=True)
class MetricSums:
    """Sums of KL (nats) over the `queries` queries that see a key, masses per k; `MetricSums()` is zero."""

    queries: int = 0
    kl: float = 0.0
    uniform_kl: float = 0.0
    at_k: Mapping[int, MassSums] = field(default_factory=dict)

    def __add__(self, other: MetricSums) -> MetricSums:
        at_k = dict(self.at_k)
        for k, sums in other.at_k.items():
            at_k[k] = at_k[k] + sums if k in at_k else sums
        return MetricSums(
            self.queries + other.queries,
            self.kl + other.kl,
            self.uniform_kl + other.uniform_kl,
            dict(sorted(at_k.items())),
        )


@torch.no_grad()
def layer_sums(
    capture: AttentionCapture,
    *,
    ks: Sequence[int] = (64, 128, 256, 512),
    min_visible: int = 0,
    sink: int = SINK,
    workspace_bytes: int = _WORKSPACE,
) -> MetricSums:
    """Sums of KL, uniform KL, mass at k and recall at k over one layer's queries.

    Args:
        capture: one layer's tensors.
        ks: selection sizes; each counts only queries that see at least max(4 * k, min_visible) keys, and is
            left out of the result where none does.
        min_visible: keys that a query must see to count in the masses, on top of 4 * k.
        sink: first keys of the document that sink + window keeps.
        workspace_bytes: bound on the memory for [R, C] tiles; query rows are processed in chunks that fit.

    Raises:
        ValueError: for a k below `sink` (or 1).
    """
    _check_ks("layer_sums", ks, sink)
    result = MetricSums()
    for rows, keys, start, end in _chunks(capture, workspace_bytes):
        p = _teacher(capture, rows, keys, start, end)
        scores = _scores(capture, rows, keys, start, end)
        result += block_sums(p, scores, start, end, ks=ks, min_visible=min_visible, sink=sink)
    return result


def block_sums(
    p: Tensor,
    scores: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    *,
    ks: Sequence[int],
    min_visible: int = 0,
    sink: int = SINK,
) -> MetricSums:
    """The sums for one chunk of rows.

        KL[t]      = sum_s p log p - sum_s p i + logsumexp_s i
        uniform[t] = sum_s p log p + log(visible keys of t)

    Args:
        p: [R, C] head-summed attention, not necessarily divided by its row sum, 0 where unseen.
        scores: [R, C] index scores i, -inf where unseen.
        key_start, key_end: [R], counted from the chunk's first key.
        ks, min_visible, sink: as in `layer_sums`.
    """
    visible = (key_end - key_start).clamp_min(0)
    seen = visible > 0
    finfo = torch.finfo(p.dtype)
    total = p.sum(-1).masked_fill(~seen, 1.0)
    p_log_p = torch.linalg.vecdot(p, p.clamp_min(finfo.tiny).log()) / total - total.log()
    expected_score = torch.linalg.vecdot(p, scores.clamp_min(finfo.min)) / total
    columns = [
        seen,
        torch.where(seen, p_log_p - expected_score + scores.logsumexp(-1), 0.0),
        torch.where(seen, p_log_p + visible.clamp_min(1).to(p.dtype).log(), 0.0),
    ]
    most = int(visible.max()) if visible.numel() else 0
    thresholds = {k: max(VISIBLE_PER_K * k, min_visible) for k in sorted(ks)}
    counted = {k: least for k, least in thresholds.items() if least <= most}
    sums = torch.stack([column.sum(dtype=torch.float64) for column in columns])
    if counted:
        enough = visible >= min(counted.values())
        if not bool(enough.all()):
            p, scores, total = p[enough], scores[enough], total[enough]
            key_start, key_end, visible = key_start[enough], key_end[enough], visible[enough]
        masses = _mass_sums(p / total[:, None], scores, key_start, key_end, counted, sink)
        sums = torch.cat([sums, masses.flatten()])
    queries, kl, uniform_kl, *rest = sums.tolist()
    at_k = {
        k: MassSums(int(rest[5 * j]), least, *rest[5 * j + 1 : 5 * j + 5])
        for j, (k, least) in enumerate(counted.items())
    }
    return MetricSums(int(queries), kl, uniform_kl, at_k)


def _mass_sums(
    p: Tensor, scores: Tensor, key_start: Tensor, key_end: Tensor, counted: Mapping[int, int], sink: int
) -> Tensor:
    """float64 [len(counted), 5]: queries; masses of indexer, oracle, window and recall summed over them."""
    largest = max(counted)
    chosen = p.gather(1, top_keys(scores, largest))
    oracle = p.topk(largest).values
    window = p.gather(1, window_keys(key_start, key_end, largest, sink, p.shape[1]))
    masses = [x.cumsum(-1) for x in (chosen, oracle, window)]
    visible = key_end - key_start
    table = []
    for k, least in counted.items():
        row = visible >= least
        recall = _hits(chosen[:, :k], oracle[:, :k]).double() / k
        values = [row, *(x[row, k - 1] for x in masses), recall[row]]
        table.append(torch.stack([x.sum(dtype=torch.float64) for x in values]))
    return torch.stack(table)


def _hits(chosen: Tensor, oracle: Tensor) -> Tensor:
    """[R]: how many chosen keys are in a top k of p; of keys tied at its last place, as many as have room."""
    last = oracle[:, -1:]
    room = (oracle == last).sum(-1)
    return (chosen > last).sum(-1) + torch.minimum((chosen == last).sum(-1), room)


def top_keys(scores: Tensor, k: int) -> Tensor:
    """The k keys of largest score, best first; of equal scores the earlier key: [R, C] -> int64 [R, k].

    Rows with fewer than k keys above -inf end in keys that they do not see.
    """
    values, keys = scores.topk(min(k + 1, scores.shape[1]))
    tied = ((values[:, 1:] == values[:, :-1]) & (values[:, 1:] > -torch.inf)).any(-1)
    if bool(tied.any()):
        keys[tied] = scores[tied].sort(descending=True, stable=True).indices[:, : keys.shape[1]]
    return keys[:, :k]


def window_keys(key_start: Tensor, key_end: Tensor, k: int, sink: int, num_keys: int) -> Tensor:
    """The first `sink` visible keys, then the most recent backwards: int64 [R, k]; for rows that see k."""
    steps = torch.arange(k, device=key_start.device)
    keys = torch.where(steps < sink, key_start[:, None] + steps, key_end[:, None] - 1 - (steps - sink))
    return keys.clamp_(0, num_keys - 1).long()


@torch.no_grad()
def sparse_attention(
    capture: AttentionCapture,
    *,
    select: str,
    k: int,
    sink: int = SINK,
    workspace_bytes: int = _WORKSPACE,
) -> Tensor:
    """out[t,h] = sum over t's chosen keys s of softmax_s(scale * q[t,h]·k[s,g(h)]) v[s,g(h)].

    Args:
        capture: one layer's tensors.
        select: "indexer", "oracle" or "window": whose k keys; one choice for all heads.
        k: keys a query; a query that sees at most k attends to all of them, one that sees none gives zeros.
        sink, workspace_bytes: as in `layer_sums`.

    Returns:
        [T, H, V], v's dtype.

    Raises:
        ValueError: for another `select`, or a k below `sink` (or 1).
    """
    if select not in SELECTIONS:
        raise ValueError(f"sparse_attention: select must be one of {', '.join(SELECTIONS)}, got {select!r}")
    _check_ks("sparse_attention", [k], sink)
    q, v = capture.q, capture.v
    out = v.new_zeros(*q.shape[:2], v.shape[-1])
    for rows, keys, start, end in _chunks(capture, workspace_bytes):
        num_keys = keys.stop - keys.start
        columns = torch.arange(num_keys, device=q.device)
        attended = (columns >= start[:, None]) & (columns < end[:, None])
        visible = end - start
        if int(visible.max()) > k:
            if select == "window":
                chosen = window_keys(start, end, k, sink, num_keys)
            elif select == "oracle":
                chosen = top_keys(_teacher(capture, rows, keys, start, end), k)
            else:
                chosen = top_keys(_scores(capture, rows, keys, start, end), k)
            attended &= torch.zeros_like(attended).scatter_(1, chosen, True)
        blind = visible <= 0
        attended[:, 0] |= blind
        query, key, value = (x.transpose(0, 1)[None] for x in (q[rows], capture.k[keys], v[keys]))
        block = scaled_dot_product_attention(
            query, key, value, attn_mask=attended, scale=capture.softmax_scale, enable_gqa=True
        )
        out[rows] = block[0].transpose(0, 1).masked_fill(blind[:, None, None], 0.0)
    return out


def teacher_row_sums(capture: AttentionCapture, *, workspace_bytes: int = _WORKSPACE) -> Iterator[Tensor]:
    """sum_s sum_h exp(scale * q[t,h]·k[s,g(h)] - lse[t,h]), chunk by chunk, of the queries that see a key."""
    for rows, keys, start, end in _chunks(capture, workspace_bytes):
        yield _teacher(capture, rows, keys, start, end).sum(-1)[end > start]


def _chunks(capture: AttentionCapture, workspace_bytes: int) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Query rows, the keys that they see, and their intervals counted from the first of those keys."""
    key_start, key_end = capture.key_start, capture.key_end
    for begin, stop, first, last in plan_chunks(
        key_start, key_end, _TILES, capture.lse.element_size(), workspace_bytes
    ):
        rows = slice(begin, stop)
        start, end = ((x[rows] - first).clamp(0, last - first) for x in (key_start, key_end))
        yield rows, slice(first, last), start, end


def _teacher(capture: AttentionCapture, rows: slice, keys: slice, start: Tensor, end: Tensor) -> Tensor:
    q, k, lse = capture.q[rows], capture.k[keys], capture.lse[rows]
    return teacher_scores(q, k, lse, start, end, softmax_scale=capture.softmax_scale)


def _scores(capture: AttentionCapture, rows: slice, keys: slice, start: Tensor, end: Tensor) -> Tensor:
    index_q, index_k, weights = capture.index_q[rows], capture.index_k[keys], capture.index_weights[rows]
    return indexer_scores(index_q, index_k, weights, start, end)


def _check_ks(op: str, ks: Sequence[int], sink: int) -> None:
    for k in ks:
        if k < max(1, sink):
            least = max(1, sink)
            raise ValueError(f"{op}: k must be at least max(1, sink) = {least}, got {k}; choose a larger k")
