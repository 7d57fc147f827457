"""The launches of `quantization` on GPUs with kernels: rows of bfloat16 whose width the kernels know."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import HEAD_WIDTHS, INDEX_WIDTHS, quantized_rows
from flash_indexer.ops import launch
from flash_indexer.ops.quantization import E4M3, Quantized
from flash_indexer.ops.worklists import TILE


class Rows(NamedTuple):
    """e4m3 values [T, H, D] ([S, E]); their scales, flat: of row r, or by head, [H, keys], keys a multiple of 128."""

    values: Tensor
    scale: Tensor
    copy: Tensor | None

    @property
    def quantized(self) -> Quantized:
        """For rows that are not by head."""
        return Quantized(self.values, self.scale.view(self.values.shape[:-1]))


def wanted(width: int, rotation: bool, copy: bool) -> launch.Wanted:
    """The kernel that `quantize_rows` launches."""
    return "quantize", dict(D=width, rotation=int(rotation), copy=int(copy))


def takes(x: Tensor, rotation: bool) -> bool:
    """Whether a kernel of the package is built for these rows."""
    width = x.shape[-1]
    return x.dtype == torch.bfloat16 and width in (INDEX_WIDTHS if rotation else HEAD_WIDTHS)


def quantize_rows(x: Tensor, *, rotation: bool = False, copy: bool = False, by_head: bool = False) -> Rows:
    """Rows of x in e4m3, and with `copy` also rounded to them in bfloat16.

    Args:
        x: bfloat16 [T, H, D] or [S, E], contiguous, aligned. by_head: scales [H, keys], those past the last key 0.
    """
    width, heads = x.shape[-1], x.shape[1] if by_head else 1
    rows = x.numel() // width
    values = torch.empty(x.shape, dtype=E4M3, device=x.device)
    if by_head:
        stride = padded_keys(x.shape[0])
        scale = torch.zeros(heads * stride, device=x.device)
    else:
        stride, scale = 0, torch.empty(rows, device=x.device)
    out = torch.empty_like(x) if copy else x
    if rows:
        name, static = wanted(width, rotation, copy)
        tables = (x.view(-1, width), values.view(-1, width), scale, out.view(-1, width))
        launch.load(name, **static)(*tables, rows, heads, stride, blocks(rows, width))
    return Rows(values, scale, out if copy else None)


def scales_by_head(scale: Tensor) -> Tensor:
    """[S, G] -> flat [G, keys], keys a multiple of 128, zeros past S."""
    S, G = scale.shape
    out = torch.zeros(G, padded_keys(S), device=scale.device)
    out[:, :S] = scale.T
    return out.view(-1)


def wanted_keys(width: int, narrow: bool) -> launch.Wanted:
    """The kernel that `quantize_keys` launches; narrow: for keys that are in e4m3."""
    return "quantize_keys", dict(D=width, narrow=int(narrow))


def quantize_keys(k: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """A teacher's keys in e4m3, and their scales by head, flat: [G, keys], keys a multiple of 128.

    128 keys of a head share a scale where theirs are near enough, and then all have it with a minus sign: the kernel
    says when, and what that costs.

    Args:
        k: [S, G, D], contiguous, aligned; bfloat16 without a scale, e4m3 with one, float32 [S, G].
    """
    S, G, D = k.shape
    stride = padded_keys(S)
    values = torch.empty(k.shape, dtype=E4M3, device=k.device)
    scales = torch.empty(G * stride, device=k.device)
    if k.numel():
        name, static = wanted_keys(D, scale is not None)
        own = scales if scale is None else scale.reshape(-1)
        launch.load(name, **static)(k.view(-1, D), own, values.view(-1, D), scales, S, G, stride, stride // TILE * G)
    return values, scales


def rotate_rows(x: Tensor) -> None:
    """x = its rotation, in place: bfloat16 or float32 [..., E], contiguous."""
    E = x.shape[-1]
    rows = x.numel() // E
    if rows:
        launch.load("rotate", E=E, wide=int(x.dtype == torch.float32))(x.view(-1, E), rows, blocks(rows, E))


def padded_keys(S: int) -> int:
    """Keys in whole tiles."""
    return -(-S // TILE) * TILE


def blocks(rows: int, width: int) -> int:
    """Thread blocks of `quantize` and `rotate`."""
    return -(-rows // quantized_rows(width))
