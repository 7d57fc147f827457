"""Rows of weight zero are left out, of every stage and of the plan; the rest is `indexer_kl` as it is defined."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_indexer import indexer_kl
from flash_indexer.ops import weighted
from flash_indexer.ops.blockwise import plan_chunks
from flash_indexer.ops.kl import torch_body
from flash_indexer.ops.kl.plan import Plan, make_plan
from flash_indexer.ops.kl.plan_sizes import PlanSizes
from flash_indexer.ops.problem import Problem
from flash_indexer.testing import (
    Inputs,
    Result,
    Shape,
    assert_close,
    eager_indexer_kl,
    make_inputs,
    reference_indexer_kl,
)

SHAPE = Shape(((1, 1), (33, 29), (5, 0), (60, 66)), H=6, G=3, D=16, I=6, E=32)
D_LOSS = -1.3
CPU = torch.device("cpu")


def problem_of(x: Inputs, weight: Tensor | None, target: str = "mean") -> Problem:
    return Problem(
        x.q, x.k, x.index_q, x.index_k, x.index_weights, x.lse, x.key_start, x.key_end, weight, x.softmax_scale,
        target, 2**20, (True, True, True),
    )  # fmt: skip


def measure(x: Inputs, **options: Any) -> Result:
    leaves = [leaf.clone().requires_grad_() for leaf in (x.index_q, x.index_k, x.index_weights)]
    fixed: dict[str, Any] = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end)
    result = indexer_kl(x.q, x.k, leaves[0], leaves[1], leaves[2], **fixed, **options)
    gradients = torch.autograd.grad(D_LOSS * result.loss, leaves)
    return Result(result.loss.detach(), result.kl, result.entropy, *gradients)


def sparse_weight(x: Inputs) -> Tensor:
    """A run of rows and some others have weight: 40 of 99."""
    weight = x.token_weight.clone()
    weight[weight == 0] = 0.3
    weight[10:50] = weight[56::2] = 0.0
    assert 0 < weight.count_nonzero() <= weighted.MOST * len(weight)
    return weight


@pytest.mark.parametrize("target", ["mean", "per_head", "sum_logits"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_the_definition(target: str, dtype: torch.dtype) -> None:
    x = make_inputs(SHAPE, seed=1, dtype=dtype)
    weight = sparse_weight(x)
    got = measure(x, target=target, token_weight=weight, lse=x.lse if target == "mean" else None)
    truth = reference_indexer_kl(x, target=target, token_weight=weight, d_loss=D_LOSS)
    counts = (weight != 0).view(-1, *[1] * (truth.kl.ndim - 1))
    truth = truth._replace(kl=truth.kl * counts, entropy=truth.entropy * counts)
    if dtype == torch.float64:
        for name, a, b in zip(Result._fields, got, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=name)
        return
    eager = eager_indexer_kl(x, target=target, token_weight=weight, d_loss=D_LOSS)
    eager = eager._replace(kl=eager.kl * counts, entropy=eager.entropy * counts)
    for name, *tensors in zip(Result._fields[1:], got[1:], truth[1:], eager[1:], strict=True):
        assert_close(name, *tensors)


def test_e4m3_rows_are_left_out_too() -> None:
    x = make_inputs(SHAPE, seed=2, dtype=torch.float64)
    weight = sparse_weight(x)
    rows = weight.nonzero()[:, 0]
    options: dict[str, Any] = dict(index_dtype="fp8", teacher_dtype="fp8")
    named = {name: getattr(x, name)[rows] for name in ("q", "index_q", "index_weights", "key_start", "key_end")}
    part = measure(replace(x, **named), token_weight=weight[rows], **options)
    got = measure(x, token_weight=weight, **options)
    torch.testing.assert_close(got.loss, part.loss)
    torch.testing.assert_close(got.d_index_q[rows], part.d_index_q)
    torch.testing.assert_close(got.d_index_k, part.d_index_k)


@pytest.mark.parametrize("target", ["mean", "per_head", "sum_logits"])
def test_every_stage_sees_the_rows_that_have_weight_alone(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    x = make_inputs(SHAPE, seed=3)
    weight = sparse_weight(x)
    seen: list[int] = []
    original = torch_body.index_scores

    def counted(index_q: Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(len(index_q))
        return original(index_q, *arguments, **options)

    monkeypatch.setattr(torch_body, "index_scores", counted)
    measure(x, target=target, token_weight=weight)
    visible = (x.key_end > x.key_start) & (weight != 0)
    passes = 6 if target == "per_head" else 1
    assert passes * int(visible.sum()) <= sum(seen) <= passes * int(weight.count_nonzero())


def test_what_is_left_out_is_not_read_but_keys_that_nobody_sees_any_more_are() -> None:
    """A key's row of a tile is multiplied by zeros: NaN there reaches gradients, and so must show in the loss."""
    x = make_inputs(Shape(((40, 40), (40, 40)), H=2, G=1, D=8, I=2, E=32), seed=4)
    weight = torch.ones(80)
    weight[40:] = 0.0
    clean = measure(x, token_weight=weight)
    for name in ("q", "index_q", "index_weights", "lse"):
        spoilt = getattr(x, name).clone()
        spoilt[60] = float("nan")
        got = measure(replace(x, **{name: spoilt}), token_weight=weight)
        assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True)), name
    spoilt = x.index_k.clone()
    spoilt[60] = float("nan")
    assert measure(replace(x, index_k=spoilt), token_weight=weight).loss.isnan()


