"""Judges a model's indexers on held-out text: metrics, perplexity under sparse attention, a row block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING

from torch import Tensor

from flash_indexer.judge.batches import batch_tensors, loss_sum
from flash_indexer.judge.metrics import MetricSums, layer_sums
from flash_indexer.judge.rows import row_block
from flash_indexer.judge.scores import Evaluation, LayerScore, Perplexity, RowBlock, score
from flash_indexer.judge.selections import SELECTIONS, selected_attention
from flash_indexer.models.capture import LayerCapture

if TYPE_CHECKING:
    from flash_indexer.models.attach import IndexerHandle, LayerCapture


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
    dense_loss, predicted, tokens, sequences, done, most_visible = 0.0, 0, 0, 0, 0, 0
    restricted = dict.fromkeys(perplexity_ks, 0)

    def measure(capture: LayerCapture) -> None:
        nonlocal most_visible
        layer, visible = capture.layer, capture.key_end - capture.key_start
        most_visible = max(most_visible, int(visible.max()))
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
            input_ids, position_ids = batch_tensors(batch, next(model.parameters()).device)
            before = dict(restricted)
            with handle.using(measure):
                loss, targets = loss_sum(model, input_ids, position_ids)
            advance()
            dense_loss, predicted = dense_loss + loss, predicted + targets
            sequences, tokens = sequences + input_ids.shape[0], tokens + input_ids.numel()
            for select, k in losses:
                if restricted[k] > before[k]:
                    with handle.using(_sparse(select, k)):
                        losses[select, k] += loss_sum(model, input_ids, position_ids)[0]
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
        ks=tuple(sorted(set(ks))),
        min_visible=min_visible,
        most_visible=most_visible,
    )


def _sparse(select: str, k: int) -> Callable[[LayerCapture], Tensor]:
    def consumer(capture: LayerCapture) -> Tensor:
        return selected_attention(capture, select=select, k=k)

    return consumer


def _perplexity(selection: str, k: int | None, loss: float, sparse_fraction: float) -> Perplexity:
    return Perplexity(selection, k, loss, math.exp(min(loss, 700.0)), sparse_fraction)


def _typical(layers: Sequence[LayerScore]) -> int:
    """The layer of median KL over uniform."""
    ordered = sorted(layers, key=lambda score: score.kl_over_uniform or 0.0)
    layer = ordered[len(ordered) // 2].layer
    assert layer is not None, "per-layer scores carry their layer"
    return layer
