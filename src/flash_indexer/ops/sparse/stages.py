"""The sparse stage's steps, for whoever owns the loop over rows and ranks. None knows autograd or a process group.

    select_rows             Selection of the K keys of largest score      index_q, index_k, index_weights, intervals
    attended_rows           Selection of the K keys of largest attention  q, k, intervals
    sparse_forward          out, lse                                      SparseProblem; with sinks: forward_with_sinks
    sparse_backward         dq, sums dk and dv, p_sum                     SparseProblem, d_out, out, lse
    sparse_target           p_sum alone, where no backward runs           SparseProblem, lse or None
    sparse_index_scores     i[t,s] at the selected keys                   leaves, Selection
    sparse_kl_rows          kl, entropy, di                               p_sum, scores, count, token_weight
    sparse_index_gradients  d_index_q, sum d_index_k, d_index_weights     di, leaves, Selection

Every step takes any run of query rows (`SparseProblem.rows`, `Selection.rows`) with all keys. What belongs to a query
is written; what belongs to a key (dk, dv, d_index_k) is a sum over queries in float32 (float64 for float64 inputs),
added to buffers that the caller has zeroed, so that runs of rows, and ranks, add up before anything is rounded. p_sum,
the probabilities summed over this process's heads and not divided by their row sum, is where ranks that share out heads
put their sum.

Contract of slots: only the first count[t] slots of a row are read. Behind them outputs hold p_sum = 0, scores = -inf
and di = 0. Keys and values that a query did not select have no part in its results, finite or not. In torch, on any
device, the contents of a selection are checked; a kernel skips a slot whose index is not from 0 to S - 1.

A GPU body (gpu_body.py gathers keys, gpu_bits.py takes dense tiles) has some of these functions, as torch_select,
torch_attention and torch_index have them:

    select(index_q, index_k, index_weights, key_start, key_end, topk, always, workspace_bytes) -> Selection
    attended(q, k, key_start, key_end, topk, softmax_scale, workspace_bytes) -> Selection
    forward(problem) -> out, lse
    target(problem, lse | None) -> p_sum
    backward(problem, d_out, out, lse, needs, sums) -> dq | None, p_sum | None          adds to sums.dk, sums.dv
    index_scores(leaves, selection, workspace_bytes) -> scores
    kl_rows(p_sum, scores, count, token_weight) -> kl, entropy, di
    index_gradients(di, leaves, selection, needs, d_index_k | None, deterministic, workspace_bytes)
        -> d_index_q | None, d_index_weights | None                                     adds to d_index_k
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.intervals import check_intervals
from flash_indexer.kernels.sm_90.sizes import BITS_WIDTHS
from flash_indexer.ops import bodies
from flash_indexer.ops.blockwise import compute_dtype
from flash_indexer.ops.bodies import TORCH
from flash_indexer.ops.sinks import share_beside_sinks
from flash_indexer.ops.sparse import (
    gpu_bits,
    gpu_body,
    gpu_index,
    gpu_select,
    torch_attended,
    torch_attention,
    torch_index,
    torch_select,
)
from flash_indexer.ops.sparse.problem import KeySums, Leaves, Needs, SparseProblem, new_key_sums
from flash_indexer.ops.sparse.selection import Selection, check_selection


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


def select_rows(
    leaves: Leaves, key_start: Tensor, key_end: Tensor, topk: int, always: tuple[int, int], workspace_bytes: int
) -> Selection:
    """S_t of the queries, among the keys key_start[t] <= s < key_end[t]: see `select_keys`."""
    body = bodies.choose("select_keys", leaves[0].device, lambda: gpu_select.refusal(leaves))
    if body == TORCH:
        check_intervals(key_start, key_end, leaves[1].shape[0])
    step = torch_select.select if body == TORCH else gpu_select.select
    with torch.autocast(leaves[0].device.type, enabled=False):
        return step(*leaves, key_start, key_end, topk, always, workspace_bytes)


def attended_rows(
    q: Tensor, k: Tensor, key_start: Tensor, key_end: Tensor, topk: int, softmax_scale: float, workspace_bytes: int
) -> Selection:
    """The topk visible keys with the largest sum_h a[t,h,s], the attention over all visible keys summed over heads."""
    body = bodies.choose("select_keys", q.device, lambda: gpu_select.attended_refusal(q, softmax_scale))
    if body == TORCH:
        check_intervals(key_start, key_end, k.shape[0])
    step = torch_attended.attended if body == TORCH else gpu_select.attended
    with torch.autocast(q.device.type, enabled=False):
        return step(q, k, key_start, key_end, topk, softmax_scale, workspace_bytes)


def sparse_forward(problem: SparseProblem) -> tuple[Tensor, Tensor]:
    """out [T, H, V] in q's dtype and lse [T, H]: zeros and -inf for a query without keys, NaN where its scores are."""
    bits = _in_tiles(problem)
    body = _choose(problem, lambda: gpu_bits.refusal(problem) if bits else gpu_body.forward_refusal(problem))
    step = torch_attention.forward if body == TORCH else gpu_bits.forward if bits else gpu_body.forward
    with torch.autocast(problem.q.device.type, enabled=False):
        return step(problem)


