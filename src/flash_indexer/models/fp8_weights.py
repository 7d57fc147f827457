"""Checkpoints whose own weights are FP8 (quantization_config: quant_method "fp8"): values times their scales.

    weight[r, c] = values[r, c] * scale_inv[r // rows, c // columns]           weight_block_size = [rows, columns]
    weight[r, c] = values[r, c] * scale_inv                                    without: one scale a matrix

The last block of a row or a column may be smaller. A tensor K has its scales in `K_scale_inv`; of stacked experts
[experts, rows, columns] each matrix has its own. Scales of activations change no weight and are passed over.

Source of the format: DeepSeek-V3's released checkpoints, section 3.3 of its technical report (2024).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from flash_indexer.models.shards import shards

SCALE = "_scale_inv"
_ACTIVATIONS = re.compile(r"\.(activation_scale|input_scale)$")
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


def is_fp8(quantisation: Any) -> bool:
    """Whether a config's quantization_config is the one of this format."""
    return isinstance(quantisation, Mapping) and quantisation.get("quant_method") == "fp8"


def dequantised_weights(
    directory: Path, quantisation: Mapping[str, Any], dtype: torch.dtype, skip: re.Pattern[str]
) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name, those in FP8 times their scales, in `dtype`; the others as stored.

    Args:
        directory: of model.safetensors, or of its shards and their index.
        quantisation: the config's quantization_config.
        dtype: of the products, which are formed in float32.
        skip: names that are not read.

    Raises:
        ValueError: a block size that is none, FP8 weights without scales, or scales of another shape or dtype than the
            format's; names the tensor. OSError, SafetensorError: files that can't be read.
    """
    block = _block_size(quantisation)
    names = {name: shard for shard in shards(directory) for name in _names(shard) if not skip.search(name)}
    scales = dict(_tensors({name: shard for name, shard in names.items() if name.endswith(SCALE)}))
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, tensor in _tensors({name: shard for name, shard in names.items() if not name.endswith(SCALE)}):
        if not str(tensor.dtype).startswith("torch.float8") or tensor.dtype == torch.float8_e8m0fnu:
            found[name] = tensor
            continue
        scale = scales.get(name + SCALE)
        if scale is None:
            raise ValueError(
                f"load_model: {name} is stored in {_short(tensor.dtype)} and needs its scales in {name}{SCALE}, which "
                f"{str(directory)!r} lacks; use the whole checkpoint, or one in bfloat16"
            )
        used.add(name + SCALE)
        found[name] = dequantised(name, tensor, scale, block, dtype)
    found |= {name: scale for name, scale in scales.items() if name not in used}
    owners = {name.rpartition(".")[0] for name in used}
    return {n: x for n, x in found.items() if not (_ACTIVATIONS.search(n) and n.rpartition(".")[0] in owners)}


def dequantised(name: str, values: Tensor, scale: Tensor, block: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """values[..., r, c] * scale[..., r // block[0], c // block[1]], in float32, rounded to `dtype`.

    block None: the whole matrix is one.

    Raises:
        ValueError: scales of another shape or dtype than the format's, naming the tensor.
    """
    if scale.dtype not in _SCALE_DTYPES:
        raise ValueError(
            f"load_model: {name}{SCALE} must be float32, bfloat16, float16 or float8_e8m0fnu, got "
            f"{_short(scale.dtype)}; use a checkpoint in bfloat16"
        )
    rows, columns = values.shape[-2:] if values.ndim >= 2 else (1, values.numel())
    size = (rows, columns) if block is None else block
    grid = (*values.shape[:-2], math.ceil(rows / size[0]), math.ceil(columns / size[1]))
    if scale.numel() == math.prod(grid) == 1:
        scale = scale.reshape(grid)
    if scale.shape != grid:
        blocks = "the whole matrix" if block is None else f"each block of {block[0]} x {block[1]}"
        raise ValueError(
            f"load_model: {name}{SCALE} must be {list(grid)}, a scale for {blocks} in {list(values.shape)}, got "
            f"{list(scale.shape)}; put the checkpoint's own quantization_config back into config.json"
        )
    factor = scale.float()
    for dim, steps, length in ((-2, size[0], rows), (-1, size[1], columns)):
        factor = factor.repeat_interleave(steps, dim).narrow(dim, 0, length)
    return (values.float() * factor.reshape(values.shape)).to(dtype)


def _block_size(quantisation: Mapping[str, Any]) -> tuple[int, int] | None:
    size = quantisation.get("weight_block_size")
    if size is None:
        return None
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise ValueError(
            "load_model: weight_block_size of quantization_config must be two positive integers or null, got "
            f"{size!r}; put the checkpoint's own back into config.json"
        )
    return int(size[0]), int(size[1])


def _names(shard: Path) -> list[str]:
    with safe_open(shard, framework="pt") as file:
        return list(file.keys())


def _tensors(names: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, file after file."""
    for shard in dict.fromkeys(names.values()):
        with safe_open(shard, framework="pt") as file:
            for name in (name for name, place in names.items() if place == shard):
                yield name, file.get_tensor(name)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
