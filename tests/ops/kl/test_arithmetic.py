"""The loss in e4m3 on the CPU, against the definition in float64 of tensors that are rounded here, independently."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_indexer import indexer_kl, quantize, reference
from flash_indexer.ops.kl.arithmetic import check_arithmetic
from flash_indexer.ops.quantization import E4M3, Quantized
from flash_indexer.testing import Inputs, Shape, make_inputs

SHAPE = Shape(((37, 37), (1, 5), (20, 30)), 4, 2, 24, 3, 16)
KINDS = [("fp8", None), ("fp8_unrotated", None), (None, "fp8"), (None, "fp8_unrotated"), ("fp8", "fp8")]
BLOCKS = {24: 8, 576: 64}  # columns that are rotated together, by width


def hadamard(width: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / width**0.5


def rounded(x: Tensor) -> Tensor:
    """Rows in e4m3 times a power of two that is rounded up, by torch's conversion within the range."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min(1e-20)
    scale = 2.0 ** torch.ceil(torch.log2(largest / 448))
    return (x / scale).float().to(E4M3).double() * scale


def teacher(x: Inputs, teacher_dtype: str | None) -> tuple[Tensor, Tensor]:
    """q and k in float64, with "fp8" rotated by the matrix of all blocks, and rounded."""
    q, k = x.q.double(), x.k.double()
    if teacher_dtype == "fp8":
        width = q.shape[-1]
        rotation = torch.block_diag(*[hadamard(BLOCKS[width])] * (width // BLOCKS[width]))
        q, k = q @ rotation.T, k @ rotation.T
    return (rounded(q), rounded(k)) if teacher_dtype else (q, k)


def truth(x: Inputs, index_dtype: str | None, teacher_dtype: str | None, target: str) -> tuple[Tensor, ...]:
    """Loss, KL and gradients in float64, straight through by autograd: at the scores, with "per_head" at the rows."""
    q, k = teacher(x, teacher_dtype)
    leaves = [t.double().clone().requires_grad_() for t in (x.index_q, x.index_k, x.index_weights)]
    index_q, index_k = leaves[:2]
    if index_dtype == "fp8":
        rotation = hadamard(index_q.shape[-1])
        index_q, index_k = index_q @ rotation.T, index_k @ rotation.T
    rows = rounded(index_q.detach()), rounded(index_k.detach())
    options: dict[str, Any] = dict(
        softmax_scale=x.softmax_scale, target=target, token_weight=x.token_weight.double(), key_start=x.key_start,
        key_end=x.key_end,
    )  # fmt: skip
    if index_dtype and target != "per_head":
        loss, kl = reference.rounded_indexer_kl(q, k, (index_q, index_k, leaves[2]), rows, **options)
    else:
        if index_dtype:
            index_q, index_k = (t + (low - t).detach() for t, low in zip((index_q, index_k), rows, strict=True))
        loss, kl = reference.indexer_kl(q, k, index_q, index_k, leaves[2], **options)
    return (loss.detach(), kl, *torch.autograd.grad(loss, leaves))


def computed(x: Inputs, **options: Any) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in (x.index_q, x.index_k, x.index_weights)]
    q, k = options.pop("teacher", (x.q, x.k))
    got = indexer_kl(
        q, k, *leaves, softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end,
        token_weight=x.token_weight, **options,
    )  # fmt: skip
    return (got.loss.detach(), got.kl, *torch.autograd.grad(got.loss, leaves))


@pytest.mark.parametrize("target", ["mean", "sum_logits"])
@pytest.mark.parametrize(("index_dtype", "teacher_dtype"), KINDS)
def test_the_loss_is_that_of_the_rounded_tensors(
    index_dtype: str | None, teacher_dtype: str | None, target: str
) -> None:
    x = make_inputs(SHAPE, seed=3, dtype=torch.float64)
    got = computed(x, index_dtype=index_dtype, teacher_dtype=teacher_dtype, target=target)
    expected = truth(x, index_dtype, teacher_dtype, target)
    for ours, right in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-12)
    plain = computed(x, target=target)
    assert not torch.allclose(plain[1], got[1], rtol=1e-6), "rounding must change something"


def test_per_head_and_float32() -> None:
    x = make_inputs(Shape(((30, 30),), 4, 2, 24, 4, 16), seed=5, dtype=torch.float32)
    got = computed(x, index_dtype="fp8", teacher_dtype="fp8", target="per_head")
    for ours, right in zip(got, truth(x, "fp8", "fp8", "per_head"), strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=2e-4, atol=2e-6)