def test_nothing_at_all_has_weight() -> None:
    got = measure(make_inputs(SHAPE, seed=5), token_weight=torch.zeros(SHAPE.T))
    assert all((value == 0).all() for value in got) and got.kl.shape == (SHAPE.T,)


def test_few_rows_of_weight_zero_are_not_worth_a_copy() -> None:
    x = make_inputs(SHAPE, seed=6, dtype=torch.float64)
    assert (x.token_weight == 0).any()
    problem = problem_of(x, x.token_weight)
    assert weighted.weighted_part(problem) == (problem, None)
    assert weighted.weighted_part(problem_of(x, None))[1] is None
    got = measure(x, token_weight=x.token_weight)
    torch.testing.assert_close(got.kl, reference_indexer_kl(x, token_weight=x.token_weight).kl)


def test_the_same_weights_are_read_once_and_give_the_same_intervals_to_every_layer() -> None:
    x, y = make_inputs(SHAPE, seed=7), make_inputs(SHAPE, seed=8)
    weight = sparse_weight(x)
    y = replace(y, key_start=x.key_start, key_end=x.key_end)
    (one, rows), (other, others) = (weighted.weighted_part(problem_of(z, weight)) for z in (x, y))
    assert rows is others and one.key_start is other.key_start and one.key_end is other.key_end
    weight[0] = 0.0
    changed, fewer = weighted.weighted_part(problem_of(x, weight))
    assert rows is not None and fewer is not None and len(fewer) == len(rows) - 1
    assert changed.key_start is not one.key_start
    x.key_start[0] = x.key_start[0].clone()  # written to: read again
    again, _ = weighted.weighted_part(problem_of(x, weight))
    assert again.key_start is not changed.key_start
    alive = weakref.ref(weight)
    del one, other, changed, again, weight
    gc.collect()
    assert alive() is None


def sizes(S: int) -> PlanSizes:
    return PlanSizes(S, 64, 16, True, 2**29, 8)


def work(made: Plan) -> tuple[int, int, int]:
    """Score tiles; key tiles by groups of tokens of the queries' gradients; tiles of the keys' gradients."""
    scores = sum(chunk.score.numel() // 4 for chunk in made.chunks)
    queries = sum(int(chunk.gradients.query.view(-1, 4)[:, 2].sum()) for chunk in made.chunks)
    blocks = [chunk.gradients.key.view(-1, 4)[:, 1:3] for chunk in made.chunks]
    keys = sum(int((x[:, 1] - x[:, 0]).sum()) for x in blocks)
    return scores, queries, keys


def test_rows_found_in_inference_mode_are_for_training_too() -> None:
    x = make_inputs(SHAPE, seed=9)
    problem = problem_of(x, sparse_weight(x))
    with torch.inference_mode():
        weighted.weighted_part(problem)
    part, rows = weighted.weighted_part(problem)
    assert rows is not None
    assert not any(y.is_inference() for y in (rows, part.key_start, part.key_end))


@pytest.mark.parametrize("documents", [1, 4])
def test_the_plan_is_linear_in_the_part_that_has_weight(documents: int) -> None:
    """One block of 128 rows in every 2, 4, 8 and 16, those in the middle of their run: the mean's work."""
    T = 128 * 128
    start = torch.arange(T, dtype=torch.int32) // (T // documents) * (T // documents)
    end = torch.arange(1, T + 1, dtype=torch.int32)
    x = make_inputs(Shape(((1, 1),), H=1, G=1, D=1, I=1, E=32), seed=0)
    tall = replace(
        x, **{name: getattr(x, name).expand(T, *getattr(x, name).shape[1:]) for name in ("q", "index_q", "lse")},
        index_weights=x.index_weights.expand(T, 1), key_start=start, key_end=end,
    )  # fmt: skip
    whole = work(make_plan(start, end, sizes(T), CPU))
    for every in (2, 4, 8, 16):
        weight = torch.zeros(T // 128, 128)
        weight[every // 2 :: every] = 1 / T
        part, rows = weighted.weighted_part(problem_of(tall, weight.flatten()))
        assert rows is not None and len(rows) == T // every
        made = work(make_plan(part.key_start, part.key_end, sizes(T), CPU))
        for found, all_of_it, rest in zip(made, whole, (0.04, 0.04, 0.07), strict=True):  # keys come in pairs of tiles
            assert found * every == pytest.approx(all_of_it, rel=rest)


def test_chunks_of_the_torch_body_are_linear_in_the_part_that_has_weight() -> None:
    """Their area, rows by the keys from the first to the last that one of them sees, is what is computed."""
    T = 4096
    start, end = torch.zeros(T, dtype=torch.int32), torch.arange(1, T + 1, dtype=torch.int32)

    def area(rows: Tensor) -> int:
        chunks = plan_chunks(start[rows], end[rows], 6, 4, 2**29)
        assert [chunk.begin for chunk in chunks[1:]] == [chunk.end for chunk in chunks[:-1]]
        assert chunks[0].begin == 0 and chunks[-1].end == len(rows)
        assert all(chunk.end - chunk.begin >= 16 for chunk in chunks[:-1])
        return sum((chunk.end - chunk.begin) * (chunk.last - chunk.first) for chunk in chunks)

    whole = area(torch.arange(T))
    for every in (2, 4, 8, 16):
        for block in (16, 128):
            at = torch.arange(T) // block % every
            parts = [area((at == place).nonzero()[:, 0]) for place in range(every)]
            assert sum(parts) < 1.1 * whole, (every, block)
