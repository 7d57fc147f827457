"""The loss in e4m3: what the arguments say, and the same loss by products in a wider dtype.

    teacher_dtype="fp8"   q and k stand for q̂ and k̂, their rows rotated and rounded to e4m3 with a scale each
    index_dtype="fp8"     index_q and index_k likewise

"fp8_unrotated" leaves the rotation out of either, and q and k that are handed over in e4m3 are taken as they are: both
rotated or neither, for R q · R k = q · k with the rotation R.

Everything else is the loss as it is of q̂, k̂ and the rounded index tensors. Its gradient goes straight through at the
index scores, as if rounding changed their values but not how they depend on anything:

    d θ = sum over t, s of di[t,s] · d i[t,s] / d θ       di of the rounded scores, i of index_q and index_k as they are

With target="per_head", whose kernels form scores and gradients of the same numbers, it goes through at the rounded
tensors instead, and is rotated back: with R the rotation, index_q·index_k = R index_q · R index_k, so that
d index_q = R^T d(R index_q), and R is its own transpose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_indexer.ops.problem import Problem, Sums
from flash_indexer.ops.quantization import E4M3, Quantized, check_rotation, dequantize, quantize, rotate

FP8, UNROTATED = "fp8", "fp8_unrotated"
INDEX_DTYPES = TEACHER_DTYPES = (FP8, UNROTATED)


def parts(op: str, name: str, x: Tensor | Quantized) -> tuple[Tensor, Tensor | None]:
    """A tensor and the scales of its rows, None where it has none.

    Raises:
        TypeError, ValueError: for a `Quantized` that is none: values of another dtype, scales of another shape.
    """
    if not isinstance(x, Quantized):
        return x, None
    values, scale = x
    if values.dtype != E4M3 or scale.dtype != torch.float32:
        raise TypeError(
            f"{op}: {name} must have values in {E4M3} and scales in torch.float32, got {values.dtype} and "
            f"{scale.dtype}; make it with flash_indexer.quantize"
        )
    if scale.shape != values.shape[:-1] or scale.device != values.device:
        raise ValueError(
            f"{op}: {name} must have a scale for each row, {list(values.shape[:-1])} on {values.device}, got "
            f"{list(scale.shape)} on {scale.device}; make it with flash_indexer.quantize"
        )
    return values, scale


def check_arithmetic(
    op: str, q: Tensor, k: Tensor, index_q: Tensor, index_dtype: str | None, teacher_dtype: str | None
) -> None:
    """Checks index_dtype and teacher_dtype, and that they agree with q, k and the width of index_q.

    Raises:
        ValueError: naming the argument, what it must be and what it is.
    """
    choices = (("index_dtype", index_dtype, INDEX_DTYPES), ("teacher_dtype", teacher_dtype, TEACHER_DTYPES))
    for name, value, allowed in choices:
        if value is not None and value not in allowed:
            raise ValueError(f"{op}: {name} must be None or one of {', '.join(map(repr, allowed))}, got {value!r}")
    if isinstance(index_q, Tensor) and index_q.ndim:
        check_rotation(f'{op}: index_dtype="fp8"', index_q.shape[-1], index_dtype == FP8)
    e4m3 = [isinstance(x, Tensor) and x.dtype == E4M3 for x in (q, k)]
    if any(e4m3) and not (all(e4m3) and teacher_dtype is not None):
        raise ValueError(
            f"{op}: q and k in e4m3 need each other and teacher_dtype={FP8!r} or {UNROTATED!r}, got q {_dtype(q)}, "
            f"k {_dtype(k)}, teacher_dtype={teacher_dtype!r}; quantise both, or neither"
        )


def stand_in(x: Tensor, scale: Tensor | None, like: Tensor) -> Tensor:
    """x, or for e4m3 values a tensor of their shape and device in `like`'s dtype, for checks: it takes no memory."""
    if scale is None or not isinstance(like, Tensor):
        return x
    return torch.empty((), dtype=like.dtype, device=x.device).expand(x.shape)


def _dtype(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def with_wide_teacher(problem: Problem) -> Problem:
    """The problem with q̂ and k̂ in index_q's dtype, and no teacher_dtype: their products in that dtype.

    They are rotated, but those that are handed over in e4m3 are as they were handed over.
    """
    if problem.teacher_dtype is None:
        return problem
    rotation = problem.teacher_dtype == FP8
    q, k = (
        dequantize(quantize(x, rotation=rotation) if scale is None else Quantized(x, scale), problem.index_q.dtype)
        for x, scale in ((problem.q, problem.q_scale), (problem.k, problem.k_scale))
    )
    return problem._replace(q=q, k=k, q_scale=None, k_scale=None, teacher_dtype=None)


def with_wide_index(problem: Problem) -> Problem:
    """The problem with rounded (and rotated) index_q and index_k in their own dtype, and no index_dtype."""
    if problem.index_dtype is None:
        return problem
    index_q, index_k = (
        dequantize(quantize(x, rotation=problem.index_dtype == FP8), x.dtype)
        for x in (problem.index_q, problem.index_k)
    )
    return problem._replace(index_q=index_q, index_k=index_k, index_dtype=None)


def rotate_back(gradient: Tensor | None, index_dtype: str | None) -> None:
    """The gradient of index_q or index_k from that of its rounded rotation, in place; no other, nor None."""
    if gradient is not None and index_dtype == FP8:
        gradient.copy_(rotate(gradient.to(torch.promote_types(gradient.dtype, torch.float32))))


def straight_through(sums: Sums, index_dtype: str | None) -> Sums:
    """Gradients of index_q and index_k from those of the rounded tensors, in place: of target="per_head"."""
    for gradient in sums.gradients[:2]:
        rotate_back(gradient, index_dtype)
    return sums
