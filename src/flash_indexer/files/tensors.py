"""Tensors by name in a safetensors file, one in memory at a time; whole in the file, however they are shared out.

A tensor that FSDP2 shares out over processes is a DTensor. It is gathered to be written, and each process takes its
shard of what it reads, so that a file does not tell how many processes wrote it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What a safetensors file calls them."""


def write_tensors(file: Path | None, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file: the length of a JSON header in 8 bytes, the header, and the tensors' bytes by name.

    Every process that has shards of the tensors calls it with the same names, one of them with a file.

    Args:
        file: None where another process writes.

    Raises:
        ValueError: a dtype that no checkpoint of ours has.
    """
    header, end = {}, 0
    tensors = dict(sorted(tensors.items()))
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise ValueError(f"write_tensors: {name} must be of {[str(d) for d in DTYPES]}, got {x.dtype}")
        begin, end = end, end + math.prod(x.shape) * x.element_size()
        header[name] = dict(dtype=DTYPES[x.dtype], shape=list(x.shape), data_offsets=[begin, end])
    if file is None:
        for x in tensors.values():
            whole(x)
        return
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            target.write(whole(x).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors. SafetensorError where the file is truncated or damaged."""
    with safe_open(file, framework="pt") as tensors:
        for name in list(tensors.keys()):
            yield name, tensors.get_tensor(name)


def whole(x: Tensor) -> Tensor:
    """All of x; every process that has a shard of it calls."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shared_out(x: Tensor, like: Tensor) -> Tensor:
    """This process's part of x, which all have whole, as `like` is shared out, on its device."""
    x = x.to(like.device)
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
