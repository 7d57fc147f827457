"""Judges a model's indexers on held-out text: metrics, perplexity under sparse attention, a row block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, cast

from torch import Tensor

from flash_indexer.indexer import LightningIndexer
from flash_indexer.judge.batches import batch_tensors, loss_sum
from flash_indexer.judge.metrics import MetricSums, layer_sums
from flash_indexer.judge.rows import row_block
from flash_indexer.judge.scores import Evaluation, LayerScore, OverlapAtK, Perplexity, RowBlock, Unserved, score
from flash_indexer.judge.selections import SELECTIONS, selected_attention
from flash_indexer.judge.serving import OverlapSums, add_overlaps, check_arithmetic, overlap_sums, served
from flash_indexer.models.capture import LayerCapture

if TYPE_CHECKING:
    from flash_indexer.models.attach import IndexerHandle, LayerCapture

_UNSERVED = "unserved"


def evaluate(
    handle: IndexerHandle,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    ks: Sequence[int] = (64, 128, 256, 512),
    perplexity_ks: Sequence[int] = (128,),
    min_visible: int = 0,
    serve: str | None = None,
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
        serve: a server's arithmetic, one of `flash_indexer.judge.serving.ARITHMETICS`: the indexers are judged as they
            are served, and beside it (`unserved`) in the arithmetic of the model, which takes a sparse pass more for
            each of perplexity_ks. None: in the arithmetic of the model alone.
        progress: called with the passes done and their total (None if batches has no length).

    Raises:
        KeyError: for a batch without input_ids or position_ids.
        ValueError: for an unknown `serve`, or one that an index dim can't have; for no batch, an empty or padded one,
            no token to predict, a KL that is not finite (naming its layer), or a loss of the model's that is not.
    """
    perplexity_ks = tuple(dict.fromkeys(perplexity_ks))
    if min_visible < 0 or any(k < 1 for k in perplexity_ks):
        raise ValueError(
            f"evaluate: min_visible must be 0 or more, perplexity_ks 1 or more, got {min_visible} and {perplexity_ks}"
        )
    if serve is not None:
        for indexer in handle.indexers.values():
            check_arithmetic("evaluate", serve, cast(LightningIndexer, indexer).head_dim)
    judge = _Judge(ks, perplexity_ks, min_visible, serve)
    passes = 1 + len(judge.losses)
    total = passes * len(batches) if isinstance(batches, Sized) else None
    model, done = handle.model, 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    was_training = model.training
    model.train(False)
    try:
        for batch in batches:
            judge.read(handle, batch, advance)
    finally:
        model.train(was_training)
    return judge.evaluation()