def test_gradients_of_rounded_tensors_are_those_of_finite_differences() -> None:
    """Of rows that rounding leaves as they are, value and gradient are those without it."""
    x = make_inputs(Shape(((12, 12),), 2, 1, 8, 2, 8), seed=7, dtype=torch.float64)
    once = [rounded(t) for t in (x.index_q, x.index_k)]
    y = replace(x, index_q=once[0], index_k=once[1])
    got = computed(y, index_dtype="fp8_unrotated")
    for ours, plain in zip(got, computed(y), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-15)  # rounded numbers stay


def test_gradients_of_alike_keys_keep_their_direction() -> None:
    """di sums to zero over keys: what all keys share drops out of d_index_q, but its rounding does not."""
    x = make_inputs(Shape(((96, 96),), 4, 2, 24, 3, 16), seed=9, dtype=torch.float64)
    x = replace(x, index_k=0.02 * x.index_k + 1.0, index_q=x.index_q.abs())  # every ReLU is on
    plain, got = computed(x)[2], computed(x, index_dtype="fp8_unrotated")[2]
    low = [t.clone().requires_grad_() for t in (rounded(x.index_q), rounded(x.index_k), x.index_weights)]
    options = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end)
    of_rounded = torch.autograd.grad(indexer_kl(x.q, x.k, *low, token_weight=x.token_weight, **options).loss, low)[0]  # type: ignore[arg-type]
    cosines = [float((g * plain).sum() / (g.norm() * plain.norm())) for g in (got, of_rounded)]
    assert cosines[0] > 0.99 and cosines[1] < 0.6, cosines


@pytest.mark.parametrize("target", ["mean", "sum_logits"])
def test_a_teacher_that_is_handed_over_in_e4m3_is_taken_as_it_is(target: str) -> None:
    x = make_inputs(SHAPE, seed=3, dtype=torch.float64)
    for kind in ("fp8", "fp8_unrotated"):
        rows = tuple(quantize(t, rotation=kind == "fp8") for t in (x.q, x.k))
        expected = computed(x, teacher_dtype=kind, index_dtype="fp8", target=target)
        for given_as in ("fp8", "fp8_unrotated"):
            given = computed(x, teacher=rows, teacher_dtype=given_as, index_dtype="fp8", target=target)
            for ours, right in zip(given, expected, strict=True):
                assert torch.equal(ours, right)


def test_a_teacher_of_576_columns_is_rotated_in_blocks_of_64() -> None:
    """DeepSeek's latents with their rope part, which is a block of its own: columns 512 to 575."""
    x = make_inputs(Shape(((20, 20),), 2, 1, 576, 2, 16), seed=9, dtype=torch.float64)
    for kind in ("fp8", "fp8_unrotated"):
        got = computed(x, teacher_dtype=kind)
        for ours, right in zip(got, truth(x, None, kind, "mean"), strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-12)


def test_a_channel_that_is_large_in_queries_and_keys_costs_less_when_it_is_rotated() -> None:
    x = make_inputs(Shape(((64, 64),), 4, 2, 64, 3, 16), seed=3, dtype=torch.float64)
    q, k = x.q.clone(), x.k.clone()
    q[..., 3] *= 30
    k[..., 3] *= 30
    x = replace(x, q=q, k=k, softmax_scale=x.softmax_scale / 30)
    exact = computed(x)
    lost = {
        kind: [float((a - b).norm() / b.norm()) for a, b in zip(computed(x, teacher_dtype=kind), exact, strict=True)]
        for kind in ("fp8", "fp8_unrotated")
    }
    assert all(rotated < plain / 2 for rotated, plain in zip(lost["fp8"][1:], lost["fp8_unrotated"][1:], strict=True))


def test_scales_of_a_teacher_that_are_not_powers_of_two() -> None:
    x = make_inputs(SHAPE, seed=3, dtype=torch.float64)
    q, k = (Quantized(quantize(t).values, quantize(t).scale * 1.37) for t in (x.q, x.k))
    wide = replace(x, q=x.q * 1.37, k=x.k * 1.37)
    got = computed(x, teacher=(q, k), teacher_dtype="fp8")
    expected = truth(replace(wide, q=rounded(x.q) * 1.37, k=rounded(x.k) * 1.37), None, None, "mean")
    for ours, right in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-7)  # scales are float32


