"""The ruler rejects what is wrong, accepts the baseline, and the inputs hold the corner cases they promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flash_indexer import reference
from flash_indexer.testing import (
    SHAPES,
    Inputs,
    Result,
    assert_close,
    eager_attention,
    eager_indexer_kl,
    make_inputs,
    reference_indexer_kl,
)

DTYPES = [torch.float32, torch.bfloat16]
GRADIENTS = ("d_index_q", "d_index_k", "d_index_weights")
TILE = slice(16, 32)


def judge(got: Result, truth: Result, eager: Result) -> list[str]:
    """The fields that the ruler rejects."""
    rejected = []
    for name, *tensors in zip(Result._fields, got, truth, eager, strict=True):
        try:
            assert_close(name, *tensors)
        except AssertionError:
            rejected.append(name)
    return rejected


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16"])
def case(request: pytest.FixtureRequest) -> tuple[Inputs, Result, Result]:
    inputs = make_inputs(SHAPES["smollm2"], seed=0, dtype=request.param)
    return inputs, reference_indexer_kl(inputs), eager_indexer_kl(inputs)


@pytest.mark.parametrize("target", ["mean", "per_head", "sum_logits"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_accepts_the_baseline(shape, target, dtype):
    sizes = replace(SHAPES[shape], I=SHAPES[shape].H) if target == "per_head" else SHAPES[shape]
    inputs = make_inputs(sizes, seed=1, dtype=dtype)
    eager, truth = eager_indexer_kl(inputs, target=target), reference_indexer_kl(inputs, target=target)
    assert judge(eager, truth, eager) == []
    for name, got, ref in zip(Result._fields, eager, truth, strict=True):
        distance = (got - ref).norm() / ref.norm()
        assert distance < (2e-2 if dtype == torch.bfloat16 and name in GRADIENTS else 1e-5), name


@pytest.mark.parametrize("name", GRADIENTS)
def test_rejects_a_zeroed_row(case, name):
    _, truth, eager = case
    broken = getattr(eager, name).clone()
    broken[-1] = 0
    with pytest.raises(AssertionError, match=rf"{name}: rms error of "):
        assert_close(name, broken, getattr(truth, name), getattr(eager, name))


def test_rejects_four_zeroed_rows_of_4096_by_the_row_criterion():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(4096, 64, generator=generator, dtype=torch.float64)
    noisy = (truth + 0.05 * torch.randn(4096, 64, generator=generator)).float()
    broken = noisy.clone()
    broken[100:104] = 0
    assert_close("x", noisy, truth, noisy)
    with pytest.raises(AssertionError, match=r"row 10[0-3] \(4 of 4096 rows fail\)"):
        assert_close("x", broken, truth, noisy)


def test_rejects_a_dropped_key_tile_in_a_gradient(case):
    _, truth, eager = case
    broken = eager.d_index_k.clone()
    broken[TILE] = 0
    assert judge(eager._replace(d_index_k=broken), truth, eager) == ["d_index_k"]


def test_rejects_a_dropped_key_tile_in_the_scores(case):
    inputs, truth, eager = case
    index_k = inputs.index_k.clone()
    index_k[TILE] = 0
    assert judge(eager_indexer_kl(replace(inputs, index_k=index_k)), truth, eager) != []


def test_rejects_a_missing_softmax_scale(case):
    inputs, truth, eager = case
    rejected = judge(eager_indexer_kl(replace(inputs, softmax_scale=1.0)), truth, eager)
    assert rejected == list(Result._fields)


@pytest.mark.parametrize("head", [0, 7])
def test_rejects_a_wrong_sign_on_one_head(case, head):
    inputs, truth, eager = case
    broken = eager.d_index_q.clone()
    broken[:, head] *= -1
    assert judge(eager._replace(d_index_q=broken), truth, eager) == ["d_index_q"]
    index_weights = inputs.index_weights.clone()
    index_weights[:, head] *= -1
    rejected = judge(eager_indexer_kl(replace(inputs, index_weights=index_weights)), truth, eager)
    assert set(rejected) >= {"kl", *GRADIENTS}


def test_rejects_low_precision_logits():
    inputs = make_inputs(SHAPES["smollm2"], seed=0, dtype=torch.float32)
    rounded = {name: getattr(inputs, name).bfloat16().float() for name in ("q", "k", "index_q", "index_k")}
    got = eager_indexer_kl(replace(inputs, **rounded))
    assert set(judge(got, reference_indexer_kl(inputs), eager_indexer_kl(inputs))) == set(Result._fields)


def test_non_finite_elements_must_agree():
    ref = torch.tensor([[1.0, -torch.inf], [torch.nan, 2.0]], dtype=torch.float64)
    assert_close("x", ref.float(), ref, ref.float())
    for wrong in (
        [[1.0, torch.inf], [torch.nan, 2.0]],
        [[1.0, 0.0], [torch.nan, 2.0]],
        [[torch.nan, -torch.inf], [torch.nan, 2.0]],
    ):
        with pytest.raises(AssertionError, match="x: got and ref64 differ in their non-finite elements at 1 places"):
            assert_close("x", torch.tensor(wrong), ref, ref.float())
    with pytest.raises(AssertionError, match="x: eager and ref64 differ in their non-finite"):
        assert_close("x", ref.float(), ref, torch.ones(2, 2))


def test_all_zero_truth_wants_exact_zeros():
    zeros = torch.zeros(3, 2, dtype=torch.float64)
    assert_close("x", zeros.float(), zeros, zeros.float())
    assert_close("x", torch.empty(0, 2), zeros[:0], torch.empty(0, 2))
    with pytest.raises(AssertionError, match="the whole tensor"):
        assert_close("x", torch.full((3, 2), 1e-30), zeros, zeros.float())


def test_refuses_what_cannot_be_compared():
    ref = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match="ref64 must be float64, got torch.float32"):
        assert_close("x", ref.float(), ref.float(), ref.float())
    with pytest.raises(ValueError, match=r"eager must be shaped like ref64, \[2, 3\], got \[3, 2\]"):
        assert_close("x", ref.float(), ref, torch.ones(3, 2))
    with pytest.raises(AssertionError, match=r"x: shape must be \[2, 3\], got \[2, 1\]"):
        assert_close("x", torch.ones(2, 1), ref, ref.float())
    with pytest.raises(AssertionError, match="x: dtype must be torch.bfloat16 like eager, got torch.float32"):
        assert_close("x", ref.float(), ref, ref.bfloat16())
    with pytest.raises(TypeError, match="eager_indexer_kl: inputs must be"):
        eager_indexer_kl(make_inputs(SHAPES["one_head"], seed=0).double())


def test_shapes_hold_the_corner_cases():
    lengths, sizes, documents = set(), set(), set()
    for shape in SHAPES.values():
        key_start, key_end = shape.intervals()
        lengths |= set((key_end - key_start).tolist())
        sizes.add((shape.T > shape.S) - (shape.T < shape.S))
        documents |= set(shape.documents)
        assert shape.H % shape.G == 0
    assert {0, 1} <= lengths
    assert sizes == {-1, 0, 1}
    assert (1, 1) in documents
    assert any(shape.window for shape in SHAPES.values())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_inputs_are_repeatable_and_typed(dtype):
    a, b, c = (make_inputs(SHAPES["packed"], seed=seed, dtype=dtype) for seed in (3, 3, 4))
    assert torch.equal(a.q, b.q) and not torch.equal(a.q, c.q)
    assert {x.dtype for x in (a.q, a.k, a.index_q, a.index_k)} == {dtype}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for x in (a.index_weights, a.lse, a.token_weight)} == {wide}
    assert a.key_start.dtype == a.key_end.dtype == torch.int32
    assert torch.equal(a.double().q, a.q.double())
    assert (a.token_weight > 0).any() and (a.token_weight < 0).any() and (a.token_weight == 0).any()
    assert torch.equal(a.lse.isinf().all(-1), a.key_end == a.key_start)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_the_eager_attention_rounds_probabilities_and_output_once(dtype):
    x = make_inputs(SHAPES["cached_prefix"], seed=2, dtype=dtype)
    v = torch.randn(x.k.shape[0], 2, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    out, lse = eager_attention(x, v)
    y = x.double()
    truth = reference.attention(y.q, y.k, v.double(), y.softmax_scale, y.key_start, y.key_end)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), truth[1], rtol=1e-6, atol=1e-6)
    distance = (out - truth[0]).norm() / truth[0].norm()
    step = torch.finfo(dtype).eps
    assert step / 10 < distance < step * (1 if dtype == torch.bfloat16 else 4)


def test_lse_does_not_depend_on_blocks_of_rows(monkeypatch):
    whole = make_inputs(SHAPES["window"], seed=0)
    monkeypatch.setattr("flash_indexer.testing._ELEMENTS", 3 * 5 * 102)
    torch.testing.assert_close(make_inputs(SHAPES["window"], seed=0).lse, whole.lse, rtol=1e-6, atol=0)
