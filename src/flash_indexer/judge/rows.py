"""A block of query rows of one document: the model's attention and the indexer's prediction of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from flash_indexer.judge.scores import RowBlock
from flash_indexer.ops import indexer_scores, teacher_scores

if TYPE_CHECKING:
    from flash_indexer.models.attach import LayerCapture


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
    p = teacher_scores(q, k, lse, *bounds, softmax_scale=capture.softmax_scale, softcap=capture.softcap)
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
