"""Losses that know their gradients: with the custom operator where somebody follows the call, without it elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flash_indexer import IndexerKL, indexer_kl
from flash_indexer.ops import attention_forward, quantize
from flash_indexer.ops.kl import op
from flash_indexer.ops.known import is_followed, known_loss
from flash_indexer.ops.worklists import cached
from flash_indexer.testing import SHAPES, Inputs, make_inputs


class Names(TorchDispatchMode):
    """Notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.called.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def inputs() -> Inputs:
    return make_inputs(SHAPES["packed"], seed=0, dtype=torch.float64)


def call(x: Inputs, leaves: list[Tensor]) -> IndexerKL:
    intervals = dict(key_start=x.key_start, key_end=x.key_end)
    return indexer_kl(x.q, x.k, *leaves, softmax_scale=x.softmax_scale, **intervals)


def leaves_of(x: Inputs) -> list[Tensor]:
    return [leaf.clone().requires_grad_() for leaf in (x.index_q, x.index_k, x.index_weights)]


def test_the_operator_and_the_direct_call_give_the_same_bits(inputs: Inputs) -> None:
    found = []
    for mode in (None, Names()):
        leaves = leaves_of(inputs)
        with mode or torch.enable_grad():
            result = call(inputs, leaves)
        (-1.5 * result.loss).backward()
        found.append([result.loss.detach(), result.kl, result.entropy, *(leaf.grad for leaf in leaves)])
        assert not result.kl.requires_grad and not result.entropy.requires_grad
        if mode is not None:
            assert "flash_indexer.indexer_kl.default" in mode.called
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_direct_call_leaves_the_operator_out(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_indexer_kl", lambda *arguments: pytest.fail("the operator was called"))
    leaves = leaves_of(inputs)
    call(inputs, leaves).loss.backward()  # type: ignore[no-untyped-call]
    assert all(leaf.grad is not None for leaf in leaves)
    with torch.no_grad():
        assert not call(inputs, leaves).loss.requires_grad
    with torch.inference_mode():
        assert torch.isfinite(call(inputs, leaves).loss)


def test_a_second_backward_of_the_direct_call_is_refused(inputs: Inputs) -> None:
    loss = call(inputs, leaves_of(inputs)).loss
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match=r"backward already ran and scaled the gradients in place"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_a_loss_without_gradients_may_be_added_to(inputs: Inputs) -> None:
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = call(inputs, [leaf.detach() for leaf in leaves_of(inputs)]).loss
    loss += weight
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and weight.grad == 1


def test_lists_are_made_on_the_cpu_whatever_the_default_device(inputs: Inputs) -> None:
    want = call(inputs, leaves_of(inputs)).loss
    intervals = dict(key_start=inputs.key_start.clone(), key_end=inputs.key_end.clone())  # which no list is kept of
    with torch.device("meta"):
        assert is_followed([inputs.q])
        assert torch.equal(call(replace(inputs, **intervals), leaves_of(inputs)).loss, want)
        kept = cached(intervals["key_start"], intervals["key_end"], 10**6, "a list", lambda start, end: torch.zeros(2))
    assert kept.device.type == "cpu"


def test_intervals_and_scales_of_a_kind_of_their_own_are_seen(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Tensor | None]()
    monkeypatch.setattr(op.known, "is_followed", lambda tensors: asked.extend(tensors))
    narrow = replace(inputs, **{name: getattr(inputs, name).float() for name in ("q", "k")})
    leaves = [leaf.float() for leaf in (inputs.index_q, inputs.index_k, inputs.index_weights)]
    q, k = (quantize(x) for x in (narrow.q, narrow.k))
    options = dict(softmax_scale=0.3, key_start=inputs.key_start, key_end=inputs.key_end)
    indexer_kl(q, k, *leaves, **options, teacher_dtype="fp8_unrotated")
    wanted = [*q, *k, *leaves, inputs.key_start, inputs.key_end]
    assert all(any(x is y for y in asked) for x in wanted)


def traced(check: Callable[[Tensor], Tensor]) -> object:
    return torch.jit.trace(check, torch.ones(2), check_trace=False)


@pytest.mark.parametrize(
    "follow",
    [
        lambda check: torch.vmap(check)(torch.ones(2, 2)),
        lambda check: torch.func.grad(lambda x: check(x).sum())(torch.ones(2)),
        lambda check: torch.compile(check, backend="eager")(torch.ones(2)),
        lambda check: check(torch.ones(2, device="meta")),
        pytest.param(traced, marks=pytest.mark.filterwarnings("ignore")),
    ],
    ids=["vmap", "grad", "compile", "meta", "trace"],
)
def test_who_follows_a_call(follow: Callable[[Callable[[Tensor], Tensor]], object]) -> None:
    answers = []

    def check(x: Tensor) -> Tensor:
        answers.append(is_followed([None, x]))
        return x * 2

    follow(check)
    assert answers and all(answers)


def test_modes_and_tensors_of_their_own_kind_follow_a_call() -> None:
    x = torch.ones(2)
    assert not is_followed([x, None, nn.Parameter(x)])
    with Names():
        assert is_followed([x])
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert is_followed([x, fake])


def test_attention_goes_through_its_operator_where_it_is_followed(inputs: Inputs) -> None:
    options = dict(softmax_scale=0.3, key_start=inputs.key_start, key_end=inputs.key_end)
    direct = attention_forward(inputs.q, inputs.k, inputs.k, **options)
    with Names() as names:
        followed = attention_forward(inputs.q, inputs.k, inputs.k, **options)
    assert "flash_indexer.attention.default" in names.called
    assert all(torch.equal(a, b) for a, b in zip(direct, followed, strict=True))


def test_the_loss_that_is_handed_over_is_none_of_the_graph() -> None:
    """What it was made from stays out of the backward, whose gradients are the known ones."""
    leaf = torch.tensor([2.0, 3.0], requires_grad=True)
    loss = known_loss("op", "torch", (leaf * 5).sum(), [torch.tensor([7.0, 8.0])], [leaf])
    assert loss.item() == 25
    (2 * loss).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None and leaf.grad.tolist() == [14, 16]


def test_a_loss_that_is_a_view_made_without_gradients_may_be_added_to() -> None:
    """As the kernels' is."""
    leaf = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        loss = torch.full((1,), 5.0).view(())
    total = known_loss("op", "torch", loss, [torch.tensor([7.0, 8.0])], [leaf])
    total += 3 * leaf.sum()
    total.backward()  # type: ignore[no-untyped-call]
    assert total.item() == 11 and leaf.grad is not None and leaf.grad.tolist() == [10, 11]
