"""Context parallel on 2 and 4 processes against one, by the ruler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flash_indexer import indexer_kl
from flash_indexer.parallel import context_positions
from flash_indexer.testing import Result, Shape, make_inputs, reference_indexer_kl

# documents of length 1, queries that see nothing, odd lengths; 80 tokens divide into 4 and 8 pieces
PACKED = Shape(((1, 1), (33, 29), (5, 0), (1, 1), (27, 36), (13, 13)), H=6, G=3, D=16, I=5, E=32)
LATENT = Shape(((17, 17), (1, 1), (62, 62)), H=5, G=1, D=24, I=3, E=32)
SHAPES = {"packed": PACKED, "latent": LATENT}
COMMON: dict[str, Any] = dict(seed=3, d_loss=-1.7)
FIXED: dict[str, Any] = dict(COMMON, workspace_bytes=2**15)


def join(parts: list[list[Any]], world: int, layout: str, T: int) -> Result:
    """One result of the ranks' results: rows put in global order; the loss is the same on all."""
    order = torch.cat([context_positions(T, world, rank, layout=layout) for rank in range(world)]).argsort()
    losses = torch.stack([part[0] for part in parts])
    assert (losses == losses[0]).all()
    return Result(losses[0], *(torch.cat([part[n] for part in parts])[order] for n in range(1, 6)))


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_as_one_process(ranks: Any, judge: Any, layout: str, world: int, weighted: bool, name: str) -> None:
    options: dict[str, Any] = dict(dtype=torch.float32, lse=weighted, weighted=weighted)
    parts = ranks.call("context", world, which=str(world), layout=layout, shape=SHAPES[name], **options, **FIXED)
    judge(join(parts, world, layout, SHAPES[name].T), SHAPES[name], **COMMON, **options)


@pytest.mark.parametrize("target", ["mean", "per_head", "sum_logits"])
def test_targets_in_float64(ranks: Any, judge: Any, target: str) -> None:
    shape = replace(PACKED, I=6)
    options: dict[str, Any] = dict(dtype=torch.float64, lse=False, weighted=True, target=target)
    parts = ranks.call("context", 4, which="4", layout="zigzag", shape=shape, **options, **FIXED)
    judge(join(parts, 4, "zigzag", shape.T), shape, **COMMON, **options)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_wide_keys_arrive_while_chunks_are_computed(ranks: Any, judge: Any, layout: str, lse: bool) -> None:
    options: dict[str, Any] = dict(dtype=torch.float64, lse=lse, weighted=False)
    parts = ranks.call("context", 4, which="4", layout=layout, shape=PACKED, wide=True, **options, **FIXED)
    judge(join(parts, 4, layout, PACKED.T), PACKED, **COMMON, **options)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("target", ["mean", "sum_logits"])
@pytest.mark.parametrize("wide", [False, True])
def test_context_and_tensor_parallel(ranks: Any, judge: Any, layout: str, target: str, wide: bool) -> None:
    options: dict[str, Any] = dict(dtype=torch.float32, lse=target == "mean", weighted=wide, target=target)
    parts = ranks.call("context", 4, which="mesh", layout=layout, shape=PACKED, wide=wide, **options, **FIXED)
    for first, second in (parts[:2], parts[2:]):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "ranks of a tensor group differ"
    judge(join(parts[::2], 2, layout, PACKED.T), PACKED, **COMMON, **options)


@pytest.mark.parametrize("target", ["mean", "sum_logits"])
@pytest.mark.parametrize(("world", "which"), [(2, "2"), (4, "4"), (4, "mesh")])
def test_each_rank_leaves_out_its_rows_of_weight_zero(ranks: Any, world: int, which: str, target: str) -> None:
    call: dict[str, Any] = dict(which=which, layout="zigzag", shape=PACKED, dtype=torch.float64, target=target)
    parts = ranks.call("context", world, positive=True, **call, **FIXED)
    parts = parts[::2] if which == "mesh" else parts  # the ranks of a tensor group have the same
    got = join(parts, len(parts), "zigzag", PACKED.T)
    x = make_inputs(PACKED, seed=COMMON["seed"], dtype=torch.float64)
    weight = x.token_weight.clamp(min=0)
    truth = reference_indexer_kl(x, target=target, token_weight=weight, d_loss=COMMON["d_loss"])
    truth = truth._replace(kl=truth.kl * (weight != 0), entropy=truth.entropy * (weight != 0))
    for name, mine, expected in zip(Result._fields, got, truth, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_ranks_may_hold_any_number_of_queries(ranks: Any, layout: str) -> None:
    parts = ranks.call("some_rows", 4, which="4", layout=layout, shape=PACKED, seed=5, of=6)
    x = make_inputs(PACKED, seed=5, dtype=torch.float64)
    rows = torch.cat([context_positions(PACKED.T, 4, rank, layout=layout)[: 6 * rank] for rank in range(4)])
    weight = torch.zeros_like(x.token_weight)
    weight[rows] = x.token_weight[rows]
    truth = reference_indexer_kl(x, token_weight=weight)
    d_index_k = torch.cat([part[4] for part in parts])
    order = torch.cat([context_positions(PACKED.T, 4, rank, layout=layout) for rank in range(4)])
    torch.testing.assert_close(d_index_k, truth.d_index_k[order], rtol=1e-10, atol=1e-13)
    for n, expected in ((1, truth.kl), (3, truth.d_index_q), (5, truth.d_index_weights)):
        torch.testing.assert_close(torch.cat([part[n] for part in parts]), expected[rows], rtol=1e-10, atol=1e-13)
    assert all(torch.allclose(part[0], truth.loss, rtol=1e-12) for part in parts)


@pytest.mark.parametrize(("world", "which"), [(2, "2"), (4, "4"), (4, "mesh")])
def test_in_e4m3_as_one_process(ranks: Any, world: int, which: str) -> None:
    """Against `indexer_kl` on one process, which tests/ops/kl/test_arithmetic.py holds to the definition."""
    options: dict[str, Any] = dict(index_dtype="fp8", teacher_dtype="fp8")
    call: dict[str, Any] = dict(which=which, layout="zigzag", shape=PACKED, dtype=torch.float64, weighted=True)
    parts = ranks.call("context", world, **call, **options, **FIXED)
    if which == "mesh":
        parts = parts[::2]  # the ranks of a tensor group have the same
    got = join(parts, len(parts), "zigzag", PACKED.T)
    x = make_inputs(PACKED, seed=COMMON["seed"], dtype=torch.float64)
    leaves = [leaf.clone().requires_grad_() for leaf in (x.index_q, x.index_k, x.index_weights)]
    one = indexer_kl(
        x.q, x.k, *leaves, softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end,
        token_weight=x.token_weight, **options,
    )  # fmt: skip
    (COMMON["d_loss"] * one.loss).backward()
    for mine, expected in zip(got, (*one, *(leaf.grad for leaf in leaves)), strict=True):
        assert expected is not None
        torch.testing.assert_close(mine, expected.detach(), rtol=1e-10, atol=1e-13)
