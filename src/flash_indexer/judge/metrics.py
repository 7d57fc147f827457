"""How well an indexer predicts its attention: KL over uniform, mass and recall at k.

Everything is computed for a chunk of R query rows and the C keys that any of them may see, never for [T, S]
at once, and summed in float64 into `MetricSums`, so that chunks, sequences and ranks simply add up.

    p[t,s]   the target: the head-summed attention of query t, divided by its sum over s
    mass@k   sum of p[t,s] over k chosen keys: the indexer's top k, p's own top k ("oracle"), or the first
             `sink` visible keys and the k - sink most recent ones ("window")
    recall   |indexer's top k ∩ oracle's top k| / k
    tie      a query whose k-th largest index score equals the next, so that which key is taken is a convention

Shape legend: T queries, S keys, H teacher heads, G teacher key/value heads, D teacher head dim, V value dim,
I index heads, E index dim.

Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1; sink and window: StreamingLLM (2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flash_indexer.judge.capture import WORKSPACE, chunk_scores, chunk_teacher, chunks
from flash_indexer.judge.selections import SINK, check_ks
from flash_indexer.models.capture import LayerCapture
from flash_indexer.ops import top_keys

VISIBLE_PER_K = 4


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
class TieSums:
    """Of the `queries` queries that see more than k keys, `tied_rows` have equal scores at rank k and at k + 1.

    For `taken_otherwise` of these torch.topk, given the same row, takes other keys than the earlier ones.
    """

    queries: int
    tied_rows: int
    taken_otherwise: int

    def __add__(self, other: TieSums) -> TieSums:
        return TieSums(
            self.queries + other.queries,
            self.tied_rows + other.tied_rows,
            self.taken_otherwise + other.taken_otherwise,
        )


@dataclass(frozen=True)
class MetricSums:
    """Sums of KL (nats) over the `queries` queries that see a key, masses and ties per k; `MetricSums()` is zero."""

    queries: int = 0
    kl: float = 0.0
    uniform_kl: float = 0.0
    at_k: Mapping[int, MassSums] = field(default_factory=dict)
    ties: Mapping[int, TieSums] = field(default_factory=dict)

    def __add__(self, other: MetricSums) -> MetricSums:
        at_k, ties = dict(self.at_k), dict(self.ties)
        for k, mass in other.at_k.items():
            at_k[k] = at_k[k] + mass if k in at_k else mass
        for k, tie in other.ties.items():
            ties[k] = ties[k] + tie if k in ties else tie
        return MetricSums(
            self.queries + other.queries,
            self.kl + other.kl,
            self.uniform_kl + other.uniform_kl,
            dict(sorted(at_k.items())),
            dict(sorted(ties.items())),
        )


@torch.no_grad()
def layer_sums(
    capture: LayerCapture,
    *,
    ks: Sequence[int] = (64, 128, 256, 512),
    min_visible: int = 0,
    sink: int = SINK,
    workspace_bytes: int = WORKSPACE,
) -> MetricSums:
    """Sums of KL, uniform KL, mass at k, recall at k and ties at rank k over one layer's queries.

    Args:
        capture: one layer's tensors.
        ks: selection sizes; the masses of each count only queries that see at least max(4 * k, min_visible) keys,
            its ties those that see more than k; it is left out where no query does.
        min_visible: keys that a query must see to count in the masses, on top of 4 * k.
        sink: first keys of the document that sink + window keeps.
        workspace_bytes: bound on the memory for [R, C] tiles; query rows are processed in chunks that fit.

    Raises:
        ValueError: for a k below `sink` (or 1).
    """
    check_ks("layer_sums", ks, sink)
    result = MetricSums()
    for rows, keys, start, end in chunks(capture, workspace_bytes):
        p = chunk_teacher(capture, rows, keys, start, end)
        scores = chunk_scores(capture, rows, keys, start, end)
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
    tied_ks = [k for k in sorted(ks) if k < most]
    if tied_ks:
        sums = torch.cat([sums, _tie_sums(scores, key_start, key_end, tied_ks).flatten()])
    if counted:
        enough = visible >= min(counted.values())
        if not bool(enough.all()):
            p, scores, total = p[enough], scores[enough], total[enough]
            key_start, key_end, visible = key_start[enough], key_end[enough], visible[enough]
        masses = _mass_sums(p / total[:, None], scores, key_start, key_end, counted, sink)
        sums = torch.cat([sums, masses.flatten()])
    queries, kl, uniform_kl, *rest = sums.tolist()
    ties = {k: TieSums(*(int(x) for x in rest[3 * j : 3 * j + 3])) for j, k in enumerate(tied_ks)}
    rest = rest[3 * len(tied_ks) :]
    at_k = {
        k: MassSums(int(rest[5 * j]), least, *rest[5 * j + 1 : 5 * j + 5])
        for j, (k, least) in enumerate(counted.items())
    }
    return MetricSums(int(queries), kl, uniform_kl, at_k, ties)


def _mass_sums(
    p: Tensor, scores: Tensor, key_start: Tensor, key_end: Tensor, counted: Mapping[int, int], sink: int
) -> Tensor:
    """float64 [len(counted), 5]: queries; masses of indexer, oracle, window and recall summed over them."""
    largest = max(counted)
    chosen = p.gather(1, ranked_keys(scores, key_start, key_end, largest))
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


def _tie_sums(scores: Tensor, key_start: Tensor, key_end: Tensor, ks: Sequence[int]) -> Tensor:
    """float64 [len(ks), 3]: rows that see more than k keys, those of them whose k-th score equals the next, and those
    of these for which torch.topk takes other keys than `top_keys`."""
    enough = key_end - key_start > ks[0]
    scores, key_start, key_end = scores[enough], key_start[enough], key_end[enough]
    values, table = scores.topk(ks[-1] + 1).values, []
    for k in ks:
        more = key_end - key_start > k
        tied = more & (values[:, k - 1] == values[:, k])
        otherwise = torch.zeros_like(more.sum())
        if bool(tied.any()):
            ours = top_keys(scores[tied], key_start[tied], key_end[tied], k).indices.long().sort().values
            theirs = scores[tied].topk(k).indices.sort().values
            otherwise = (ours != theirs).any(-1).sum()
        table.append(torch.stack([more.sum(), tied.sum(), otherwise]))
    return torch.stack(table).double()


def _hits(chosen: Tensor, oracle: Tensor) -> Tensor:
    """[R]: how many chosen keys are in a top k of p; of keys tied at its last place, as many as have room."""
    last = oracle[:, -1:]
    room = (oracle == last).sum(-1)
    return (chosen > last).sum(-1) + torch.minimum((chosen == last).sum(-1), room)


def ranked_keys(scores: Tensor, key_start: Tensor, key_end: Tensor, k: int) -> Tensor:
    """The k keys of largest score, best first; of equal scores the lowest key: [R, C] -> int64 [R, k].

    Rows that see fewer than k keys end in key 0.
    """
    selection = top_keys(scores, key_start, key_end, k)
    order = (selection.scores + 0.0).sort(descending=True, stable=True).indices  # -0.0 + 0.0 is +0.0
    return selection.indices.gather(1, order).clamp_min_(0).long()


def window_keys(key_start: Tensor, key_end: Tensor, k: int, sink: int, num_keys: int) -> Tensor:
    """The first `sink` visible keys, then the most recent backwards: int64 [R, k]; for rows that see k."""
    steps = torch.arange(k, device=key_start.device)
    keys = torch.where(steps < sink, key_start[:, None] + steps, key_end[:, None] - 1 - (steps - sink))
    return keys.clamp_(0, num_keys - 1).long()