def test_a_given_lse_is_read_as_it_is() -> None:
    """Of the rounded logits: then a sums to 1. The model's own is that of its own logits."""
    x = make_inputs(SHAPE, seed=3, dtype=torch.float64)
    own = reference.teacher_lse(*teacher(x, "fp8"), x.softmax_scale, x.key_start, x.key_end)
    same = computed(x, teacher_dtype="fp8", lse=own)
    for ours, right in zip(same, computed(x, teacher_dtype="fp8"), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-12)
    models = reference.teacher_lse(x.q, x.k, x.softmax_scale, x.key_start, x.key_end)
    assert not torch.allclose(computed(x, teacher_dtype="fp8", lse=models)[1], same[1], rtol=1e-6)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_a_subset_of_gradients(needs: tuple[bool, ...]) -> None:
    x = make_inputs(SHAPE, seed=3, dtype=torch.float64)
    leaves = [t.clone().requires_grad_(n) for t, n in zip((x.index_q, x.index_k, x.index_weights), needs, strict=True)]
    options = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end)
    loss = indexer_kl(x.q, x.k, *leaves, index_dtype="fp8", token_weight=x.token_weight, **options).loss  # type: ignore[arg-type]
    loss.backward()  # type: ignore[no-untyped-call]
    whole = computed(x, index_dtype="fp8")[2:]
    for leaf, gradient, need in zip(leaves, whole, needs, strict=True):
        assert (leaf.grad is not None) == need
        if leaf.grad is not None:
            assert torch.equal(leaf.grad, gradient)


def test_nan_and_infinity_stay_visible() -> None:
    x = make_inputs(Shape(((20, 20),), 2, 1, 16, 2, 16), seed=1, dtype=torch.float64)
    for name, bad in (("q", torch.nan), ("k", torch.inf), ("index_q", torch.inf), ("index_k", torch.nan)):
        tensor = getattr(x, name).clone()
        tensor[10, ..., 3] = bad
        kl = computed(replace(x, **{name: tensor}), index_dtype="fp8", teacher_dtype="fp8")[1]
        touched = slice(10, 11) if name in ("q", "index_q") else slice(10, 20)
        assert kl[touched].isnan().all(), name
        assert kl[:10].isfinite().all(), name


def test_a_compiled_call_is_the_same() -> None:
    x = make_inputs(SHAPE, seed=3, dtype=torch.float64)

    def call(*leaves: Tensor) -> Tensor:
        options = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end)
        return indexer_kl(x.q, x.k, *leaves, index_dtype="fp8", teacher_dtype="fp8", **options).loss  # type: ignore[arg-type]

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x.index_q, x.index_k, x.index_weights)]
        loss = function(*leaves)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for compiled, eager in zip(*results, strict=True):
        assert torch.equal(compiled, eager)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(index_dtype="fp4"), r"index_dtype must be None or one of 'fp8', 'fp8_unrotated', got 'fp4'"),
        (dict(teacher_dtype="fp4"), r"teacher_dtype must be None or one of 'fp8', 'fp8_unrotated', got 'fp4'"),
        (dict(teacher=0), r"q and k in e4m3 need each other and teacher_dtype='fp8' or 'fp8_unrotated', got"),
        (dict(teacher=1, teacher_dtype="fp8"), r"q and k in e4m3 need each other"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    x = make_inputs(SHAPE, seed=3, dtype=torch.float64)
    teachers = [(quantize(x.q), quantize(x.k)), (quantize(x.q), x.k)]
    if "teacher" in options:
        options = {**options, "teacher": teachers[options["teacher"]]}
    with pytest.raises(ValueError, match=message):
        computed(x, **options)


def test_a_width_that_cannot_be_rotated_is_refused_with_the_remedy() -> None:
    x = make_inputs(Shape(((9, 9),), 2, 1, 8, 2, 24), seed=0, dtype=torch.float64)
    with pytest.raises(ValueError, match="power of two up to 256 for the last dimension, got 24; quantise without it"):
        computed(x, index_dtype="fp8")
    computed(x, index_dtype="fp8_unrotated")


def test_scales_that_do_not_fit_are_refused() -> None:
    x = make_inputs(SHAPE, seed=3, dtype=torch.float64)
    q, k = quantize(x.q), quantize(x.k)
    with pytest.raises(ValueError, match=r"q must have a scale for each row, \[58, 4\]"):
        computed(x, teacher=(Quantized(q.values, q.scale[:, :2]), k), teacher_dtype="fp8")
    with pytest.raises(TypeError, match="k must have values in torch.float8_e4m3fn and scales in torch.float32"):
        computed(x, teacher=(q, Quantized(x.k, k.scale)), teacher_dtype="fp8")


def test_an_e4m3_tensor_without_its_scales_is_refused() -> None:
    x = make_inputs(SHAPE, seed=3, dtype=torch.float64)
    q, k = quantize(x.q).values, quantize(x.k).values
    with pytest.raises(TypeError, match="q must be"):
        computed(x, teacher=(q, k), teacher_dtype="fp8")


def test_arguments_that_are_no_tensors_are_left_to_their_own_checks() -> None:
    check_arithmetic("op", None, None, None, None, None)  # type: ignore[arg-type]
