"""The benchmark of the sparse stage: its problems, its checks and its line (the timing itself needs a GPU)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flash_indexer.bench.sparse import line
from flash_indexer.bench.sparse_check import Answer, check
from flash_indexer.bench.sparse_problem import CAUSAL, CLUSTERED, RANDOM, SparseSize, make
from flash_indexer.bench.sparse_steps import STEPS, Steps, with_kernels
from flash_indexer.ops import bodies, check_selection

ABSORBED = SparseSize(6, 1, 12, 8, 3, 16, 40, 90, 30)
GROUPED = SparseSize(6, 2, 8, 8, 3, 16, 64, 64, 20, CAUSAL)
CASES = (ABSORBED, dataclasses.replace(ABSORBED, selection=CLUSTERED), GROUPED)


def problem(size):
    return make(size, "cpu", torch.float64)


@pytest.mark.parametrize("size", CASES)
def test_a_selection_is_one_and_is_as_its_size_says(size):
    x = problem(size)
    check_selection(x.selection, size.S)
    visible = x.key_end.clamp(max=size.K)
    assert torch.equal(x.selection.count, visible.int())
    present = x.selection.indices >= 0
    assert (x.selection.indices < x.key_end[:, None]).all() and int(present.sum()) == int(visible.sum())
    assert size.pairs == int(x.key_end.sum())
    again = make(size, "cpu", torch.float64)
    assert torch.equal(again.selection.indices, x.selection.indices) and torch.equal(again.q, x.q)


def test_half_of_a_clustered_selection_is_recent_and_neighbours_share_runs():
    size = SparseSize(1, 1, 8, 8, 1, 8, 64, 640, 64, CLUSTERED)
    x = problem(size)
    recent = x.selection.indices >= x.key_end[:, None] - 32
    assert (recent.sum(-1) >= 32).all()
    rows = [set(row.tolist()) for row in x.selection.indices[16:32]]
    assert len(set.intersection(*rows)) >= 32 - 16  # 15 keys of the recent ones move
    random = problem(dataclasses.replace(size, selection=RANDOM)).selection.indices[16:32]
    assert len(set.intersection(*(set(row.tolist()) for row in random))) < 8


@pytest.mark.parametrize("size", CASES)
def test_right_results_pass_the_check_and_wrong_ones_do_not(size):
    x = problem(size)
    steps = Steps(size, x)
    calls = steps.by_name()
    assert tuple(calls) == STEPS
    answers = steps.answers()
    ours, missing = with_kernels({name: step for name, step in calls.items() if "layer" not in name})
    assert not missing and len(ours) == len(STEPS) - 2
    got = answers["one order"]
    errors, loose = check(size, x, got), check(size, x, answers["any order"])
    values = {name for name in Answer._fields if getattr(got, name) is not None} - {"selection"}
    assert set(errors) == values | {"scores", "topk"} and ("dv" in errors) == (x.v is not None)
    assert set(loose) == set(errors) - {"scores", "topk"}
    assert max((errors | loose).values()) < 1e-9
    for name in values:
        value = getattr(got, name)
        wrong = value + 0.1 * value.abs().max()
        with pytest.raises(RuntimeError, match=f"no speed is reported: .*'{name}'"):
            check(size, x, got._replace(**{name: wrong}))
        with pytest.raises(RuntimeError, match="no speed is reported"):
            check(size, x, got._replace(**{name: torch.full_like(value, torch.nan)}))


def test_a_wrong_selection_does_not_pass_the_check():
    x = problem(ABSORBED)
    found = Steps(ABSORBED, x).answers()["one order"].selection
    check(ABSORBED, x, Answer(selection=found))
    with pytest.raises(RuntimeError, match="no speed is reported: .*'scores'"):
        check(ABSORBED, x, Answer(selection=found._replace(scores=found.scores * 1.01)))
    row = ABSORBED.T - 1
    indices, scores = found.indices.clone(), found.scores.clone()
    absent = next(key for key in range(ABSORBED.S) if key not in indices[row].tolist())
    indices[row, 3] = absent
    scores[row, 3] = x.index_weights[row] @ (x.index_q[row] @ x.index_k[absent]).relu()
    with pytest.raises(RuntimeError, match="no speed is reported: .*'topk'"):
        check(ABSORBED, x, Answer(selection=found._replace(indices=indices, scores=scores)))


def test_the_layer_steps_run_and_leave_no_gradient():
    x = problem(GROUPED)
    calls = Steps(GROUPED, x).by_name()
    calls["layer"]()
    calls["layer_any_order"]()
    assert x.q.grad is None and x.index_q.grad is None


def test_a_step_without_a_kernel_is_named_and_not_timed(monkeypatch):
    monkeypatch.setattr(bodies, "no_kernels", lambda device: "the GPU is too old")
    steps = {"slow": lambda: bodies.choose("select_keys", torch.device("cuda"), lambda: None), "fast": lambda: None}
    ours, missing = with_kernels(steps)
    assert list(ours) == ["fast"] and missing == {"slow": "select_keys has no kernel here: the GPU is too old"}
    with pytest.warns(UserWarning, match="too old"):  # outside of the block it runs
        monkeypatch.setattr(bodies, "_said", set())
        assert bodies.choose("select_keys", torch.device("cuda"), lambda: None) == bodies.TORCH


def test_the_line_names_times_peers_and_what_is_missing():
    times = {"select": {"p50": 1.25}, "forward": {"p50": 2.5}, "cudnn_forward": {"p50": 0.5}}
    record = {"name": "v32", "peers": ["cudnn_forward"], "no_kernel": {"learn": "why"}, "matmul_tflops": 790.2, **times}
    text = line(record)
    assert "select 1.25, forward 2.50; beside cudnn_forward 0.50" in text
    assert "product 790" in text and text.endswith("no kernel: learn")
