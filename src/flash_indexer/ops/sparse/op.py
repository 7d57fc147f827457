"""Selecting keys and attending to them: public functions, custom operators, fakes and autograd on one screen."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_indexer.ops.blockwise import compute_dtype
from flash_indexer.ops.checks import (
    check_dtypes,
    check_index_inputs,
    check_interval_tensors,
    check_selection_tensors,
    check_sinks,
    check_sparse_attention,
    check_topk,
    check_workspace,
)
from flash_indexer.ops.recomputed import Recomputed
from flash_indexer.ops.sinks import sink_gradient
from flash_indexer.ops.sparse.problem import Needs, SparseProblem
from flash_indexer.ops.sparse.selection import Selection
from flash_indexer.ops.sparse.stages import forward_with_sinks, select_rows, sparse_backward

_SELECT = "flash_indexer::select_keys"
_ATTENTION, _GRADIENTS = "flash_indexer::sparse_attention", "flash_indexer::sparse_attention_gradients"
_LEAVES = ("q", "k", "v", "sinks")


class SparseAttention(NamedTuple):
    """Result of `sparse_attention`: the output to differentiate, and its logsumexp over the selected keys."""

    out: Tensor
    lse: Tensor


def select_keys(
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    *,
    key_start: Tensor,
    key_end: Tensor,
    topk: int,
    always: tuple[int, int] = (0, 0),
    workspace_bytes: int = 512 * 2**20,
) -> Selection:
    """S_t = the topk keys with the largest i[t,s] = sum_j index_weights[t,j] * ReLU(index_q[t,j]·index_k[s]).

    Among the visible keys key_start[t] <= s < key_end[t]; all of them where at most topk are visible. Of equal scores
    the lowest key wins, -0.0 equals +0.0. Exact for the scores that are computed, and these are the same bits on a
    device whatever the workspace is and whichever other rows are in the call. Not differentiable.

    Args:
        index_q: [T, I, E]. index_k: [S, E]. index_weights: [T, I]. Dtypes as in `indexer_kl`.
        key_start, key_end: int32 [T], non-decreasing.
        topk: 1 or more. K = min(topk, S).
        always: so many first and so many last (most recent) keys of a query's interval are selected whatever their
            score; they count among the topk.
        workspace_bytes: bound on the memory for scores; query rows are processed in chunks that fit, one at least.

    Returns:
        indices int32 [T, K], ascending, -1 behind the last; count int32 [T]; scores [T, K], float32 (float64 for
        float64 inputs), -inf behind the last. A query that sees a NaN score has NaN in its whole row of scores, and so
        in everything that is computed from its selection.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it is.

    Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1, equations 1 and 2.
    """
    op = "select_keys"
    T, _, _, _ = check_index_inputs(op, index_q, index_k, index_weights)
    check_interval_tensors(op, key_start, key_end, T, index_q.device)
    check_dtypes(op, dict(index_q=index_q, index_k=index_k, index_weights=index_weights))
    check_topk(op, topk, always)
    check_workspace(op, workspace_bytes)
    leaves = index_q.detach(), index_k.detach(), index_weights.detach()
    return Selection(*_select_keys(*leaves, key_start, key_end, topk, *always, workspace_bytes))


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    selection: Selection,
    *,
    softmax_scale: float,
    value_dim: int | None = None,
    sinks: Tensor | None = None,
    deterministic: bool = True,
    workspace_bytes: int = 512 * 2**20,
) -> SparseAttention:
    """out[t,h] = sum_{s in S_t} a[t,h,s] v[s,g(h)],  a[t,h,s] = exp(scale * q[t,h]·k[s,g(h)] - lse[t,h]).

    lse[t,h] = log(sum_{s in S_t} exp(scale * q[t,h]·k[s,g(h)]) + exp(sinks[h])), the natural logarithm, over the
    selected keys alone; without sinks a is the softmax over them.
    Backward forms a again from lse and may run more than once. Keys and values that a query did not select have no part
    in its result, whether they are finite or not.

    Args:
        q: [T, H, D]. k: [S, G, D], H % G == 0. v: [S, G, V], or None with value_dim=V: the values are k[..., :V] (MLA's
            absorbed form), and their gradient is part of k's.
        selection: of the T queries, as `select_keys` returns it: distinct keys from 0 to S - 1, ascending, in its first
            `count` slots. Checked on the CPU and wherever torch runs; a kernel skips a slot that is out of range.
        softmax_scale: the model's own softmax scale.
        sinks: [H], floating point and finite: a logit of each head that takes part in the softmax and has no value, as
            gpt-oss learns it; None for none. A query without keys gives its sink all the mass: out 0, lse sinks[h].
        deterministic: True gives the same gradients of k and v to the bit every time.
        workspace_bytes: bound on the memory for gathered keys, values and logits; one query at least is processed.

    Dtypes: on CUDA bfloat16; on the CPU float32 or float64 throughout. Sums over queries are taken in float32 (float64)
    and rounded once.

    Returns:
        out [T, H, V] in q's dtype, differentiable in q, k, v and sinks; lse [T, H], float32 (float64), not
        differentiable: zeros and -inf (or its sink) for a query without keys, NaN for one whose selection's scores are.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it is.

    Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1, equation 2; docs/math.md.
    """
    op = "sparse_attention"
    width = check_sparse_attention(op, q, k, v, value_dim, softmax_scale)
    check_selection_tensors(op, *selection, q)
    check_sinks(op, sinks, q)
    check_workspace(op, workspace_bytes)
    return SparseAttention(
        *_sparse_attention(q, k, v, *selection, sinks, float(softmax_scale), width, deterministic, workspace_bytes)
    )


def _select_op(
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    topk: int,
    first: int,
    last: int,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = index_q, index_k, index_weights
    return select_rows(leaves, key_start, key_end, topk, (first, last), workspace_bytes)


def _fake_select(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = dict(zip(inspect.signature(_select_op).parameters, arguments, strict=True))
    index_q, slots = x["index_q"], (x["index_q"].shape[0], min(x["topk"], x["index_k"].shape[0]))
    indices, count = (index_q.new_empty(size, dtype=torch.int32) for size in (slots, slots[:1]))
    return indices, count, index_q.new_empty(slots, dtype=compute_dtype(index_q))


def _attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    indices: Tensor,
    count: Tensor,
    scores: Tensor,
    sinks: Tensor | None,
    softmax_scale: float,
    value_dim: int,
    deterministic: bool,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    selection = Selection(indices, count, scores)
    problem = SparseProblem(q, k, v, selection, softmax_scale, value_dim, deterministic, workspace_bytes)
    return forward_with_sinks(problem, sinks)


def _fake_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    x = dict(zip(_INPUTS, arguments, strict=True))
    q = x["q"]
    return q.new_empty(*q.shape[:2], x["value_dim"]), q.new_empty(q.shape[:2], dtype=compute_dtype(q))


def _backward(values: Mapping[str, Any], d_out: Tensor, wanted: list[bool]) -> Sequence[Tensor]:
    gradients: Sequence[Tensor] = torch.ops.flash_indexer.sparse_attention_gradients.default(
        d_out=d_out, needs=wanted, **values
    )
    return gradients


def _gradient_op(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    indices: Tensor,
    count: Tensor,
    scores: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    value_dim: int,
    deterministic: bool,
    workspace_bytes: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sinks, rounded once; empty where not in `needs`."""
    selection = Selection(indices, count, scores)
    problem = SparseProblem(q, k, v, selection, softmax_scale, value_dim, deterministic, workspace_bytes)
    made = sparse_backward(problem, d_out, out, lse, Needs(needs[0], needs[1], needs[2], False))
    dq, dk, dv = (
        like.new_empty(0) if x is None else x.to(like.dtype)
        for x, like in zip((made.dq, made.dk, made.dv), (q, k, k), strict=True)
    )
    if sinks is None or not needs[3]:
        return dq, dk, dv, (lse if sinks is None else sinks).new_empty(0)
    return dq, dk, dv, sink_gradient(d_out, out, lse, sinks, workspace_bytes)


