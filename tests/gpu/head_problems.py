"""What the tests of the per-head kernels share: problems, calls, the baseline of the ruler, and checks."""

from __future__ import annotations

import random
import warnings
import zlib
from dataclasses import replace

import torch

from flash_indexer import indexer_kl, reference, warmup_attention
from flash_indexer.testing import KernelClass, Result, assert_close, eager_attention, eager_indexer_kl

LAYOUTS = ("causal", "documents", "window", "cached_prefix", "fewer_keys", "arbitrary", "long", "short")
GRADIENTS = ("d_index_q", "d_index_k", "d_index_weights")


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


def without(nothing, x, v):
    """The problem with no key "seen" by any query, with no "keys" or with no "queries"."""
    if nothing == "seen":
        return replace(x, key_end=x.key_start), v
    if nothing == "keys":
        return replace(x, k=x.k[:0], index_k=x.index_k[:0], key_start=0 * x.key_start, key_end=0 * x.key_end), v[:0]
    names = ("q", "index_q", "index_weights", "key_start", "key_end")
    return replace(x, **{name: getattr(x, name)[:0] for name in names}), v


def call(x, v, *, weight=None, d_loss=1.0, target="per_head", deterministic=True):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x.index_q, x.index_k, x.index_weights)]
    fixed = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end, target=target)
    result = warmup_attention(x.q, x.k, v, *leaves, **fixed, token_weight=weight, deterministic=deterministic)
    (d_loss * result.loss).backward()
    return result, [leaf.grad for leaf in leaves]


def call_alone(x, *, weight=None, d_loss=1.0, needs=(True, True, True), **others):
    """`indexer_kl` of the same heads, by the kernels and not in torch."""
    leaves = [
        leaf.detach().clone().requires_grad_(need)
        for leaf, need in zip((x.index_q, x.index_k, x.index_weights), needs, strict=True)
    ]
    fixed = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end, target="per_head")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the torch body says why it runs
        result = indexer_kl(x.q, x.k, *leaves, **fixed, token_weight=weight, **others)
        if any(needs):
            (d_loss * result.loss).backward()
    return result, [leaf.grad for leaf in leaves]


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


def check_loss(got, gradients, truth, eager, x, weight):
    assert_close("kl", *map(long_rows, (got.kl, truth.kl, eager.kl)))
    for name, *tensors in zip(GRADIENTS, gradients, truth[3:], eager[3:], strict=True):
        assert_close(name, *map(long_rows, tensors))
    seen = x.key_end > x.key_start
    used = seen.double() / seen.sum().clamp_min(1) if weight is None else weight.double()
    terms = used[:, None] * got.kl.double() / got.kl.shape[1]
    assert abs(got.loss.item() - terms.sum().item()) <= 1e-6 * terms.abs().sum().item()
