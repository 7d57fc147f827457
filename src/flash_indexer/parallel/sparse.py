"""`dsa_attention` on several processes: queries sharded and keys gathered, or heads sharded, or both.

    context     keys of all ranks are gathered; dk, dv, d_index_k, sums over all queries, go to the keys' owners
    tensor      p_sum is a sum over all heads, taken between the probabilities and the index gradients:

        run n of rows   probabilities, local heads | reduce-scatter of p_sum over rows | KL, index gradients, own rows
        run n + 1              probabilities, local heads | reduce-scatter ...

Gathered keys are not kept for backward, which gathers them again. Every rank selects for itself: the selection is a
function of the index tensors alone, the same bits on each rank of a tensor group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from flash_indexer.ops import (
    DSAAttention,
    KeySums,
    Learner,
    Needs,
    Selection,
    SparseProblem,
    SparseSettings,
    Sums,
    known_loss,
    new_key_sums,
    runs_of_rows,
    sparse_backward,
    sparse_forward,
    sparse_target,
)
from flash_indexer.ops.bodies import TORCH
from flash_indexer.ops.sparse.dsa_op import refuse_backward
from flash_indexer.parallel.context import by_owner, check_rows, in_order, piece_owners
from flash_indexer.parallel.groups import Group, all_gather, process_groups, reduce_scatter
from flash_indexer.parallel.loss import mean_weight, wanted

_CONTEXT, _TENSOR = "context_parallel_dsa_attention", "tensor_parallel_dsa_attention"


class Ranks(NamedTuple):
    """Who shares what. context: the ranks that hold the tokens, by piece `owners`; heads: those that hold the heads."""

    op: str
    context: ProcessGroup | None
    owners: list[int]
    heads: ProcessGroup | None

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all ranks in global order."""
        return x if self.context is None else in_order(all_gather(x.detach(), self.context), self.owners)

    def own(self, x: Tensor) -> Tensor:
        """The sum over ranks of x, of which each rank keeps the rows that it owns."""
        return x if self.context is None else reduce_scatter(by_owner(x, self.owners), self.context)()

    def over_heads(self, x: Tensor) -> Tensor:
        """The sum over the ranks that share the heads, in place."""
        if self.heads is not None:
            dist.all_reduce(x, group=self.heads)
        return x


def context_parallel_dsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    *,
    group: Group,
    layout: str = "zigzag",
    softmax_scale: float,
    key_start: Tensor,
    key_end: Tensor,
    topk: int,
    value_dim: int | None = None,
    always: tuple[int, int] = (0, 0),
    token_weight: Tensor | None = None,
    kl: str = "forward",
    kl_scale: Tensor | None = None,
    kl_out: Tensor | None = None,
    deterministic: bool = True,
    workspace_bytes: int = 512 * 2**20,
) -> DSAAttention:
    """`dsa_attention` of the tokens of all ranks, each rank holding some:

        out, lse, KL: this rank's queries, over the keys of all ranks
        loss = sum over ranks, sum_t token_weight[t] * KL[t], on every rank
        backward gives this rank's q, k, v and index tensors the derivatives of what all ranks compute

    The ranks' shares of the keys' gradients (k, v, index_k) are added in float32 and rounded once, at the owner.

    Args:
        q, index_q, index_weights, token_weight, kl_out: this rank's rows, [T_local, ...] as in `dsa_attention`.
        k, v, index_k: this rank's keys, sharded by the same layout, [S_local, ...]; as many on every rank.
        key_start, key_end: int32 [T_local], this rank's rows of the intervals; they count global keys.
        group: the ranks that share the sequence, as a process group or a mesh of one dimension. Or (context, tensor),
            where q, k and v also hold only this rank's heads: see `tensor_parallel_dsa_attention`.
        layout: "zigzag" or "contiguous", as in `context_positions`.
        token_weight: None means 1/n, n over all ranks.
        Else as in `dsa_attention`; the same options and upstream gradient of the loss on every rank. Every rank runs
        backward, whose collectives wait for each other.

    Returns:
        As `dsa_attention`: out, lse, kl and selection (of global keys) of this rank's rows, the loss of all.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it is.
    """
    settings = SparseSettings(
        softmax_scale, key_start, key_end, topk, value_dim, always, token_weight, kl, kl_scale, kl_out, deterministic,
        True, workspace_bytes,
    ).checked(_CONTEXT, q, k, v, (index_q, index_k, index_weights))  # fmt: skip
    context, *heads = process_groups(_CONTEXT, group, 2)
    owners = piece_owners(dist.get_world_size(context), layout, _CONTEXT)
    for name, x in (("q", q), ("k", k)):
        check_rows(_CONTEXT, name, x, owners)
    ranks = Ranks(_CONTEXT, context, owners, heads[0] if heads else None)
    return _attention(settings, ranks, q, k, v, (index_q, index_k, index_weights))


