"""Rows in e4m3: the conversion pinned bit by bit, since libraries disagree about it."""

import math

import pytest
import torch
from torch import Tensor

from flash_indexer import reference
from flash_indexer.ops.quantization import (
    E4M3,
    SMALLEST_SCALE,
    Quantized,
    check_rotation,
    dequantize,
    quantize,
    rotate,
    scales,
)


def e4m3_numbers() -> list[float]:
    """Every finite non-negative number of e4m3, ascending, from the format's definition: 4 bits exponent, bias 7."""
    subnormal = [m / 8 * 2.0**-6 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return subnormal + normal[:-1]  # the last pattern is NaN


def rounded(x: float, scale: float) -> float:
    """x / scale to the nearest number of e4m3, of two equally near the one whose last bit is 0."""
    numbers = e4m3_numbers()
    n = min(range(len(numbers)), key=lambda i: (abs(abs(x) / scale - numbers[i]), i % 2))
    return math.copysign(numbers[n], x)


def expected_scale(largest: float) -> float:
    """The smallest power of two, from 2^-100 on, of which 448 times is no less than `largest`."""
    exponent = -100
    while largest > 448 * 2.0**exponent:
        exponent += 1
    return 2.0**exponent


@pytest.mark.parametrize(
    "largest", [0.0, 1e-45, 1e-30, 0.4375, 0.43750003, 1.0, 447.99997, 448.0, 448.00003, 896.0, 3e38]
)
def test_scales_are_rounded_up_to_powers_of_two(largest: float) -> None:
    value = torch.tensor([largest])
    assert float(scales(value)) == expected_scale(float(value))


@pytest.mark.parametrize("largest", [torch.inf, torch.nan])
def test_the_scale_of_a_row_that_is_not_finite_is_nan(largest: float) -> None:
    assert scales(torch.tensor([largest])).isnan().all()


def test_values_are_rounded_to_the_nearest_ties_to_even() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 16, generator=generator) * torch.logspace(-20, 20, 40)[:, None]
    x[0] = torch.tensor([448.0, 17.0, 19.0, 0.0009765625, 0.0029296875, 0.0048828125, -0.0, 0.0] * 2)  # ties, scale 1
    got = quantize(x)
    for row in range(len(x)):
        scale = expected_scale(float(x[row].abs().max()))
        assert float(got.scale[row]) == scale
        expected = [rounded(float(v), scale) for v in x[row]]
        assert got.values[row].float().tolist() == expected


def test_no_value_depends_on_saturation() -> None:
    """Libraries disagree about numbers above 448 (448, or NaN); a scale that is rounded up leaves none."""
    x = torch.randn(4096, 64) * torch.logspace(-20, 20, 4096)[:, None]
    got = quantize(x)
    assert ((x / got.scale[:, None]).abs() <= 448).all()
    assert got.values.float().isfinite().all()


def test_the_error_is_half_a_step() -> None:
    x = torch.randn(256, 128, dtype=torch.float64).float()
    back = dequantize(quantize(x), torch.float32)
    step = torch.maximum(x.abs() * 2**-4, quantize(x).scale[:, None] * 2**-10)
    assert ((back - x).abs() <= step).all()
    assert ((back - x).abs() > 0).any()


def test_what_is_rounded_is_exact_in_bfloat16_and_stays() -> None:
    x = torch.randn(300, 96) * torch.logspace(-20, 20, 300)[:, None]
    once = dequantize(quantize(x), torch.bfloat16)
    assert torch.equal(once.float(), dequantize(quantize(x), torch.float32))
    assert torch.equal(dequantize(quantize(once), torch.bfloat16), once)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_nan_throughout_and_others_are_not(bad: float) -> None:
    x = torch.randn(3, 32)
    x[1, 7] = bad
    for rotation in (False, True):
        back = dequantize(quantize(x, rotation=rotation), torch.float32)
        assert back[1].isnan().all()
        assert back[[0, 2]].isfinite().all()


def test_zeros_stay_zeros() -> None:
    got = quantize(torch.zeros(2, 3, 8))
    assert (got.scale == SMALLEST_SCALE).all()
    assert (dequantize(got, torch.float32) == 0).all()


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (2, 0, 32), (64,)])
def test_shapes(shape: tuple[int, ...]) -> None:
    got = quantize(torch.randn(shape))
    assert got.values.dtype == E4M3 and got.values.shape == shape == got.shape
    assert got.scale.dtype == torch.float32 and got.scale.shape == shape[:-1]
    assert dequantize(got, torch.bfloat16).shape == shape


def test_strided_rows_are_those_of_their_copy() -> None:
    x = torch.randn(32, 7, 5).transpose(0, 2)
    assert torch.equal(quantize(x).values.float(), quantize(x.contiguous()).values.float())


