"""Attention and the per-head KL on the GPU against float64, for every class of sizes and every layout."""

from __future__ import annotations

import random
import zlib
from dataclasses import replace

import pytest
import torch
from head_problems import (
    GRADIENTS,
    LAYOUTS,
    call,
    call_alone,
    check_attention,
    check_loss,
    long_rows,
    make,
    without,
    worst_of_four,
)

from flash_indexer import indexer_kl, warmup_attention
from flash_indexer.ops import attention_forward, bodies, launch
from flash_indexer.testing import (
    HEAD_CLASSES,
    KernelClass,
    assert_close,
    eager_indexer_kl,
    reference_indexer_kl,
)

pytestmark = pytest.mark.gpu
EACH = pytest.mark.parametrize("sizes", HEAD_CLASSES, ids=lambda sizes: "D{}-V{}-E{}-heads{}".format(*sizes))


@pytest.mark.parametrize("upstream", ["one", "any"])
@pytest.mark.parametrize("layout", LAYOUTS)
@EACH
def test_per_head_against_float64(sizes, layout, upstream, problem, request):
    x, v = make(problem, request.node.name, sizes, layout)
    weight, d_loss = (None, 1.0) if upstream == "one" else (x.token_weight, 1.7)
    got, gradients = call(x, v, weight=weight, d_loss=d_loss)
    common = dict(target="per_head", token_weight=weight, d_loss=d_loss)
    truth = reference_indexer_kl(x, **common)
    eager = worst_of_four(x, truth, **common)
    print(list(x.q.shape), list(x.k.shape), list(v.shape), list(x.index_q.shape))
    check_attention(got.out, got.lse, x, v)
    check_loss(got, gradients, truth, eager, x, weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@EACH
def test_the_loss_alone_against_float64(sizes, layout, problem, request):
    """`indexer_kl`, with the attention's entropy."""
    x, _ = make(problem, request.node.name, sizes, layout)
    weight, d_loss = random.Random(zlib.crc32(request.node.name.encode())).choice(
        ((None, 1.0), (x.token_weight, 1.7), (x.token_weight, 1.0))
    )
    got, gradients = call_alone(x, weight=weight, d_loss=d_loss)
    common = dict(target="per_head", token_weight=weight, d_loss=d_loss)
    truth = reference_indexer_kl(x, **common)
    eager = worst_of_four(x, truth, **common)
    print(list(x.q.shape), list(x.k.shape), list(x.index_q.shape))
    check_loss(got, gradients, truth, eager, x, weight)
    assert_close("entropy", *map(long_rows, (got.entropy, truth.entropy, eager.entropy)))
    alone = x.key_end <= x.key_start + 1
    assert (got.entropy >= 0).all() and (got.entropy[alone] == 0).all() and (got.kl[alone] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@EACH
def test_attention_against_float64(sizes, layout, problem, request):
    x, v = make(problem, request.node.name, sizes, layout)
    out, lse = attention_forward(x.q, x.k, v, softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end)
    check_attention(out, lse, x, v)


@pytest.mark.parametrize("heads", [1, 8, 24, 128])
@pytest.mark.parametrize("layout", ["documents", "window", "arbitrary", "short"])
def test_latent_attention_against_float64(heads, layout, problem, request):
    """MLA's absorbed form: values are the first 512 features of the one key head."""
    x = problem(request.node.name, KernelClass(576, 64, 8), layout, H=heads, G=1)
    v = x.k[..., :512]
    out, lse = attention_forward(x.q, x.k, v, softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end)
    check_attention(out, lse, x, v)


@pytest.mark.parametrize("where", [0, 300, 500, 899])
@pytest.mark.parametrize("tensor", ["k", "index_k"])
def test_a_key_far_above_all_others(tensor, where, problem):
    """Shifts of the exponentials are raised late, or never."""
    x, v = make(problem, "sink", HEAD_CLASSES[2], "causal", groups=2)
    T = x.q.shape[0]
    large = getattr(x, tensor).clone()
    large[where % T] *= 64
    x = replace(x, **{tensor: large})
    got, gradients = call(x, v)
    truth, eager = (f(x, target="per_head") for f in (reference_indexer_kl, eager_indexer_kl))
    check_attention(got.out, got.lse, x, v)
    assert_close("kl", got.kl, truth.kl, eager.kl)
    alone, others = call_alone(x)
    for name in ("kl", "entropy"):
        assert_close(name, *(long_rows(getattr(result, name)) for result in (alone, truth, eager)))
    for name, *each in zip(GRADIENTS, gradients, others, strict=True):
        assert all(gradient.isfinite().all() for gradient in each), name


@pytest.mark.parametrize("target", ["mean", "sum_logits"])
def test_other_targets_are_attention_and_indexer_kl(target, problem, measure):
    x, v = make(problem, "targets", HEAD_CLASSES[2], "documents")
    got, gradients = call(x, v, target=target)
    expected = measure(x, target=target, lse=got.lse if target == "mean" else None)
    assert torch.equal(got.loss, expected.loss) and torch.equal(got.kl, expected.kl)
    for name, gradient in zip(GRADIENTS, gradients, strict=True):
        assert torch.equal(gradient, getattr(expected, name)), name
    check_attention(got.out, got.lse, x, v)


@pytest.mark.parametrize("way", ["with attention", "alone"])
def test_the_same_bits_each_time(way, problem):
    x, v = make(problem, "bits", HEAD_CLASSES[1], "documents")
    run = (lambda: call(x, v)) if way == "with attention" else (lambda: call_alone(x))
    first, gradients = run()
    for _ in range(20):
        again, others = run()
        assert all(torch.equal(a, b) for a, b in zip((*first, *gradients), (*again, *others), strict=True))


@pytest.mark.parametrize("way", ["with attention", "alone"])
def test_memory_that_held_nan(way, problem):
    """Every element that is read has been written, every output is written."""
    x, v = make(problem, "poison", HEAD_CLASSES[2], "arbitrary")
    run = (lambda: call(x, v)) if way == "with attention" else (lambda: call_alone(x))
    expected, gradients = run()
    size = 64 * 2**20
    for _ in range(2):
        poison = [torch.full((size // 4,), float("nan"), device="cuda") for _ in range(4)]
        del poison
        got, others = run()
        assert all(torch.equal(a, b) for a, b in zip((*expected, *gradients), (*got, *others), strict=True))


@pytest.mark.parametrize("tensor", ["q", "index_q"])
def test_nan_in_one_row_is_shown_there_and_nowhere_else(tensor, problem):
    x, v = make(problem, "nan", HEAD_CLASSES[2], "causal")
    expected, (clean, _) = call(x, v)[0], call_alone(x, needs=(False,) * 3)
    row, hit = (x.q.shape[0] - 1, 1), getattr(x, tensor).clone()
    hit[row] = float("nan")
    x = replace(x, **{tensor: hit})
    got, (alone, _) = call(x, v)[0], call_alone(x, needs=(False,) * 3)
    broken = {"out", "lse", "kl", "entropy"} if tensor == "q" else {"kl"}
    for result, before in ((got, expected), (alone, clean)):
        assert result.loss.isnan()
        for name in ("out", "lse", "kl", "entropy"):
            if hasattr(result, name):
                a, b = getattr(result, name), getattr(before, name).clone()
                assert a[row].isnan().all() == (name in broken), name
                b[row] = a[row]
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), name


@pytest.mark.parametrize("tensor", ["q", "index_q", "index_weights"])
def test_nan_of_a_query_with_one_key(tensor, problem):
    """Its KL and entropy are 0 without being computed."""
    x, v = make(problem, "nan", HEAD_CLASSES[2], "causal")
    hit = getattr(x, tensor).clone()
    hit[0] = float("nan")
    clean, hit = (replace(x, **{tensor: y}) for y in (getattr(x, tensor), hit))
    for run in (lambda y: call(y, v)[0], lambda y: call_alone(y, needs=(False,) * 3)[0]):
        before, got = run(clean), run(hit)
        assert (before.kl[0] == 0).all() and got.kl[0].isnan().all() and got.loss.isnan()
        assert not hasattr(got, "entropy") or got.entropy[0].isnan().all() == (tensor == "q")


@pytest.mark.parametrize("heads", [8, 128])
def test_nan_in_one_row_of_latent_attention(heads, problem):
    x = problem("latent nan", KernelClass(576, 64, 8), "causal", H=heads, G=1)
    fixed = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end)
    hit = x.q.clone()
    hit[x.q.shape[0] - 1, 1] = float("nan")
    expected, got = (attention_forward(q, x.k, x.k[..., :512], **fixed) for q in (x.q, hit))
    for a, b in zip(got, expected, strict=True):
        assert a[-1, 1].isnan().all()
        b[-1, 1] = a[-1, 1]
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_wanted_gradients_do_not_change_one_another(needs, problem):
    x, _ = make(problem, "needs", HEAD_CLASSES[7], "documents")
    whole, gradients = call_alone(x, weight=x.token_weight)
    got, others = call_alone(x, weight=x.token_weight, needs=needs)
    assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))
    for gradient, need, expected in zip(others, needs, gradients, strict=True):
        assert torch.equal(gradient, expected) if need else gradient is None


def test_a_given_lse_is_not_read(problem):
    x, _ = make(problem, "lse", HEAD_CLASSES[2], "documents")
    (got, gradients), (expected, others) = call_alone(x, lse=torch.full_like(x.lse, torch.nan)), call_alone(x)
    assert all(torch.equal(a, b) for a, b in zip((*expected, *others), (*got, *gradients), strict=True))


def test_backward_of_the_loss_alone_runs_once(problem):
    x, _ = make(problem, "once", HEAD_CLASSES[0], "documents")
    leaf = x.index_k.clone().requires_grad_()
    fixed = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end, target="per_head")
    loss = indexer_kl(x.q, x.k, x.index_q, leaf, x.index_weights, **fixed).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward already ran and scaled the gradients in place"):
        loss.backward()


