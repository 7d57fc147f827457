"""What runs beside the sparse stage's steps: it must compute what ours does, and is named where it is absent."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from flash_indexer.bench import sparse_cudnn, sparse_peers
from flash_indexer.bench.sparse_peers import in_torch, peers
from flash_indexer.bench.sparse_problem import CAUSAL, SparseSize, make
from flash_indexer.bench.sparse_steps import Steps

ABSORBED = SparseSize(6, 1, 12, 8, 3, 16, 40, 90, 30)
GROUPED = SparseSize(6, 2, 8, 8, 3, 16, 64, 64, 20, CAUSAL)


@pytest.fixture
def problem():
    x = make(ABSORBED, "cpu", torch.float64)
    return x, Steps(ABSORBED, x).answers()


def library(x, answers, **changes):
    """A module like cuDNN's front end that gives our results: shapes are checked as it does, on a GPU of 9.0.

    changes: of a wrapper, a factor by the name of a result, or an error that it raises.
    """
    ours, indices = answers["one order"], x.selection.indices
    T, S, H, D, I, E, K = (getattr(ABSORBED, name) for name in "TSHDIEK")
    scores = torch.einsum("tj,tjs->ts", x.index_weights, torch.einsum("tje,se->tjs", x.index_q, x.index_k).relu())
    scores[torch.arange(S) >= x.key_end[:, None]] = -torch.inf
    p, absent = ours.p_sum / ours.p_sum.sum(-1, keepdim=True), indices < 0

    def wrapper(name, shapes, results):
        change = changes.get(name, {})

        def call(*tensors, **settings):
            if isinstance(change, Exception):
                raise change
            given = [tuple(y.shape) for y in tensors if isinstance(y, torch.Tensor)]
            given += [tuple(y.shape) for y in settings.values() if isinstance(y, torch.Tensor)]
            assert given == shapes, f"{name}: {given}"
            return {key: y * change.get(key, 1) for key, y in results.items()}

        return call

    index, slots = ((1, T, I, E), (1, S, E), (1, T, I)), (1, T, K)
    return SimpleNamespace(
        DSA=SimpleNamespace(
            indexer_forward_wrapper=wrapper(
                "indexer_forward_wrapper", [index[0], (1, S, 1, E), index[2], (1,)], dict(scores=scores[None])
            ),
            indexer_top_k_wrapper=lambda given, ends, *_, **__: wrapper(
                "indexer_top_k_wrapper", [(len(ends), S), (len(ends),)], dict(values=given.topk(K).values)
            )(given, ends),
            sparse_attention_backward_wrapper=wrapper(
                "sparse_attention_backward_wrapper",
                [(T, H, D), (S, D), (T, H, ABSORBED.V), (T, H, ABSORBED.V), (T, H), (H,), (T, K), (T,)],
                dict(dq=ours.dq, dkv=ours.dk[:, 0]),
            ),
            sparse_attn_score_recompute_wrapper=wrapper(
                "sparse_attn_score_recompute_wrapper",
                [(1, T, H, D), (1, S, D), (1, T, H), slots, (1, T)],
                dict(target=p.masked_fill(absent, torch.nan)[None]),
            ),
            sparse_indexer_score_recompute_wrapper=wrapper(
                "sparse_indexer_score_recompute_wrapper",
                [*index, slots, (1, T)],
                dict(predict=x.selection.scores.softmax(-1).masked_fill(absent, torch.nan)[None]),
            ),
            indexer_backward_wrapper=wrapper(
                "indexer_backward_wrapper",
                [index[0], index[2], index[1], slots, slots, slots, (1,)],
                dict(
                    d_index_q=ours.d_index_q[None], d_index_k=ours.d_index_k[None], d_weights=ours.d_index_weights[None]
                ),
            ),
        )
    )  # fmt: skip


DSA = ["dsa_scores", "dsa_topk", "dsa_backward", "dsa_target", "dsa_index_scores", "dsa_index_gradients"]


@pytest.mark.parametrize("numbers", [sparse_cudnn.TOPK_NUMBERS, 2 * 90 * 7])
def test_a_library_that_gives_our_results_takes_its_turns(problem, numbers, monkeypatch):
    x, answers = problem
    monkeypatch.setattr(sparse_cudnn, "TOPK_NUMBERS", numbers)
    monkeypatch.setitem(sys.modules, "cudnn", library(x, answers))
    beside, reasons = peers(ABSORBED, x, answers)
    assert not reasons and list(beside) == DSA
    for call in beside.values():
        call()


@pytest.mark.parametrize(
    ("wrapper", "key", "name"),
    [
        ("indexer_forward_wrapper", "scores", "dsa_scores"),
        ("indexer_top_k_wrapper", "values", "dsa_topk"),
        ("sparse_attention_backward_wrapper", "dq", "dsa_backward"),
        ("sparse_attention_backward_wrapper", "dkv", "dsa_backward"),
        ("sparse_attn_score_recompute_wrapper", "target", "dsa_target"),
        ("sparse_indexer_score_recompute_wrapper", "predict", "dsa_index_scores"),
        ("indexer_backward_wrapper", "d_index_q", "dsa_index_gradients"),
        ("indexer_backward_wrapper", "d_index_k", "dsa_index_gradients"),
        ("indexer_backward_wrapper", "d_weights", "dsa_index_gradients"),
    ],
)
def test_a_kernel_of_other_results_is_named_and_the_others_are_timed(problem, monkeypatch, wrapper, key, name):
    x, answers = problem
    monkeypatch.setitem(sys.modules, "cudnn", library(x, answers, **{wrapper: {key: 1.05}}))
    beside, reasons = peers(ABSORBED, x, answers)
    wrong = [name, "dsa_topk"] if name == "dsa_scores" else [name]  # which takes these scores
    assert [*beside] == [x for x in DSA if x not in wrong]
    assert [*reasons] == wrong and all(f"{x} differs from ours by" in reasons[x] for x in wrong)


def test_a_kernel_that_fails_is_named_and_the_others_are_timed(problem, monkeypatch):
    x, answers = problem
    failed = AssertionError("k must be 4D BSHD, got 3D")
    monkeypatch.setitem(sys.modules, "cudnn", library(x, answers, sparse_attn_score_recompute_wrapper=failed))
    beside, reasons = peers(ABSORBED, x, answers)
    assert [*beside] == [x for x in DSA if x != "dsa_target"]
    assert reasons == {"dsa_target": "AssertionError: k must be 4D BSHD, got 3D"}


def test_an_absent_library_is_named(problem, monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None)
    beside, reasons = peers(ABSORBED, *problem)
    assert beside == {} and reasons["dsa"].startswith("ModuleNotFoundError")


def test_few_queries_run_in_torch_beside_the_kernels(monkeypatch):
    x = make(GROUPED, "cpu", torch.float64)
    answers = Steps(GROUPED, x).answers()
    beside, reasons = peers(GROUPED, x, answers)
    assert not reasons and list(beside) == ["torch_forward", "torch_backward"]
    made = in_torch(GROUPED, x)["torch_backward"]()
    torch.testing.assert_close(made.dq, answers["one order"].dq)
    monkeypatch.setattr(sparse_peers, "LATE", GROUPED.T - 1)
    monkeypatch.setattr(sparse_peers, "attention_contestants", lambda size: ({}, {"cudnn": f"none of H={size.H}"}))
    beside, reasons = peers(GROUPED, x, answers)
    assert beside == {} and reasons["cudnn"] == "none of H=6"
