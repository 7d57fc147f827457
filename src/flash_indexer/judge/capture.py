"""What one layer's attention saw, and its scores for a chunk of query rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from flash_indexer.models.capture import LayerCapture
from flash_indexer.ops import indexer_scores, teacher_scores
from flash_indexer.ops.blockwise import plan_chunks

WORKSPACE = 512 * 2**20
_TILES = 6


def chunks(capture: LayerCapture, workspace_bytes: int) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Query rows, the keys that they see, and their intervals counted from the first of those keys."""
    key_start, key_end = capture.key_start, capture.key_end
    for begin, stop, first, last in plan_chunks(
        key_start, key_end, _TILES, capture.lse.element_size(), workspace_bytes
    ):
        rows = slice(begin, stop)
        start, end = ((x[rows] - first).clamp(0, last - first) for x in (key_start, key_end))
        yield rows, slice(first, last), start, end


def chunk_teacher(capture: LayerCapture, rows: slice, keys: slice, start: Tensor, end: Tensor) -> Tensor:
    """Head-summed attention [R, C], not divided by its row sum, 0 where unseen."""
    q, k, lse = capture.q[rows], capture.k[keys], capture.lse[rows]
    return teacher_scores(q, k, lse, start, end, softmax_scale=capture.softmax_scale, softcap=capture.softcap)


def chunk_scores(capture: LayerCapture, rows: slice, keys: slice, start: Tensor, end: Tensor) -> Tensor:
    """Index scores [R, C], -inf where unseen."""
    index_q, index_k, weights = capture.index_q[rows], capture.index_k[keys], capture.index_weights[rows]
    return indexer_scores(index_q, index_k, weights, start, end)
