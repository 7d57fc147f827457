"""The launches of `quantization` on GPUs with kernels: rows of bfloat16 whose width the kernels know."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import quantized_rows
from flash_indexer.ops import launch
from flash_indexer.ops.quantization import E4M3, Quantized
from flash_indexer.ops.worklists import TILE


class Rows(NamedTuple):
    """e4m3 values [T, H, D]; their scales, flat: of row r, or by head, [H, keys], keys a multiple of 128."""

    values: Tensor
    scale: Tensor

    @property
    def quantized(self) -> Quantized:
        """For rows that are not by head."""
        return Quantized(self.values, self.scale.view(self.values.shape[:-1]))


class IndexRows(NamedTuple):
    """An indexer's rows in e4m3, index_q [T, I, E], index_k [S, E].

    half_weights: half of the weights times the scales of index_q, flat [T·I], for scores take the double of a ReLU.
    k_scale: flat, S in whole tiles of 128, 0 past the last key.
    """

    q: Tensor
    k: Tensor
    k_scale: Tensor
    half_weights: Tensor


def wanted(width: int, rotation: bool) -> launch.Wanted:
    """The kernel that `quantize_rows` launches."""
    return "quantize", dict(D=width, rotation=int(rotation))


def wanted_index(width: int, rotation: bool) -> launch.Wanted:
    """The kernel that `quantize_index` launches."""
    return "quantize_index", dict(E=width, rotation=int(rotation))


def quantize_rows(x: Tensor, *, rotation: bool = False, by_head: bool = False) -> Rows:
    """Rows of x in e4m3.

    Args:
        x: bfloat16 [T, H, D], contiguous, aligned. rotation: whether rows are rotated before. by_head: scales
            [H, keys], those past the last key 0.
    """
    width, heads = x.shape[-1], x.shape[1] if by_head else 1
    rows = x.numel() // width
    values = torch.empty(x.shape, dtype=E4M3, device=x.device)
    stride = padded_keys(x.shape[0]) if by_head else 0
    make = torch.zeros if stride > x.shape[0] else torch.empty
    scale = make(heads * stride if by_head else rows, device=x.device)
    if rows:
        name, static = wanted(width, rotation)
        tables = (x.view(-1, width), values.view(-1, width), scale)
        launch.load(name, **static)(*tables, rows, heads, stride, blocks(rows, width))
    return Rows(values, scale)


def quantize_index(index_q: Tensor, index_k: Tensor, weights: Tensor, rotation: bool) -> IndexRows:
    """The indexer's rows in e4m3, in one launch; nothing is written where there are no queries or no keys.

    Args:
        index_q: [T, I, E], index_k: [S, E] bfloat16, weights: [T, I] float32; contiguous, aligned. rotation: whether
            rows are rotated before.
    """
    E, (rows, keys) = index_k.shape[1], (weights.numel(), index_k.shape[0])
    q, k = (torch.empty(x.shape, dtype=E4M3, device=x.device) for x in (index_q, index_k))
    out = IndexRows(q, k, weights.new_empty(padded_keys(keys)), weights.new_empty(rows))
    if rows and keys:
        name, static = wanted_index(E, rotation)
        launch.load(name, **static)(
            index_q.view(-1, E), q.view(-1, E), weights.view(-1), out.half_weights,
            index_k, k, out.k_scale, blocks(rows, E) + blocks(padded_keys(keys), E),
        )  # fmt: skip
    return out


def scales_by_head(scale: Tensor) -> Tensor:
    """[S, G] -> flat [G, keys], keys a multiple of 128, zeros past S."""
    S, G = scale.shape
    out = torch.zeros(G, padded_keys(S), device=scale.device)
    out[:, :S] = scale.T
    return out.view(-1)


def wanted_keys(width: int, narrow: bool, rotation: bool) -> launch.Wanted:
    """The kernel that `quantize_keys` launches; narrow: for keys that are in e4m3, which are not rotated."""
    return "quantize_keys", dict(D=width, narrow=int(narrow), rotation=int(rotation and not narrow))


def quantize_keys(k: Tensor, scale: Tensor | None, *, rotation: bool = False) -> tuple[Tensor, Tensor]:
    """A teacher's keys in e4m3, and their scales by head, flat: [G, keys], keys a multiple of 128.

    128 keys of a head share a scale where theirs are near enough, and then all have it with a minus sign: the kernel
    says when, and what that costs.

    Args:
        k: [S, G, D], contiguous, aligned; bfloat16 without a scale, e4m3 with one, float32 [S, G].
        rotation: whether bfloat16 is rotated before; e4m3 is taken as it is.
    """
    S, G, D = k.shape
    stride = padded_keys(S)
    values = torch.empty(k.shape, dtype=E4M3, device=k.device)
    scales = torch.empty(G * stride, device=k.device)
    if k.numel():
        name, static = wanted_keys(D, scale is not None, rotation)
        own = scales if scale is None else scale.reshape(-1)
        launch.load(name, **static)(k.view(-1, D), own, values.view(-1, D), scales, S, G, stride, stride // TILE * G)
    return values, scales


def padded_keys(S: int) -> int:
    """Keys in whole tiles."""
    return -(-S // TILE) * TILE


def blocks(rows: int, width: int) -> int:
    """Thread blocks of `quantize`."""
    return -(-rows // quantized_rows(width))
