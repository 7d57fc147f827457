"""Sinks, a further logit of each head's softmax: values and gradients by the definition, in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_indexer import dsa_attention, reference, sparse_attention
from flash_indexer.testing import SHAPES
from flash_indexer.testing.sparse import selection_mask

MODES = ("forward", "selects again", "backward")
D_LOSS = -1.7


def sinks_of(case: Any) -> Tensor:
    """Below, among and above the keys' logsumexps, so that sinks take nearly nothing and nearly all."""
    H = case.x.q.shape[1]
    return torch.linspace(-3.0, 4.0, H, dtype=torch.float64).to(case.x.q.dtype)


def definition(case: Any, tensors: list[Tensor | None], sinks: Tensor) -> tuple[Tensor, ...]:
    """out, lse, loss and kl, whose graph reaches the given tensors."""
    q, k, v, *index = tensors
    assert q is not None and k is not None
    selected = selection_mask(case.selection, len(case.x.k))
    scale = case.x.softmax_scale
    values = k[..., : case.value_dim] if v is None else v
    out, lse = reference.sparse_attention(q, k, values, selected, scale, sinks)
    loss, kl = reference.sparse_indexer_kl(
        q.detach(), k.detach(), *index, selected, softmax_scale=scale, sinks=sinks.detach()
    )
    return out, lse, loss, kl


def gradients(tensors: list[Tensor | None], sinks: Tensor) -> list[Tensor | None]:
    return [None if x is None else x.grad for x in (*tensors, sinks)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_definition(make_case: Callable[..., Any], shape: str, mode: str) -> None:
    for V, workspace_bytes in ((5, 2**29), (-4, 30_000)):
        case = make_case(shape, V=V)
        wanted, sinks = case.tensors(), sinks_of(case).requires_grad_()
        out, lse, loss, kl = definition(case, wanted, sinks)
        torch.autograd.backward([out, D_LOSS * loss], [case.d_out, torch.ones_like(loss)])
        tensors, own = case.tensors(), sinks_of(case).requires_grad_()
        options = dict(
            softmax_scale=case.x.softmax_scale, value_dim=case.value_dim, topk=case.topk, sinks=own,
            workspace_bytes=workspace_bytes, save_selection=mode != "selects again", **case.intervals,
        )  # fmt: skip
        if mode == "backward":
            found = torch.zeros(len(case.x.q), dtype=torch.float64)
            scale = torch.tensor(D_LOSS, dtype=torch.float64)
            got = dsa_attention(*tensors, kl="backward", kl_out=found, kl_scale=scale, **options)
            got.out.backward(case.d_out)
        else:
            got = dsa_attention(*tensors, **options)
            torch.autograd.backward([got.out, D_LOSS * got.loss], [case.d_out, torch.ones_like(got.loss)])
            torch.testing.assert_close(got.loss, loss, rtol=1e-10, atol=1e-12)
        pairs = [(got.out, out), (got.lse, lse), (got.kl, kl)]
        pairs += zip(gradients(tensors, own), gradients(wanted, sinks), strict=True)
        for mine, right in pairs:
            assert (mine is None) == (right is None)
            if right is not None:
                torch.testing.assert_close(mine, right.detach(), rtol=1e-9, atol=1e-11)


def test_gradcheck_and_who_wants_a_gradient(make_case: Callable[..., Any]) -> None:
    case = make_case("packed", documents=((1, 1), (3, 5), (4, 2)), H=4, G=2, D=4, V=3, topk=2)
    q, k, v = case.tensors()[:3]
    sinks = sinks_of(case).requires_grad_()

    def attended(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return sparse_attention(q, k, v, case.selection, softmax_scale=case.x.softmax_scale, sinks=sinks).out

    assert torch.autograd.gradcheck(attended, [q, k, v, sinks], eps=1e-6)
    alone = attended(q.detach(), k.detach(), v.detach(), sinks)
    (found,) = torch.autograd.grad(alone, sinks, case.d_out)
    (whole,) = torch.autograd.grad(attended(q, k, v, sinks), sinks, case.d_out)
    assert torch.equal(found, whole)
    frozen = attended(q, k, v, sinks.detach())
    frozen.backward(case.d_out)
    assert sinks.grad is None and q.grad is not None


def test_a_query_without_keys_leaves_all_to_its_sink(make_case: Callable[..., Any]) -> None:
    case = make_case("one_head", documents=((3, 0),), topk=3)
    sinks = sinks_of(case).requires_grad_()
    q, k, v = case.tensors()[:3]
    out, lse = sparse_attention(q, k, v, case.selection, softmax_scale=1.0, sinks=sinks)
    out.backward(case.d_out)
    assert bool((out == 0).all()) and torch.equal(lse, sinks.detach().expand_as(lse))
    assert bool((q.grad == 0).all()) and bool((sinks.grad == 0).all())


def test_a_models_dtype_and_a_weak_sink(make_case: Callable[..., Any]) -> None:
    """Sinks come in the dtype of the model's parameters; one that takes nothing changes nothing."""
    case = make_case("packed", dtype=torch.float32)
    q, k, v = case.tensors()[:3]
    plain = sparse_attention(q, k, v, case.selection, softmax_scale=0.3)
    weak = torch.full((q.shape[1],), -200.0, dtype=torch.bfloat16, requires_grad=True)
    with_them = sparse_attention(q, k, v, case.selection, softmax_scale=0.3, sinks=weak)
    some = case.selection.count > 0
    assert torch.equal(plain.out, with_them.out) and torch.equal(plain.lse[some], with_them.lse[some])
    with_them.out.backward(case.d_out)
    assert weak.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("sinks", "message"),
    [
        (torch.zeros(3), r"sinks must be \[H\] = \[4\], got \[3\]"),
        (torch.zeros(4, 1), r"sinks must be \[H\], got \[4, 1\]"),
        (torch.zeros(4, dtype=torch.int32), "sinks must be floating point on cpu like the queries, got torch.int32"),
    ],
)
def test_rejections(make_case: Callable[..., Any], sinks: Tensor, message: str) -> None:
    case = make_case("packed", H=4, G=2)
    q, k, v, *index = case.tensors()
    with pytest.raises(ValueError, match=f"sparse_attention: {message}"):
        sparse_attention(q, k, v, case.selection, softmax_scale=1.0, sinks=sinks)
    with pytest.raises(ValueError, match=f"dsa_attention: {message}"):
        dsa_attention(q, k, v, *index, softmax_scale=1.0, topk=3, sinks=sinks, kl="backward", **case.intervals)
