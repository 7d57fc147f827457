"""Attention and the per-head KL on the GPU against float64, for every class of sizes and every layout."""

from __future__ import annotations

import importlib
import random
import zlib
from dataclasses import replace

import pytest
import torch

from flash_indexer import indexer_kl, reference, warmup_attention
from flash_indexer.ops import attention_forward
from flash_indexer.testing import (
    HEAD_CLASSES,
    KernelClass,
    Result,
    assert_close,
    eager_indexer_kl,
    reference_indexer_kl,
)

pytestmark = pytest.mark.gpu
operator = importlib.import_module("flash_indexer.ops.indexer_kl")  # the module: the package exports its function
LAYOUTS = ("causal", "documents", "window", "cached_prefix", "fewer_keys", "arbitrary", "long", "short")
GRADIENTS = ("d_index_q", "d_index_k", "d_index_weights")
EACH = pytest.mark.parametrize("sizes", HEAD_CLASSES, ids=lambda sizes: "D{}-V{}-E{}-heads{}".format(*sizes))


def make(problem, name, sizes, layout, groups=None):
    """Inputs with H = I heads and values; few heads where the layout is long."""
    G = groups or (
        1 if sizes.heads >= 64 or layout == "long" else random.Random(zlib.crc32(name.encode())).choice((1, 2, 3))
    )
    H = G * sizes.heads
    x = problem(name, KernelClass(sizes.D, sizes.E, 8), layout, H=H, G=G, I=H)
    generator = torch.Generator("cuda").manual_seed(zlib.crc32(name.encode()) + 2)
    v = torch.randn(x.k.shape[0], G, sizes.V, device="cuda", generator=generator).bfloat16()
    return x, v


def call(x, v, *, weight=None, d_loss=1.0, target="per_head"):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x.index_q, x.index_k, x.index_weights)]
    fixed = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end, target=target)
    result = warmup_attention(x.q, x.k, v, *leaves, **fixed, token_weight=weight)
    (d_loss * result.loss).backward()
    return result, [leaf.grad for leaf in leaves]


def call_alone(x, *, weight=None, d_loss=1.0, needs=(True, True, True), **others):
    """`indexer_kl` of the same heads, by the kernels and not in torch."""
    leaves = [
        leaf.detach().clone().requires_grad_(need)
        for leaf, need in zip((x.index_q, x.index_k, x.index_weights), needs, strict=True)
    ]
    fixed = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end, target="per_head")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "torch_body", lambda *_: pytest.fail("the torch body ran"))
        result = indexer_kl(x.q, x.k, *leaves, **fixed, token_weight=weight, **others)
        if any(needs):
            (d_loss * result.loss).backward()
    return result, [leaf.grad for leaf in leaves]


def eager_attention(x, v):
    """Probabilities rounded once, everything else in float32."""
    q, k, heads = x.q.float(), x.k.float(), x.q.shape[1] // v.shape[1]
    p = reference.target_distribution(q, k, x.softmax_scale, x.key_start, x.key_end, "per_head")
    out = torch.einsum("ths,shv->thv", p.bfloat16().float(), v.float().repeat_interleave(heads, 1)).bfloat16()
    return out, reference.teacher_lse(q, k, x.softmax_scale, x.key_start, x.key_end)


def worst_of_four(x, truth, *, token_weight, d_loss, **options):
    """Each element from that one of four float32 evaluations which errs most there.

    They differ in the factor that the gradient of the scores has when it is rounded: the kernels round it before the
    token's weight is applied. In a token of few heads one evaluation alone may be right by luck.
    """
    seen = x.key_end > x.key_start
    weight = seen.float() / seen.sum().clamp_min(1) if token_weight is None else token_weight
    worst = None
    for factor in (1.0, 1.19, 1.41, 1.68):
        other = eager_indexer_kl(x, token_weight=weight * factor, d_loss=d_loss / factor, **options)
        if worst is None:
            worst = other
        errors = [[(a.double() - t).abs() for a, t in zip(r, truth, strict=True)] for r in (worst, other)]
        worst = Result(*(torch.where(m >= n, a, b) for m, n, a, b in zip(*errors, worst, other, strict=True)))
    return worst


def long_rows(x):
    """Rows of 64 elements at least, so that a row's error is a mean over many roundings."""
    if x.ndim != 2 or x.shape[1] >= 64:
        return x
    tokens = -(-64 // x.shape[1])
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % tokens)).reshape(-1, tokens * x.shape[1])


def check_attention(out, lse, x, v):
    truth = reference.attention(x.q.double(), x.k.double(), v.double(), x.softmax_scale, x.key_start, x.key_end)
    eager = eager_attention(x, v)
    assert_close("out", out, truth[0], eager[0])
    seen = x.key_end > x.key_start
    assert (lse[~seen] == -torch.inf).all() and (out[~seen] == 0).all()
    assert_close("lse", *(long_rows(y[seen]) for y in (lse, truth[1], eager[1])))


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


def check_loss(got, gradients, truth, eager, x, weight):
    assert_close("kl", *map(long_rows, (got.kl, truth.kl, eager.kl)))
    for name, *tensors in zip(GRADIENTS, gradients, truth[3:], eager[3:], strict=True):
        assert_close(name, *map(long_rows, tensors))
    seen = x.key_end > x.key_start
    used = seen.double() / seen.sum().clamp_min(1) if weight is None else weight.double()
    terms = used[:, None] * got.kl.double() / got.kl.shape[1]
    assert abs(got.loss.item() - terms.sum().item()) <= 1e-6 * terms.abs().sum().item()


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
    if nothing == "seen":
        x = replace(x, key_end=x.key_start)
    elif nothing == "keys":
        x, v = replace(x, k=x.k[:0], index_k=x.index_k[:0], key_start=0 * x.key_start, key_end=0 * x.key_end), v[:0]
    else:
        cut = {name: getattr(x, name)[:0] for name in ("q", "index_q", "index_weights", "key_start", "key_end")}
        x = replace(x, **cut)
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


def test_unsupported_sizes_are_named(problem):
    x, v = make(problem, "unsupported", HEAD_CLASSES[0], "short")
    wide = torch.zeros(*x.q.shape[:2], 320, device="cuda").bfloat16()
    with pytest.raises(ValueError, match="q must have D of 1 to 256 on CUDA"):
        call(replace(x, q=wide, k=wide[: x.k.shape[0], : x.k.shape[1]]), v)
    with pytest.raises(ValueError, match=r"index_q must have E in \{32, 64, 128\} on CUDA, got E=16"):
        call(replace(x, index_q=x.index_q[..., :16].contiguous(), index_k=x.index_k[..., :16].contiguous()), v)
