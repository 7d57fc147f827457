"""`attention_forward` and `warmup_attention` on the CPU against the definition, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flash_indexer import WarmupAttention, indexer_kl, reference, warmup_attention
from flash_indexer.ops import attention_forward
from flash_indexer.testing import Shape, assert_close, make_inputs

SHAPE = Shape(((37, 37), (1, 1), (5, 9), (20, 3)), H=6, G=2, D=16, I=6, E=8)
TARGETS = ("mean", "per_head", "sum_logits")


def problem(dtype=torch.float64, shape=SHAPE, V=12):
    x = make_inputs(shape, seed=3, dtype=dtype)
    return x, torch.randn(x.k.shape[0], shape.G, V, dtype=dtype, generator=torch.Generator().manual_seed(4))


def arguments(x, **changes):
    fixed = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end)
    return fixed | changes


@pytest.mark.parametrize("window", [None, 4])
def test_attention_is_the_definition(window):
    x, v = problem(shape=replace(SHAPE, window=window))
    out, lse = attention_forward(x.q, x.k, v, **arguments(x))
    truth = reference.attention(x.q, x.k, v, x.softmax_scale, x.key_start, x.key_end)
    torch.testing.assert_close(out, truth[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, truth[1], rtol=1e-12, atol=1e-12)
    seen = x.key_end > x.key_start
    assert not seen.all() and (out[~seen] == 0).all() and (lse[~seen] == -torch.inf).all()


def test_the_definition_is_torchs_attention():
    x, v = problem(shape=Shape(((33, 33),), H=6, G=2, D=16, I=6, E=8))
    out, _ = reference.attention(x.q, x.k, v, x.softmax_scale, x.key_start, x.key_end)
    q, k, value = (y.transpose(0, 1)[None] for y in (x.q, x.k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, value, is_causal=True, enable_gqa=True, scale=x.softmax_scale
    )
    torch.testing.assert_close(out, expected[0].transpose(0, 1))


def test_attention_in_float32():
    x, v = problem(torch.float32)
    got = attention_forward(x.q, x.k, v, **arguments(x))
    wide = (x.softmax_scale, x.key_start, x.key_end)
    truth = reference.attention(x.q.double(), x.k.double(), v.double(), *wide)
    eager = reference.attention(x.q, x.k, v, *wide)
    seen = x.key_end > x.key_start
    assert_close("out", got[0], truth[0], eager[0])
    assert_close("lse", got[1][seen], truth[1][seen], eager[1][seen])


@pytest.mark.parametrize("target", TARGETS)
def test_loss_and_gradients_are_indexer_kls(target):
    x, v = problem()
    results = []
    for call in ("one", "two"):
        leaves = [y.clone().requires_grad_() for y in (x.index_q, x.index_k, x.index_weights)]
        common = arguments(x, target=target, token_weight=x.token_weight)
        if call == "one":
            got = warmup_attention(x.q, x.k, v, *leaves, **common)
            assert isinstance(got, WarmupAttention)
            out = got.out
        else:
            got = indexer_kl(x.q, x.k, *leaves, **common)
        (1.7 * got.loss).backward()
        results.append((got.loss, got.kl, *(leaf.grad for leaf in leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    assert not out.requires_grad
    assert got.kl.shape == (x.q.shape[:2] if target == "per_head" else x.q.shape[:1])


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_the_main_model_is_frozen(name):
    x, v = problem()
    tensors = dict(q=x.q, k=x.k, v=v)
    tensors[name] = tensors[name].requires_grad_()
    operands = (*tensors.values(), x.index_q, x.index_k, x.index_weights)
    expected = f"{name} is a constant but requires grad; detach: the main model is frozen"
    with pytest.raises(ValueError, match=f"warmup_attention: {expected}"):
        warmup_attention(*operands, **arguments(x))
    with pytest.raises(ValueError, match=f"attention_forward: {expected}"):
        attention_forward(*tensors.values(), **arguments(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(v=torch.zeros(3, 2, 4)), r"v must be \[S, G, V\] = \[\d+, 2, 4\], got \[3, 2, 4\]"),
        (dict(v=torch.zeros(3, 4)), r"v must be \[S, G, V\], got \[3, 4\]"),
        (dict(softmax_scale=-1.0), "softmax_scale must be positive"),
        (dict(target="head"), "target must be one of"),
        (dict(index_q=torch.zeros(63, 5, 8, dtype=torch.float64)), r"warmup_attention: index_"),
        (dict(key_end=torch.zeros(2, dtype=torch.int32)), r"key_end must be \[T\]"),
    ],
)
def test_bad_input_is_named(change, message):
    x, v = problem()
    operands = dict(q=x.q, k=x.k, v=v, index_q=x.index_q, index_k=x.index_k, index_weights=x.index_weights)
    operands |= {name: y.double() if y.dtype == torch.float32 else y for name, y in change.items() if name in operands}
    options = arguments(x, **{name: y for name, y in change.items() if name not in operands})
    with pytest.raises(ValueError, match=message):
        warmup_attention(*operands.values(), **options)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_workspace_of_nothing_is_refused_whatever_runs(target, device):
    x, v = problem(torch.float32)
    operands = (y.to(device) for y in (x.q, x.k, v, x.index_q, x.index_k, x.index_weights))
    options = dict(softmax_scale=0.25, key_start=x.key_start.to(device), key_end=x.key_end.to(device), target=target)
    with pytest.raises(ValueError, match="warmup_attention: workspace_bytes must be positive, got 0"):
        warmup_attention(*operands, **options, workspace_bytes=0)


def test_dtypes_do_not_mix():
    x, v = problem()
    with pytest.raises(TypeError, match="v must be torch.float64 like k, got torch.float32"):
        warmup_attention(x.q, x.k, v.float(), x.index_q, x.index_k, x.index_weights, **arguments(x))


@pytest.mark.parametrize("target", TARGETS)
def test_meta_tensors_have_the_right_shapes(target):
    x, v = problem(torch.float32)
    names = ("q", "k", "index_q", "index_k", "index_weights", "key_start", "key_end")
    meta = {name: getattr(x, name).to("meta") for name in names}
    low = {name: meta[name].bfloat16() for name in ("q", "k", "index_q", "index_k")}
    leaves = [low["index_q"].requires_grad_(), low["index_k"].requires_grad_(), meta["index_weights"].requires_grad_()]
    options = dict(softmax_scale=0.25, key_start=meta["key_start"], key_end=meta["key_end"], target=target)
    got = warmup_attention(low["q"], low["k"], v.to("meta").bfloat16(), *leaves, **options)
    assert got.out.shape == (*x.q.shape[:2], v.shape[2]) and got.out.dtype == torch.bfloat16
    assert got.lse.shape == x.q.shape[:2] and got.lse.dtype == torch.float32
    assert got.kl.shape == (x.q.shape[:2] if target == "per_head" else x.q.shape[:1])
    got.loss.backward()
    assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("window", [None, 4])
def test_the_attention_operator_keeps_torchs_rules(window):
    x, v = problem(torch.float32, replace(SHAPE, window=window))
    operands = (x.q, x.k, v, x.key_start, x.key_end, x.softmax_scale)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.flash_indexer.attention.default, operands, test_utils=tests)
