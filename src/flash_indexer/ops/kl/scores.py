"""Index scores as a matrix, for inspection and for selecting tokens on short sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_indexer.intervals import check_intervals
from flash_indexer.ops.blockwise import compute_dtype, fill_unseen
from flash_indexer.ops.checks import check_dtypes, check_index_inputs, check_interval_tensors
from flash_indexer.ops.kl import torch_body


def indexer_scores(
    index_q: Tensor, index_k: Tensor, index_weights: Tensor, key_start: Tensor, key_end: Tensor
) -> Tensor:
    """i[t,s] = sum_j index_weights[t,j] * ReLU(index_q[t,j]·index_k[s]), -inf where unseen. Not differentiable.

    Args:
        index_q: [T, I, E]. index_k: [S, E]. index_weights: [T, I]. key_start, key_end: int32 [T].
        Dtypes as in `indexer_kl`.

    Returns:
        float32 [T, S] (float64 for float64 inputs): as large as it sounds, so pass a slice of the queries when S is
        large.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it is.

    Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1, equation 1.
    """
    T, S, _, _ = check_index_inputs("indexer_scores", index_q, index_k, index_weights)
    check_interval_tensors("indexer_scores", key_start, key_end, T, index_q.device)
    check_dtypes("indexer_scores", dict(index_q=index_q, index_k=index_k, index_weights=index_weights))
    check_intervals(key_start, key_end, S)
    with torch.no_grad(), torch.autocast(index_q.device.type, enabled=False):
        relu = index_q.new_empty(1, T, S, dtype=compute_dtype(index_q))
        scores, _ = torch_body.index_scores(index_q, index_k, index_weights, key_start, key_end, relu=relu)
        return fill_unseen(scores, key_start, key_end, -torch.inf)