def test_backward_may_run_twice(problem):
    x, v = make(problem, "twice", HEAD_CLASSES[0], "documents")
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x.index_q, x.index_k, x.index_weights)]
    fixed = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end, target="per_head")
    loss = warmup_attention(x.q, x.k, v, *leaves, **fixed).loss
    a = torch.autograd.grad(loss, leaves, retain_graph=True)
    b = torch.autograd.grad(loss, leaves[1:2])
    assert torch.equal(a[1], b[0])


@pytest.mark.parametrize("nothing", ["seen", "keys", "queries"])
def test_no_query_sees_a_key(nothing, problem):
    x, v = make(problem, "empty", HEAD_CLASSES[0], "documents")
    x, v = without(nothing, x, v)
    got, gradients = call(x, v)
    assert got.loss == 0 and (got.kl == 0).all() and (got.out == 0).all() and (got.lse == -torch.inf).all()
    alone, others = call_alone(x)
    assert all((value == 0).all() for value in (*alone, *others, *gradients))
    assert alone.kl.shape == alone.entropy.shape == x.q.shape[:2]


@pytest.mark.parametrize("inputs", ["strided", "unaligned"])
def test_any_layout_in_memory(inputs, problem):
    x, v = make(problem, "strides", HEAD_CLASSES[2], "documents")
    shift = lambda y: torch.cat([y.new_zeros(1), y.flatten()])[1:].view(y.shape)  # noqa: E731
    move = {"strided": lambda y: torch.stack([y, y], -1)[..., 0], "unaligned": shift}[inputs]
    names = ("q", "k", "index_q", "index_k", "index_weights", "key_start", "key_end")
    other = replace(x, **{name: move(getattr(x, name)) for name in names})
    expected, gradients = call(x, v)
    got, others = call(other, move(v))
    assert all(torch.equal(a, b) for a, b in zip((*expected, *gradients), (*got, *others), strict=True))
    (expected, gradients), (got, others) = call_alone(x), call_alone(other)
    assert all(torch.equal(a, b) for a, b in zip((*expected, *gradients), (*got, *others), strict=True))