def _fake_gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = dict(zip(inspect.signature(_gradient_op).parameters, arguments, strict=True))
    likes = x["q"], x["q"], x["q"], x["lse"] if x["sinks"] is None else x["sinks"]
    a, b, c, d = (
        like.new_empty(x[name].shape if need else 0)
        for name, like, need in zip(_LEAVES, likes, x["needs"], strict=True)
    )
    return a, b, c, d


_INPUTS = tuple(inspect.signature(_attention_op).parameters)
_AUTOGRAD = Recomputed(
    op="sparse_attention",
    inputs=_INPUTS,
    outputs=("out", "lse"),
    saved=(*_LEAVES, "indices", "count", "scores", "out", "lse"),
    constants=("softmax_scale", "value_dim", "deterministic", "workspace_bytes"),
    gradients=_backward,
    result="out",
    leaves=_LEAVES,
)

# not torch.library.custom_op, whose first call imports torch._dynamo: seconds in which nothing is computed
torch.library.define(_SELECT, torch.library.infer_schema(_select_op, mutates_args=()))
torch.library.impl(_SELECT, "default", _select_op)
torch.library.register_fake(_SELECT, _fake_select)
torch.library.define(_ATTENTION, torch.library.infer_schema(_attention_op, mutates_args=()))
torch.library.impl(_ATTENTION, "default", _attention_op)
torch.library.register_fake(_ATTENTION, _fake_attention)
torch.library.register_autograd(_ATTENTION, _AUTOGRAD.backward, setup_context=_AUTOGRAD.setup_context)
torch.library.define(_GRADIENTS, torch.library.infer_schema(_gradient_op, mutates_args=()))
torch.library.impl(_GRADIENTS, "default", _gradient_op)
torch.library.register_fake(_GRADIENTS, _fake_gradients)
_select_keys = torch.ops.flash_indexer.select_keys.default
_sparse_attention = torch.ops.flash_indexer.sparse_attention.default
