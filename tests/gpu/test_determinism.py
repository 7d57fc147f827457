"""The same bits every time, on any stream, however often; chunks change the bits but not the result."""

from __future__ import annotations

import pytest
import torch

from flash_indexer import indexer_kl
from flash_indexer.ops.kl.plan_sizes import BYTES_PER_TILE
from flash_indexer.testing import KernelClass, Result, assert_close, eager_indexer_kl, reference_indexer_kl

pytestmark = pytest.mark.gpu
SMOLLM2, DEEPSEEK, NARROW = KernelClass(64, 64, 8), KernelClass(576, 128, 64), KernelClass(128, 32, 64)
CASES = {
    "smollm2": (SMOLLM2, "long", dict(H=9, G=3, I=8), "mean"),
    "deepseek": (DEEPSEEK, "causal", dict(H=32, G=1, I=64), "mean"),
    "padded heads": (NARROW, "documents", dict(H=16, G=8, I=37), "mean"),
    "per_head": (KernelClass(128, 64, 8), "long", dict(H=12, G=3, I=12), "per_head"),
    "sum_logits": (KernelClass(96, 128, 8), "long", dict(H=4, G=1, I=5), "sum_logits"),
}


def assert_same_bits(got: Result, expected: Result) -> None:
    for name, a, b in zip(Result._fields, got, expected, strict=True):
        assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} elements differ"


@pytest.mark.parametrize("case", CASES)
def test_a_hundred_runs_are_bitwise_equal(case, problem, measure):
    sizes, layout, fixed, target = CASES[case]
    x = problem(case, sizes, layout, **fixed)
    first = measure(x, target=target)
    for _ in range(99):
        assert_same_bits(measure(x, target=target), first)


@pytest.mark.parametrize("tiles", [1, 40])
@pytest.mark.parametrize("case", CASES)
def test_chunks(case, tiles, problem, measure):
    sizes, layout, fixed, target = CASES[case]
    x = problem(case, sizes, layout, **fixed)
    options = dict(target=target, token_weight=x.token_weight)
    chunked = measure(x, workspace_bytes=tiles * BYTES_PER_TILE, **options)
    assert_same_bits(measure(x, workspace_bytes=tiles * BYTES_PER_TILE, **options), chunked)
    truth, eager = reference_indexer_kl(x, **options), eager_indexer_kl(x, **options)
    for got in (chunked, measure(x, **options)):
        for name, *tensors in list(zip(Result._fields, got, truth, eager, strict=True))[1:]:
            assert_close(name, *tensors)


def test_another_stream_and_a_busy_device(problem, measure):
    x = problem("stream", SMOLLM2, "long", H=9, G=3, I=8)
    first = measure(x)
    noise = torch.randn(4096, 4096, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        noise @ noise
        with torch.cuda.stream(stream):
            got = measure(x)
        torch.cuda.current_stream().wait_stream(stream)
        assert_same_bits(got, first)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
)
def test_wanted_gradients_do_not_change_one_another(needs, problem, measure):
    x = problem("needs", NARROW, "documents", H=16, G=8, I=37)
    whole = measure(x)
    tensors = (x.index_q, x.index_k, x.index_weights)
    leaves = [leaf.clone().requires_grad_(bool(need)) for leaf, need in zip(tensors, needs, strict=True)]
    intervals = dict(key_start=x.key_start, key_end=x.key_end)
    result = indexer_kl(x.q, x.k, *leaves, softmax_scale=x.softmax_scale, **intervals)
    result.loss.backward()
    for leaf, need, expected in zip(leaves, needs, whole[3:], strict=True):
        assert torch.equal(leaf.grad, expected) if need else leaf.grad is None
