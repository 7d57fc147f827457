"""The operator's CPU body judged by reference.py, and its contract with autograd, the dispatcher and compilers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from flash_indexer import IndexerKL, indexer_kl
from flash_indexer.ops.kl import torch_body
from flash_indexer.ops.kl.op import _indexer_kl
from flash_indexer.testing import (
    SHAPES,
    Inputs,
    Result,
    assert_close,
    eager_indexer_kl,
    make_inputs,
    reference_indexer_kl,
)

TARGETS = ("mean", "per_head", "sum_logits")
INDEX_NAMES = ("index_q", "index_k", "index_weights")
D_LOSS = -1.7


def make(shape: str, target: str = "mean", dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
    sizes = SHAPES[shape]
    return make_inputs(replace(sizes, I=sizes.H) if target == "per_head" else sizes, seed=seed, dtype=dtype)


def leaves_of(x: Inputs, needs: tuple[bool, ...] = (True, True, True)) -> list[Tensor]:
    return [getattr(x, name).clone().requires_grad_(need) for name, need in zip(INDEX_NAMES, needs, strict=True)]


def call(x: Inputs, leaves: list[Tensor], **options) -> IndexerKL:
    fixed = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end)
    return indexer_kl(x.q, x.k, *leaves, **(fixed | options))


def measure(x: Inputs, **options) -> Result:
    """Values, and gradients under a random upstream factor."""
    leaves = leaves_of(x)
    result = call(x, leaves, **options)
    (D_LOSS * result.loss).backward()
    return Result(result.loss.detach(), result.kl, result.entropy, *(leaf.grad for leaf in leaves))


def weights_for(x: Inputs, kind: str) -> Tensor | None:
    weight = x.token_weight
    return {"none": None, "random": weight, "zero": torch.zeros_like(weight), "negative": -weight.abs()}[kind]


def assert_same(got: Result, expected: Result, tolerance: float = 1e-11) -> None:
    for name, a, b in zip(Result._fields, got, expected, strict=True):
        assert a.dtype == b.dtype, name
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_the_first_call_imports_nothing_heavy():
    """torch.library.custom_op would import torch._dynamo, hundreds of modules, before anything is computed."""
    program = """
