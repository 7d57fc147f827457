"""The indexer's loss over the selected keys: public function, custom operator, fake and autograd on one screen."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_indexer.ops import known
from flash_indexer.ops.blockwise import compute_dtype
from flash_indexer.ops.bodies import TORCH
from flash_indexer.ops.checks import check_selection_tensors, check_teacher_and_index, check_workspace
from flash_indexer.ops.kl.op import IndexerKL
from flash_indexer.ops.problem import LEAVES
from flash_indexer.ops.sparse.learning import Learner, mean_weight, runs_of_rows
from flash_indexer.ops.sparse.problem import SparseProblem
from flash_indexer.ops.sparse.selection import Selection
from flash_indexer.ops.sparse.stages import sparse_target

_NAME = "flash_indexer::sparse_indexer_kl"


def sparse_indexer_kl(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    selection: Selection,
    *,
    softmax_scale: float,
    lse: Tensor | None = None,
    token_weight: Tensor | None = None,
    deterministic: bool = True,
    workspace_bytes: int = 512 * 2**20,
) -> IndexerKL:
    """loss = sum_t token_weight[t] * KL(p[t,:] || softmax over S_t of i[t,:]), over the selected keys alone.

        a[t,h,:] = softmax over S_t of scale * q[t,h]·k[s,g(h)]
        p[t,s]   = sum_h a[t,h,s] / sum_{s in S_t} sum_h a[t,h,s]
        i[t,s]   = sum_j index_weights[t,j] * ReLU(index_q[t,j]·index_k[s])

    For a model that is frozen: no attention backward runs, and q and k are constants. The gradients of index_q, index_k
    and index_weights are computed with the loss; backward only scales them, in place, so it may run once. An untrained
    indexer learns nothing here but its own ranking: warm it up with `indexer_kl` first.

    Args:
        q: [T, H, D]. k: [S, G, D], H % G == 0. index_q: [T, I, E]. index_k: [S, E]. index_weights: [T, I].
        selection: of the T queries, as in `sparse_attention`. Its scores are not read: i is formed from the arguments.
        softmax_scale: the model's own softmax scale.
        lse: [T, H], natural logarithm, over the selected keys: what `sparse_attention` returns. A dense model's, over
            all keys, would weigh heads wrongly. None computes it.
        token_weight: [T]; None means 1/n for the n queries that have a key.
        deterministic: True gives the same gradient of index_k to the bit every time.
        workspace_bytes: bound on the memory for gathered keys and scores; one query at least is processed.

    Dtypes as in `indexer_kl`.

    Returns:
        loss: scalar, differentiable in index_q, index_k and index_weights. kl: [T], nats, 0 for a query without keys.
        entropy: -sum_s p log p, [T]; log(count) - entropy is the uniform prediction's KL.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it is.

    Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1, sparse training stage; docs/math.md.
    """
    op = "sparse_indexer_kl"
    tensors = dict(
        q=q, k=k, index_q=index_q, index_k=index_k, index_weights=index_weights, lse=lse, token_weight=token_weight
    )
    check_teacher_and_index(op, tensors, "mean", softmax_scale)
    check_selection_tensors(op, *selection, q)
    check_workspace(op, workspace_bytes)
    leaves = index_q, index_k, index_weights
    needs = [torch.is_grad_enabled() and x.requires_grad for x in leaves]
    loss, kl, entropy, *_ = sparse_kl_op(
        q, k, *leaves, *selection, lse, token_weight, float(softmax_scale), False, deterministic, workspace_bytes, needs
    )
    return IndexerKL(loss, kl, entropy)


def _op(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    indices: Tensor,
    count: Tensor,
    scores: Tensor,
    lse: Tensor | None,
    token_weight: Tensor | None,
    softmax_scale: float,
    scores_are_known: bool,
    deterministic: bool,
    workspace_bytes: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, kl, entropy and a gradient for each of LEAVES, empty where not wanted."""
    selection, leaves = Selection(indices, count, scores), (index_q, index_k, index_weights)
    weight = mean_weight(selection).to(compute_dtype(q)) if token_weight is None else token_weight
    learner = Learner(
        leaves, selection, weight, (needs[0], needs[1], needs[2]), scores_are_known, deterministic, workspace_bytes
    )
    problem = SparseProblem(q, k, None, selection, softmax_scale, q.shape[2], deterministic, workspace_bytes)
    sums = learner.new_sums()
    for rows in runs_of_rows(selection, workspace_bytes):
        tiles = learner.ahead(rows)
        learner.learn(rows, sparse_target(problem.rows(rows), None if lse is None else lse[rows]), sums, tiles)
    a, b, c = (
        leaf.new_empty(0) if gradient is None else gradient.to(leaf.dtype)
        for leaf, gradient in zip(leaves, sums.gradients, strict=True)
    )
    return weight.to(sums.kl.dtype) @ sums.kl, sums.kl, sums.entropy, a, b, c


_INPUTS = tuple(inspect.signature(_op).parameters)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = dict(zip(_INPUTS, arguments, strict=True))
    q, dtype = x["q"], compute_dtype(x["q"])
    kl = q.new_empty(q.shape[:1], dtype=dtype)
    a, b, c = (
        torch.empty_like(x[name], memory_format=torch.contiguous_format) if need else x[name].new_empty(0)
        for name, need in zip(LEAVES, x["needs"], strict=True)
    )
    return q.new_empty((), dtype=dtype), kl, kl.new_empty(kl.shape), a, b, c


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.wanted = dict(zip(LEAVES, dict(zip(_INPUTS, inputs, strict=True))["needs"], strict=True))
    known.save(ctx, "sparse_indexer_kl", TORCH, output[3:])


def _backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradients = dict(zip(LEAVES, known.backward(ctx, d_loss), strict=True))
    return tuple(gradients[name] if ctx.wanted.get(name) else None for name in _INPUTS)


# not torch.library.custom_op, whose first call imports torch._dynamo: seconds in which nothing is computed
torch.library.define(_NAME, torch.library.infer_schema(_op, mutates_args=()))
torch.library.impl(_NAME, "default", _op)
torch.library.register_fake(_NAME, _fake)
torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
sparse_kl_op = torch.ops.flash_indexer.sparse_indexer_kl.default
"""loss, kl, entropy and gradients of checked arguments, in the order of `_op`."""
