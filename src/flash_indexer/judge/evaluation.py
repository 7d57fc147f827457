"""Judges a model's indexers on held-out text: metrics, perplexity under sparse attention, a row block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, max_pool1d

from flash_indexer.judge.metrics import (
    SELECTIONS,
    AttentionCapture,
    MetricSums,
    layer_sums,
    sparse_attention,
    teacher_row_sums,
)
from flash_indexer.ops import indexer_scores, teacher_scores

if TYPE_CHECKING:
    from flash_indexer.models.attach import IndexerHandle, LayerCapture

_LOGIT_ROWS = 256  # rows of [B * L, vocabulary] logits in float32 at a time


@dataclass(frozen=True)
class MassAtK:
    """Means over the `queries` queries that see at least `min_visible` keys; masses are fractions of 1."""

    k: int
    min_visible: int
    queries: int
    indexer: float
    oracle: float
    window: float
    indexer_over_oracle: float
    window_over_oracle: float
    recall: float


@dataclass(frozen=True)
class LayerScore:
    """Means over the `queries` queries of one layer that see a key; KL in nats. layer None: all layers."""

    layer: int | None
    queries: int
    kl: float
    uniform_kl: float
    kl_over_uniform: float | None
    at_k: tuple[MassAtK, ...]


@dataclass(frozen=True)
class Perplexity:
    """exp(loss), loss in nats a predicted token; selection "dense" has k None.

    sparse_fraction: the part of all layers' queries that see more than k keys and so lose some.
    """

    selection: str
    k: int | None
    loss: float
    perplexity: float
    sparse_fraction: float


@dataclass(frozen=True)
class RowBlock:
    """Consecutive queries of one document: where they attend, and where the indexer expects them to.

    teacher, indexer: [rows][columns] probabilities; each column is the largest of `keys_per_column` keys.
    first_query counts from the first key shown, as the columns do: the document's first, if nothing hides it.
    """

    layer: int
    first_query: int
    num_keys: int
    keys_per_column: int
    teacher: tuple[tuple[float, ...], ...]
    indexer: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. `tokens` were read, `predicted` of them have a predecessor in their document."""

    sequences: int
    tokens: int
    predicted: int
    mean: LayerScore
    layers: tuple[LayerScore, ...]
    perplexities: tuple[Perplexity, ...]
    row_block: RowBlock

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, ready for json.dump."""
        plain = asdict(self)
        plain["layers"] = [_score_to_dict(score) for score in plain["layers"]]
        plain["mean"] = _score_to_dict(plain["mean"])
        plain["perplexities"] = list(plain["perplexities"])
        for name in ("teacher", "indexer"):
            plain["row_block"][name] = [list(row) for row in plain["row_block"][name]]
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Evaluation:
        """The inverse of `to_dict`."""
        block = dict(plain["row_block"])
        for name in ("teacher", "indexer"):
            block[name] = tuple(tuple(row) for row in block[name])
        return cls(
            sequences=plain["sequences"],
            tokens=plain["tokens"],
            predicted=plain["predicted"],
            mean=_score_from_dict(plain["mean"]),
            layers=tuple(_score_from_dict(score) for score in plain["layers"]),
            perplexities=tuple(Perplexity(**perplexity) for perplexity in plain["perplexities"]),
            row_block=RowBlock(**block),
        )


def evaluate(
    handle: IndexerHandle,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    ks: Sequence[int] = (64, 128, 256, 512),
    perplexity_ks: Sequence[int] = (128,),
    min_visible: int = 0,
    progress: Callable[[int, int | None], None] | None = None,
) -> Evaluation:
    """Runs the model over held-out batches: once as it is, then once a selection for each of perplexity_ks.

    A sparse pass replaces the attention of every attached layer; layers without an indexer stay dense. A k
    at which no query sees more than k keys is left out: sparse attention would equal dense attention there.

    Args:
        handle: the attached model. It runs in eval mode and gets its mode back.
        batches: mappings with input_ids and position_ids, int64 [B, L]; position_ids restart at 0 at the
            first token of a document, which is nobody's target.
        ks, min_visible: as in `flash_indexer.judge.metrics.layer_sums`.
        perplexity_ks: keys a query in the sparse passes.
        progress: called with the passes done and their total (None if batches has no length).

    Raises:
        KeyError: for a batch without input_ids or position_ids.
        ValueError: for no batch, an empty or padded one, no token to predict, a KL that is not finite (naming its
            layer), or a loss of the model's that is not.
    """
    perplexity_ks = tuple(dict.fromkeys(perplexity_ks))
    if min_visible < 0 or any(k < 1 for k in perplexity_ks):
        raise ValueError(
            f"evaluate: min_visible must be 0 or more, perplexity_ks 1 or more, got {min_visible} and {perplexity_ks}"
        )
    passes = 1 + len(perplexity_ks) * len(SELECTIONS)
    total = passes * len(batches) if isinstance(batches, Sized) else None
    model, sums, blocks = handle.model, dict[int, MetricSums](), dict[int, RowBlock]()
    losses = {(select, k): 0.0 for k in perplexity_ks for select in SELECTIONS}
    dense_loss, predicted, tokens, sequences, done = 0.0, 0, 0, 0, 0
    restricted = dict.fromkeys(perplexity_ks, 0)

    def measure(capture: LayerCapture) -> None:
        layer, visible = capture.layer, capture.key_end - capture.key_start
        for k in perplexity_ks:
            restricted[k] += int((visible > k).sum())
        sums[layer] = sums.get(layer, MetricSums()) + layer_sums(capture, ks=ks, min_visible=min_visible)
        if not math.isfinite(sums[layer].kl):
            raise ValueError(
                f"evaluate: the KL of layer {layer} is {sums[layer].kl}; its indexer's weights, or the "
                "model's activations, are not finite: go back to an earlier checkpoint"
            )
        if layer not in blocks:
            blocks[layer] = row_block(capture)

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    was_training = model.training
    model.train(False)
    try:
        for batch in batches:
            input_ids, position_ids = _tensors(batch, next(model.parameters()).device)
            before = dict(restricted)
            with handle.using(measure):
                loss, targets = _loss_sum(model, input_ids, position_ids)
            advance()
            dense_loss, predicted = dense_loss + loss, predicted + targets
            sequences, tokens = sequences + input_ids.shape[0], tokens + input_ids.numel()
            for select, k in losses:
                if restricted[k] > before[k]:
                    with handle.using(_sparse(select, k)):
                        losses[select, k] += _loss_sum(model, input_ids, position_ids)[0]
                else:
                    losses[select, k] += loss
                advance()
    finally:
        model.train(was_training)
    if not sequences:
        raise ValueError("evaluate: batches must hold at least one batch, got none; is the held-out text too short?")
    if not predicted:
        raise ValueError("evaluate: batches must hold a document of two tokens or more, got none")
    mean = score(None, sum(sums.values(), MetricSums()))
    perplexities = [_perplexity("dense", None, dense_loss / predicted, 0.0)]
    for (select, k), loss in losses.items():
        if restricted[k]:
            perplexities.append(_perplexity(select, k, loss / predicted, restricted[k] / mean.queries))
    layers = tuple(score(layer, sums[layer]) for layer in sorted(sums))
    return Evaluation(
        sequences=sequences,
        tokens=tokens,
        predicted=predicted,
        mean=mean,
        layers=layers,
        perplexities=tuple(perplexities),
        row_block=blocks[_typical(layers)],
    )


def teacher_errors(handle: IndexerHandle, batch: Mapping[str, Tensor]) -> dict[int, float]:
    """max over t, h of |sum_s exp(scale * q[t,h]·k[s,g(h)] - lse[t,h]) - 1|, for each attached layer.

    An error means that the logsumexp, the scale or the visible keys are not those of the model's own attention. The
    target's normalisation would hide it, and leave a wrong weighting of the heads.
    """
    errors: dict[int, float] = {}

    def measure(capture: LayerCapture) -> None:
        per_group = capture.q.shape[1] // capture.k.shape[1]
        worst = torch.zeros((), device=capture.q.device)
        for h in range(capture.q.shape[1]):
            one, g = slice(h, h + 1), slice(h // per_group, h // per_group + 1)
            head = replace(capture, q=capture.q[:, one], k=capture.k[:, g], lse=capture.lse[:, one])
            for sums in teacher_row_sums(head):
                worst = torch.maximum(worst, (sums - 1).abs().max())  # unlike max, keeps NaN
        errors[capture.layer] = float(worst)

    input_ids, position_ids = _tensors(batch, next(handle.model.parameters()).device)
    with torch.no_grad(), handle.using(measure):
        handle.decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    return errors


def score(layer: int | None, sums: MetricSums) -> LayerScore:
    """Means from sums. kl_over_uniform is None where every query sees one key: uniform is exact then."""
    at_k = []
    for k, mass in sums.at_k.items():
        indexer, oracle, window, recall = (
            x / mass.queries for x in (mass.indexer, mass.oracle, mass.window, mass.recall)
        )
        at_k.append(
            MassAtK(
                k,
                mass.min_visible,
                mass.queries,
                indexer,
                oracle,
                window,
                indexer / oracle,
                window / oracle,
                recall,
            )
        )
    n = max(1, sums.queries)
    ratio = sums.kl / sums.uniform_kl if sums.uniform_kl > 0 else None
    return LayerScore(layer, sums.queries, sums.kl / n, sums.uniform_kl / n, ratio, tuple(at_k))


@torch.no_grad()
def row_block(capture: LayerCapture, *, rows: int = 64, columns: int = 256) -> RowBlock:
    """The last `rows` queries of the longest document, over its keys max-pooled into at most `columns`."""
    key_start, key_end = capture.key_start, capture.key_end
    last = int((key_end - key_start).argmax())
    begins = (key_start[1 : last + 1] >= key_end[:last]).nonzero()[:, 0] + 1
    first = max([last + 1 - rows, 0, *begins[-1:].tolist()])
    start, end = int(key_start[first]), int(key_end[last])
    here, keys = slice(first, last + 1), slice(start, end)
    bounds = key_start[here] - start, key_end[here] - start
    q, k, lse = capture.q[here], capture.k[keys], capture.lse[here]
    p = teacher_scores(q, k, lse, *bounds, softmax_scale=capture.softmax_scale)
    p = p / p.sum(-1, keepdim=True)
    index_q, index_k, weights = capture.index_q[here], capture.index_k[keys], capture.index_weights[here]
    predicted = indexer_scores(index_q, index_k, weights, *bounds).softmax(-1)
    width = math.ceil((end - start) / columns)
    return RowBlock(
        layer=capture.layer,
        first_query=int(key_end[first]) - 1 - start,
        num_keys=end - start,
        keys_per_column=width,
        teacher=_pooled(p, width),
        indexer=_pooled(predicted, width),
    )


def _pooled(p: Tensor, width: int) -> tuple[tuple[float, ...], ...]:
    """Largest of each `width` columns, to three significant digits."""
    pooled = max_pool1d(p[:, None], width, width, ceil_mode=True)[:, 0]
    return tuple(tuple(float(f"{x:.3g}") for x in row) for row in pooled.tolist())


def _sparse(select: str, k: int) -> Callable[[AttentionCapture], Tensor]:
    def consumer(capture: AttentionCapture) -> Tensor:
        return sparse_attention(capture, select=select, k=k)

    return consumer


def _tensors(batch: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    for name in ("input_ids", "position_ids"):
        if name not in batch:
            raise KeyError(f"evaluate: a batch must hold input_ids and position_ids, got {sorted(batch)}")
        if batch[name].ndim != 2 or not batch[name].numel():
            raise ValueError(f"evaluate: {name} must be [B, L] with a token at least, got {list(batch[name].shape)}")
    if "attention_mask" in batch and not bool(batch["attention_mask"].all()):
        raise ValueError(
            "evaluate: attention_mask must be all ones, got zeros in it; pack documents by position_ids instead of "
            "padding them"
        )
    return batch["input_ids"].to(device), batch["position_ids"].to(device)


@torch.no_grad()
def _loss_sum(model: torch.nn.Module, input_ids: Tensor, position_ids: Tensor) -> tuple[float, int]:
    """Sum over predicted tokens of -log probability (nats), and their number; no document's first token."""
    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    total = 0.0
    counted = position_ids[:, 1:] == position_ids[:, :-1] + 1
    for row, targets, mask in zip(logits, input_ids[:, 1:], counted, strict=True):
        for begin in range(0, len(targets), _LOGIT_ROWS):
            part = slice(begin, min(begin + _LOGIT_ROWS, len(targets)))
            nats = cross_entropy(row[part].float(), targets[part], reduction="none")
            total += float((nats * mask[part]).sum(dtype=torch.float64))
    if not math.isfinite(total):
        raise ValueError(
            f"evaluate: the model's loss is {total}; its weights or its activations are not finite: look for NaN"
        )
    return total, int(counted.sum())


def _perplexity(selection: str, k: int | None, loss: float, sparse_fraction: float) -> Perplexity:
    return Perplexity(selection, k, loss, math.exp(min(loss, 700.0)), sparse_fraction)


def _typical(layers: Sequence[LayerScore]) -> int:
    """The layer of median KL over uniform."""
    ordered = sorted(layers, key=lambda score: score.kl_over_uniform or 0.0)
    layer = ordered[len(ordered) // 2].layer
    assert layer is not None, "per-layer scores carry their layer"
    return layer


def _score_to_dict(plain: dict[str, Any]) -> dict[str, Any]:
    return {**plain, "at_k": list(plain["at_k"])}


def _score_from_dict(plain: Mapping[str, Any]) -> LayerScore:
    return LayerScore(**{**plain, "at_k": tuple(MassAtK(**mass) for mass in plain["at_k"])})
