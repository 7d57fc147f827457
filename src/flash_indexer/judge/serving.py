"""Indexers as servers run them: index queries and keys in fewer bits than the training's.

    bf16             index_q and index_k rounded to bfloat16
    fp8              the Hadamard rotation over E, then e4m3 with one scale a row
    fp8_unrotated    e4m3 without the rotation

Scores are those of the rounded rows, i[t,s] = sum_j w[t,j] * ReLU(index_q^[t,j]·index_k^[s]), summed in float32; the
head weights stay as they are. A rotated row stands for the row itself: the products are the same but for the rounding.

Source: DeepSeek-V3.2-Exp's inference (2025): its indexer multiplies rotated e4m3 rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flash_indexer.judge.capture import WORKSPACE, chunk_scores, chunks
from flash_indexer.judge.metrics import VISIBLE_PER_K
from flash_indexer.models.capture import LayerCapture
from flash_indexer.ops import Selection, top_keys
from flash_indexer.ops.quantization import MOST_COLUMNS, dequantize, quantize, rotation_columns

ARITHMETICS = ("bf16", "fp8", "fp8_unrotated")
NAMES = {
    "bf16": "bfloat16", "fp8": "FP8 (e4m3, rotated)", "fp8_unrotated": "FP8 (e4m3, not rotated)",
}  # fmt: skip
"""For people: an arithmetic of ours, else the dtype of the model."""


@dataclass(frozen=True)
class OverlapSums:
    """Sum of |A ∩ B| / k over the `queries` queries that see at least `min_visible` keys; A and B: two top k."""

    queries: int
    min_visible: int
    overlap: float

    def __add__(self, other: OverlapSums) -> OverlapSums:
        if self.min_visible != other.min_visible:
            raise ValueError(
                f"OverlapSums: min_visible must agree to be added, got {self.min_visible} and {other.min_visible}; "
                "measure every part with the same min_visible"
            )
        return OverlapSums(self.queries + other.queries, self.min_visible, self.overlap + other.overlap)


def served(capture: LayerCapture, arithmetic: str) -> LayerCapture:
    """The capture with index_q and index_k as a server of this arithmetic rounds them, in their own dtypes.

    Raises:
        ValueError: no such arithmetic, or rows that can't be rotated.
    """
    check_arithmetic("served", arithmetic, capture.index_q.shape[-1])
    index_q, index_k = (_rounded(x, arithmetic) for x in (capture.index_q, capture.index_k))
    return replace(capture, index_q=index_q, index_k=index_k)


def check_arithmetic(op: str, arithmetic: str, width: int) -> None:
    """Raises ValueError, in the name of `op`, for an unknown arithmetic or rows of E = width that can't be rotated."""
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"{op}: serve must be one of {', '.join(ARITHMETICS)}, got {arithmetic!r}")
    if arithmetic == "fp8" and rotation_columns(width) != width:
        raise ValueError(
            f"{op}: serve 'fp8' rotates rows whose width, the index dim E, must be a power of two up to "
            f"{MOST_COLUMNS}, got {width}; use 'fp8_unrotated'"
        )


@torch.no_grad()
def overlap_sums(
    capture: LayerCapture,
    other: LayerCapture,
    *,
    ks: Sequence[int],
    min_visible: int = 0,
    workspace_bytes: int = WORKSPACE,
) -> dict[int, OverlapSums]:
    """How many keys two indexers of one layer both select: sums for each k, over the queries that masses at k count.

    Args:
        capture, other: the layer with one indexer's tensors, and with the other's.
        ks, min_visible, workspace_bytes: as in `flash_indexer.judge.metrics.layer_sums`.
    """
    sums: dict[int, OverlapSums] = {}
    for rows, keys, start, end in chunks(capture, workspace_bytes):
        scores = [chunk_scores(c, rows, keys, start, end) for c in (capture, other)]
        for k in sorted(ks):
            least = max(VISIBLE_PER_K * k, min_visible)
            row = end - start >= least
            if not bool(row.any()):
                continue
            both = [_members(top_keys(x[row], start[row], end[row], k), x.shape[1]) for x in scores]
            shared = float((both[0] & both[1]).sum(dtype=torch.float64)) / k
            found = OverlapSums(int(row.sum()), least, shared)
            sums[k] = sums[k] + found if k in sums else found
    return sums


def add_overlaps(a: Mapping[int, OverlapSums], b: Mapping[int, OverlapSums]) -> dict[int, OverlapSums]:
    """The sums of both parts, for each k that either has."""
    total = dict(a)
    for k, found in b.items():
        total[k] = total[k] + found if k in total else found
    return dict(sorted(total.items()))


def _rounded(x: Tensor, arithmetic: str) -> Tensor:
    if arithmetic == "bf16":
        return x.to(torch.bfloat16).to(x.dtype)
    return dequantize(quantize(x, rotation=arithmetic == "fp8"), x.dtype)


def _members(selection: Selection, num_keys: int) -> Tensor:
    """bool [R, C]: whether the query selected the key."""
    slots = selection.indices.long()
    chosen = torch.zeros(len(slots), num_keys + 1, dtype=torch.bool, device=slots.device)
    return chosen.scatter_(1, slots.masked_fill(slots < 0, num_keys), True)[:, :num_keys]
