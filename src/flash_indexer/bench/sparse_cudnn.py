"""cuDNN's kernels for selected keys (package nvidia-cudnn-frontend, where it is installed), called with our tensors.

    dsa_scores            index scores of all visible keys
    dsa_topk              exact top-k of these scores, ties to the lowest key
    dsa_backward          gradients of q and of the keys that hold the values
    dsa_target            head-summed probabilities at the selected keys, divided by their sum
    dsa_index_scores      softmax of the index scores at the selected keys
    dsa_index_gradients   gradients of the index tensors, from target and softmax

Its forward over selected keys runs on later GPUs alone. Additions to keys come in any order. Queries have one batch
around them, index keys a head as well where all are scored; weights of index heads are bfloat16.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flash_indexer.bench.sparse_check import Answer
from flash_indexer.bench.sparse_problem import SparseSize, Tensors

NO_SINK = -1e30
TOPK_NUMBERS = 2**30  # of a call's workspace, which int32 counts: two for each score
Pairs = tuple[tuple[Tensor | None, Tensor], ...]
"""Ours, or None where there is nothing to compare with, and theirs."""


class SelectedKeys:
    """The kernels at one problem; they read our out, lse, target and scores.

    Raises:
        ImportError: where the package or a part of it is missing. RuntimeError: where `answers` have no backward.
    """

    def __init__(self, size: SparseSize, x: Tensors, answers: Mapping[str, Answer]) -> None:
        self._calls = importlib.import_module("cudnn").DSA
        with_target = [answer for answer in answers.values() if answer.p_sum is not None]
        if not with_target or with_target[-1].p_sum is None:
            raise RuntimeError("nothing of ours to hold it to")
        self.size, self.x, self.ours, self.first = size, x, with_target[-1], answers["one order"]
        p_sum, (self.indices, self.count, scores) = with_target[-1].p_sum, x.selection
        self.absent = self.indices < 0
        self.p, self.predicted = p_sum / p_sum.sum(-1, keepdim=True), scores.softmax(-1)
        self.weights = x.index_weights.to(x.index_q.dtype)[None]
        self.k = x.k[:, 0]
        self._constants = torch.full((size.H,), NO_SINK, device=x.q.device), torch.ones(1, device=x.q.device)
        self._offset = torch.tensor([size.S - size.T], dtype=torch.int32, device=x.q.device)
        self._target = self.p[None].clone()  # `index_gradients` writes what it makes of it there: right the first time
        self._given: Tensor | None = None

    def by_name(self) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Pairs]]]:
        """Of each kernel its call, and what must be close in what that returns."""
        x, first, ours, known = self.x, self.first, self.ours, self._known
        dk = None if ours.dk is None else ours.dk.squeeze(1)
        best = None if first.selection is None else first.selection.scores.sort(-1).values
        return {
            "dsa_scores": (self.scores, lambda made: ((known(x.selection.scores), self._chosen(made["scores"])),)),
            "dsa_topk": (self.topk, lambda made: ((best, torch.cat([run["values"] for run in made]).sort(-1).values),)),
            "dsa_backward": (self.backward, lambda made: ((ours.dq, made["dq"]), (dk, made["dkv"]))),
            "dsa_target": (self.target, lambda made: ((self.p, known(made["target"][0])),)),
            "dsa_index_scores": (self.index_scores, lambda made: ((self.predicted, known(made["predict"][0])),)),
            "dsa_index_gradients": (
                self.index_gradients,
                lambda made: (
                    (first.d_index_q, made["d_index_q"][0]),
                    (first.d_index_k, made["d_index_k"][0]),
                    (first.d_index_weights, made["d_weights"][0]),
                ),
            ),
        }

    def scores(self) -> Any:
        return self._calls.indexer_forward_wrapper(
            self.x.index_q[None], self.x.index_k[None, :, None], self.weights, ratio=1, qhead_per_kv_head=self.size.I,
            q_causal_offsets=self._offset,
        )  # fmt: skip

    def topk(self) -> list[Any]:
        """Of runs of rows."""
        if self._given is None:
            self._given = self.scores()["scores"][0]
        runs = (torch.split(y, max(TOPK_NUMBERS // (2 * self.size.S), 1)) for y in (self._given, self.x.key_end))
        return [
            self._calls.indexer_top_k_wrapper(scores, ends, self.size.K, deterministic=True)
            for scores, ends in zip(*runs, strict=True)
        ]

    def backward(self) -> Any:
        return self._calls.sparse_attention_backward_wrapper(
            self.x.q, self.k, self.ours.out, self.x.d_out, self.ours.lse, self._constants[0], self.indices,
            softmax_scale=self.size.D**-0.5, topk_length=self.count,
        )  # fmt: skip

    def target(self) -> Any:
        lse = self.ours.lse
        return self._calls.sparse_attn_score_recompute_wrapper(
            self.x.q[None], self.k[None], None if lse is None else lse[None], self.indices[None], self.size.D**-0.5,
            qhead_per_kv_head=self.size.H, topk_length=self.count[None],
        )  # fmt: skip

    def index_scores(self) -> Any:
        return self._calls.sparse_indexer_score_recompute_wrapper(
            self.x.index_q[None], self.x.index_k[None], self.weights, self.indices[None],
            qhead_per_kv_head=self.size.I, topk_length=self.count[None],
        )  # fmt: skip

    def index_gradients(self) -> Any:
        return self._calls.indexer_backward_wrapper(
            self.x.index_q[None], self.weights, self.x.index_k[None], self._target, self.predicted[None],
            self.indices[None], self._constants[1],
        )  # fmt: skip

    def _known(self, at_slots: Tensor) -> Tensor:
        """Zero in slots that hold no key, of which each has what it likes."""
        return at_slots.masked_fill(self.absent, 0.0)

    def _chosen(self, scores: Tensor) -> Tensor:
        return self._known(scores[0].gather(1, self.indices.clamp_min(0).long()))