def forward_with_sinks(problem: SparseProblem, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """out and lse of `sparse_forward`, with sinks [H] where there are some: what `sparse_backward` takes."""
    out, lse = sparse_forward(problem)
    if sinks is None:
        return out, lse
    share, whole = share_beside_sinks(lse, sinks)
    return out.mul_(share[..., None]), whole


def sparse_target(problem: SparseProblem, lse: Tensor | None) -> Tensor:
    """p_sum[t,s] = sum_h exp(scale * q[t,h]·k[s,g(h)] - lse[t,h]) at the selected keys: [T, K].

    lse: [T, H], over the selected keys; None computes it.
    """
    bits = _in_tiles(problem)
    body = _choose(problem, lambda: gpu_bits.refusal(problem) if bits else gpu_body.refusal())
    with torch.autocast(problem.q.device.type, enabled=False):
        return torch_attention.target(problem, lse) if body == TORCH else gpu_bits.target(problem, lse)


def sparse_backward(
    problem: SparseProblem, d_out: Tensor, out: Tensor, lse: Tensor, needs: Needs, sums: KeySums | None = None
) -> SparseGradients:
    """The gradients of q, k, v under d_out [T, H, V], and p_sum of the same probabilities.

    Args:
        out, lse: what `sparse_forward` returned. sums: buffers to add dk and dv to; None makes zeros.
    """
    bits = _in_tiles(problem)
    body = _choose(problem, lambda: gpu_bits.refusal(problem) if bits else gpu_body.backward_refusal(problem, needs))
    sums = new_key_sums(problem, needs) if sums is None else sums
    step = torch_attention.backward if body == TORCH else gpu_bits.backward if bits else gpu_body.backward
    with torch.autocast(problem.q.device.type, enabled=False):
        dq, p_sum = step(problem, d_out, out, lse, needs, sums)
    return SparseGradients(dq, sums.dk, sums.dv, p_sum)


def sparse_index_scores(leaves: Leaves, selection: Selection, workspace_bytes: int) -> Tensor:
    """i[t,s] = sum_j w[t,j] * ReLU(index_q[t,j]·index_k[s]) at the selected keys, -inf behind them: [T, K]."""
    body = bodies.choose("sparse_indexer_kl", leaves[0].device, lambda: gpu_index.refusal(leaves))
    if body == TORCH:
        check_selection(selection, leaves[1].shape[0])
    step = torch_index.index_scores if body == TORCH else gpu_index.index_scores
    with torch.autocast(leaves[0].device.type, enabled=False):
        return step(leaves, selection, workspace_bytes)


def sparse_kl_rows(p_sum: Tensor, scores: Tensor, count: Tensor, token_weight: Tensor) -> KLRows:
    """KL[t] = sum_{S_t} p (log p - log softmax(i)) with p = p_sum / its row sum, and di = (softmax(i) - p) * weight.

    Args:
        p_sum, scores: [T, K]. count: [T]. token_weight: [T].
    """
    body = bodies.choose("sparse_indexer_kl", p_sum.device, lambda: None)
    step = torch_index.kl_rows if body == TORCH else gpu_index.kl_rows
    return KLRows(*step(p_sum, scores, count, token_weight.to(p_sum.dtype)))


def count_index_tiles(leaves: Leaves, selection: Selection, *, deterministic: bool) -> gpu_index.Tiles | None:
    """What `sparse_index_gradients` would know of a selection that lies on the GPU; None where it needs nothing."""
    if leaves[0].device.type != "cuda":
        return None
    body = bodies.choose("sparse_indexer_kl", leaves[0].device, lambda: gpu_index.refusal(leaves))
    return None if body == TORCH else gpu_index.count_tiles(leaves, selection, deterministic)


def sparse_index_gradients(
    di: Tensor,
    leaves: Leaves,
    selection: Selection,
    needs: tuple[bool, bool, bool],
    *,
    d_index_k: Tensor | None = None,
    deterministic: bool = True,
    workspace_bytes: int = 512 * 2**20,
    tiles: gpu_index.Tiles | None = None,
) -> IndexGradients:
    """The gradients of index_q, index_k, index_weights from those of their scores, di [T, K].

    d_index_k: the buffer [S, E] to add to; None makes zeros where `needs` wants it. tiles: what `count_index_tiles`
    returned for this selection and `deterministic` before other work was launched; None does without.
    """
    body = bodies.choose("sparse_indexer_kl", di.device, lambda: gpu_index.refusal(leaves))
    if body == TORCH:
        check_selection(selection, leaves[1].shape[0])
    if d_index_k is None and needs[1]:
        d_index_k = torch.zeros(leaves[1].shape, dtype=compute_dtype(leaves[1]), device=di.device)
    with torch.autocast(di.device.type, enabled=False):
        arguments = di, leaves, selection, needs, d_index_k, deterministic, workspace_bytes
        if body == TORCH:
            d_index_q, d_weights = torch_index.index_gradients(*arguments)
        else:
            d_index_q, d_weights = gpu_index.index_gradients(*arguments, tiles)
    return IndexGradients(d_index_q, d_index_k, d_weights)


def _in_tiles(problem: SparseProblem) -> bool:
    """Whether kernels take dense tiles with a bit per (query, key), rather than gather keys: MLA's absorbed form alone
    has heads wide enough, and enough of them, for a gathered key."""
    return problem.v is not None or problem.k.shape[1] > 1 or problem.q.shape[2] <= BITS_WIDTHS[-1]


def _choose(problem: SparseProblem, refusal: Callable[[], str | None]) -> str:
    """The body of a step; in torch the selection's contents are checked first."""
    body = bodies.choose("sparse_attention", problem.q.device, refusal)
    if body == TORCH:
        check_selection(problem.selection, problem.k.shape[0])
    return body
