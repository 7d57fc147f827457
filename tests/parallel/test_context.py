"""Context parallel on 2 and 4 processes against one, by the ruler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flash_indexer.parallel import context_positions
from flash_indexer.testing import Result, Shape

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