import sys
import torch
from flash_indexer import causal_intervals, indexer_kl
q, k, index_q, index_k = torch.randn(5, 2, 4), torch.randn(5, 1, 4), torch.randn(5, 3, 4), torch.randn(5, 4)
key_start, key_end = causal_intervals(torch.tensor([0, 5]))
weights = torch.randn(5, 3, requires_grad=True)
result = indexer_kl(q, k, index_q, index_k, weights, softmax_scale=0.5, key_start=key_start, key_end=key_end)
result.loss.backward()
print(sorted({"torch._dynamo", "sympy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_against_the_reference(shape, target):
    """Each pair of workspace, lse and weights."""
    x = make(shape, target)
    truth = {
        kind: reference_indexer_kl(x, target=target, token_weight=weights_for(x, kind), d_loss=D_LOSS)
        for kind in ("none", "random")
    }
    cases = ((1, True, "none"), (3000, False, "random"), (30_000, True, "random"), (30_000, False, "none"))
    for workspace, with_lse, kind in (*cases, (2**29, True, "none"), (2**29, False, "random")):
        lse = x.lse if with_lse and target != "sum_logits" else None
        got = measure(x, target=target, lse=lse, token_weight=weights_for(x, kind), workspace_bytes=workspace)
        assert_same(got, truth[kind])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_by_the_ruler(shape, target):
    x = make(shape, target, torch.float32)
    for workspace, kind in ((1, "random"), (30_000, "none"), (2**29, "random")):
        lse = x.lse if workspace == 30_000 and target != "sum_logits" else None
        options = dict(target=target, token_weight=weights_for(x, kind))
        got = measure(x, lse=lse, workspace_bytes=workspace, **options)
        truth = reference_indexer_kl(x, d_loss=D_LOSS, **options)
        eager = eager_indexer_kl(x, lse=lse, d_loss=D_LOSS, **options)
        for name, *tensors in zip(Result._fields[1:], got[1:], truth[1:], eager[1:], strict=True):
            assert_close(name, *tensors)
        weight = truth.kl.new_full(truth.kl.shape[:1], 1 / len(x.q)) if kind == "none" else x.token_weight
        per_token = truth.kl.mean(-1) if target == "per_head" else truth.kl
        terms = (weight * per_token).abs().sum().item()
        assert abs(got.loss.item() - truth.loss.item()) <= 1e-6 * terms


@pytest.mark.parametrize("kind", ["zero", "negative"])
@pytest.mark.parametrize("target", TARGETS)
def test_token_weights(target, kind):
    x = make("packed", target)
    got = measure(x, target=target, token_weight=weights_for(x, kind))
    if kind == "zero":  # rows that cost nothing: not even their KL is known
        assert all((value == 0).all() for value in got)
        return
    assert_same(got, reference_indexer_kl(x, target=target, token_weight=weights_for(x, kind), d_loss=D_LOSS))
    assert (got.kl > 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", TARGETS)
def test_no_query_sees_a_key(target, dtype):
    x = make("packed", target, dtype)
    empty = replace(x, key_end=x.key_start)
    keyless = replace(x, k=x.k[:0], index_k=x.index_k[:0], key_start=0 * x.key_start, key_end=0 * x.key_end)
    for case in (empty, keyless):
        got = measure(case, target=target)
        assert got.loss == 0 and (got.kl == 0).all() and (got.entropy == 0).all()
        assert all((gradient == 0).all() for gradient in got[3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_without_mass_is_nan_there_and_nowhere_else(dtype):
    """An lse that is not this attention's: every p of the row underflows, and there is no distribution to learn."""
    x = make("packed", dtype=dtype)
    row = int((x.key_end - x.key_start).argmax())
    lse = x.lse.clone()
    lse[row] = 2000.0
    expected, got = (measure(x, token_weight=x.token_weight, lse=y) for y in (x.lse, lse))
    assert got.loss.isnan() and got.kl[row].isnan() and got.entropy[row].isnan() and got.d_index_q[row].isnan().any()
    others = torch.arange(len(got.kl)) != row
    for name in ("kl", "entropy", "d_index_q", "d_index_weights"):
        assert torch.equal(getattr(got, name)[others], getattr(expected, name)[others]), name


def test_no_query_at_all():
    x = make("packed")
    cut = {name: getattr(x, name)[:0] for name in ("q", "index_q", "index_weights", "key_start", "key_end")}
    got = measure(replace(x, **cut))
    assert got.loss == 0 and got.kl.shape == (0,) and (got.d_index_k == 0).all()


def test_unseen_rows_get_zero_gradients_and_kl():
    x = make("fewer_keys", dtype=torch.float32)
    empty = x.key_end == x.key_start
    got = measure(x, token_weight=torch.ones_like(x.token_weight), lse=x.lse)
    assert empty.any() and not empty.all()
    for rows in (got.kl, got.entropy, got.d_index_q, got.d_index_weights):
        assert (rows[empty] == 0).all() and (rows[~empty] != 0).any()


def test_unseen_keys_do_not_matter():
    """Huge keys, and NaN in the teacher's, outside every interval must not leak in."""
    x = make("packed", dtype=torch.float32)
    limit = x.k.shape[0] - 40
    x = replace(x, key_start=x.key_start.clamp(max=limit), key_end=x.key_end.clamp(max=limit))
    clean = measure(x)
    k, index_k = x.k.clone(), x.index_k.clone()
    k[limit:], index_k[limit:] = torch.nan, 1e30
    assert_same(measure(replace(x, k=k, index_k=index_k)), clean, 0.0)
    assert (clean.d_index_k[limit:] == 0).all()


@pytest.mark.parametrize("target", TARGETS)
def test_non_contiguous_inputs(target):
    x = make("cached_prefix", target)
    names = ("q", "k", *INDEX_NAMES, "lse", "token_weight", "key_start", "key_end")
    strided = {name: torch.stack([getattr(x, name), getattr(x, name)], -1)[..., 0] for name in names}
    assert not any(y.is_contiguous() for y in strided.values())
    lse = None if target == "sum_logits" else x.lse
    plain = measure(x, target=target, lse=lse, token_weight=x.token_weight)
    fixed = {name: strided[name] for name in ("key_start", "key_end", "token_weight")}
    lse = None if lse is None else strided["lse"]
    leaves = [strided[name].detach().requires_grad_() for name in INDEX_NAMES]
    result = indexer_kl(
        strided["q"], strided["k"], *leaves, softmax_scale=x.softmax_scale, target=target, lse=lse, **fixed
    )
    (D_LOSS * result.loss).backward()
    assert_same(Result(*(y.detach() for y in result), *(leaf.grad for leaf in leaves)), plain, 1e-12)


class Recomputed(torch.autograd.Function):
    """The operator with its loss computed anew in backward, because gradcheck calls backward repeatedly."""

    @staticmethod
    def forward(ctx, x, options, *leaves):
        ctx.problem = x, options, [leaf.detach().clone() for leaf in leaves]
        return call(x, ctx.problem[2], **options).loss

    @staticmethod
    def backward(ctx, d_loss):
        x, options, leaves = ctx.problem
        with torch.enable_grad():
            leaves = [leaf.clone().requires_grad_() for leaf in leaves]
            loss = call(x, leaves, **options).loss
        return None, None, *torch.autograd.grad(loss, leaves, d_loss)


@pytest.mark.parametrize("target", TARGETS)
def test_gradcheck(target):
    x = make_tiny(index_heads=3 if target == "per_head" else 2)
    logits = torch.einsum("tie,se->tis", x.index_q, x.index_k)
    assert logits.abs().min() > 1e-4, "a ReLU kink too near for finite differences"
    options = dict(target=target, token_weight=x.token_weight, workspace_bytes=2000)
    assert torch.autograd.gradcheck(lambda *leaves: Recomputed.apply(x, options, *leaves), leaves_of(x), eps=1e-7)


def make_tiny(index_heads: int) -> Inputs:
    shape = replace(SHAPES["packed"], documents=((1, 1), (3, 5), (3, 2)), H=3, G=1, D=4, I=index_heads, E=6)
    return make_inputs(shape, seed=2, dtype=torch.float64)


@pytest.mark.parametrize("needs", list(product([True, False], repeat=3)))
@pytest.mark.parametrize("target", TARGETS)
def test_every_subset_of_gradients(target, needs, monkeypatch):
    x, whole = make("smollm2", target), measure(make("smollm2", target), target=target)
    computed: list[dict[str, bool]] = []
    original = torch_body.index_gradients

    def spy(*args, **outputs):
        computed.append({name: out is not None for name, out in outputs.items()})
        return original(*args, **outputs)

    monkeypatch.setattr(torch_body, "index_gradients", spy)
    leaves = leaves_of(x, needs)
    result = call(x, leaves, target=target)
    assert result.loss.requires_grad == any(needs)
    assert not result.kl.requires_grad and not result.entropy.requires_grad
    assert bool(computed) == any(needs)
    assert all(tuple(wanted.values()) == needs for wanted in computed)
    if any(needs):
        (D_LOSS * result.loss).backward()
    for leaf, need, expected in zip(leaves, needs, whole[3:], strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(result.loss.detach(), whole.loss)


def test_no_grad_computes_no_gradients(monkeypatch):
    monkeypatch.setattr(torch_body, "index_gradients", None)
    x = make("packed")
    with torch.no_grad():
        assert not call(x, leaves_of(x)).loss.requires_grad


def test_second_and_double_backward_are_refused():
    x = make("packed")
    leaves = leaves_of(x)
    loss = call(x, leaves).loss
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    with pytest.raises(RuntimeError, match="indexer_kl: backward already ran and scaled the gradients in place"):
        loss.backward()
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, once, strict=True))
    with pytest.raises(RuntimeError, match="indexer_kl: the loss has no second derivative"):
        torch.autograd.grad(call(x, leaves).loss, leaves, create_graph=True)


def test_two_losses_accumulate():
    x = make("packed")
    leaves, twice = leaves_of(x), measure(x)
    (D_LOSS * call(x, leaves).loss).backward()
    (D_LOSS * call(x, leaves).loss).backward()
    for leaf, once in zip(leaves, twice[3:], strict=True):
        torch.testing.assert_close(leaf.grad, 2 * once)


@pytest.mark.parametrize("target", TARGETS)
def test_two_runs_are_bitwise_equal(target):
    x = make("window", target, torch.float32)
    first, second = (measure(x, target=target, workspace_bytes=20_000) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_changes_nothing():
    x = make("smollm2", dtype=torch.float32)
    plain = measure(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = measure(x)
    assert_same(under, plain, 0.0)


@pytest.mark.parametrize(
    "target, with_lse, needs",
    [
        *((*way, [True] * 3) for way in (("mean", True), ("mean", False), ("per_head", True), ("sum_logits", False))),
        ("mean", True, [False, True, False]),
        ("sum_logits", False, [False, True, False]),
        ("mean", False, [False] * 3),
    ],
)
def test_opcheck(target, with_lse, needs):
    x = make("cached_prefix", target, torch.float32)
    leaves = leaves_of(x, tuple(needs))
    weight = x.token_weight.abs() if with_lse else None  # opcheck's upstream gradient is then 1: see known.backward
    args = (x.q, x.k, *leaves, x.lse if with_lse else None, x.key_start, x.key_end, weight)
    torch.library.opcheck(_indexer_kl, (*args, x.softmax_scale, target, 50_000, needs))


def compiled_case(x: Inputs, backend: str, target: str) -> Result:
    def step(q, k, index_q, index_k, index_weights, key_start, key_end):
        result = indexer_kl(
            q,
            k,
            2 * index_q,
            index_k.sin(),
            index_weights,
            softmax_scale=0.3,
            key_start=key_start,
            key_end=key_end,
            target=target,
        )
        return D_LOSS * result.loss, result.kl, result.entropy

    step = step if backend == "" else torch.compile(step, fullgraph=True, backend=backend)
    leaves = leaves_of(x)
    loss, kl, entropy = step(x.q, x.k, *leaves, x.key_start, x.key_end)
    loss.backward()
    return Result(loss.detach(), kl, entropy, *(leaf.grad for leaf in leaves))


@pytest.mark.parametrize(
    "backend, target",
    [*(("aot_eager", target) for target in TARGETS), pytest.param("inductor", "mean", marks=pytest.mark.slow)],
)
def test_compiled(backend, target):
    torch._dynamo.reset()
    x = make("packed", target)
    assert_same(compiled_case(x, backend, target), compiled_case(x, "", target), 1e-13)


def test_meta_shapes():
    x = make("fewer_keys", "per_head", torch.float32)
    names = ("q", "k", *INDEX_NAMES, "key_start", "key_end")
    got = call(
        replace(x, **{name: getattr(x, name).to("meta") for name in names}),
        [getattr(x, name).to("meta") for name in INDEX_NAMES],
        target="per_head",
    )
    assert got.loss.shape == () and got.kl.shape == got.entropy.shape == x.q.shape[:2]
