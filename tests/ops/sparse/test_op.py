"""The public select_keys and sparse_attention: judged by reference.py; their contract with autograd and compilers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_indexer import Selection, SparseAttention, select_keys, sparse_attention
from flash_indexer.ops.sparse import torch_attention
from flash_indexer.ops.sparse.op import _select_keys, _sparse_attention
from flash_indexer.testing import SHAPES


def call(case: Any, tensors: list[Tensor | None], **options: Any) -> SparseAttention:
    fixed = dict(softmax_scale=case.x.softmax_scale, value_dim=case.value_dim)
    return sparse_attention(*tensors[:3], case.selection, **(fixed | options))


def measure(case: Any, **options: Any) -> dict[str, Tensor | None]:
    tensors = case.tensors()
    out, lse = call(case, tensors, **options)
    assert not lse.requires_grad
    out.backward(case.d_out)
    grads = [None if x is None else x.grad for x in tensors[:3]]
    return dict(out=out.detach(), lse=lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True)))


@pytest.mark.parametrize("V", [5, -4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(make_case: Callable[..., Any], shape: str, dtype: torch.dtype, V: int) -> None:
    fewest = 1 if dtype == torch.float64 else 2  # of one key dq is 0, and no rounding of float32 is allowed beside it
    least = 1 if (V > 0) == (dtype == torch.float64) else 3000
    for topk, workspaces in ((fewest, (30_000,)), (7, (least, 2**29)), (500, (30_000, 2**29))):
        case = make_case(shape, dtype=dtype, V=V, topk=topk)
        for workspace_bytes in workspaces:
            case.judge(measure(case, workspace_bytes=workspace_bytes))


def test_gradcheck(make_case: Callable[..., Any]) -> None:
    for V in (3, -2):
        case = make_case("packed", documents=((1, 1), (3, 5), (4, 2)), H=4, G=2, D=4, V=V, topk=2)
        tensors = case.tensors()
        given = [x for x in tensors[:3] if x is not None]
        assert torch.autograd.gradcheck(
            lambda *x, case=case: call(case, [*x, *[None] * (3 - len(x))]).out, given, eps=1e-6
        )


@pytest.mark.parametrize("needs", list(product([True, False], repeat=3)))
@pytest.mark.parametrize("V", [5, -4])
def test_every_subset_of_gradients(
    make_case: Callable[..., Any], V: int, needs: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("smollm2", V=V)
    whole, asked = measure(case), []
    inner = torch_attention.backward
    monkeypatch.setattr(torch_attention, "backward", lambda *x: asked.append(tuple(x[4])) or inner(*x))
    tensors = case.tensors((*needs, False, False, False))
    out = call(case, tensors).out
    wants = [need and x is not None for need, x in zip(needs, tensors, strict=False)]
    assert out.requires_grad == any(wants)
    if any(wants):
        out.backward(case.d_out)
        assert asked == [(*wants, False)]
    for x, want, name in zip(tensors[:3], wants, ("dq", "dk", "dv"), strict=True):
        assert x is None or (x.grad is not None) == want
        assert not want or torch.equal(x.grad, whole[name])


def test_it_accumulates_and_may_run_twice(make_case: Callable[..., Any]) -> None:
    case = make_case("packed")
    once, tensors = measure(case), case.tensors()
    out = call(case, tensors).out
    out.backward(case.d_out, retain_graph=True)
    out.backward(case.d_out)
    for x, name in zip(tensors[:3], ("dq", "dk", "dv"), strict=True):
        torch.testing.assert_close(x.grad, 2 * once[name])


def test_no_second_derivative_and_none_of_lse(make_case: Callable[..., Any]) -> None:
    case = make_case("packed")
    tensors = case.tensors()
    with pytest.raises(RuntimeError, match="sparse_attention: the output has no second derivative"):
        torch.autograd.grad(call(case, tensors).out.sum(), tensors[0], create_graph=True)


def test_two_runs_are_bitwise_equal(make_case: Callable[..., Any]) -> None:
    case = make_case("window", dtype=torch.float32)
    first, second = (measure(case, workspace_bytes=20_000) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def test_autocast_and_strides_change_nothing(make_case: Callable[..., Any]) -> None:
    case = make_case("smollm2", dtype=torch.float32)
    plain = measure(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = measure(case)
    assert all(torch.equal(a, b) for a, b in zip(under.values(), plain.values(), strict=True))
    strided = [torch.stack([x, x], -1)[..., 0].detach().requires_grad_() for x in case.tensors()[:3]]
    slots = Selection(*(torch.stack([x, x], -1)[..., 0] for x in case.selection))
    out, _ = sparse_attention(*strided, slots, softmax_scale=case.x.softmax_scale)
    out.backward(torch.stack([case.d_out, case.d_out], -1)[..., 0])
    for x, name in zip(strided, ("dq", "dk", "dv"), strict=True):
        torch.testing.assert_close(x.grad, plain[name])


@pytest.mark.parametrize("V", [5, -4])
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_opcheck(make_case: Callable[..., Any], with_sinks: bool, needs: tuple[bool, ...], V: int) -> None:
    case = make_case("cached_prefix", dtype=torch.float32, V=V)
    tensors = case.tensors((*needs, False, False, False))
    sinks = torch.randn(case.x.q.shape[1], requires_grad=needs[0]) if with_sinks else None
    arguments = (*tensors[:3], *case.selection, sinks, case.x.softmax_scale, abs(V), True, 50_000)
    torch.library.opcheck(_sparse_attention, arguments)


def test_opcheck_of_select(make_case: Callable[..., Any]) -> None:
    x = make_case("cached_prefix", dtype=torch.float32).x
    for topk in (5, 1000):
        leaves = x.index_q, x.index_k, x.index_weights
        torch.library.opcheck(_select_keys, (*leaves, x.key_start, x.key_end, topk, 1, 2, 50_000))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(make_case: Callable[..., Any], backend: str) -> None:
    torch._dynamo.reset()
    case = make_case("packed")

    def step(q: Tensor, k: Tensor, v: Tensor, index: list[Tensor], start: Tensor, end: Tensor) -> Tensor:
        chosen = select_keys(*index, key_start=start, key_end=end, topk=case.topk)
        return sparse_attention(q.sin(), 2 * k, v, chosen, softmax_scale=0.3).out

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
        tensors = case.tensors()
        out = run(*tensors[:3], list(case.index), case.x.key_start, case.x.key_end)
        out.backward(case.d_out)
        results.append((out.detach(), *(x.grad for x in tensors[:3])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_selection_is_not_differentiable(make_case: Callable[..., Any]) -> None:
    case = make_case("packed")
    index = [x.clone().requires_grad_() for x in case.index]
    chosen = select_keys(*index, **case.intervals, topk=3)
    assert not any(x.requires_grad for x in chosen)


def test_meta_shapes(make_case: Callable[..., Any]) -> None:
    case = make_case("fewer_keys", dtype=torch.float32, V=3)
    index, bounds = (tuple(x.to("meta") for x in y) for y in (case.index, case.intervals.values()))
    chosen = select_keys(*index, key_start=bounds[0], key_end=bounds[1], topk=6)
    assert [tuple(x.shape) for x in chosen] == [(51, 6), (51,), (51, 6)]
    q, k, v = (x.to("meta") for x in (case.x.q, case.x.k, case.v))
    out, lse = sparse_attention(q, k, v, chosen, softmax_scale=0.5)
    assert out.shape == (51, 4, 3) and lse.shape == (51, 4)


def swap(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return values | {name: change(values[name]) if callable(change) else change for name, change in changes.items()}


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(q=lambda x: x[0]), ValueError, r"q must be \[T, H, D\]"),
        (dict(k=lambda x: x[..., 1:]), ValueError, r"k must be \[S, G, D\] = \[\*, \*, 16\]"),
        (dict(k=lambda x: x[:, :2]), ValueError, "H % G == 0, got H=9, G=2"),
        (dict(v=lambda x: x[1:]), ValueError, r"v must be \[S, G, V\] = \[89, 3, 5\], got \[88, 3, 5\]"),
        (dict(v=None), ValueError, "value_dim must be from 1 to D = 16 where v is None .* got None"),
        (dict(v=None, value_dim=17), ValueError, "value_dim must be from 1 to D = 16 .* got 17"),
        (dict(value_dim=5), ValueError, "value_dim must be None where v is given, got 5"),
        (dict(softmax_scale=0.0), ValueError, "softmax_scale must be positive"),
        (dict(workspace_bytes=0), ValueError, "workspace_bytes must be positive"),
        (dict(q=lambda x: x.float()), TypeError, "k must be torch.float32 like q, got torch.float64"),
        (dict(selection=lambda s: s._replace(indices=s.indices.long())), TypeError, "selection.indices must be int32"),
        (dict(selection=lambda s: s._replace(count=s.count.float())), TypeError, "selection.count must be int32"),
        (dict(selection=lambda s: s._replace(scores=s.indices)), TypeError, "selection.scores must be floating point"),
        (
            dict(selection=lambda s: s._replace(count=s.count[1:])),
            ValueError,
            r"selection.count must be \[T\] = \[91\]",
        ),
        (
            dict(selection=lambda s: s._replace(scores=s.scores[:, 1:])),
            ValueError,
            r"selection.scores must be \[T, K\]",
        ),
        (
            dict(selection=lambda s: s._replace(indices=s.indices + 89)),
            ValueError,
            "indices must be from 0 to S - 1 = 88",
        ),
        (dict(selection=lambda s: s._replace(indices=0 * s.indices)), ValueError, "each key once"),
        (
            dict(selection=lambda s: s._replace(indices=s.indices.to("meta"))),
            ValueError,
            "must be on cpu like the queries",
        ),
    ],
)
def test_refusals_of_attention(
    make_case: Callable[..., Any], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    case = make_case("packed")
    values = dict(q=case.x.q, k=case.x.k, v=case.v, selection=case.selection, softmax_scale=0.5)
    with pytest.raises(error, match=message):
        sparse_attention(**swap(values | {n: None for n in changes if n not in values}, **changes))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(topk=0), ValueError, "select_keys: topk must be at least 1, got 0"),
        (dict(topk=2.0), TypeError, "topk must be an integer, got 2.0"),
        (dict(always=(3, 5)), ValueError, "always must hold at most topk = 7 keys together, got 3 first and 5 last"),
        (dict(always=(-1, 5)), ValueError, "always must be .first, last., two counts of keys from 0"),
        (dict(always=3), ValueError, "always must be .first, last., two counts"),
        (dict(workspace_bytes=-1), ValueError, "workspace_bytes must be positive"),
        (dict(index_k=lambda x: x[:, 1:]), ValueError, r"index_k must be \[S, E\] = \[\*, 32\]"),
        (dict(key_end=lambda x: x.long()), TypeError, "key_end must be int32"),
        (dict(key_end=lambda x: x + 1000), ValueError, "key_end must be at most S = 89"),
        (dict(index_weights=lambda x: x.float()), TypeError, "index_weights must be torch.float64 like index_q"),
    ],
)
def test_refusals_of_select(
    make_case: Callable[..., Any], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    case = make_case("packed")
    names = ("index_q", "index_k", "index_weights")
    values = dict(zip(names, case.index, strict=True)) | case.intervals | dict(topk=7)
    with pytest.raises(error, match=message):
        select_keys(**swap(values | {n: None for n in changes if n not in values}, **changes))
