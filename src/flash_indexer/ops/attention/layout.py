"""How tensors are laid out for the attention kernels: padded widths, and rows as the copy engine reads them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_indexer.ops.worklists import TILE

LOG2E = 1.4426950408889634

TileSizes = Mapping[str, Mapping[str, int]]
"""Static sizes of each kernel named, in place of those chosen for the GPU."""


def padded_width(n: int) -> int:
    """The width of queries, keys or values that the kernels work on: the next multiple of 64."""
    return -(-n // 64) * 64


def index_width(E: int, heads: int) -> int:
    """E, or 64 for 32 where a copy of part of a tile would begin between multiples of 128 bytes."""
    odd = any(max(heads, rows // heads) % 2 for rows in (TILE // 2, TILE))
    return 64 if E == 32 and odd else E


def padded(x: Tensor, width: int | None = None) -> Tensor:
    """The last dimension filled up with zeros, to a multiple of 64: they change neither logits nor outputs."""
    width = padded_width(x.shape[-1]) if width is None else width
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def row_tiles(x: Tensor, heads: int, rows: int) -> Tensor:
    """x [T, H, n] as tiles of `rows` rows are copied: token by token from [T·H, n], or head by head from [T, H·n]."""
    return x.view(-1, x.shape[2]) if heads > rows // heads else x.view(x.shape[0], -1)


def shapes(D: int, V: int, E: int, heads: int) -> dict[str, dict[str, int]]:
    """Of each kernel with tiles to choose: the widths that it works on, for `heads` heads of a key head."""
    E = index_width(E, heads)
    gradients = dict(D=padded_width(D), E=E, HG=heads)
    return {
        "attention": dict(D=padded_width(D), V=padded_width(V), E=E, HG=heads),
        "head_gradients_query": gradients, "head_gradients_key": gradients,
    }  # fmt: skip


def tile_sizes(
    kernel: str, shape: Mapping[str, int], device: torch.device, named: TileSizes | None = None
) -> dict[str, int]:
    """Static sizes besides the shape: those named, or the ones chosen for the GPU."""
    from flash_indexer.kernels import tuned

    if named is not None and kernel in named:
        return dict(named[kernel])
    return dict(tuned.sizes(kernel, torch.cuda.get_device_properties(device).name, dict(shape)))
