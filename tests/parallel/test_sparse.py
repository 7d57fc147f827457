"""dsa_attention context parallel, tensor parallel and both, on 2 and 4 processes against one, by the ruler."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_indexer.ops import Selection
from flash_indexer.parallel import context_positions
from flash_indexer.testing import Shape, assert_close, make_inputs
from flash_indexer.testing.sparse import eager_dsa, make_values, reference_dsa, selection_mask

# documents of length 1, queries that see nothing, odd lengths, and documents shorter than K; 80 tokens: 4 and 8 pieces
PACKED = Shape(((1, 1), (33, 29), (5, 0), (1, 1), (27, 36), (13, 13)), H=6, G=3, D=16, I=5, E=32)
LATENT = Shape(((17, 17), (1, 1), (62, 62)), H=5, G=1, D=24, I=3, E=32)
FOUR = Shape(((41, 41), (39, 39)), H=8, G=4, D=16, I=4, E=32)
ROWS = ("out", "lse", "kl", "dq", "dk", "dv", "d_index_q", "d_index_k", "d_index_weights", *Selection._fields)
HEADS = ("out", "lse", "dq", "dk", "dv")
COMMON: dict[str, Any] = dict(seed=3, d_loss=-1.7, topk=9)
Part = dict[str, Any]


def join_rows(parts: list[Part], layout: str, T: int) -> Part:
    """Results of ranks that hold tokens, in global order; the loss is the same on all."""
    world = len(parts)
    order = torch.cat([context_positions(T, world, rank, layout=layout) for rank in range(world)]).argsort()
    joined = {n: None if parts[0][n] is None else torch.cat([part[n] for part in parts])[order] for n in ROWS}
    losses = [part["loss"] for part in parts]
    assert losses == [None] * world or all(torch.equal(x, losses[0]) for x in losses)
    return joined | dict(loss=losses[0])


def join_heads(parts: list[Part], G: int) -> Part:
    """Results of ranks that hold heads; all that is not of heads is the same on all to the bit."""
    joined = {}
    for name, first in parts[0].items():
        values = [part[name] for part in parts]
        if first is None:
            joined[name] = None
        elif name in ("dk", "dv") and G == 1:
            joined[name] = torch.stack(values).sum(0)
        elif name in HEADS:
            joined[name] = torch.cat(values, 1)
        else:
            assert all(torch.equal(x, first) for x in values), f"ranks differ in {name}"
            joined[name] = first
    return joined


def judge(
    got: Part, shape: Shape, V: int, dtype: torch.dtype, weighted: bool, always: tuple[int, int] = (0, 0)
) -> None:
    """float64 to 1e-10, float32 by the ruler, both against the definition of the whole problem in float64."""
    from flash_indexer import select_keys

    x = make_inputs(shape, seed=COMMON["seed"], dtype=dtype)
    alone = select_keys(
        x.index_q,
        x.index_k,
        x.index_weights,
        key_start=x.key_start,
        key_end=x.key_end,
        topk=COMMON["topk"],
        always=always,
    )
    assert all(torch.equal(got[n], y) for n, y in alone._asdict().items()), "a rank selects other keys"
    generator = torch.Generator().manual_seed(COMMON["seed"] + 2)
    d_out = torch.randn(shape.T, shape.H, abs(V), generator=generator, dtype=torch.float64).to(dtype)
    v = None if V < 0 else make_values(x, V, seed=COMMON["seed"] + 1)
    options = dict(
        d_out=d_out, value_dim=-V if V < 0 else None, token_weight=x.token_weight if weighted else None,
        d_loss=COMMON["d_loss"],
    )  # fmt: skip
    selected = selection_mask(alone, shape.S)
    truth = reference_dsa(x, v, selected, **options)
    eager = None if dtype == torch.float64 else eager_dsa(x, v, selected, **options)
    for name in truth._fields:
        value, right = got.get(name), getattr(truth, name)
        if right is None or (name == "loss" and value is None):
            assert value is None
        elif eager is None:
            torch.testing.assert_close(value, right, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")
        elif name == "loss":
            assert abs(float(value) - float(right)) <= 1e-5 * float(truth.kl.abs().mean())
        else:
            assert_close(name, value, right, getattr(eager, name))


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("shape, V", [(PACKED, 7), (LATENT, -16)])
def test_context_parallel(ranks: Any, shape: Shape, V: int, layout: str, mode: str) -> None:
    for world, dtype, workspace in ((2, torch.float32, 2**15), (4, torch.float64, 2**29)):
        options: dict[str, Any] = dict(dtype=dtype, V=V, weighted=world == 2)
        call = dict(which=str(world), layout=layout, shape=shape, mode=mode, workspace_bytes=workspace)
        parts = ranks.call("sparse", world, **call, **options, **COMMON)
        judge(join_rows(parts, layout, shape.T), shape, **options)


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("shape, V", [(FOUR, 7), (LATENT, -16)])
def test_tensor_parallel(ranks: Any, shape: Shape, V: int, mode: str) -> None:
    """LATENT has five heads: the ranks hold different numbers, and k is the same on all."""
    few = 1 if mode == "forward" else 2**29  # bytes; one query a chunk, or all
    for world, dtype, workspace in ((2, torch.float32, 2**13), (4, torch.float64, few)):
        options: dict[str, Any] = dict(dtype=dtype, V=V, weighted=world == 2, always=(1, 2))
        call = dict(which=str(world), layout=None, shape=shape, mode=mode, workspace_bytes=workspace)
        parts = ranks.call("sparse", world, **call, **options, **COMMON)
        judge(join_heads(parts, shape.G), shape, **options)


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("shape, V", [(FOUR, 7), (LATENT, -16)])
def test_context_and_tensor_parallel(ranks: Any, shape: Shape, V: int, mode: str) -> None:
    options: dict[str, Any] = dict(dtype=torch.float32, V=V, weighted=True)
    call = dict(which="mesh", layout="zigzag", shape=shape, mode=mode, workspace_bytes=2**14)
    parts = ranks.call("sparse", 4, **call, **options, **COMMON)
    rows = [join_heads(pair, shape.G) for pair in (parts[:2], parts[2:])]
    judge(join_rows(rows, "zigzag", shape.T), shape, **options)


@pytest.mark.parametrize("wanted", [needs for n, needs in enumerate(product([True, False], repeat=6)) if n % 9 == 4])
@pytest.mark.parametrize("mode, layout", [("forward", "zigzag"), ("backward", None)])
def test_what_requires_no_gradient_gets_none(
    pair: Any, mode: str, layout: str | None, wanted: tuple[bool, ...]
) -> None:
    common = dict(which="2", layout=layout, shape=FOUR, mode=mode, dtype=torch.float64, V=7, weighted=False, **COMMON)
    whole = pair.call("sparse", 2, **common)
    names = ("dq", "dk", "dv", "d_index_q", "d_index_k", "d_index_weights")
    for part, full in zip(pair.call("sparse", 2, wanted=wanted, **common), whole, strict=True):
        for name, want in zip(names, wanted, strict=True):
            assert (part[name] is not None) == want
            assert not want or torch.equal(part[name], full[name])


def test_no_query_of_any_rank_sees_a_key(pair: Any) -> None:
    shape = Shape(((8, 0), (0, 8)), H=2, G=1, D=8, I=2, E=8)
    for layout, mode in product(["zigzag", None], ["forward", "backward"]):
        common: dict[str, Any] = dict(seed=0, d_loss=1.0, topk=3, which="2", dtype=torch.float64, V=3, weighted=False)
        for part in pair.call("sparse", 2, layout=layout, shape=shape, mode=mode, **common):
            zero: list[Tensor] = [
                part[n] for n in ("out", "kl", "dq", "dk", "dv", "d_index_q", "d_index_k", "d_index_weights")
            ]
            assert all(bool((x == 0).all()) for x in zero) and bool((part["lse"] == -torch.inf).all())


@pytest.mark.parametrize("function", ["context", "tensor"])
def test_a_second_backward_is_refused_where_it_counts_the_kl(pair: Any, function: str) -> None:
    for told in pair.call("again_sparse", 2, which="2", function=function):
        assert len(told) == 2 and "backward already ran" in told[0] and "no second derivative" in told[1]
        assert all(text.startswith(f"{function}_parallel_dsa_attention: ") for text in told)


@pytest.mark.parametrize("function", ["context", "tensor"])
@pytest.mark.parametrize(
    "options, told",
    [
        (dict(topk=0), "ValueError: {}: topk must be at least 1, got 0"),
        (dict(which="none"), "TypeError: {}: group must be a process group"),
        (dict(which="1x2"), None),
        (dict(kl="sideways"), "ValueError: {}: kl must be 'forward' or 'backward', got 'sideways'"),
        (dict(always=(2, 2)), "ValueError: {}: always must hold at most topk = 3 keys together"),
        (dict(value_dim=3), "ValueError: {}: value_dim must be None where v is given"),
    ],
)
def test_bad_calls_are_refused_on_every_rank(
    pair: Any, function: str, options: dict[str, Any], told: str | None
) -> None:
    name = f"{function}_parallel_dsa_attention"
    if told is None:
        told = "nothing" if function == "context" else "ValueError: {}: group must be a process group or a mesh of one"
    for answer in pair.call("refused_sparse", 2, **(dict(which="2", function=function) | options)):
        assert answer.startswith(told.format(name)), answer


@pytest.mark.parametrize(
    "options, told",
    [
        (dict(layout="spiral"), "layout must be one of 'zigzag', 'contiguous', got 'spiral'"),
        (dict(rows=7), "q must have a multiple of 2 rows on each rank, its pieces of the sequence, got 7"),
    ],
)
def test_bad_layouts_are_refused(pair: Any, options: dict[str, Any], told: str) -> None:
    for answer in pair.call("refused_sparse", 2, which="2", function="context", **options):
        assert answer.startswith(f"ValueError: context_parallel_dsa_attention: {told}"), answer
