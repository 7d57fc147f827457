"""One layer's sparse stage from one call: select, attend, and the indexer's loss beside the attention or behind it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_indexer.ops.checks import (
    check_interval_tensors,
    check_kl_mode,
    check_sinks,
    check_sparse_attention,
    check_teacher_and_index,
    check_topk,
    check_workspace,
)
from flash_indexer.ops.problem import LEAVES, Sums
from flash_indexer.ops.sinks import sink_gradient
from flash_indexer.ops.sparse.kl_op import sparse_kl_op
from flash_indexer.ops.sparse.learning import Learner, mean_weight, runs_of_rows, with_rows
from flash_indexer.ops.sparse.op import select_keys, sparse_attention
from flash_indexer.ops.sparse.problem import KeySums, Leaves, Needs, SparseProblem, new_key_sums
from flash_indexer.ops.sparse.selection import Selection
from flash_indexer.ops.sparse.stages import forward_with_sinks, select_rows, sparse_backward

_OP = "dsa_attention"


class DSAAttention(NamedTuple):
    """Result of `dsa_attention`: the attention's output and logsumexp, the indexer's loss and KL, the selection."""

    out: Tensor
    lse: Tensor
    loss: Tensor | None
    kl: Tensor | None
    selection: Selection


class SparseSettings(NamedTuple):
    """The arguments of `dsa_attention` besides the tensors of the model and of the indexer, in its order."""

    softmax_scale: float
    key_start: Tensor
    key_end: Tensor
    topk: int
    value_dim: int | None
    always: tuple[int, int]
    token_weight: Tensor | None
    kl: str
    kl_scale: Tensor | None
    kl_out: Tensor | None
    deterministic: bool
    save_selection: bool
    workspace_bytes: int = 512 * 2**20
    selection: Selection | None = None
    """What `select_keys` gave for the same index tensors, where it is known: nothing is selected then."""

    def checked(self, op: str, q: Tensor, k: Tensor, v: Tensor | None, leaves: Leaves) -> SparseSettings:
        """With value_dim filled in.

        Raises:
            ValueError, TypeError: naming the argument of `op`, what it must be and what it is.
        """
        tensors = dict(zip(("q", "k", *LEAVES, "token_weight"), (q, k, *leaves, self.token_weight), strict=True))
        sizes = check_teacher_and_index(op, tensors, "mean", self.softmax_scale, constants=("token_weight",))
        check_interval_tensors(op, self.key_start, self.key_end, sizes.T, q.device)
        width = check_sparse_attention(op, q, k, v, self.value_dim, self.softmax_scale)
        check_topk(op, self.topk, self.always)
        check_kl_mode(op, self.kl, self.kl_scale, self.kl_out, q)
        check_workspace(op, self.workspace_bytes)
        if self.selection is not None and self.selection.indices.shape[0] != sizes.T:
            raise ValueError(
                f"{op}: selection must be of the T = {sizes.T} queries, got one of {self.selection.indices.shape[0]}; "
                "take the rows of the same queries (Selection.rows)"
            )
        return self._replace(value_dim=width)

    def rows(self, rows: slice) -> SparseSettings:
        """Those of some of the queries."""
        weight, kl, selection = self.token_weight, self.kl_out, self.selection
        return self._replace(
            key_start=self.key_start[rows],
            key_end=self.key_end[rows],
            token_weight=None if weight is None else weight[rows],
            kl_out=None if kl is None else kl[rows],
            selection=None if selection is None else selection.rows(rows),
        )

    def select(self, leaves: Leaves) -> Selection:
        """The selection that is given, or that by these index tensors; the same bits each time."""
        if self.selection is not None:
            return self.selection
        return select_rows(leaves, self.key_start, self.key_end, self.topk, self.always, self.workspace_bytes)

    def problem(self, q: Tensor, k: Tensor, v: Tensor | None, selection: Selection) -> SparseProblem:
        """The attention over the selected keys."""
        width = self.value_dim or 0
        scale = float(self.softmax_scale)
        return SparseProblem(q, k, v, selection, scale, width, self.deterministic, self.workspace_bytes)

    def learner(self, leaves: Leaves, selection: Selection, weight: Tensor, needs: tuple[bool, bool, bool]) -> Learner:
        """The indexer's loss, its gradients times kl_scale."""
        if self.kl_scale is not None:
            weight = weight * self.kl_scale.to(weight.dtype)
        return Learner(leaves, selection, weight, needs, True, self.deterministic, self.workspace_bytes)


def dsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    *,
    softmax_scale: float,
    key_start: Tensor,
    key_end: Tensor,
    topk: int,
    value_dim: int | None = None,
    sinks: Tensor | None = None,
    always: tuple[int, int] = (0, 0),
    token_weight: Tensor | None = None,
    kl: str = "forward",
    kl_scale: Tensor | None = None,
    kl_out: Tensor | None = None,
    deterministic: bool = True,
    save_selection: bool = True,
    workspace_bytes: int = 512 * 2**20,
) -> DSAAttention:
    """`select_keys`, `sparse_attention` over them, and `sparse_indexer_kl` of the same attention.

        S_t      = the topk visible keys of largest i[t,s] = sum_j index_weights[t,j] * ReLU(index_q[t,j]·index_k[s])
        out[t,h] = sum_{s in S_t} a[t,h,s] v[s,g(h)],    a[t,h,:] = softmax over S_t of scale * q[t,h]·k[s,g(h)]
        KL[t]    = sum_{s in S_t} p (log p - log softmax over S_t of i[t,:]),    p = sum_h a / sum_{s in S_t} sum_h a

    With sinks the softmax is over these logits and sinks[h], so that p weighs a head by what its sink leaves the keys.
    q, k, v and sinks get the gradients of out alone; index_q, index_k and index_weights those of the KL alone, so
    detach the indexer's own inputs from the model. No gradient passes through the selection.

    Args:
        q: [T, H, D]. k: [S, G, D], H % G == 0. v: [S, G, V], or None with value_dim=V: the values are k[..., :V].
        index_q: [T, I, E]. index_k: [S, E]. index_weights: [T, I], the factors I^-0.5 and E^-0.5 included.
        softmax_scale: the model's own softmax scale.
        key_start, key_end: int32 [T], non-decreasing; an empty interval gives out 0, KL 0, zero gradients, and lse -inf
            or sinks[h].
        topk, always: as in `select_keys`. sinks: [H] or None, as in `sparse_attention`.
        token_weight: [T]; None means 1/n for the n queries that see a key.
        kl: "forward": loss and KL come with the output; one pass over the selected keys more. "backward": the
            probabilities are formed once, in the backward of out, which also makes the index tensors' gradients, those
            of kl_scale * sum_t token_weight[t] * KL[t]. There is no loss then; where out gets no gradient the indexer
            gets none either (`sparse_indexer_kl` is for that case), and a second backward is refused.
        kl_scale: a tensor of no dimension, for kl="backward": the gradient scaler's factor, 1 / accumulation steps. It
            is read when backward runs. None means 1.
        kl_out: a buffer [T], for kl="backward": NaN from the forward on, KL[t] after backward.
        deterministic: True gives the same gradients to the bit every time.
        save_selection: False selects again in backward instead of keeping indices and scores for it, 8 bytes a slot.
        workspace_bytes: bound on the memory for scores, gathered keys and values, and logits.

    Dtypes: on CUDA q, k, v, index_q, index_k bfloat16 and the rest float32; on the CPU float32 or float64 throughout.
    torch.compile takes kl="forward" with save_selection=True.

    Returns:
        out [T, H, V] in q's dtype; lse [T, H], natural logarithm, over the selected keys; loss, scalar, and kl [T],
        nats: for kl="backward" None and kl_out. selection as `select_keys` returns it. out and loss are differentiable.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it is.

    Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1, sparse training stage; docs/math.md.
    """
    leaves = index_q, index_k, index_weights
    settings = SparseSettings(
        softmax_scale, key_start, key_end, topk, value_dim, always, token_weight, kl, kl_scale, kl_out, deterministic,
        save_selection, workspace_bytes,
    ).checked(_OP, q, k, v, leaves)  # fmt: skip
    if kl == "forward" and save_selection:
        chosen = select_keys(
            *leaves, key_start=key_start, key_end=key_end, topk=topk, always=always, workspace_bytes=workspace_bytes
        )
        out, lse = sparse_attention(
            q, k, v, chosen, softmax_scale=softmax_scale, value_dim=value_dim, sinks=sinks,
            deterministic=deterministic, workspace_bytes=workspace_bytes,
        )  # fmt: skip
    else:
        check_sinks(_OP, sinks, q)
        out, lse, chosen = recomputed_attention(settings, q, k, v, sinks, leaves)
    if kl == "backward":
        return DSAAttention(out, lse, None, kl_out, chosen)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in leaves]
    loss, values, *_ = sparse_kl_op(
        q.detach(), k.detach(), *leaves, *chosen, lse, token_weight, float(softmax_scale), True, deterministic,
        workspace_bytes, needs,
    )  # fmt: skip
    return DSAAttention(out, lse, loss, values, chosen)


