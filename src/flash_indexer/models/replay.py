"""An attention module run once more on the first tokens of a batch, by another attention function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from flash_indexer.indexer import no_autocast
from flash_indexer.models.families import CACHES
from flash_indexer.models.layer_mask import LayerMask

TOLERANCE, LOW_TOLERANCE = 1e-3, 0.06
"""Largest rms difference of outputs and probabilities, over their own rms: in float32 (in which eager attention forms
probabilities of float64 logits too), and in 16-bit dtypes, to which probabilities and outputs are rounded."""


@contextmanager
def attention_function(module: nn.Module, name: str) -> Iterator[None]:
    """The attention function of that name in one module; eager's logits of 16-bit queries in float32."""
    config: Any = module.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        with Float32Logits() if name == "eager" else nullcontext():
            yield
    finally:
        config._attn_implementation = before


class Float32Logits(TorchFunctionMode):
    """Products of [n, D] queries and [D, n] keys in float32, where eager attention would round them to 16 bits.

    A logit of 100 is rounded by up to a quarter there, and a probability by as large a part of itself. n must be odd: D
    is even, so that no product with values is taken for one with keys.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (torch.matmul, Tensor.matmul, Tensor.__matmul__) or len(args) != 2 or args[1].ndim < 4:
            return func(*args, **(kwargs or {}))
        a, b = args
        with no_autocast(a.device.type):
            product = torch.matmul(a.float(), b.float())
        logits = a.shape[-1] % 2 == 0 and product.shape[-1] == product.shape[-2]
        return product if logits else product.to(b.dtype)


def shortened(value: Any, length: int, n: int) -> Any:
    """A module's arguments with the first row of a batch, its first n of `length` tokens, and no cache."""
    if isinstance(value, Tensor):
        value = value[:1] if value.ndim >= 2 and value.shape[0] != length else value
        dim = next((dim for dim in (1, 2, 0) if dim < value.ndim and value.shape[dim] == length), None)
        return value if dim is None else value.narrow(dim, 0, n)
    if isinstance(value, tuple | list):
        return type(value)(shortened(x, length, n) for x in value)
    if isinstance(value, Mapping):
        return {name: None if name in CACHES else shortened(x, length, n) for name, x in value.items()}
    return value


def with_mask(value: Any, mask: Tensor) -> Any:
    """A module's arguments with `mask` in the place of the mask that only the attached function reads."""
    if isinstance(value, LayerMask):
        return mask
    return {name: with_mask(x, mask) for name, x in value.items()} if isinstance(value, Mapping) else value


def tolerance(module: nn.Module, dtype: torch.dtype) -> float:
    """What a module's outputs of a dtype may differ by. A module with quantised weights counts as one of 16 bits.

    Such layers may round their inputs to eight bits, which makes a whole step of a difference in the last bit.
    """
    plain = all(
        x.dtype.itemsize >= 4 and (type(x) is nn.Parameter or isinstance(x, DTensor)) for x in module.parameters()
    )
    return TOLERANCE if dtype.itemsize >= 4 and plain else LOW_TOLERANCE


def difference(got: Tensor, wanted: Tensor) -> float:
    """The largest of the rms differences of rows over the rms of them all.

    Rows with values that are not finite are left out: eager attention spreads them over keys that nobody sees.
    """
    got, wanted = (x.double().flatten(0, -2) for x in (got, wanted))
    finite = (got.isfinite() & wanted.isfinite()).all(-1)
    got, wanted = got[finite], wanted[finite]
    if not got.numel():
        return 0.0
    rms = wanted.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return float(((got - wanted).square().mean(-1).sqrt() / rms).max())


def first_output(output: Any) -> Tensor:
    """What a module returns, or the first of it."""
    value: Tensor = output[0] if isinstance(output, tuple) else output
    return value
