"""Tensor parallel on 2 and 4 processes against one, by the ruler."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flash_indexer.testing import SHAPES, Result, Shape

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
