"""Gradients with deterministic=False on the GPU: logits formed once, d_index_k by atomic additions, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from head_problems import GRADIENTS, LAYOUTS, call, check_loss, make, without, worst_of_four

from flash_indexer import warmup_attention
from flash_indexer.ops import launch
from flash_indexer.testing import HEAD_CLASSES, assert_close, reference_indexer_kl

pytestmark = pytest.mark.gpu
CLASSES = [sizes for sizes in HEAD_CLASSES if sizes.D <= 128 and sizes.E <= 64]
EACH = pytest.mark.parametrize("sizes", CLASSES, ids=lambda sizes: "D{}-V{}-E{}-heads{}".format(*sizes))


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that ran."""
    names, load = [], launch.load
    monkeypatch.setattr(launch, "load", lambda name, **static: names.append(name) or load(name, **static))
    return names


def against_float64(x, v, launched, *, weight=None, d_loss=1.0):
    got, gradients = call(x, v, weight=weight, d_loss=d_loss, deterministic=False)
    assert launched == ["attention", "head_gradients_once"]
    common = dict(target="per_head", token_weight=weight, d_loss=d_loss)
    truth = reference_indexer_kl(x, **common)
    check_loss(got, gradients, truth, worst_of_four(x, truth, **common), x, weight)
    return gradients


@pytest.mark.parametrize("upstream", ["one", "any"])
@pytest.mark.parametrize("layout", LAYOUTS)
@EACH
def test_formed_once_against_float64(sizes, layout, upstream, problem, launched, request):
    x, v = make(problem, request.node.name, sizes, layout)
    weight, d_loss = (None, 1.0) if upstream == "one" else (x.token_weight, 1.7)
    print(list(x.q.shape), list(x.k.shape), list(x.index_q.shape))
    against_float64(x, v, launched, weight=weight, d_loss=d_loss)


def test_weights_of_zero_have_gradients(problem, launched):
    """p carries the factor w: where w is 0 the gradient of w must come out of it all the same, and nothing else."""
    x, v = make(problem, "zero", HEAD_CLASSES[1], "documents")
    weights = x.index_weights.clone()
    weights[:, ::3] = 0
    d_index_q, _, d_weights = against_float64(replace(x, index_weights=weights), v, launched)
    assert (d_index_q[weights == 0] == 0).all() and (d_weights[weights == 0] != 0).any()


def test_weights_that_all_are_zero(problem):
    """As a projection that begins at zero makes them. d_index_k is zero but for 2^-60 of what a weight of 1 gives."""
    x, v = make(problem, "zero", HEAD_CLASSES[1], "documents")
    x = replace(x, index_weights=torch.zeros_like(x.index_weights))
    (_, expected), (_, got) = (call(x, v, deterministic=way) for way in (True, False))
    assert (got[0] == 0).all() and (expected[1] == 0).all() and got[1].abs().max() < 1e-15
    assert expected[2].norm() > 0
    assert (got[2].double() - expected[2].double()).norm() < 2**-8 * expected[2].norm()


def test_tokens_that_weigh_less_than_nothing(problem, launched):
    x, v = make(problem, "sign", HEAD_CLASSES[2], "documents")
    weight = x.token_weight.clone()
    weight[::2] *= -1
    weight[::5] = 0
    gradients = against_float64(x, v, launched, weight=weight, d_loss=-1.0)
    assert (gradients[0][::5] == 0).all() and (gradients[2][::5] == 0).all()


def test_an_upstream_gradient_that_is_nan_is_not_hidden(problem):
    x, v = make(problem, "nan", HEAD_CLASSES[2], "documents")
    _, gradients = call(x, v, d_loss=float("nan"), deterministic=False)
    assert all(gradient.isnan().any() for gradient in gradients)


@pytest.mark.parametrize("wanted", [(0, 1), (1, 2), (0,), (1,)])
def test_some_of_the_gradients(wanted, problem, launched):
    x, v = make(problem, "some", HEAD_CLASSES[2], "documents")
    names = ("index_q", "index_k", "index_weights")
    _, gradients = call(x, v, deterministic=False)
    del launched[:]
    leaves = [getattr(x, name).clone().requires_grad_(i in wanted) for i, name in enumerate(names)]
    fixed = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end, target="per_head")
    loss = warmup_attention(x.q, x.k, v, *leaves, **fixed, deterministic=False).loss
    found = torch.autograd.grad(loss, [leaves[i] for i in wanted])
    assert ("head_gradients_once" in launched) == (len(wanted) == 2)
    for i, gradient in zip(wanted, found, strict=True):
        error = (gradient.double() - gradients[i].double()).norm() / gradients[i].double().norm()
        assert error < 1e-2, GRADIENTS[i]


def test_repeats_differ_by_rounding_alone(problem):
    x, v = make(problem, "repeats", HEAD_CLASSES[1], "long")
    _, first = call(x, v, deterministic=False)
    for _ in range(5):
        _, again = call(x, v, deterministic=False)
        assert torch.equal(first[0], again[0]) and torch.equal(first[2], again[2])
        assert_close("d_index_k", again[1], first[1].double(), call(x, v)[1][1])


def test_memory_that_held_nan(problem):
    x, v = make(problem, "poison", CLASSES[2], "arbitrary")
    _, expected = call(x, v, deterministic=False)
    poison = [torch.full((16 * 2**20,), float("nan"), device="cuda") for _ in range(4)]
    del poison
    _, got = call(x, v, deterministic=False)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[2], expected[2]) and got[1].isfinite().all()
    assert (got[1].double() - expected[1].double()).norm() <= 1e-2 * expected[1].double().norm()


@pytest.mark.parametrize("nothing", ["seen", "keys", "queries"])
def test_no_query_sees_a_key(nothing, problem):
    x, v = without(nothing, *make(problem, "empty", CLASSES[0], "documents"))
    _, gradients = call(x, v, deterministic=False)
    assert all((gradient == 0).all() for gradient in gradients)
