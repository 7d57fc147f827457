"""dsa_attention context and tensor parallel on two GPUs, by NCCL, against float64 of the whole, by the ruler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sparse_problems import hold_to_float64
from torch import Tensor

from flash_indexer import select_keys
from flash_indexer.ops import Selection
from flash_indexer.parallel import context_positions
from flash_indexer.testing import Inputs, Shape, make_inputs
from flash_indexer.testing.sparse import make_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
DOCUMENTS = ((1, 1), (600, 540), (129, 129), (70, 130))  # 800 queries, of which 60 see nothing, and 800 keys
CASES = {
    "bits": (Shape(DOCUMENTS, H=8, G=4, D=64, I=8, E=64), 64),
    "bits, one key head": (Shape(DOCUMENTS, H=8, G=1, D=128, I=4, E=128), 128),
    "absorbed": (Shape(DOCUMENTS, H=32, G=1, D=576, I=8, E=128), -512),
}
OF_TOKENS = ("dq", "dk", "dv", "d_index_q", "d_index_k", "d_index_weights", "out", "lse", "kl")
OF_HEADS = ("out", "lse", "dq", "dk", "dv")
COMMON: dict[str, Any] = dict(seed=2, d_loss=-1.3, topk=40, dtype=torch.bfloat16)
Part = dict[str, Tensor | None]


@pytest.fixture(scope="module")
def ranks(start_ranks: Any) -> Any:
    return start_ranks("nccl", 2)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Shape, int]:
    return CASES[request.param]


def join_rows(parts: list[Part], layout: str) -> Part:
    """Of ranks that hold tokens, in global order."""
    order = torch.cat([context_positions(800, 2, rank, layout=layout) for rank in range(2)]).argsort()
    names = (*OF_TOKENS, *Selection._fields)
    return {n: None if parts[0][n] is None else torch.cat([part[n] for part in parts])[order] for n in names}


def join_heads(parts: list[Part], one_key_head: bool) -> Part:
    """Of ranks that hold heads; what is of no head is the same on all, to the bit."""
    joined: Part = {}
    for name in (*OF_TOKENS, *Selection._fields):
        first, second = parts[0][name], parts[1][name]
        if name in ("dk", "dv") and one_key_head and first is not None:
            joined[name] = (first.float() + second.float()).to(first.dtype)
        elif name in OF_HEADS and first is not None:
            joined[name] = torch.cat((first, second), 1)
        else:
            assert first is second is None or torch.equal(first, second), f"the ranks differ in {name}"
            joined[name] = first
    return joined


def judge(got: Part, shape: Shape, V: int, weighted: bool) -> None:
    x = make_inputs(shape, seed=COMMON["seed"], dtype=torch.bfloat16, device="cuda")
    x = replace(x, index_q=eighths(x.index_q), index_k=eighths(x.index_k))
    on_gpu = {name: None if y is None else y.cuda() for name, y in got.items()}
    selection = Selection(*(on_gpu.pop(name) for name in Selection._fields))
    alone = whole_selection(x)
    assert all(torch.equal(a, b) for a, b in zip(selection, alone, strict=True)), "a rank selects other keys"
    generator = torch.Generator().manual_seed(COMMON["seed"] + 2)
    d_out = torch.randn(shape.T, shape.H, abs(V), generator=generator, dtype=torch.float64).bfloat16().cuda()
    v = None if V < 0 else make_values(x, V, seed=COMMON["seed"] + 1)
    weight = x.token_weight if weighted else None
    hold_to_float64(on_gpu, selection, x, v, d_out, d_loss=COMMON["d_loss"], token_weight=weight)


def whole_selection(x: Inputs) -> Selection:
    index = x.index_q, x.index_k, x.index_weights
    return select_keys(*index, key_start=x.key_start, key_end=x.key_end, topk=COMMON["topk"])


def eighths(x: Tensor) -> Tensor:
    """As the processes do: index logits are then exact in float32, whatever the order of summation."""
    return (x.float() * 8).round().div(8).to(x.dtype)


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_context_parallel(ranks: Any, case: tuple[Shape, int], layout: str, mode: str) -> None:
    shape, V = case
    options: dict[str, Any] = dict(V=V, weighted=layout == "zigzag")
    parts = ranks.call("sparse", 2, which="2", layout=layout, shape=shape, mode=mode, **options, **COMMON)
    judge(join_rows(parts, layout), shape, **options)


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("workspace", [2**22, 2**29])
def test_tensor_parallel(ranks: Any, case: tuple[Shape, int], workspace: int, mode: str) -> None:
    shape, V = case
    options: dict[str, Any] = dict(V=V, weighted=workspace == 2**22)
    call = dict(which="2", layout=None, shape=shape, mode=mode, workspace_bytes=workspace)
    parts, again = (ranks.call("sparse", 2, **call, **options, **COMMON) for _ in range(2))
    for name, value in parts[0].items():
        assert value is again[0][name] is None or torch.equal(value, again[0][name]), f"{name}: a second run differs"
    judge(join_heads(parts, shape.G == 1), shape, **options)
