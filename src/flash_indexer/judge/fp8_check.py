"""What FP8 changes in the training and in the selection of a model's indexers, layer by layer.

    variant             index_q, index_k    q, k             logsumexp
    index               rotated, e4m3       as given         the model's
    index_unrotated     e4m3                as given         the model's
    teacher             as given            rotated, e4m3    of the e4m3 logits
    teacher_unrotated   as given            e4m3             of the e4m3 logits
    teacher_model_lse   as given            rotated, e4m3    the model's
    both                rotated, e4m3       rotated, e4m3    of the e4m3 logits

Each variant is `flash_indexer.indexer_kl` with these index_dtype, teacher_dtype and lse, beside it without any.

Source: DeepSeek-V3.2-Exp's inference (2025): rotated e4m3 rows in the indexer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from flash_indexer.indexer import LightningIndexer
from flash_indexer.judge.batches import batch_tensors
from flash_indexer.judge.metrics import layer_sums
from flash_indexer.judge.serving import check_arithmetic, overlap_sums, served
from flash_indexer.judge.teacher_check import head_errors
from flash_indexer.models.capture import LayerCapture
from flash_indexer.ops import indexer_kl
from flash_indexer.ops.quantization import dequantize, quantize

if TYPE_CHECKING:
    from flash_indexer.models.attach import IndexerHandle, LayerCapture

LARGEST_ERROR = 1e-2
"""Of a row's sum of the teacher's probabilities: beyond it the check fails."""
KS = (64, 128, 256, 512, 1024, 2048)
GRADIENTS = ("index_q", "index_k", "index_weights")
VARIANTS = {
    "index": ("fp8", None, True),
    "index_unrotated": ("fp8_unrotated", None, True),
    "teacher": (None, "fp8", False),
    "teacher_unrotated": (None, "fp8_unrotated", False),
    "teacher_model_lse": (None, "fp8", True),
    "both": ("fp8", "fp8", False),
}
"""index_dtype, teacher_dtype, and whether the model's own logsumexp is given."""


class Gradient(NamedTuple):
    """One gradient beside that without FP8: cosine of the angle between them, and ratio of their lengths."""

    cosine: float
    length: float


@dataclass(frozen=True)
class Variant:
    """Mean KL over the queries that see a key, nats, and the gradients of that mean, by the names of GRADIENTS."""

    kl: float
    gradients: Mapping[str, Gradient]

    @property
    def least_cosine(self) -> float:
        """Of the three gradients."""
        return min(gradient.cosine for gradient in self.gradients.values())

    @property
    def worst_length(self) -> float:
        """The ratio of lengths that is farthest from 1."""
        return max((gradient.length for gradient in self.gradients.values()), key=lambda x: abs(x - 1))


@dataclass(frozen=True)
class SelectionAtK:
    """The k keys of index scores in FP8 beside those without, over the `queries` queries that see 4k keys or more.

    overlap, overlap_unrotated: the part of the k keys that both select, with and without the rotation. tied_rows: of
    the tie_queries queries that see more than k keys, those with equal FP8 scores at rank k and k + 1;
    tied_rows_before: without FP8.
    """

    k: int
    queries: int
    overlap: float
    overlap_unrotated: float
    tie_queries: int
    tied_rows: int
    tied_rows_before: int


