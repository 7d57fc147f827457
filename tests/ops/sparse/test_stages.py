"""ops.sparse.stages and learning: steps over runs of rows add up, whoever runs them; which body is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from flash_indexer.ops import (
    Learner,
    Needs,
    SparseProblem,
    bodies,
    new_key_sums,
    runs_of_rows,
    select_rows,
    sparse_backward,
    sparse_forward,
    sparse_index_gradients,
    sparse_index_scores,
    sparse_kl_rows,
    sparse_target,
)
from flash_indexer.ops.sparse import gpu_body
from flash_indexer.ops.sparse.learning import equal_runs, mean_weight
from flash_indexer.testing import SHAPES, assert_close, make_inputs
from flash_indexer.testing.sparse import eager_dsa, make_values, reference_dsa, selection_mask

ALL = Needs(True, True, True, True)


def problem_of(case: Any) -> SparseProblem:
    return SparseProblem(
        case.x.q, case.x.k, case.v, case.selection, case.x.softmax_scale, case.d_out.shape[2], True, 2**29
    )


@pytest.mark.parametrize("cuts", [(0, 91), (0, 1, 2, 40, 91), tuple(range(92))])
def test_runs_of_rows_add_up(make_case: Callable[..., Any], cuts: tuple[int, ...]) -> None:
    """Every stage over runs of rows, put together by hand as a loop over ranks would: the whole layer's step."""
    case = make_case("packed")
    problem, index = problem_of(case), case.index
    sums, d_index_k = new_key_sums(problem, ALL), torch.zeros_like(case.x.index_k)
    weight, rows_made = mean_weight(case.selection), []
    for begin, end in pairwise(cuts):
        rows = slice(begin, end)
        part, leaves = problem.rows(rows), (index[0][rows], index[1], index[2][rows])
        bounds = case.x.key_start[rows], case.x.key_end[rows]
        chosen = select_rows(leaves, *bounds, case.topk, (0, 0), 2**29)
        assert all(torch.equal(a, b) for a, b in zip(chosen, part.selection, strict=True))
        out, lse = sparse_forward(part)
        made = sparse_backward(part, case.d_out[rows], out, lse, ALL, sums)
        torch.testing.assert_close(made.p_sum, sparse_target(part, None))
        assert made.dk is sums.dk and made.dv is sums.dv
        scores = sparse_index_scores(leaves, chosen, 2**29)
        learned = sparse_kl_rows(made.p_sum, scores, chosen.count, weight[rows])
        grads = sparse_index_gradients(learned.di, leaves, chosen, (True,) * 3, d_index_k=d_index_k)
        assert grads.d_index_k is d_index_k
        rows_made.append(
            dict(
                out=out,
                lse=lse,
                kl=learned.kl,
                dq=made.dq,
                d_index_q=grads.d_index_q,
                d_index_weights=grads.d_index_weights,
            )
        )
    joined = {name: torch.cat([run[name] for run in rows_made]) for name in rows_made[0]}
    case.judge(joined | dict(dk=sums.dk, dv=sums.dv, d_index_k=d_index_k), d_loss=1.0)


def test_without_buffers_they_are_made(make_case: Callable[..., Any]) -> None:
    case = make_case("packed")
    problem = problem_of(case)
    made = sparse_backward(problem, case.d_out, *sparse_forward(problem), Needs(False, True, False, False))
    assert made.dq is None and made.dv is None and made.p_sum is None
    case.judge(dict(dk=made.dk))
    di = torch.ones_like(case.selection.scores)
    grads = sparse_index_gradients(di, case.index, case.selection, (False, True, False))
    assert grads.d_index_q is None and grads.d_index_weights is None and grads.d_index_k.abs().max() > 0


def test_sums_are_wide(make_case: Callable[..., Any]) -> None:
    """bfloat16 inputs: what belongs to a key is not rounded, what belongs to a query once."""
    case = make_case("packed", dtype=torch.float32)
    problem = problem_of(case)._replace(**{n: getattr(problem_of(case), n).bfloat16() for n in ("q", "k", "v")})
    made = sparse_backward(problem, case.d_out.bfloat16(), *sparse_forward(problem), ALL)
    assert (made.dq.dtype, made.dk.dtype, made.dv.dtype, made.p_sum.dtype) == (torch.bfloat16, *[torch.float32] * 3)