@pytest.mark.parametrize(
    ("width", "block"),
    [(1, 1), (3, 1), (24, 8), (32, 32), (64, 64), (96, 32), (128, 128), (192, 64), (256, 256), (512, 256), (576, 64)],
)
def test_the_rotation_is_the_hadamard_matrix_over_blocks(width: int, block: int) -> None:
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    matrix = torch.block_diag(*[torch.tensor(signs, dtype=torch.float64) / block**0.5] * (width // block))
    x = torch.randn(10, width, dtype=torch.float64)
    torch.testing.assert_close(rotate(x), x @ matrix.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotate(rotate(x)), x, rtol=1e-12, atol=1e-12)
    got, expected = quantize(x.float(), rotation=True), quantize(rotate(x.float()))
    assert torch.equal(got.values.float(), expected.values.float()) and torch.equal(got.scale, expected.scale)


@pytest.mark.parametrize("width", [64, 256])
def test_sums_of_pairs_have_one_order(width: int) -> None:
    """Bit by bit in float32: at distance 1, then 2, then 4, ..., and the root last."""
    x = torch.randn(5, width)
    y, step = x.numpy().copy(), 1
    while step < width:
        for n in range(width):
            if not n & step:
                y[:, n], y[:, n + step] = y[:, n] + y[:, n + step], y[:, n] - y[:, n + step]
        step *= 2
    assert torch.equal(rotate(x), torch.from_numpy(y) * width**-0.5)


def test_the_rotation_keeps_products_and_spreads_a_large_entry() -> None:
    q, k = torch.randn(50, 128, dtype=torch.float64), torch.randn(60, 128, dtype=torch.float64)
    torch.testing.assert_close(rotate(q) @ rotate(k).T, q @ k.T, rtol=1e-12, atol=1e-11)
    q[:, 3] = 1e4
    exact = q @ k.T
    plain = dequantize(quantize(q), torch.float64) @ dequantize(quantize(k), torch.float64).T
    rows = (quantize(x.float(), rotation=True) for x in (q, k))
    rotated_q, rotated_k = (dequantize(x, torch.float64) for x in rows)
    assert float((rotated_q @ rotated_k.T - exact).norm()) < 2 * float((plain - exact).norm())


def product_error(q: Tensor, k: Tensor, rotation: bool) -> float:
    """Root mean square over keys of what q·k is off by, less what all keys of a query have in common."""
    q_hat, k_hat = (dequantize(quantize(x, rotation=rotation), torch.float64) for x in (q, k))
    lost = q_hat @ k_hat.T - q @ k.T
    return float((lost - lost.mean(-1, keepdim=True)).square().mean().sqrt())


@pytest.mark.parametrize("width", [64, 96, 128, 192, 256, 512, 576])
def test_products_over_one_large_channel_err_far_less_when_rotated(width: int) -> None:
    """Unrotated the error of q·k is that of one product; rotated, of a block's many, which average out."""
    torch.manual_seed(0)
    q, k = torch.randn(200, width, dtype=torch.float64), torch.randn(300, width, dtype=torch.float64)
    q[:, 3] *= 30
    k[:, 3] *= 30
    assert product_error(q, k, True) < product_error(q, k, False) / 4


@pytest.mark.parametrize("width", [64, 128, 192])
def test_products_err_more_when_rotated_where_keys_alone_have_a_channel_in_common(width: int) -> None:
    """What it loses unrotated is the same for all keys, and softmax does not see it; rotated it is in every column."""
    torch.manual_seed(0)
    q, k = torch.randn(200, width, dtype=torch.float64), torch.randn(300, width, dtype=torch.float64)
    k[:, 3] = 100.0
    assert product_error(q, k, True) > 3 * product_error(q, k, False)


@pytest.mark.parametrize("width", [0, 3, 96, 512, 576])
def test_an_indexers_row_is_rotated_whole_or_not_at_all(width: int) -> None:
    with pytest.raises(ValueError, match=f"power of two up to 256 for the last dimension, got {width}; .* pad with"):
        check_rotation("op", width, True)
    check_rotation("op", width, False)


@pytest.mark.parametrize("rotation", [False, True])
def test_rows_without_columns(rotation: bool) -> None:
    assert quantize(torch.randn(3, 0), rotation=rotation).values.shape == (3, 0)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100, 64)
    whole = quantize(x, rotation=True)
    monkeypatch.setattr("flash_indexer.ops.quantization._ELEMENTS", 64 * 7)
    parts = quantize(x, rotation=True)
    assert torch.equal(whole.values.float(), parts.values.float()) and torch.equal(whole.scale, parts.scale)
    assert torch.equal(dequantize(whole, torch.float32), dequantize(parts, torch.float32))


def test_served_scores_are_those_of_the_scales_folded_into_the_weights() -> None:
    """i = ks * sum_j (w qs) relu(q8 · k8): how servers form it, and what the dequantised rows give."""
    x = torch.randn(9, 4, 32, dtype=torch.float64), torch.randn(11, 32, dtype=torch.float64)
    weights = torch.randn(9, 4, dtype=torch.float64)
    q, k = (quantize(part, rotation=True) for part in x)
    starts, ends = torch.zeros(9, dtype=torch.int32), torch.full((9,), 11, dtype=torch.int32)
    wide = [dequantize(Quantized(*part), torch.float64) for part in (q, k)]
    expected = reference.indexer_scores(wide[0], wide[1], weights, starts, ends)
    products = torch.einsum("tie,se->tis", q.values.double(), k.values.double()).relu()
    served = k.scale.double() * torch.einsum("ti,tis->ts", weights * q.scale.double(), products)
    torch.testing.assert_close(served, expected, rtol=1e-12, atol=1e-12)
