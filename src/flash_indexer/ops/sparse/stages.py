"""The sparse stage's steps, for whoever owns the loop over rows and ranks. None knows autograd or a process group.

    select           Selection of the K keys of largest score            index_q, index_k, index_weights, intervals
    sparse_forward   out, lse                                             SparseProblem
    sparse_backward  dq, sums dk and dv, p_sum                            SparseProblem, d_out, out, lse
    sparse_target    p_sum alone, where no backward runs                  SparseProblem, lse or None
    sparse_index_scores      i[t,s] at the selected keys                  leaves, Selection
    sparse_kl_rows           kl, entropy, di                              p_sum, scores, count, token_weight
    sparse_index_gradients   d_index_q, sum d_index_k, d_index_weights    di, leaves, Selection

Every step takes any run of query rows (`SparseProblem.rows`, `Selection.rows`) with all keys. What belongs to a query is
written; what belongs to a key (dk, dv, d_index_k) is a sum over queries in float32 (float64 for float64 inputs), added to
buffers that the caller has zeroed, so that runs of rows, and ranks, add up before anything is rounded. p_sum, the
probabilities summed over this process's heads and not divided by their row sum, is where ranks that share out heads put
their sum.

Contract of slots: only the first count[t] slots of a row are read. Behind them outputs hold p_sum = 0, scores = -inf and
di = 0. Keys and values that a query did not select have no part in its results, finite or not. On the CPU, and in torch
on any device, the contents of a selection are checked; a kernel skips a slot whose index is not from 0 to S - 1.

A GPU body (gpu_body.py) has functions of the same names and signatures as torch_select, torch_attention and torch_index:

    select(index_q, index_k, index_weights, key_start, key_end, topk, always, workspace_bytes) -> Selection
    forward(problem) -> out, lse
    backward(problem, d_out, out, lse, needs, sums) -> dq | None, p_sum | None       needs: of q, k, v, p_sum
    target(problem, lse | None) -> p_sum
    index_scores(leaves, selection, workspace_bytes) -> scores
    index_gradients(di, leaves, selection, needs, d_index_k | None, workspace_bytes) -> d_index_q | None, d_weights | None
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.ops import bodies
from flash_indexer.ops.blockwise import compute_dtype
from flash_indexer.ops.sparse import gpu_body, torch_attention, torch_index, torch_select
from flash_indexer.ops.sparse.problem import KeySums, Leaves, SparseProblem
from flash_indexer.ops.sparse.selection import Selection


class SparseGradients(NamedTuple):
    """dq [T, H, D] in q's dtype; dk, dv: the sums that were added to; p_sum [T, K]. None: not wanted."""

    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    p_sum: Tensor | None


class KLRows(NamedTuple):
    """KL and entropy of the target [T], and di [T, K] = token_weight * d KL / d scores."""

    kl: Tensor
    entropy: Tensor
    di: Tensor


class IndexGradients(NamedTuple):
    """d_index_q, d_index_weights in their input's dtype; d_index_k: the sum that was added to. None: not wanted."""

    d_index_q: Tensor | None
    d_index_k: Tensor | None
    d_index_weights: Tensor | None