def recomputed_attention(
    settings: SparseSettings, q: Tensor, k: Tensor, v: Tensor | None, sinks: Tensor | None, leaves: Leaves
) -> tuple[Tensor, Tensor, Selection]:
    """out, lse and selection of checked arguments; the backward of out forms the probabilities again."""
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{_OP}: save_selection=False can not be compiled; use save_selection=True")
    if settings.kl == "forward":
        leaves = leaves[0].detach(), leaves[1].detach(), leaves[2].detach()
    if settings.kl_out is not None:
        settings.kl_out.fill_(torch.nan)
    out, lse, *slots = _RecomputedAttention.apply(settings, q, k, v, sinks, *leaves)  # type: ignore[no-untyped-call]
    return out, lse, Selection(*slots)


class _RecomputedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: SparseSettings,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        sinks: Tensor | None,
        *leaves: Tensor,
    ) -> tuple[Tensor, ...]:
        index_q, index_k, index_weights = leaves
        selection = settings.select((index_q, index_k, index_weights))
        out, lse = forward_with_sinks(settings.problem(q, k, v, selection), sinks)
        ctx.mark_non_differentiable(lse, *selection)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sinks, *leaves, out, lse, *(selection if settings.save_selection else ()))
        # saved once, as tensors, which activation checkpointing frees
        ctx.settings = settings._replace(selection=None) if settings.save_selection else settings
        ctx.consumed = False
        return out, lse, *selection

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_backward(ctx, _OP)
        if d_out is None:
            return (None,) * 8
        q, k, v, sinks, index_q, index_k, index_weights, out, lse, *slots = ctx.saved_tensors
        settings: SparseSettings = ctx.settings
        leaves, wanted = (index_q, index_k, index_weights), ctx.needs_input_grad
        selection = Selection(*slots) if slots else settings.select(leaves)
        ctx.consumed = settings.kl == "backward"
        problem = settings.problem(q, k, v, selection)
        learner = None
        if ctx.consumed and (any(wanted[5:]) or settings.kl_out is not None):
            weight = mean_weight(selection) if settings.token_weight is None else settings.token_weight
            learner = settings.learner(leaves, selection, weight, (wanted[5], wanted[6], wanted[7]))
        dq, sums, learned = attention_and_learning(problem, d_out, out, lse, wanted[1:4], learner)
        if learned is not None and settings.kl_out is not None:
            settings.kl_out.copy_(learned.kl)
        index = (None, None, None) if learned is None else learned.gradients
        d_sinks = sink_gradient(d_out, out, lse, sinks, settings.workspace_bytes) if wanted[4] else None
        inputs, gradients = (q, k, v, sinks, *leaves), (dq, *sums, d_sinks, *index)
        return None, *(None if x is None else x.to(like.dtype) for x, like in zip(gradients, inputs, strict=True))


def attention_and_learning(
    problem: SparseProblem,
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
    wanted: tuple[bool, bool, bool],
    learner: Learner | None,
) -> tuple[Tensor | None, KeySums, Sums | None]:
    """dq, the sums dk and dv, and what `learner` makes of the same probabilities, a run of rows at a time."""
    needs, learned = Needs(*wanted, p_sum=learner is not None), None
    sums, runs = new_key_sums(problem, needs), list(runs_of_rows(problem.selection, problem.workspace_bytes))
    if learner is not None and len(runs) != 1:
        learned = learner.new_sums()
    dq = problem.q.new_empty(problem.q.shape) if needs.q and len(problem.q) == 0 else None
    for rows in runs:
        tiles = None if learner is None else learner.ahead(rows)
        made = sparse_backward(problem.rows(rows), d_out[rows], out[rows], lse[rows], needs, sums)
        if made.dq is not None:
            dq = with_rows(dq, rows, made.dq, len(problem.q))
        if learner is not None and made.p_sum is not None:
            if learned is None:
                learned = learner.learn_all(made.p_sum, tiles)
            else:
                learner.learn(rows, made.p_sum, learned, tiles)
    return dq, sums, learned


def refuse_backward(ctx: Any, op: str) -> None:
    """Raises RuntimeError for a second derivative, and for a second backward where the first took the KL."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: the output has no second derivative; call backward without create_graph=True")
    if ctx.consumed:
        raise RuntimeError(
            f'{op}: backward already ran and with kl="backward" a second one would count the KL twice; call the '
            'operator again, add the losses and call backward once, or use kl="forward"'
        )
