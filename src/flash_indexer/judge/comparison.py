"""A sparse stage judged: dense attention, sparse before the training and sparse after it, on the same held-out tokens.

Perplexities are compared token by token: nats of a variant minus nats of the untouched dense model. The error bar is
that of a ratio of sums over sequences, which hold tokens that go together:

    mean = sum_s D_s / N,    error = sqrt(n / (n - 1) * sum_s (D_s - mean * N_s)^2) / N

D_s: summed difference of sequence s, N_s its predicted tokens, N their number, n sequences.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from flash_indexer.judge.batches import TokenLosses, batch_tensors, token_losses
from flash_indexer.judge.metrics import MetricSums, layer_sums
from flash_indexer.judge.needle import Needle, NeedleScore, needle_scores
from flash_indexer.judge.selections import SINK
from flash_indexer.models.attach import IndexerHandle
from flash_indexer.models.capture import LayerCapture
from flash_indexer.models.own_sparse import make_sparse
from flash_indexer.models.sparse import SparseHandle
from flash_indexer.ops import Selection

DENSE, BEFORE, AFTER, CONTROL = "dense", "sparse before", "sparse after", "dense after"


@dataclass(frozen=True)
class Measures:
    """One model and its indexers over all batches.

    dense, sparse: losses with dense attention, and on the selected keys. sums: KL over all keys, mass and ties at K of
    each layer, in the dense model. kl: mean KL over the selected keys of each layer, in the sparse one. chosen: of each
    batch and layer a number for each query's selection, equal where selections are. full: queries that see more than K.
    """

    topk: int
    dense: TokenLosses
    sparse: TokenLosses
    sums: Mapping[int, MetricSums]
    kl: Mapping[int, float]
    chosen: Sequence[Mapping[int, Tensor]]
    full: Sequence[Tensor]
    needles: tuple[Sequence[NeedleScore], Sequence[NeedleScore]] = ((), ())
    """Of the dense model and of the sparse one."""


@dataclass(frozen=True)
class Loss:
    """Mean nats of a variant on tokens whose place in their document is at least `begin` and below `end` (None: any).

    difference: to the untouched dense model, with its standard error; None where there is one sequence.
    """

    variant: str
    begin: int
    end: int | None
    tokens: int
    nats: float
    perplexity: float
    difference: float
    error: float | None


@dataclass(frozen=True)
class LayerChange:
    """One layer, before and after; layer None: the mean over layers. None: no query sees keys enough to measure it.

    mass: attention that the K selected keys hold; kl: over the selected keys; changed: part of the queries that see
    more than K keys whose selection is another one; tied: their part whose K-th score equals the next, after.
    """

    layer: int | None
    mass_before: float | None
    mass_after: float | None
    mass_oracle: float | None
    kl_before: float
    kl_after: float
    changed: float | None
    tied: float | None


@dataclass(frozen=True)
class Comparison:
    """What a sparse stage changed at K = topk."""

    topk: int
    losses: tuple[Loss, ...]
    layers: tuple[LayerChange, ...]
    mean: LayerChange
    needles: Mapping[str, tuple[NeedleScore, ...]] = field(default_factory=dict)
    """Of each variant; empty where none were asked for."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def overall(self, variant: str) -> Loss:
        """The variant's loss over all tokens."""
        return next(x for x in self.losses if x.variant == variant and x.begin == 0 and x.end is None)


def measure(
    dense: IndexerHandle,
    batches: Sequence[Mapping[str, Tensor]],
    topk: int,
    documents: Sequence[Needle] = (),
    keys: str = "indexer",
) -> Measures:
    """Runs a model over the batches, dense and on `topk` keys a query. The handle is removed, and the model left dense.

    Args:
        dense: what `attach` or `load_native` gave. batches: as in `flash_indexer.judge.evaluation.evaluate`.
        documents: those of `flash_indexer.judge.needle.needles` to be scored as well.
        keys: whose keys the sparse model attends to, one of `flash_indexer.models.oracle.KEYS`.
    """
    model = dense.model
    device = next(model.parameters()).device
    inputs = [batch_tensors(batch, device) for batch in batches]
    if not inputs:
        raise ValueError("measure: batches must hold at least one batch, got none; is the held-out text too short?")
    sums: dict[int, MetricSums] = {}

    def add(capture: LayerCapture) -> None:
        found = layer_sums(capture, ks=(topk,), sink=min(SINK, topk))
        sums[capture.layer] = sums.get(capture.layer, MetricSums()) + found

    model.train(False)
    with dense.using(add):
        whole = _joined([token_losses(model, *pair) for pair in inputs])
    with dense.using(lambda capture: None):
        found_dense = needle_scores(model, documents)
    handle = make_sparse(dense, topk)
    handle.keys = keys
    handle.indexers.train(False)
    kl, chosen, losses = dict.fromkeys(handle.layers, 0.0), list[dict[int, Tensor]](), []
    for pair in inputs:
        chosen.append(_watched(handle))
        losses.append(token_losses(model, *pair))
        for layer, found in handle.losses().items():
            kl[layer] += float(found.kl) * pair[0].numel() / sum(ids.numel() for ids, _ in inputs)
    handle.on_selection = None
    found_sparse = needle_scores(model, documents)
    handle.remove()
    full = [(positions >= topk).flatten().cpu() for _, positions in inputs]
    return Measures(topk, whole, _joined(losses), sums, kl, chosen, full, (found_dense, found_sparse))


