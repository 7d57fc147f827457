"""What runs beside the sparse stage's steps: it must compute what ours does, and is named where it is absent."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from flash_indexer.bench import sparse_peers
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
    """A module like cuDNN's front end that gives our results, float32 as it does."""
    ours, indices = answers["one order"], x.selection.indices
    best = ours.selection.scores.sort(-1, descending=True).values
    results = {
        "sparse_attention_backward_wrapper": dict(dq=ours.dq, dkv=ours.dk[:, 0]),
        "sparse_attn_score_recompute_wrapper": dict(target=ours.p_sum[None].masked_fill(indices < 0, torch.nan)),
        "sparse_indexer_score_recompute_wrapper": dict(predict=x.selection.scores[None]),
        "indexer_backward_wrapper": dict(d_index_q=ours.d_index_q[None]),
        "indexer_forward_wrapper": dict(scores=torch.zeros(1, ABSORBED.T, ABSORBED.S)),
        "indexer_top_k_wrapper": dict(values=best),
    } | changes  # fmt: skip
    calls = {name: lambda *_, found=found, **__: found for name, found in results.items()}
    return SimpleNamespace(DSA=SimpleNamespace(**calls))


def test_a_library_that_gives_our_results_takes_its_turns(problem, monkeypatch):
    x, answers = problem
    monkeypatch.setitem(sys.modules, "cudnn", library(x, answers))
    beside, reasons = peers(ABSORBED, x, answers)
    assert not reasons
    assert list(beside) == [
        "dsa_scores", "dsa_topk", "dsa_backward", "dsa_target", "dsa_index_scores", "dsa_index_gradients"
    ]  # fmt: skip
    for call in beside.values():
        call()


@pytest.mark.parametrize(
    ("wrapper", "key", "name"),
    [
        ("sparse_attention_backward_wrapper", "dq", "dsa_backward"),
        ("sparse_attention_backward_wrapper", "dkv", "dsa_backward"),
        ("indexer_backward_wrapper", "d_index_q", "dsa_index_gradients"),
        ("indexer_top_k_wrapper", "values", "dsa_topk"),
    ],
)
def test_a_library_of_other_results_is_named_and_not_timed(problem, monkeypatch, wrapper, key, name):
    x, answers = problem
    right = getattr(library(x, answers).DSA, wrapper)()
    monkeypatch.setitem(sys.modules, "cudnn", library(x, answers, **{wrapper: right | {key: right[key] * 1.05}}))
    beside, reasons = peers(ABSORBED, x, answers)
    assert beside == {} and f"{name} differs from ours by" in reasons["dsa"]


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
