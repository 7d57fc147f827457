"""Teachers whose softmax is not that of scale * q·k over the keys alone: a softcap, sinks, keys that nobody ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flash_indexer import indexer_kl, reference
from flash_indexer.ops import attention_forward, teacher_lse, teacher_scores
from flash_indexer.testing import SHAPES, Inputs, Result, assert_close, make_inputs

NAMES = ("index_q", "index_k", "index_weights")


def make(shape: str, dtype: torch.dtype, per_head: bool = False) -> Inputs:
    sizes = SHAPES[shape]
    return make_inputs(replace(sizes, I=sizes.H) if per_head else sizes, seed=3, dtype=dtype)


def measure(x: Inputs, **options) -> Result:
    leaves = [getattr(x, name).clone().requires_grad_() for name in NAMES]
    fixed = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end, token_weight=x.token_weight)
    got = indexer_kl(x.q, x.k, *leaves, **fixed, **options)
    got.loss.backward()
    return Result(got.loss.detach(), got.kl, got.entropy, *(leaf.grad for leaf in leaves))


def learned(x: Inputs, p: Tensor, target: str = "mean") -> Result:
    """The loss of a given target distribution and its gradients, by the definition."""
    leaves = [getattr(x, name).clone().requires_grad_() for name in NAMES]
    scores = reference.indexer_scores(*leaves, x.key_start, x.key_end, target)
    kl = reference.divergence(p, scores, x.key_end > x.key_start)
    loss = (x.token_weight * (kl.mean(-1) if target == "per_head" else kl)).sum()
    gradients = torch.autograd.grad(loss, leaves)
    return Result(loss.detach(), kl.detach(), torch.special.entr(p).sum(-1), *gradients)


@pytest.mark.parametrize("target", ["mean", "per_head"])
@pytest.mark.parametrize("shape", ["packed", "fewer_keys"])
def test_softcap(shape: str, target: str) -> None:
    x = make(shape, torch.float64, target == "per_head")
    spread = reference.teacher_logits(x.q, x.k, x.softmax_scale).std()
    softcap = float(spread)  # as large as the logits, so that it bends them
    common = (x.q, x.k, x.softmax_scale, x.key_start, x.key_end)
    want = learned(x, reference.target_distribution(*common, target, softcap), target)
    lse = reference.teacher_lse(*common, softcap)
    for options in (dict(), dict(workspace_bytes=30_000), dict(lse=lse)):
        got = measure(x, target=target, softcap=softcap, **options)
        for name, a, b in zip(Result._fields, got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    assert not torch.allclose(measure(x, target=target).kl, want.kl, rtol=1e-3)


def test_softcap_in_float32_by_the_ruler() -> None:
    x = make("packed", torch.float32)
    wide = x.double()
    common = dict(softmax_scale=x.softmax_scale, softcap=1.5)
    want = reference.target_distribution(wide.q, wide.k, x.softmax_scale, x.key_start, x.key_end, softcap=1.5)
    lse = teacher_lse(x.q, x.k, x.key_start, x.key_end, **common)
    p = teacher_scores(x.q, x.k, lse, x.key_start, x.key_end, **common)
    seen = x.key_end > x.key_start
    eager = reference.target_distribution(x.q, x.k, x.softmax_scale, x.key_start, x.key_end, softcap=1.5)
    assert_close("p", (p / p.sum(-1, keepdim=True))[seen], want[seen], eager[seen])


@pytest.mark.parametrize("shape", ["packed", "fewer_keys"])
def test_attention_with_a_softcap(shape: str) -> None:
    x = make(shape, torch.float64)
    v = torch.randn(*x.k.shape[:2], 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    intervals = dict(key_start=x.key_start, key_end=x.key_end)
    out, lse = attention_forward(x.q, x.k, v, softmax_scale=x.softmax_scale, **intervals, softcap=1.5)
    want = reference.attention(x.q, x.k, v, x.softmax_scale, x.key_start, x.key_end, 1.5)
    torch.testing.assert_close((out, lse), want, rtol=1e-10, atol=1e-12)
    plain, _ = attention_forward(x.q, x.k, v, softmax_scale=x.softmax_scale, **intervals)
    assert not torch.allclose(plain, out, rtol=1e-3)


def test_sinks_weigh_the_heads() -> None:
    """gpt-oss: exp(sinks[h]) is in the softmax's sum; the target is what the heads then give the keys."""
    x = make("packed", torch.float64)
    sinks = torch.linspace(-2.0, 3.0, x.q.shape[1], dtype=torch.float64)
    logits = reference.teacher_logits(x.q, x.k, x.softmax_scale)
    visible = reference.visible_keys(x.key_start, x.key_end, x.k.shape[0])[:, None]
    extra = sinks[:, None].expand(len(x.q), -1, 1)
    a = torch.cat([logits.masked_fill(~visible, -torch.inf), extra], -1).softmax(-1)[..., :-1]
    total = a.sum(1)
    want = learned(x, total / total.sum(-1, keepdim=True).clamp_min(1e-300))
    keys = reference.teacher_lse(x.q, x.k, x.softmax_scale, x.key_start, x.key_end)
    got = measure(x, lse=torch.logaddexp(keys, sinks))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(measure(x).kl, want.kl, rtol=1e-3)


def test_compressed_keys_beside_a_window_and_a_sink() -> None:
    """DeepSeek-V4: one softmax over a sink, a window of keys and the compressed keys; the last alone are ranked."""
    generator = torch.Generator().manual_seed(4)
    T, S, C, H, D, I, E = 40, 40, 10, 4, 8, 3, 16
    q, keys, compressed = (torch.randn(n, heads, D, dtype=torch.float64, generator=generator)
                           for n, heads in ((T, H), (S, 1), (C, 1)))  # fmt: skip
    index_q, index_k, weights = (torch.randn(*shape, dtype=torch.float64, generator=generator)
                                 for shape in ((T, I, E), (C, E), (T, I)))  # fmt: skip
    sinks, t = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64), torch.arange(T)
    window = ((t - 7).clamp_min(0).int(), (t + 1).int())
    blocks = (torch.zeros(T, dtype=torch.int32), (t // 4).int())  # the blocks of 4 keys that are complete
    parts = [
        reference.teacher_logits(q, k, 0.4).masked_fill(~reference.visible_keys(*i, len(k))[:, None], -torch.inf)
        for k, i in ((keys, window), (compressed, blocks))
    ]
    a = torch.cat([*parts, sinks[:, None].expand(T, -1, 1)], -1).softmax(-1)[..., S : S + C].sum(1)
    p = a / a.sum(-1, keepdim=True).clamp_min(1e-300)
    x = Inputs(
        q, compressed, index_q, index_k, weights, *blocks, torch.empty(0), torch.full((T,), 1 / T, dtype=q.dtype), 0.4
    )  # fmt: skip
    lses = [reference.teacher_lse(q, k, 0.4, *i) for k, i in ((keys, window), (compressed, blocks))]
    got = measure(x, lse=torch.stack([*lses, sinks.expand(T, -1)]).logsumexp(0))
    for one, other in zip(got, learned(x, p), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