def test_other_sizes_run_in_torch_and_say_why(problem, monkeypatch):
    load = launch.load

    refused = []

    def attention_alone(name, **static):
        assert name == "attention" or "E=16" not in refused[-1], "the loss and its gradients are torch's"
        return load(name, **static)

    monkeypatch.setattr(launch, "load", attention_alone)
    monkeypatch.setattr(bodies, "_said", set())
    x, v = make(problem, "other sizes", HEAD_CLASSES[0], "short")
    narrow = replace(x, index_q=x.index_q[..., :16].contiguous(), index_k=x.index_k[..., :16].contiguous())
    wide = torch.randn(*v.shape[:2], 320, device="cuda").bfloat16()
    for y, value, reason in (
        (narrow, v, r"index_q must have E in \{32, 64, 128\} on CUDA, got E=16"),
        (x, wide, "v must have V of 1 to 256 on CUDA"),
    ):
        refused.append(reason)
        with pytest.warns(UserWarning, match=f"warmup_attention runs the blockwise torch body .* {reason}"):
            got, gradients = call(y, value, weight=y.token_weight)
        options = dict(target="per_head", token_weight=y.token_weight, d_loss=1.0)
        truth, eager = reference_indexer_kl(y, **options), eager_indexer_kl(y, **options)
        check_attention(got.out, got.lse, y, value)
        check_loss(got, gradients, truth, eager, y, y.token_weight)