class _Judge:
    """What is summed up over batches."""

    def __init__(self, ks: Sequence[int], perplexity_ks: Sequence[int], min_visible: int, serve: str | None) -> None:
        self._ks, self._min_visible, self._serve = ks, min_visible, serve
        selections = (*SELECTIONS, *([_UNSERVED] if serve is not None else []))
        self.losses = {(select, k): 0.0 for k in perplexity_ks for select in selections}
        self._restricted = dict.fromkeys(perplexity_ks, 0)
        self._dense_loss, self._predicted, self._tokens, self._sequences, self._most_visible = 0.0, 0, 0, 0, 0
        self._sums, self._unserved_sums = dict[int, MetricSums](), dict[int, MetricSums]()
        self._overlaps = dict[int, dict[int, OverlapSums]]()
        self._blocks = dict[int, RowBlock]()
        self._dtype = ""

    def read(self, handle: IndexerHandle, batch: Mapping[str, Tensor], advance: Callable[[], None]) -> None:
        """One batch: the dense pass, and a sparse one for each selection that loses keys."""
        model, before = handle.model, dict(self._restricted)
        input_ids, position_ids = batch_tensors(batch, next(model.parameters()).device)
        with handle.using(self._measure):
            loss, targets = loss_sum(model, input_ids, position_ids)
        advance()
        self._dense_loss, self._predicted = self._dense_loss + loss, self._predicted + targets
        self._sequences, self._tokens = self._sequences + input_ids.shape[0], self._tokens + input_ids.numel()
        for select, k in self.losses:
            if self._restricted[k] > before[k]:
                with handle.using(self._sparse(select, k)):
                    self.losses[select, k] += loss_sum(model, input_ids, position_ids)[0]
            else:
                self.losses[select, k] += loss
            advance()

    def _measure(self, capture: LayerCapture) -> None:
        layer, visible = capture.layer, capture.key_end - capture.key_start
        self._most_visible = max(self._most_visible, int(visible.max()))
        self._dtype = str(capture.index_q.dtype).removeprefix("torch.")
        for k in self._restricted:
            self._restricted[k] += int((visible > k).sum())
        judged = self._served(capture)
        self._add(self._sums, judged)
        if self._serve is not None:
            self._add(self._unserved_sums, capture)
            found = overlap_sums(capture, judged, ks=self._ks, min_visible=self._min_visible)
            self._overlaps[layer] = add_overlaps(self._overlaps.get(layer, {}), found)
        if layer not in self._blocks:
            self._blocks[layer] = row_block(judged)

    def _add(self, sums: dict[int, MetricSums], capture: LayerCapture) -> None:
        layer = capture.layer
        sums[layer] = sums.get(layer, MetricSums()) + layer_sums(capture, ks=self._ks, min_visible=self._min_visible)
        if not math.isfinite(sums[layer].kl):
            raise ValueError(
                f"evaluate: the KL of layer {layer} is {sums[layer].kl}; its indexer's weights, or the "
                "model's activations, are not finite: go back to an earlier checkpoint"
            )

    def _served(self, capture: LayerCapture) -> LayerCapture:
        return capture if self._serve is None else served(capture, self._serve)

    def _sparse(self, select: str, k: int) -> Callable[[LayerCapture], Tensor]:
        def consumer(capture: LayerCapture) -> Tensor:
            if select == _UNSERVED:
                return selected_attention(capture, select="indexer", k=k)
            return selected_attention(self._served(capture) if select == "indexer" else capture, select=select, k=k)

        return consumer

    def evaluation(self) -> Evaluation:
        """Means of the sums."""
        if not self._sequences:
            raise ValueError(
                "evaluate: batches must hold at least one batch, got none; is the held-out text too short?"
            )
        if not self._predicted:
            raise ValueError("evaluate: batches must hold a document of two tokens or more, got none")
        mean = score(None, sum(self._sums.values(), MetricSums()))
        perplexities = [_perplexity("dense", None, self._dense_loss / self._predicted, 0.0)]
        unserved: list[Perplexity] = []
        for (select, k), loss in self.losses.items():
            if self._restricted[k]:
                name = "indexer" if select == _UNSERVED else select
                found = _perplexity(name, k, loss / self._predicted, self._restricted[k] / mean.queries)
                (unserved if select == _UNSERVED else perplexities).append(found)
        layers = tuple(score(layer, self._sums[layer]) for layer in sorted(self._sums))
        return Evaluation(
            sequences=self._sequences,
            tokens=self._tokens,
            predicted=self._predicted,
            mean=mean,
            layers=layers,
            perplexities=tuple(perplexities),
            row_block=self._blocks[_typical(layers)],
            ks=tuple(sorted(set(self._ks))),
            min_visible=self._min_visible,
            most_visible=self._most_visible,
            arithmetic=self._serve or self._dtype,
            unserved=None if self._serve is None else self._unserved(unserved),
        )

    def _unserved(self, perplexities: Sequence[Perplexity]) -> Unserved:
        sums = self._unserved_sums
        total: dict[int, OverlapSums] = {}
        for found in self._overlaps.values():
            total = add_overlaps(total, found)
        by_layer = [(None, total), *sorted(self._overlaps.items())]
        return Unserved(
            arithmetic=self._dtype,
            mean=score(None, sum(sums.values(), MetricSums())),
            layers=tuple(score(layer, sums[layer]) for layer in sorted(sums)),
            perplexities=tuple(perplexities),
            overlaps=tuple(
                OverlapAtK(layer, k, at.min_visible, at.queries, at.overlap / at.queries)
                for layer, found in by_layer
                for k, at in found.items()
            ),
        )


def _perplexity(selection: str, k: int | None, loss: float, sparse_fraction: float) -> Perplexity:
    return Perplexity(selection, k, loss, math.exp(min(loss, 700.0)), sparse_fraction)


def _typical(layers: Sequence[LayerScore]) -> int:
    """The layer of median KL over uniform."""
    ordered = sorted(layers, key=lambda score: score.kl_over_uniform or 0.0)
    layer = ordered[len(ordered) // 2].layer
    assert layer is not None, "per-layer scores carry their layer"
    return layer