def tensor_parallel_dsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    *,
    group: ProcessGroup | DeviceMesh,
    softmax_scale: float,
    key_start: Tensor,
    key_end: Tensor,
    topk: int,
    value_dim: int | None = None,
    always: tuple[int, int] = (0, 0),
    token_weight: Tensor | None = None,
    kl: str = "forward",
    kl_scale: Tensor | None = None,
    kl_out: Tensor | None = None,
    deterministic: bool = True,
    workspace_bytes: int = 512 * 2**20,
) -> DSAAttention:
    """`dsa_attention` of all heads, each rank holding some: p_sum[t,s] = sum over ranks of sum over its heads of a.

    The selection, the KL and the index gradients are those of all heads and equal on every rank, so that replicated
    indexer parameters get the same gradient everywhere: neither sum nor average it over the group. out and lse, and the
    gradients of q, k and v, are those of this rank's heads: where every rank holds the same k (MQA, absorbed MLA), its
    gradient is a share, to be added up by whoever replicated it, as in every attention with sharded heads.

    Args:
        q: [T, H_local, D]. k: [S, G_local, D]. v: [S, G_local, V] or None: this rank's heads. With one key head for all
            k and v are the same on every rank. The ranks may hold different numbers of heads.
        index_q, index_k, index_weights, key_start, key_end, token_weight: as in `dsa_attention`, the same on every
            rank, and so are all options and what requires a gradient.
        group: the ranks, as a process group or a mesh of one dimension.

    Returns:
        As `dsa_attention`: out [T, H_local, V] and lse [T, H_local] of this rank's heads, all else of all heads.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it is.
    """
    settings = SparseSettings(
        softmax_scale, key_start, key_end, topk, value_dim, always, token_weight, kl, kl_scale, kl_out, deterministic,
        True, workspace_bytes,
    ).checked(_TENSOR, q, k, v, (index_q, index_k, index_weights))  # fmt: skip
    (heads,) = process_groups(_TENSOR, group, 1)
    return _attention(settings, Ranks(_TENSOR, None, [0], heads), q, k, v, (index_q, index_k, index_weights))


def _attention(
    settings: SparseSettings, ranks: Ranks, q: Tensor, k: Tensor, v: Tensor | None, leaves: tuple[Tensor, ...]
) -> DSAAttention:
    index_q, index_k, index_weights = leaves
    needs = wanted(leaves)
    with torch.no_grad():
        keys = ranks.gather(index_k)
        selection = settings.select((index_q.detach(), keys, index_weights.detach()))
        gathered = ranks.gather(k), None if v is None else ranks.gather(v)
        problem = settings.problem(q.detach(), *gathered, selection)
        if settings.token_weight is None:
            weight = mean_weight(settings.key_start, settings.key_end, index_weights, ranks.context)
            settings = settings._replace(token_weight=weight)
    if settings.kl_out is not None:
        settings.kl_out.fill_(torch.nan)
    index = leaves if settings.kl == "backward" else tuple(x.detach() for x in leaves)
    out, lse = _ShardedAttention.apply(settings, ranks, problem, q, k, v, *index)  # type: ignore[no-untyped-call]
    if settings.kl == "backward":
        return DSAAttention(out, lse, None, settings.kl_out, selection)
    with torch.no_grad():
        learning = _Learning(ranks, _learner(settings, (index_q, keys, index_weights), selection, needs))
        for rows in runs_of_rows(selection, settings.workspace_bytes):
            learning.add(rows, sparse_target(problem.rows(rows), lse[rows]))
        sums = learning.finish()
        loss = _weight(settings).double() @ sums.kl.double()
        if ranks.context is not None:
            dist.all_reduce(loss, group=ranks.context)
    loss = known_loss(ranks.op, TORCH, loss.to(sums.kl.dtype), sums.gradients, leaves)
    return DSAAttention(out, lse, loss, sums.kl, selection)


