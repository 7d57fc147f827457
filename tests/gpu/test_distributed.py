"""Context and tensor parallel on two GPUs, by NCCL, against float64 of the whole problem, judged by the ruler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flash_indexer.parallel import context_positions
from flash_indexer.testing import Result, Shape, assert_close, make_inputs, reference_indexer_kl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
DOCUMENTS = ((1, 1), (600, 540), (129, 129), (70, 130))  # 800 queries, of which 60 see nothing, and 800 keys
CASES = {
    "smollm2": (dict(H=6, G=3, D=64, I=8, E=64), "mean"),
    "deepseek": (dict(H=16, G=1, D=576, I=64, E=128), "mean"),
    "padded heads": (dict(H=8, G=4, D=128, I=37, E=32), "mean"),
    "sum_logits": (dict(H=4, G=2, D=192, I=33, E=128), "sum_logits"),
}
COMMON: dict[str, Any] = dict(seed=2, dtype=torch.bfloat16, d_loss=-1.3)


@pytest.fixture(scope="module")
def ranks(start_ranks: Any) -> Any:
    return start_ranks("nccl", 2)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Shape, str]:
    sizes, target = CASES[request.param]
    return Shape(DOCUMENTS, **sizes), target


def judge(got: Result, shape: Shape, baseline: Any, *, target: str, lse: bool, weighted: bool) -> None:
    x = make_inputs(shape, seed=COMMON["seed"], dtype=torch.bfloat16, device="cuda")
    x = replace(x, index_q=eighths(x.index_q), index_k=eighths(x.index_k))
    common = dict(target=target, token_weight=x.token_weight if weighted else None, d_loss=COMMON["d_loss"])
    truth = reference_indexer_kl(x, **common)
    eager = baseline(x, truth, lse=x.lse if lse else None, **common)
    for name, *values in list(zip(Result._fields, got, truth, eager, strict=True))[1:]:
        assert_close(name, *values)
    seen = x.key_end > x.key_start
    weight = x.token_weight.double() if weighted else seen / seen.sum()
    terms = (got.kl.mean(-1) if target == "per_head" else got.kl).double() * weight.cpu()
    assert abs(float(got.loss) - float(terms.sum())) <= 1e-6 * float(terms.abs().sum())


def eighths(x: torch.Tensor) -> torch.Tensor:
    """As the processes do: index logits are then exact in float32, whatever the order of summation."""
    return (x.float() * 8).round().div(8).to(x.dtype)


def join(parts: list[list[Any]], layout: str, T: int) -> Result:
    order = torch.cat([context_positions(T, len(parts), r, layout=layout) for r in range(len(parts))]).argsort()
    return Result(parts[0][0], *(torch.cat([part[n] for part in parts])[order] for n in range(1, 6)))


@pytest.mark.parametrize("wide", [False, True], ids=["gathered", "streamed"])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_context_parallel(ranks: Any, baseline: Any, case: tuple[Shape, str], layout: str, wide: bool) -> None:
    shape, target = case
    options: dict[str, Any] = dict(target=target, lse=wide and target == "mean", weighted=layout == "zigzag")
    call = dict(which="2", layout=layout, shape=shape, wide=wide, workspace_bytes=2**21 if wide else 2**29)
    parts = ranks.call("context", 2, **call, **options, **COMMON)
    assert torch.equal(parts[0][0], parts[1][0])
    judge(join(parts, layout, shape.T), shape, baseline, **options)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_context_parallel_head_by_head(ranks: Any, baseline: Any, layout: str) -> None:
    shape = Shape(DOCUMENTS, H=8, G=2, D=128, I=8, E=64)
    options: dict[str, Any] = dict(target="per_head", weighted=layout == "zigzag")
    parts = ranks.call("context", 2, which="2", layout=layout, shape=shape, wide=True, **options, **COMMON)
    judge(join(parts, layout, shape.T), shape, baseline, lse=False, **options)


@pytest.mark.parametrize("lse", [False, True], ids=["no lse", "lse"])
@pytest.mark.parametrize("workspace", [1, 2**22, 2**29])
def test_tensor_parallel(ranks: Any, baseline: Any, case: tuple[Shape, str], workspace: int, lse: bool) -> None:
    shape, target = case
    options: dict[str, Any] = dict(target=target, lse=lse and target == "mean", weighted=lse)
    call = dict(which="2", shape=shape, workspace_bytes=workspace)
    parts, again = (ranks.call("tensor", 2, **call, **options, **COMMON) for _ in range(2))
    for name, a, b, c in zip(Result._fields, *parts, again[0], strict=True):
        assert torch.equal(a, b), f"{name}: the ranks differ"
        assert torch.equal(a, c), f"{name}: a second run differs"
    judge(Result(*parts[0]), shape, baseline, **options)


@pytest.mark.parametrize("mesh", ["1x2", "2x1"])
def test_context_and_tensor_parallel(ranks: Any, baseline: Any, case: tuple[Shape, str], mesh: str) -> None:
    shape, target = case
    options: dict[str, Any] = dict(target=target, lse=target == "mean", weighted=True)
    call = dict(which=mesh, layout="zigzag", shape=shape, wide=True, workspace_bytes=2**22)
    parts = ranks.call("context", 2, **call, **options, **COMMON)
    judge(join(parts if mesh == "2x1" else parts[:1], "zigzag", shape.T), shape, baseline, **options)
    if mesh == "1x2":
        assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True)), "ranks of the tensor group differ"


@pytest.mark.parametrize("function", ["context", "tensor"])
@pytest.mark.parametrize("only", range(3))
def test_one_gradient_alone(ranks: Any, function: str, only: int) -> None:
    """What is not wanted has no gradient, and its absence does not disturb the scaling of the other."""
    wanted = tuple(n == only for n in range(3))
    call = dict(which="2", function=function, dtype=torch.bfloat16)
    full, part = (ranks.call("without_gradients", 2, **call, wanted=w)[0] for w in ((True,) * 3, wanted))
    for want, got, expected in zip(wanted, part[3:], full[3:], strict=True):
        assert torch.equal(got, expected) if want else got is None