def compare(before: Measures, after: Measures) -> Comparison:
    """The same batches and K, with the model and the indexers before the training and after it."""
    if before.topk != after.topk or not torch.equal(before.dense.position, after.dense.position):
        raise ValueError("compare: both must be measured on the same batches and topk; measure them again")
    base = before.dense
    variants = {DENSE: base, BEFORE: before.sparse, AFTER: after.sparse, CONTROL: after.dense}
    ranges = [(0, None), *_ranges(before.topk, int(base.position.max()))]
    losses = tuple(
        loss for begin, end in ranges for name, x in variants.items() if (loss := _loss(name, x, base, begin, end))
    )
    layers = tuple(_layer(layer, before, after) for layer in sorted(before.kl.keys() & after.kl.keys()))
    names = ("mass_before", "mass_after", "mass_oracle", "kl_before", "kl_after", "changed", "tied")
    mean = LayerChange(None, **{name: _mean([getattr(x, name) for x in layers]) for name in names})
    scores = dict(zip(variants, (*before.needles, after.needles[1], after.needles[0]), strict=True))
    found = {name: tuple(score) for name, score in scores.items() if score}
    return Comparison(before.topk, losses, layers, mean, found)


def paired_difference(difference: Tensor, sequence: Tensor) -> tuple[float, float | None]:
    """Mean of `difference` [n] and its standard error, of tokens in the sequences of these numbers [n]; the module's
    formula. None where there is one sequence.
    """
    tokens = torch.bincount(sequence).double()
    return paired_sums(torch.zeros_like(tokens).index_add_(0, sequence, difference.double()), tokens)


def paired_sums(sums: Tensor, tokens: Tensor) -> tuple[float, float | None]:
    """`paired_difference` of differences that are summed over each sequence already: [sequences], with the number of
    tokens of each. One without tokens doesn't count."""
    count, mean = int((tokens > 0).sum()), float(sums.sum() / tokens.sum())
    spread = float((sums - mean * tokens).square().sum())
    return mean, None if count < 2 else math.sqrt(count / (count - 1) * spread) / float(tokens.sum())


def _watched(handle: SparseHandle) -> dict[int, Tensor]:
    """Filled by the handle's next forward: of each layer a number for each query's selection."""
    found: dict[int, Tensor] = {}

    def look(layer: int, selection: Selection) -> None:
        slots = selection.indices.long()
        generator = torch.Generator().manual_seed(0)
        table = torch.randint(-(2**62), 2**62, (int(slots.max()) + 1,), generator=generator).to(slots.device)
        found[layer] = table[slots.clamp_min(0)].masked_fill(slots < 0, 0).sum(1).cpu()  # modulo 2^64

    handle.on_selection = look
    return found


def _joined(parts: Sequence[TokenLosses]) -> TokenLosses:
    """Sequences of several batches are numbered on."""
    begins = [0]
    for part in parts:
        begins.append(begins[-1] + (int(part.sequence.max()) + 1 if len(part.sequence) else 0))
    sequence = torch.cat([part.sequence + begin for part, begin in zip(parts, begins, strict=False)])
    joined = TokenLosses(torch.cat([x.nats for x in parts]), torch.cat([x.position for x in parts]), sequence)
    if not len(joined.nats) or not math.isfinite(total := float(joined.nats.sum())):
        raise ValueError(
            "measure: the model's loss must be finite, on at least one token to predict, got "
            f"{len(joined.nats)} tokens{'' if not len(joined.nats) else f' and {total}'}"
        )
    return joined


def _ranges(topk: int, last: int) -> list[tuple[int, int | None]]:
    """[0, K), [K, 2K), [2K, 4K), ... up to the last place in a document."""
    edges = [0, topk]
    while edges[-1] <= last:
        edges.append(2 * edges[-1])
    return [(begin, end) for begin, end in itertools.pairwise(edges) if begin <= last]


def _loss(variant: str, x: TokenLosses, base: TokenLosses, begin: int, end: int | None) -> Loss | None:
    inside = (x.position >= begin) & (x.position < (math.inf if end is None else end))
    if not bool(inside.any()):
        return None
    tokens, nats = int(inside.sum()), float(x.nats[inside].mean())
    mean, error = paired_difference((x.nats - base.nats)[inside], x.sequence[inside])
    return Loss(variant, begin, end, tokens, nats, math.exp(min(nats, 700.0)), mean, error)


def _layer(layer: int, before: Measures, after: Measures) -> LayerChange:
    masses = [x.sums[layer].at_k.get(x.topk) for x in (before, after)]
    held = [None if mass is None else mass.indexer / mass.queries for mass in masses]
    oracle = None if masses[1] is None else masses[1].oracle / masses[1].queries
    tie = after.sums[layer].ties.get(after.topk)
    full = torch.cat([*before.full])
    differ = torch.cat([a[layer] != b[layer] for a, b in zip(before.chosen, after.chosen, strict=True)])
    changed = float(differ[full].double().mean()) if bool(full.any()) else None
    tied = None if tie is None or not tie.queries else tie.tied_rows / tie.queries
    return LayerChange(layer, held[0], held[1], oracle, before.kl[layer], after.kl[layer], changed, tied)


def _mean(values: Sequence[float | None]) -> Any:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