@pytest.mark.parametrize("shape, V", [("smollm2", 7), ("packed", 7), ("window", -16), ("fewer_keys", -8)])
def test_bfloat16_by_the_ruler(shape: str, V: int) -> None:
    """The dtypes of a GPU, which the operators refuse on the CPU and the stages don't: vectors are bfloat16."""
    x = make_inputs(SHAPES[shape], seed=0, dtype=torch.bfloat16)
    leaves, v = (x.index_q, x.index_k, x.index_weights), None if V < 0 else make_values(x, V, seed=1)
    d_out = torch.randn(*x.q.shape[:2], abs(V), generator=torch.Generator().manual_seed(2)).bfloat16()
    selection = select_rows(leaves, x.key_start, x.key_end, 9, (0, 0), 2**29)
    assert selection.scores.dtype == torch.float32
    problem = SparseProblem(x.q, x.k, v, selection, x.softmax_scale, abs(V), True, 2**20)
    out, lse = sparse_forward(problem)
    made = sparse_backward(problem, d_out, out, lse, ALL)
    learner = Learner(leaves, selection, x.token_weight, (True,) * 3, True, True, 2**20)
    sums = learner.new_sums()
    learner.learn(slice(0, len(x.q)), made.p_sum, sums)
    selected = selection_mask(selection, len(x.k))
    options = dict(d_out=d_out, value_dim=-V if V < 0 else None, token_weight=x.token_weight)
    truth, eager = reference_dsa(x, v, selected, **options), eager_dsa(x, v, selected, **options)
    got = dict(out=out, lse=lse, kl=sums.kl, dq=made.dq, dk=made.dk, dv=made.dv)
    got |= {name: getattr(sums, name) for name in ("d_index_q", "d_index_k", "d_index_weights")}
    for name, value in got.items():
        if value is not None:
            baseline = getattr(eager, name)
            assert_close(name, value.to(baseline.dtype), getattr(truth, name), baseline)


@pytest.mark.parametrize("workspace_bytes", [1, 5000, 2**29])
def test_runs_fit_the_workspace(make_case: Callable[..., Any], workspace_bytes: int) -> None:
    selection = make_case("packed").selection
    runs = list(runs_of_rows(selection, workspace_bytes))
    assert [r.start for r in runs[1:]] == [r.stop for r in runs[:-1]] and (runs[0].start, runs[-1].stop) == (0, 91)
    assert all(r.stop - r.start == 1 or (r.stop - r.start) * 7 * 8 * 16 <= workspace_bytes for r in runs)


@pytest.mark.parametrize(
    "rows, most, unit, lengths",
    [
        (32768, 10922, 128, [8192] * 4), (32768, 16384, 128, [16384] * 2), (300, 200, 128, [128, 128, 44]),
        (300, 100, 128, [100] * 3), (10, 0, 128, [1] * 10), (7, 3, 1, [3, 3, 1]), (0, 5, 128, []),
    ],
)  # fmt: skip
def test_runs_are_about_equal(rows: int, most: int, unit: int, lengths: list[int]) -> None:
    runs = list(equal_runs(rows, most, unit))
    assert [r.stop - r.start for r in runs] == lengths
    assert [r.start for r in runs] == [sum(lengths[:n]) for n in range(len(lengths))]


def test_a_learner_takes_known_scores_or_forms_them(make_case: Callable[..., Any]) -> None:
    case = make_case("packed")
    wrong = case.selection._replace(scores=case.selection.scores * 0.5)
    weight, p_sum = mean_weight(case.selection), sparse_target(problem_of(case), None)
    made = {}
    for known, chosen in ((True, case.selection), (False, wrong), (True, wrong)):
        learner = Learner(case.index, chosen, weight, (True,) * 3, known, True, 2**29)
        sums = learner.new_sums()
        learner.learn(slice(0, 91), p_sum, sums)
        made[known, chosen is wrong] = sums
    for a, b in zip(made[True, False], made[False, True], strict=True):
        torch.testing.assert_close(a, b)
    assert (made[True, True].kl - made[True, False].kl).abs().max() > 1e-3


def test_selections_are_checked(make_case: Callable[..., Any]) -> None:
    case = make_case("packed")
    bad = case.selection._replace(indices=case.selection.indices + 89)
    problem, p = problem_of(case)._replace(selection=bad), torch.empty(0)
    for step in (
        lambda: sparse_forward(problem),
        lambda: sparse_target(problem, None),
        lambda: sparse_backward(problem, case.d_out, p, p, ALL),
        lambda: sparse_index_scores(case.index, bad, 2**29),
        lambda: sparse_index_gradients(bad.scores, case.index, bad, (True,) * 3),
    ):
        with pytest.raises(ValueError, match="indices must be from 0 to S - 1 = 88"):
            step()


def test_a_gpu_without_kernels_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operator of the family gives the same reason, so that one warning is shown."""
    monkeypatch.setattr(bodies, "_said", set())
    monkeypatch.setattr(bodies, "no_kernels", lambda device: None)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for op in ("select_keys", "sparse_attention", "sparse_indexer_kl"):
            assert bodies.choose(op, torch.device("cuda", 0), gpu_body.refusal) == bodies.TORCH
    assert len(seen) == 1 and "this step of the sparse stage has no kernel yet" in str(seen[0].message)
