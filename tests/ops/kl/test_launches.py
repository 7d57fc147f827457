"""What is launched, held against the kernels' own signatures: number, kind, dtype and shape of every argument."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_indexer.kernels import catalog
from flash_indexer.ops import Problem, launch, make_stages, run_stages
from flash_indexer.ops.kl import gpu_body
from flash_indexer.testing import Shape, make_inputs

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tilelang") is None, reason="needs tilelang")
CASES: dict[str, dict[str, Any]] = {  # heads; target, needs, workspace
    "padded heads": dict(D=64, E=32, I=3),
    "one key head's": dict(D=128, E=64, I=16),
    "masks in two halves": dict(D=64, E=64, I=37, workspace=1),
    "index_q alone": dict(D=64, E=32, I=3, needs=(True, False, False)),
    "no gradients": dict(D=64, E=32, I=3, needs=(False,) * 3),
    "sum_logits": dict(D=64, E=32, I=3, target="sum_logits"),
    "wide heads": dict(D=96, E=32, I=3),
    "a document and more": dict(D=64, E=32, I=3, documents=((300, 300), (90, 0), (33, 33))),
}
FUSED = ("padded heads", "one key head's", "masks in two halves", "index_q alone", "a document and more")


@functools.cache
def signature(name: str, **static: int) -> list[tuple[str, str, tuple[object, ...] | None]]:
    """Of each parameter its name and dtype, and of a tensor its shape: numbers, or names of what varies."""
    function, _ = catalog.program(catalog.kernel(name, **static))
    found = []
    for parameter in function.params:
        tensor = function.buffer_map.get(parameter)
        dtype = str(parameter.dtype if tensor is None else tensor.dtype)
        shape = None if tensor is None else tuple(getattr(n, "value", str(n)) for n in tensor.shape)
        found.append((parameter.name, dtype, shape))
    return found


def check(name: str, static: dict[str, int], arguments: tuple[Any, ...]) -> None:
    wanted = signature(name, **static)
    assert len(arguments) == len(wanted), f"{name}: {len(arguments)} arguments for {[x[0] for x in wanted]}"
    sizes: dict[str, int] = {}
    for (parameter, dtype, shape), argument in zip(wanted, arguments, strict=True):
        said = f"{name}, {static}: {parameter}"
        if shape is None:
            assert isinstance(argument, int if dtype.startswith("int") else (int, float)), said
            continue
        assert isinstance(argument, Tensor) and argument.is_contiguous(), said
        assert str(argument.dtype) == f"torch.{dtype}", f"{said} is {argument.dtype}"
        assert argument.ndim == len(shape), f"{said} is {list(argument.shape)}, must be {shape}"
        for n, size in zip(argument.shape, shape, strict=True):
            expected = sizes.setdefault(size, n) if isinstance(size, str) else size
            assert n == expected, f"{said} is {list(argument.shape)}, must be {shape} with {sizes}"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is launched; nothing is computed."""
    names: list[str] = []

    def load(name: str, **static: int) -> Callable[..., None]:
        assert catalog.kernel(name, **static) in prepared, f"{name} would be compiled late"
        names.append(name)
        return lambda *arguments: check(name, static, arguments)

    def prepare(kernels: list[launch.Wanted]) -> None:
        prepared.update(catalog.kernel(name, **static) for name, static in kernels)

    prepared: set[catalog.Kernel] = set()

    monkeypatch.setattr(launch, "load", load)
    monkeypatch.setattr(launch, "prepare", prepare)
    monkeypatch.setattr(launch, "processors", lambda device: 4)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(launch, "side_stream", lambda device: None)
    return names


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lse", [True, False])
def test_every_launch_is_one_that_its_kernel_takes(case: str, lse: bool, launched: list[str]) -> None:
    heads = dict(CASES[case])
    target, needs = heads.pop("target", "mean"), heads.pop("needs", (True,) * 3)
    workspace, documents = heads.pop("workspace", 2**29), heads.pop("documents", ((300, 300),))
    x = make_inputs(Shape(documents, H=4, G=2, **heads), seed=1, dtype=torch.bfloat16)
    x = replace(x, key_start=x.key_start.int(), key_end=x.key_end.int())
    problem = Problem(
        x.q, x.k, x.index_q, x.index_k, x.index_weights, x.lse if lse else None, x.key_start, x.key_end,
        x.token_weight, x.softmax_scale, target, workspace, needs,
    )  # fmt: skip
    sums = run_stages(make_stages(problem, "sm_90", 0, 1, None), x.q.device)
    assert ("kl_gradients" in launched) == (case in FUSED)
    assert ("rows_warp" in launched) == (case not in FUSED)
    if any(needs) and target == "mean":
        gpu_body.finish(sums.d_index_k, x.token_weight, sums.kl, x.index_k)
        assert launched[-1] == "finish"
