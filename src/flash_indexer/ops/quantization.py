"""Rows of e4m3 with one scale each, as indexers are served: the conversion, its inverse, and the rotation before it.

    scale = 2^ceil(log2(max |x| / 448)),   values = e4m3(x / scale), rounded to nearest, ties to even

A power of two divides exactly, so a row's products are those of its values times two scales, and `dequantize` is exact
in bfloat16: four significant bits and a power of two. 448 is e4m3's largest number; since the scale is rounded up,
no value exceeds it, whatever a library does with those that would.

The rotation is the Hadamard matrix over the last dimension, divided by its width's square root: orthogonal, so products
of rotated rows are those of the rows, and large entries are spread over the row before they are rounded.

A row with NaN or infinity has scale NaN, so everything that is made of it is NaN, as it would be in bfloat16.

Source: DeepSeek-V3.2-Exp's inference (2025): rotation of the indexer's queries and keys, e4m3 with scales rounded up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
_SMALLEST_EXPONENT = -100
SMALLEST_SCALE = 2.0**_SMALLEST_EXPONENT
"""Rows whose entries lie below e4m3's smallest number times this are zero; float32 has room for all steps above it."""
_MANTISSA = 0.875  # 448 = 0.875 * 2^9
_EXPONENT = 9
_ELEMENTS = 2**24  # of a chunk of rows: float32 copies of more would be a second tensor


class Quantized(NamedTuple):
    """x[..., d] = values[..., d] * scale[...]: values float8_e4m3fn [..., D], scale float32 [...]."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        return self.values.shape


def scales(largest: Tensor) -> Tensor:
    """2^ceil(log2(largest / 448)), at least SMALLEST_SCALE; NaN where largest is NaN or infinite. All float32."""
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa * 2^exponent, 0.5 <= mantissa < 1
    exponent = (exponent - _EXPONENT + (mantissa > _MANTISSA).int()).clamp_min_(_SMALLEST_EXPONENT)
    scale = ((exponent + 127) << 23).view(torch.float32)  # by its bits: a device's pow may be inexact
    scale = torch.where(largest == 0, SMALLEST_SCALE, scale)  # whose exponent frexp gives as 0
    return torch.where(largest.isfinite(), scale, torch.nan)


def quantize(x: Tensor, *, rotation: bool = False) -> Quantized:
    """scale[...] = 2^ceil(log2(max_d |x[...,d]| / 448)); values = e4m3(x / scale), of x or of its rotation.

    Args:
        x: [..., D], of any floating dtype; read as float32.
        rotation: whether the Hadamard rotation over D comes first; D must be a power of two then.

    Raises:
        ValueError: where a row can't be rotated.
    """
    check_rotation("quantize", x.shape[-1], rotation)
    flat = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])
    values = torch.empty(flat.shape, dtype=E4M3, device=x.device)
    scale = torch.empty(flat.shape[0], dtype=torch.float32, device=x.device)
    for rows in _chunks(flat):
        wide = flat[rows].float()
        if rotation:
            wide = rotate(wide)
        scale[rows] = scales(wide.abs().amax(-1)) if flat.shape[1] else SMALLEST_SCALE
        values[rows] = (wide / scale[rows, None]).to(E4M3)
    return Quantized(values.view(x.shape), scale.view(x.shape[:-1]))


def dequantize(x: Quantized, dtype: torch.dtype) -> Tensor:
    """values * scale: [..., D], exact in bfloat16 and in every wider dtype."""
    out = torch.empty(x.shape, dtype=dtype, device=x.values.device)
    rows, width = x.scale.numel(), out.shape[-1]
    flat, values, scale = out.view(rows, width), x.values.reshape(rows, width), x.scale.reshape(rows, 1)
    for some in _chunks(flat):
        flat[some] = values[some].float() * scale[some]
    return out


def rotate(x: Tensor) -> Tensor:
    """y = H x / sqrt(D) over the last dimension, H the Hadamard matrix in Sylvester's order; y's dtype is x's.

    Its own inverse. Sums of pairs at distance 1, 2, 4, ...: always in this order, so every body has the same bits.

    Raises:
        ValueError: where D is no power of two.
    """
    D = x.shape[-1]
    check_rotation("rotate", D, True)
    y, step = x, 1
    while step < D:
        pairs = y.reshape(*x.shape[:-1], D // (2 * step), 2, step)
        left, right = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((left + right, left - right), dim=-2)
        step *= 2
    root: float = D**-0.5
    return y.reshape(x.shape) * root


def check_rotation(op: str, width: int, rotation: bool) -> None:
    """Raises ValueError where rows of this width can't be rotated."""
    if rotation and (width < 1 or width & (width - 1)):
        raise ValueError(
            f"{op}: the rotation needs a power of two for the last dimension, got {width}; "
            "quantise without it, or pad with zeros (products stay the same)"
        )


def _chunks(flat: Tensor) -> Iterator[slice]:
    step = max(_ELEMENTS // max(flat.shape[1], 1), 1)
    return (slice(begin, begin + step) for begin in range(0, flat.shape[0], step))
