"""Kernels compiled before the first test; random problems of the pinned shape classes; the operator on the GPU."""

from __future__ import annotations

import random
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_indexer import IndexerKL, indexer_kl
from flash_indexer.testing import Inputs, KernelClass, Result, Shape, eager_indexer_kl, random_inputs

pytest.register_assert_rewrite("head_problems", "sparse_problems")
EVALUATIONS = 8
MAX_LOGITS = 48 * 2**20  # elements of [T, H, S], which the reference holds several times in float64


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None if torch.cuda.is_available() else "needs a CUDA device"
    for item in items:
        if item.get_closest_marker("gpu") and reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    """Every kernel compiled, side by side, if the cache lacks it."""
    if torch.cuda.is_available():
        subprocess.run([sys.executable, "-m", "flash_indexer.kernels.cache"], check=True)


@pytest.fixture(scope="session")
def problem() -> Callable[..., Inputs]:
    """problem(seed text, KernelClass, layout): random sizes and intervals, the same for the same text."""
    return make_problem


@pytest.fixture(scope="session")
def measure() -> Callable[..., Result]:
    """measure(inputs, d_loss=..., **options): values, and gradients under the upstream factor."""
    return run


@pytest.fixture(scope="session")
def baseline() -> Callable[..., Result]:
    """baseline(inputs, truth, **options): what float32 gives, see `worst_of_float32`."""
    return worst_of_float32


def worst_of_float32(x: Inputs, truth: Result, **options: Any) -> Result:
    """Each element from that one of eight float32 evaluations which errs most there.

    They are one formula, with the features of queries and keys in another order. A single one may be right by luck to a
    tenth of a rounding error, and at lengths of 1 or 2, or in one row of thousands where softmax and p nearly agree,
    luck is all there is to it.
    """
    generator = torch.Generator().manual_seed(0)
    worst = eager_indexer_kl(x, **options)
    for _ in range(EVALUATIONS - 1):
        d, e = (torch.randperm(y.shape[-1], generator=generator).to(y.device) for y in (x.q, x.index_q))
        moved = dict(q=x.q[..., d], k=x.k[..., d], index_q=x.index_q[..., e], index_k=x.index_k[..., e])
        other = eager_indexer_kl(replace(x, **moved), **options)
        back = e.argsort()
        other = other._replace(d_index_q=other.d_index_q[..., back], d_index_k=other.d_index_k[..., back])
        errors = [[(a.double() - t).abs() for a, t in zip(r, truth, strict=True)] for r in (worst, other)]
        worst = Result(*(torch.where(m >= n, a, b) for m, n, a, b in zip(*errors, worst, other, strict=True)))
    return worst


def make_problem(name: str, sizes: KernelClass, layout: str, *, device: str = "cuda", **fixed: int) -> Inputs:
    seed = zlib.crc32(name.encode())
    rng = random.Random(seed)
    documents, window = make_documents(rng, layout)
    T, S = (sum(lengths) for lengths in zip(*documents, strict=True))
    D, E, IP = sizes
    I = rng.choice((IP, rng.randint(IP // 2 + 1 if IP > 8 else 1, IP)))
    G = rng.choice((1, 1, 2, 3, 8))
    H = G * rng.randint(1, max(min(128, MAX_LOGITS // (T * S)) // G, 1))
    shape = Shape(documents, **(dict(H=H, G=G, I=I) | fixed), D=D, E=E, window=window)
    key_start, key_end = arbitrary_intervals(rng, T, S) if layout == "arbitrary" else shape.intervals()
    generator = torch.Generator(device).manual_seed(seed)
    x = random_inputs(shape, key_start, key_end, generator=generator, dtype=torch.bfloat16)
    return replace(x, index_q=eighths(x.index_q), index_k=eighths(x.index_k))


def eighths(x: Tensor) -> Tensor:
    """Multiples of 1/8: index logits are then exact in float32, in whatever order they are summed.

    [logit > 0] jumps: where a logit is zero but for rounding, a right evaluation may take either side, and a key with
    much weight then makes a difference of percents in its query's gradient. It also makes logits that are exactly zero.
    """
    return (x.float() * 8).round().div(8).to(x.dtype)


def make_documents(rng: random.Random, layout: str) -> tuple[tuple[tuple[int, int], ...], int | None]:
    """(queries, keys) of each document, and the window."""
    if layout == "causal":
        T = rng.randint(100, 700)
        return ((T, T),), None
    if layout == "short":
        return ((rng.choice((1, 2, 15, 63, 127, 128, 129)),) * 2,), None
    if layout == "long":
        T = rng.randint(1100, 2100)
        return ((T, T + rng.choice((0, 0, 37))),), None
    if layout == "arbitrary":
        return ((rng.randint(100, 700), rng.randint(100, 700)),), None
    lengths = [1, *(rng.randint(1, 260) for _ in range(rng.randint(2, 5))), 1, rng.randint(1, 90)]
    window = rng.choice((1, 13, 64, 128, 200)) if layout == "window" else None
    extra = {"cached_prefix": (0, 300), "fewer_keys": (-150, 20)}.get(layout, (0, 0))
    return tuple((n, max(n + rng.randint(*extra), i == 0)) for i, n in enumerate(lengths)), window


def arbitrary_intervals(rng: random.Random, T: int, S: int) -> tuple[Tensor, Tensor]:
    """Both non-decreasing, with stretches of queries that see nothing and ends past their starts by any amount."""
    start = sorted(rng.randint(0, S) for _ in range(T))
    end = sorted(rng.randint(0, S) for _ in range(T))
    end = list(accumulate((max(a, b) for a, b in zip(start, end, strict=True)), max))
    return torch.tensor(start, dtype=torch.int32), torch.tensor(end, dtype=torch.int32)


def run(x: Inputs, *, d_loss: float = 1.0, **options: Any) -> Result:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x.index_q, x.index_k, x.index_weights)]
    result = call(x, leaves, **options)
    (d_loss * result.loss).backward()
    return Result(*(value.detach() for value in result), *(leaf.grad for leaf in leaves))


def call(x: Inputs, leaves: list[Tensor], **options: Any) -> IndexerKL:
    fixed = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end)
    return indexer_kl(x.q, x.k, *leaves, **(fixed | options))