@dataclass(frozen=True)
class LayerFP8:
    """One layer. kl: without FP8, nats.

    row_errors: for each head max over t of |sum_s a[t,h,s] - 1| with logits of rotated FP8 rows and the model's own
    logsumexp.
    """

    layer: int
    kl: float
    variants: Mapping[str, Variant]
    selections: tuple[SelectionAtK, ...]
    row_errors: tuple[float, ...]

    @property
    def row_error(self) -> float:
        """The largest; NaN where one is."""
        return max(self.row_errors, key=lambda error: math.inf if math.isnan(error) else error)

    def change(self, variant: str) -> float:
        """KL of a variant over the KL without FP8, minus 1; 0 where both are 0, as where every query sees one key."""
        kl = self.variants[variant].kl
        return kl / self.kl - 1 if self.kl else (0.0 if kl == self.kl else math.inf)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts, ready for json.dump."""
        variants = {
            name: {"kl": v.kl, "gradients": {n: gradient._asdict() for n, gradient in v.gradients.items()}}
            for name, v in self.variants.items()
        }
        selections = [asdict(selection) for selection in self.selections]
        return {
            "layer": self.layer, "kl": self.kl, "variants": variants, "selections": selections,
            "row_errors": list(self.row_errors), "row_error": self.row_error,
        }  # fmt: skip


def fp8_check(handle: IndexerHandle, batch: Mapping[str, Tensor], *, ks: Sequence[int] = KS) -> tuple[LayerFP8, ...]:
    """Runs the model over a batch, and measures each attached layer.

    Args:
        handle: the attached model.
        batch: input_ids and position_ids, int64 [B, L]; position_ids restart at 0 at a document's first token.
        ks: sizes of the selections that are compared; one at which no query sees 4k keys is left out.

    Raises:
        KeyError: for a batch without input_ids or position_ids.
        ValueError: for an empty or padded batch, an index dim that can't be rotated, or a KL that is not finite.
    """
    for indexer in handle.indexers.values():
        check_arithmetic("fp8_check", "fp8", cast(LightningIndexer, indexer).head_dim)
    layers: list[LayerFP8] = []

    def measure(capture: LayerCapture) -> None:
        if capture.sinks is not None or capture.softcap is not None:
            raise ValueError(
                f"fp8_check: attention must have no sinks and no softcap, got layer {capture.layer} of one with them: "
                "the FP8 logits' own logsumexp leaves them out; check without --fp8"
            )
        layers.append(layer_fp8(capture, handle.target, ks))

    input_ids, position_ids = batch_tensors(batch, next(handle.model.parameters()).device)
    with torch.no_grad(), handle.using(measure):
        handle.decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    return tuple(sorted(layers, key=lambda found: found.layer))


def layer_fp8(capture: LayerCapture, target: str, ks: Sequence[int]) -> LayerFP8:
    """The measurement of one layer; errors as `fp8_check`'s."""
    own = None if target == "sum_logits" else capture.lse
    kl, before = _kl_and_gradients(capture, target, own)
    _check_finite(capture.layer, kl)
    variants = {}
    for name, (index_dtype, teacher_dtype, model_lse) in VARIANTS.items():
        kl_fp8, gradients = _kl_and_gradients(capture, target, own if model_lse else None, index_dtype, teacher_dtype)
        _check_finite(capture.layer, kl_fp8)
        pairs = zip(GRADIENTS, gradients, before, strict=True)
        variants[name] = Variant(kl_fp8, {n: _compared(gradient, base) for n, gradient, base in pairs})
    q, k = (dequantize(quantize(x, rotation=True), x.dtype) for x in (capture.q, capture.k))
    errors = tuple(head_errors(replace(capture, q=q, k=k)))
    return LayerFP8(capture.layer, kl, variants, _selections(capture, ks), errors)


def _kl_and_gradients(
    capture: LayerCapture,
    target: str,
    lse: Tensor | None,
    index_dtype: str | None = None,
    teacher_dtype: str | None = None,
) -> tuple[float, list[Tensor]]:
    """Mean KL, and its gradients as the operator gives them, in float64."""
    leaves = [x.detach().clone() for x in (capture.index_q, capture.index_k, capture.index_weights)]
    with torch.enable_grad():
        loss = indexer_kl(
            capture.q, capture.k, *(x.requires_grad_() for x in leaves), softmax_scale=capture.softmax_scale,
            key_start=capture.key_start, key_end=capture.key_end, lse=lse, target=target,
            index_dtype=index_dtype, teacher_dtype=teacher_dtype,
        ).loss  # fmt: skip
        loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), [cast(Tensor, x.grad).double() for x in leaves]


def _check_finite(layer: int, kl: float) -> None:
    if not math.isfinite(kl):
        raise ValueError(
            f"fp8_check: the KL of layer {layer} is {kl}; its indexer's weights, or the model's activations, are not "
            "finite: go back to an earlier checkpoint"
        )


def _compared(gradient: Tensor, before: Tensor) -> Gradient:
    """Two gradients of zeros are equal; beside one of zeros another has no direction in common with it."""
    lengths = float(gradient.norm()), float(before.norm())
    if not all(lengths):
        return Gradient(*((1.0, 1.0) if lengths[0] == lengths[1] else (0.0, math.inf if lengths[0] else 0.0)))
    return Gradient(float((gradient * before).sum()) / (lengths[0] * lengths[1]), lengths[0] / lengths[1])


def _selections(capture: LayerCapture, ks: Sequence[int]) -> tuple[SelectionAtK, ...]:
    rotated, unrotated = served(capture, "fp8"), served(capture, "fp8_unrotated")
    shared, shared_unrotated = (overlap_sums(capture, other, ks=ks) for other in (rotated, unrotated))
    measured = list(shared)
    ties, ties_before = (layer_sums(c, ks=measured).ties for c in (rotated, capture)) if measured else ({}, {})
    return tuple(
        SelectionAtK(
            k, at.queries, at.overlap / at.queries, shared_unrotated[k].overlap / at.queries,
            ties[k].queries, ties[k].tied_rows, ties_before[k].tied_rows,
        )
        for k, at in sorted(shared.items())
    )  # fmt: skip
