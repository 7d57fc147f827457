"""Rows of e4m3 with one scale each, as indexers are served: the conversion, its inverse, and the rotation before it.

    scale = 2^ceil(log2(max |x| / 448)),   values = e4m3(x / scale), rounded to nearest, ties to even

A power of two divides exactly, so a row's products are those of its values times two scales, and `dequantize` is exact
in bfloat16: four significant bits and a power of two. 448 is e4m3's largest number; since the scale is rounded up,
no value exceeds it, whatever a library does with those that would.

The rotation is the Hadamard matrix over blocks of consecutive columns, divided by a block's square root: orthogonal, so
products of rotated rows are those of the rows, and large entries are spread over their block before they are rounded. A
block has as many columns as the largest power of two that divides the row's width, MOST_COLUMNS at most: for a width
that is a power of two up to that, the whole row.

A row with NaN or infinity has scale NaN, so everything that is made of it is NaN, as it would be in bfloat16.

Source: DeepSeek-V3.2-Exp's inference (2025): rotation of the indexer's queries and keys, whole rows, e4m3 with scales
rounded up. In blocks it serves the teacher's rows too, whose widths need not be powers of two.
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
MOST_COLUMNS = 256  # of a block of the rotation: what 32 lanes of a GPU hold in 8 numbers each


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
        rotation: whether `rotate` comes first.
    """
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
    """y[..., b] = H x[..., b] / sqrt(B) for each block b of B columns, H the Hadamard matrix in Sylvester's order.

    B = `rotation_columns(D)`; y's dtype is x's. Its own inverse. Sums of pairs at distance 1, 2, 4, ...: always in this
    order, so every body has the same bits.
    """
    D, B = x.shape[-1], rotation_columns(x.shape[-1])
    y, step = x, 1
    while step < B:
        pairs = y.reshape(*x.shape[:-1], D // (2 * step), 2, step)
        left, right = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((left + right, left - right), dim=-2)
        step *= 2
    root: float = B**-0.5
    return y.reshape(x.shape) * root


def rotation_columns(width: int) -> int:
    """Columns of a block of `rotate`: the largest power of two that divides the width, at most MOST_COLUMNS."""
    return min(width & -width, MOST_COLUMNS) or 1


def check_rotation(op: str, width: int, rotation: bool) -> None:
    """Raises ValueError where an indexer's rows, which servers rotate whole, have a width that `rotate` splits."""
    if rotation and (width < 1 or rotation_columns(width) != width):
        raise ValueError(
            f"{op}: the rotation needs a power of two up to {MOST_COLUMNS} for the last dimension, got {width}; "
            "quantise without it, or pad with zeros (products stay the same)"
        )


def _chunks(flat: Tensor) -> Iterator[slice]:
    step = max(_ELEMENTS // max(flat.shape[1], 1), 1)
    return (slice(begin, begin + step) for begin in range(0, flat.shape[0], step))
