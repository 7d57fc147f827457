"""The steps of the sparse stage that are timed, and what they return, to be checked first.

select            index scores of all visible keys, and the exact top-k          select_keys
forward           attention over the selected keys, with its logsumexp
backward          gradients of q, k and v, and the head-summed target; the same bits every time
any_order         the same with deterministic=False
backward_alone    without the target, any order
learn             KL, and the index tensors' gradients, from target and scores; the same bits every time
learn_any_order   the same with deterministic=False
layer             all of it by `dsa_attention(kl="backward")`, forward and backward, the same bits every time
layer_any_order   the same with deterministic=False
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_indexer.bench.sparse_check import Answer
from flash_indexer.bench.sparse_problem import SparseSize, Tensors
from flash_indexer.ops import (
    Needs,
    dsa_attention,
    select_keys,
    sparse_backward,
    sparse_forward,
    sparse_index_gradients,
    sparse_kl_rows,
)
from flash_indexer.ops.bodies import NoKernel, need_kernels

STEPS = (
    "select", "forward", "backward", "any_order", "backward_alone", "learn", "learn_any_order", "layer",
    "layer_any_order",
)  # fmt: skip
ALL = (True, True, True)


class Forward(NamedTuple):
    """What the backward steps read. p_sum: the target that `learn` reads."""

    out: Tensor
    lse: Tensor
    p_sum: Tensor


class Steps:
    """The steps of one problem.

    forward: what `answers` found last, NaN before. weight [T]: of each token's KL.
    """

    def __init__(self, size: SparseSize, x: Tensors) -> None:
        self.size, self.x = size, x
        self.weight = torch.full_like(x.index_weights[:, 0], 1 / size.T)
        out = x.q.new_full((size.T, size.H, size.V), torch.nan)
        self.forward = Forward(out, self.weight.new_full((size.T, size.H), torch.nan), x.selection.scores)
        own_values = x.v is not None
        self._needs = Needs(True, True, own_values, True)
        leaves = (x.q, x.k, x.v, *x.leaves)
        self._leaves = [None if y is None else y.detach().requires_grad_() for y in leaves]
        self._intervals: dict[str, Any] = dict(key_start=x.key_start, key_end=x.key_end, topk=size.K)

    def by_name(self) -> dict[str, Callable[[], Any]]:
        """A call for each of STEPS; those behind `forward` read what `answers` found."""
        return {
            "select": lambda: select_keys(*self.x.leaves, **self._intervals),
            "forward": lambda: sparse_forward(self.x.problem(self.size)),
            "backward": lambda: self.backward(True, self._needs),
            "any_order": lambda: self.backward(False, self._needs),
            "backward_alone": lambda: self.backward(False, self._needs._replace(p_sum=False)),
            "learn": lambda: self.learn(True),
            "learn_any_order": lambda: self.learn(False),
            "layer": lambda: self.layer(True),
            "layer_any_order": lambda: self.layer(False),
        }

    def backward(self, deterministic: bool, needs: Needs) -> Any:
        problem = self.x.problem(self.size, deterministic=deterministic)
        return sparse_backward(problem, self.x.d_out, self.forward.out, self.forward.lse, needs)

    def learn(self, deterministic: bool) -> tuple[Any, Any]:
        x = self.x
        rows = sparse_kl_rows(self.forward.p_sum, x.selection.scores, x.selection.count, self.weight)
        return rows, sparse_index_gradients(rows.di, x.leaves, x.selection, ALL, deterministic=deterministic)

    def layer(self, deterministic: bool) -> None:
        size, leaves = self.size, self._leaves
        settings = dict(softmax_scale=size.D**-0.5, value_dim=size.V if leaves[2] is None else None, kl="backward")
        options: Any = settings | self._intervals | dict(deterministic=deterministic)
        dsa_attention(*leaves, **options).out.backward(self.x.d_out)  # type: ignore[arg-type, no-untyped-call]
        for leaf in leaves:
            if leaf is not None:
                leaf.grad = None

    def answers(self) -> dict[str, Answer]:
        """What the steps return that have kernels, with gradients in one order and in any; None where one has none."""
        with need_kernels():
            found = _attempt(lambda: sparse_forward(self.x.problem(self.size)))
            if found is None:
                return {}
            out, lse = found
            self.forward = self.forward._replace(out=out, lse=lse)
            first = Answer(out, lse, selection=_attempt(self.by_name()["select"]))
            answers = {"one order": first, "any order": Answer(out, lse)}
            for deterministic, name in ((True, "one order"), (False, "any order")):
                made = _attempt(partial(self.backward, deterministic, self._needs))
                if made is not None:
                    answers[name] = answers[name]._replace(dq=made.dq, dk=made.dk, dv=made.dv, p_sum=made.p_sum)
                    self.forward = self.forward._replace(p_sum=made.p_sum)
            for deterministic, name in ((True, "one order"), (False, "any order")):
                if all(answer.p_sum is None for answer in answers.values()):
                    break
                learned = _attempt(partial(self.learn, deterministic))
                if learned is not None:
                    rows, made = learned
                    answers[name] = answers[name]._replace(
                        kl=rows.kl, d_index_q=made.d_index_q, d_index_k=made.d_index_k,
                        d_index_weights=made.d_index_weights,
                    )  # fmt: skip
        return answers


def with_kernels(steps: dict[str, Callable[[], Any]]) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Those that run by kernels alone, and why the others don't."""
    ours: dict[str, Callable[[], Any]] = {}
    missing: dict[str, str] = {}
    for name, step in steps.items():
        try:
            with need_kernels():
                step()
        except NoKernel as reason:
            missing[name] = str(reason)
        else:
            ours[name] = step
    return ours, missing


def _attempt(step: Callable[[], Any]) -> Any:
    try:
        return step()
    except NoKernel:
        return None