class _ShardedAttention(torch.autograd.Function):
    """The attention of this rank; its backward reduces the keys' gradients, and with kl="backward" takes the KL."""

    @staticmethod
    def forward(
        ctx: Any, settings: SparseSettings, ranks: Ranks, problem: SparseProblem, q: Tensor, k: Tensor,
        v: Tensor | None, *leaves: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = sparse_forward(problem)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, *leaves, out, lse, *problem.selection)
        ctx.settings, ctx.ranks, ctx.consumed = settings, ranks, False
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        ranks: Ranks = ctx.ranks
        settings: SparseSettings = ctx.settings
        refuse_backward(ctx, ranks.op)
        if d_out is None:
            return (None,) * 9
        q, k, v, index_q, index_k, index_weights, out, lse, *slots = ctx.saved_tensors
        needs, selection = ctx.needs_input_grad[3:], Selection(*slots)
        problem = settings.problem(q, ranks.gather(k), None if v is None else ranks.gather(v), selection)
        ctx.consumed, learning = settings.kl == "backward", None
        if ctx.consumed and (any(needs[3:]) or settings.kl_out is not None):
            leaves = index_q, ranks.gather(index_k), index_weights
            learning = _Learning(ranks, _learner(settings, leaves, selection, list(needs[3:])))
        dq, sums = _own_gradients(ranks, problem, (d_out, out, lse), needs[:3], learning)
        index: tuple[Tensor | None, ...] = (None, None, None)
        if learning is not None:
            learned = learning.finish()
            index = learned.gradients
            if settings.kl_out is not None:
                settings.kl_out.copy_(learned.kl)
        gradients, inputs = (dq, *sums, *index), (q, k, v, index_q, index_k, index_weights)
        return (
            None,
            None,
            None,
            *(None if x is None else x.to(like.dtype) for x, like in zip(gradients, inputs, strict=True)),
        )


def _own_gradients(
    ranks: Ranks,
    problem: SparseProblem,
    upstream: tuple[Tensor, Tensor, Tensor],
    wants: tuple[bool, bool, bool],
    learning: _Learning | None,
) -> tuple[Tensor | None, KeySums]:
    """dq and this rank's keys' dk and dv, in float32; p_sum of each run of rows goes to `learning`."""
    needs = Needs(*wants, p_sum=learning is not None)
    sums, pieces = new_key_sums(problem, needs), []
    for rows in runs_of_rows(problem.selection, problem.workspace_bytes):
        d_out, out, lse = (x[rows] for x in upstream)
        made = sparse_backward(problem.rows(rows), d_out, out, lse, needs, sums)
        pieces.append(made.dq)
        if learning is not None and made.p_sum is not None:
            learning.add(rows, made.p_sum)
    dq = torch.cat([x for x in pieces if x is not None]) if needs.q and pieces else None
    if needs.q and dq is None:
        dq = torch.zeros_like(problem.q)
    return dq, KeySums(*(None if x is None else ranks.own(x) for x in sums))


class _Learning:
    """The indexer's loss from the runs' probabilities; with sharded heads each rank takes a part of a run's rows."""

    def __init__(self, ranks: Ranks, learner: Learner) -> None:
        self.ranks, self.learner, self.sums = ranks, learner, learner.new_sums()
        self._coming: list[tuple[slice, Callable[[], Tensor]]] = []

    def add(self, rows: slice, p_sum: Tensor) -> None:
        """p_sum [rows, K] over this rank's heads. Its sum over ranks runs until the next run, or `finish`, comes."""
        group = self.ranks.heads
        if group is None:
            self.learner.learn(rows, p_sum, self.sums)
            return
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        piece = -(-len(p_sum) // world)
        arrived = reduce_scatter(F.pad(p_sum, (0, 0, 0, world * piece - len(p_sum))), group)
        begin = min(rows.start + rank * piece, rows.stop)
        self._take()
        self._coming.append((slice(begin, min(begin + piece, rows.stop)), arrived))

    def _take(self) -> None:
        for rows, arrived in self._coming:
            self.learner.learn(rows, arrived()[: rows.stop - rows.start], self.sums)
        self._coming.clear()

    def finish(self) -> Sums:
        """KL and gradients of all heads; d_index_k of this rank's keys, complete, not yet rounded."""
        self._take()
        kl, entropy, d_index_q, d_index_k, d_weights = self.sums
        rows = [None if x is None else self.ranks.over_heads(x) for x in (d_index_q, d_weights)]
        own = None if d_index_k is None else self.ranks.over_heads(self.ranks.own(d_index_k))
        return Sums(self.ranks.over_heads(kl), self.ranks.over_heads(entropy), rows[0], own, rows[1])


def _weight(settings: SparseSettings) -> Tensor:
    if settings.token_weight is None:
        raise ValueError("SparseSettings: token_weight must be [T] here, got None; fill it in with mean_weight first")
    return settings.token_weight


def _learner(
    settings: SparseSettings, leaves: tuple[Tensor, Tensor, Tensor], selection: Selection, needs: list[bool]
) -> Learner:
    return settings.learner(leaves, selection, _weight(settings), (needs[0], needs[1], needs[2]))
