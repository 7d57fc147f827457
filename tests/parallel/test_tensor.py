"""Tensor parallel on 2 and 4 processes against one, by the ruler."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flash_indexer import indexer_kl
from flash_indexer.testing import SHAPES, Result, Shape, make_inputs, reference_indexer_kl

COMMON: dict[str, Any] = dict(seed=5, d_loss=0.6)
WIDE = Shape(((37, 37), (1, 1), (6, 0), (29, 41)), H=8, G=4, D=16, I=5, E=32)
NAMED = {"packed": SHAPES["packed"], "latent": SHAPES["window"], "fewer_keys": SHAPES["fewer_keys"], "wide": WIDE}


def same(parts: list[list[Any]]) -> Result:
    """Every rank has all of it, to the bit."""
    for part in parts[1:]:
        assert all(torch.equal(a, b) for a, b in zip(parts[0], part, strict=True)), "ranks differ"
    return Result(*parts[0])


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("target", ["mean", "sum_logits"])
@pytest.mark.parametrize("world", [2, 4])
def test_as_one_process(ranks: Any, judge: Any, name: str, target: str, world: int) -> None:
    if 1 < NAMED[name].G < world:
        pytest.skip("fewer key heads than ranks")
    options: dict[str, Any] = dict(dtype=torch.float32, lse=target == "mean", weighted=world == 2, target=target)
    call = dict(which=str(world), shape=NAMED[name], workspace_bytes=2**15, **COMMON)
    judge(same(ranks.call("tensor", world, **call, **options)), NAMED[name], **COMMON, **options)


@pytest.mark.parametrize("workspace", [1, 2**13, 2**29])
def test_without_lse_in_float64_whatever_the_chunks(ranks: Any, judge: Any, workspace: int) -> None:
    options: dict[str, Any] = dict(dtype=torch.float64, lse=False, weighted=True, target="mean")
    call = dict(which="4", shape=WIDE, workspace_bytes=workspace, **COMMON)
    judge(same(ranks.call("tensor", 4, **call, **options)), WIDE, **COMMON, **options)


@pytest.mark.parametrize("target", ["mean", "sum_logits"])
def test_rows_of_weight_zero_are_left_out(ranks: Any, target: str) -> None:
    call = dict(which="4", shape=WIDE, workspace_bytes=2**13, dtype=torch.float64, target=target, **COMMON)
    got = same(ranks.call("tensor", 4, positive=True, **call))
    x = make_inputs(WIDE, seed=COMMON["seed"], dtype=torch.float64)
    weight = x.token_weight.clamp(min=0)
    truth = reference_indexer_kl(x, target=target, token_weight=weight, d_loss=COMMON["d_loss"])
    truth = truth._replace(kl=truth.kl * (weight != 0), entropy=truth.entropy * (weight != 0))
    for name, mine, expected in zip(Result._fields, got, truth, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("index_dtype", ["fp8", "fp8_unrotated"])
def test_in_e4m3_as_one_process(ranks: Any, index_dtype: str) -> None:
    """Against `indexer_kl` on one process, which tests/ops/kl/test_arithmetic.py holds to the definition."""
    options: dict[str, Any] = dict(index_dtype=index_dtype, teacher_dtype="fp8")
    call = dict(which="4", shape=WIDE, workspace_bytes=2**13, dtype=torch.float64, weighted=True, **COMMON)
    got = same(ranks.call("tensor", 4, **call, **options))
    x = make_inputs(WIDE, seed=COMMON["seed"], dtype=torch.float64)
    leaves = [leaf.clone().requires_grad_() for leaf in (x.index_q, x.index_k, x.index_weights)]
    one = indexer_kl(
        x.q, x.k, *leaves, softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end,
        token_weight=x.token_weight, **options,
    )  # fmt: skip
    (COMMON["d_loss"] * one.loss).backward()
    for mine, expected in zip(got, (*one, *(leaf.grad for leaf in leaves)), strict=True):
        assert expected is not None
        torch.testing.assert_close(mine, expected.detach(), rtol=1e-10, atol=1e-13)
