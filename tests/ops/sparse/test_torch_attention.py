"""ops.sparse.torch_attention: both of its ways against a masked softmax, and what no key may leak into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_indexer.ops import Selection
from flash_indexer.ops.sparse.chunks import Chunk
from flash_indexer.ops.sparse.problem import Needs, SparseProblem, new_key_sums
from flash_indexer.ops.sparse.torch_attention import backward, forward, target
from flash_indexer.ops.sparse.torch_select import top_keys
from flash_indexer.testing import Shape

TINY = 2000  # bytes: a few queries a chunk
ALL = Needs(True, True, True, True)
WIDE = Shape(((150, 150),), H=6, G=2, D=8, I=2, E=8)


def problem_of(case: Any, workspace_bytes: int = 2**29, **changes: Any) -> SparseProblem:
    x = case.x
    values = dict(q=x.q, k=x.k, v=case.v, selection=case.selection) | changes
    width = case.d_out.shape[2]
    return SparseProblem(
        **values, softmax_scale=x.softmax_scale, value_dim=width, deterministic=True, workspace_bytes=workspace_bytes
    )


def everything(problem: SparseProblem, d_out: Tensor) -> dict[str, Tensor | None]:
    out, lse = forward(problem)
    sums = new_key_sums(problem, ALL)
    dq, p_sum = backward(problem, d_out, out, lse, ALL, sums)
    assert p_sum is not None
    for lse_or_none in (lse, None):
        torch.testing.assert_close(target(problem, lse_or_none), p_sum)
    return dict(out=out, lse=lse, dq=dq, dk=sums.dk, dv=sums.dv, p_sum=p_sum)


def judge(case: Any, made: dict[str, Tensor | None]) -> None:
    """p_sum by its row sums, which are the number of heads, and at the keys by the reference's normalised target."""
    from flash_indexer import reference
    from flash_indexer.testing.sparse import selection_mask

    p_sum = made.pop("p_sum")
    case.judge(made)
    x = case.x.double()
    p = reference.sparse_target(x.q, x.k, selection_mask(case.selection, len(x.k)), x.softmax_scale) * x.q.shape[1]
    expected = p.gather(1, case.selection.indices.long().clamp_min(0))
    expected[case.selection.indices < 0] = 0.0
    torch.testing.assert_close(p_sum.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("workspace_bytes", [1, TINY, 2**29])
@pytest.mark.parametrize("V", [5, -4])
@pytest.mark.parametrize("shape", ["packed", "cached_prefix", "fewer_keys", "window"])
def test_as_the_reference(make_case: Callable[..., Any], shape: str, V: int, workspace_bytes: int) -> None:
    case = make_case(shape, V=V)
    judge(case, everything(problem_of(case, workspace_bytes), case.d_out))


@pytest.mark.parametrize("workspace_bytes", [TINY, 2**29])
def test_keys_far_apart_are_gathered_and_near_ones_masked(
    make_case: Callable[..., Any], workspace_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways give the same, and both are taken: 3 keys a query of up to 150, then of the last 30 that it sees."""
    ways: list[bool] = []
    inner = Chunk.tile
    monkeypatch.setattr(Chunk, "tile", lambda self, *x: ways.append(self.near is None) or inner(self, *x))
    for window, gathered in ((None, True), (30, False)):
        case = make_case(WIDE, topk=3, window=window)
        judge(case, everything(problem_of(case, workspace_bytes), case.d_out))
        assert gathered in ways
        ways.clear()


@pytest.mark.parametrize("G", [1, 3, 33, 99])
def test_head_counts_that_are_no_powers_of_two(make_case: Callable[..., Any], G: int) -> None:
    """32 and 96 heads, where kernels of others break, and 99."""
    for H in (32, 96, 99):
        if H % G == 0:
            case = make_case("fewer_keys", H=H, G=G, dtype=torch.float32)
            judge(case, everything(problem_of(case), case.d_out))


def test_bfloat16_is_rounded_once(make_case: Callable[..., Any]) -> None:
    case = make_case("smollm2", dtype=torch.float32)
    low = {name: getattr(problem_of(case), name).bfloat16() for name in ("q", "k", "v")}
    wide = {name: x.float() for name, x in low.items()}
    d_out = case.d_out.bfloat16()
    made = [forward(problem_of(case, **values)) for values in (low, wide)]
    (out, lse), (exact, exact_lse) = made
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, exact.bfloat16()) and torch.equal(lse, exact_lse)
    for values, upstream, x in ((low, d_out, out), (wide, d_out.float(), out.float())):
        problem = problem_of(case, **values)
        sums = new_key_sums(problem, ALL)
        dq, p_sum = backward(problem, upstream, x, lse, ALL, sums)
        made.append((dq, p_sum, *sums))
    first, second = made[2:]
    assert first[0].dtype == torch.bfloat16 and torch.equal(first[0], second[0].bfloat16())
    for a, b in zip(first[1:], second[1:], strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("topk", [2, 12])
@pytest.mark.parametrize("where", ["k", "v"])
def test_keys_that_are_not_selected_have_no_part(make_case: Callable[..., Any], where: str, topk: int) -> None:
    """NaN at key 0, which fills empty slots, and at a key that only some queries select, gathered and masked."""
    shape = Shape(((60, 60),), H=4, G=2, D=8, I=2, E=8)
    case = make_case(shape, topk=topk)
    starts = torch.ones_like(case.x.key_end)  # nobody sees key 0
    scores = torch.randn(60, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    case = replace(case, selection=top_keys(scores, starts, case.x.key_end, topk))
    expected = everything(problem_of(case), case.d_out)
    poisoned = getattr(problem_of(case), where).clone()
    poisoned[0] = torch.nan
    got = everything(problem_of(case, **{where: poisoned}), case.d_out)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-13, atol=1e-14, msg=name)
    poisoned[17] = torch.nan
    problem = problem_of(case, **{where: poisoned})
    out, lse = forward(problem)
    hit = [17 in row[:n] for row, n in zip(*(x.tolist() for x in case.selection[:2]), strict=True)]
    assert any(hit) and out.isnan().any((1, 2)).tolist() == hit
    sums = new_key_sums(problem, ALL)
    dq, _ = backward(problem, case.d_out, out, lse, ALL, sums)
    assert dq.isnan().any((1, 2)).tolist() == hit
    reached = {
        s
        for row, n, is_hit in zip(*(x.tolist() for x in case.selection[:2]), hit, strict=True)
        if is_hit
        for s in row[:n]
    }
    assert {*sums.dk.isnan().any((1, 2)).nonzero()[:, 0].tolist()} <= reached


@pytest.mark.parametrize("topk", [2, 12])
@pytest.mark.parametrize("where", ["q", "d_out"])
def test_a_query_that_is_not_finite_reaches_its_own_keys_alone(
    make_case: Callable[..., Any], where: str, topk: int
) -> None:
    """Not key 0 either, which fills its empty slots: it is the second query of the second document."""
    case = make_case(Shape(((20, 20), (40, 40)), H=4, G=2, D=8, I=2, E=8), topk=topk)
    problem, d_out = problem_of(case), case.d_out.clone()
    if where == "q":
        problem = problem._replace(q=problem.q.clone())
    (problem.q if where == "q" else d_out)[21, 0, 0] = torch.inf
    out, lse = forward(problem)
    sums = new_key_sums(problem, ALL)
    backward(problem, d_out, out, lse, ALL, sums)
    wrong = {*(~sums.dk.isfinite()).any((1, 2)).nonzero()[:, 0].tolist()}
    assert wrong and wrong <= {20, 21}


def test_a_nan_score_makes_all_results_of_the_query_nan(make_case: Callable[..., Any]) -> None:
    case = make_case("smollm2", topk=9)
    scores = case.selection.scores.clone()
    scores[40] = torch.nan
    out, lse = forward(problem_of(case, selection=case.selection._replace(scores=scores)))
    rows = torch.arange(len(out)) == 40
    assert torch.equal(out.isnan().all((1, 2)), rows) and torch.equal(lse.isnan().all(1), rows)
    assert torch.equal(out.isnan().any((1, 2)), rows)


@pytest.mark.parametrize("needs", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 0, 1), (0, 0, 0, 0)])
def test_what_is_not_wanted_is_not_made(make_case: Callable[..., Any], needs: tuple[int, ...]) -> None:
    case = make_case("cached_prefix")
    whole = everything(problem_of(case), case.d_out)
    problem, wanted = problem_of(case), Needs(*map(bool, needs))
    sums = new_key_sums(problem, wanted)
    dq, p_sum = backward(problem, case.d_out, *forward(problem), wanted, sums)
    for want, value, name in zip(wanted, (dq, *sums, p_sum), ("dq", "dk", "dv", "p_sum"), strict=True):
        assert (value is not None) == want
        assert value is None or torch.equal(value, whole[name])


def test_sums_are_added_to(make_case: Callable[..., Any]) -> None:
    case = make_case("cached_prefix")
    whole, problem = everything(problem_of(case), case.d_out), problem_of(case)
    out, lse = forward(problem)
    sums = new_key_sums(problem, ALL)
    for rows in (slice(11), slice(11, None)):
        backward(problem.rows(rows), case.d_out[rows], out[rows], lse[rows], ALL, sums)
    for value, name in zip(sums, ("dk", "dv"), strict=True):
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (3, 0), (1, 1)])
def test_empty_and_single_problems(rows: int, columns: int) -> None:
    zeros = torch.zeros(rows, dtype=torch.int32)
    selection: Selection = top_keys(torch.zeros(rows, columns), zeros, zeros + columns, 4)
    q, k, v = torch.randn(rows, 2, 4), torch.randn(columns, 1, 4), torch.randn(columns, 1, 3)
    problem = SparseProblem(q, k, v, selection, 0.5, 3, True, 2**29)
    out, lse = forward(problem)
    assert out.shape == (rows, 2, 3) and lse.shape == (rows, 2)
    sums = new_key_sums(problem, ALL)
    dq, _ = backward(problem, torch.ones_like(out), out, lse, ALL, sums)
    if not columns:
        assert bool((out == 0).all()) and bool((lse == -torch.inf).all()) and bool((dq == 0).all())
    if columns == 1:
        torch.testing.assert_close(sums.dv, torch.full_like(v, 2.0))


@pytest.mark.parametrize("V", [16, pytest.param(-16, marks=pytest.mark.slow)])
def test_many_heads_and_chunks_do_not_add_to_the_rounding(make_case: Callable[..., Any], V: int) -> None:
    """A sum over 96 heads and 40 chunks of queries, one after the other in float32, would be far from a baseline's."""
    case = make_case(Shape(((120, 120),), H=96, G=1, D=32, I=2, E=8), dtype=torch.float32, topk=60, V=V)
    problem = problem_of(case, 2**17)
    out, lse = forward(problem)
    sums = new_key_sums(problem, ALL)
    backward(problem, case.d_out, out, lse, ALL, sums)
    case.judge(dict(out=out, lse=lse, dk=sums.dk, dv=sums.dv))
