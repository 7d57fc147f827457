"""Which body of an operator runs. Nothing else asks for a GPU's generation.

A body is `TORCH`, the blockwise one of any device, or the name of a GPU generation that has kernels. Each family says
in its gpu_body.py which sizes its kernels refuse; this file asks, and says why where none takes the problem.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from flash_indexer.kernels import catalog

TORCH = "torch"
GENERATIONS = {sizes.CAPABILITY: name for name, sizes in catalog.GENERATIONS.items()}
"""Compute capability -> the folder of kernels that is built for it."""


class NoKernel(RuntimeError):
    """Within `need_kernels`, where the torch body would run on a GPU."""


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ImportError:  # from a finder that somebody put in the way
        return False


_TILELANG_IS_HERE = _is_installed("tilelang")
_named: list[str] = []
_needed: list[bool] = []
_said: set[str] = set()


def choose(op: str, device: torch.device, refusal: Callable[[], str | None]) -> str:
    """The body that runs: a generation where the GPU has kernels and `refusal` returns None, else TORCH.

    Where a GPU runs TORCH, a warning says why, once for each reason.

    Args:
        refusal: why the kernels can't take these sizes, or None; called for a GPU that has kernels alone.
    """
    if device.type != "cuda" or _named:
        return TORCH
    reason = no_kernels(device) or refusal()
    if reason is None:
        return generation(device)
    if _needed:
        raise NoKernel(f"{op} has no kernel here: {reason}")
    if reason not in _said and not torch.compiler.is_compiling():
        _said.add(reason)
        warnings.warn(
            f"flash_indexer: {op} runs the blockwise torch body (exact, in linear memory, not near the GPU's peak): "
            f"{reason}",
            stacklevel=3,
        )
    return TORCH


def generation(device: torch.device) -> str:
    """The folder of kernels for a GPU; TORCH where there are none."""
    return TORCH if no_kernels(device) is not None else GENERATIONS[_capability(device)]


def no_kernels(device: torch.device) -> str | None:
    """Why no kernel can run on a GPU; None where kernels can."""
    if not _ask_once(torch.cuda.is_available):  # a compiler's tensors may claim to be on a GPU
        return "there is no GPU"
    capability = _capability(device)
    if torch.version.hip is not None or capability not in GENERATIONS:
        kind = "of ROCm" if torch.version.hip is not None else f"of compute capability {capability[0]}.{capability[1]}"
        return f"the kernels are for GPUs of compute capability 9.0 (H100, H200, GH200), and {device} is {kind}"
    return None if _TILELANG_IS_HERE else "tilelang is not installed (pip install 'flash-indexer[kernels]')"


@cache
def _ask_once(question: Callable[[], bool]) -> bool:
    """What a machine answers alike at any time: torch reads environment variables each time."""
    return question()


def _capability(device: torch.device) -> tuple[int, int]:
    return _read_capability(device, torch.cuda.get_device_properties)


@cache
def _read_capability(device: torch.device, read: Callable[[torch.device], Any]) -> tuple[int, int]:
    """Read once: a model of many layers asks hundreds of times a step."""
    properties = read(device)
    return properties.major, properties.minor


@contextmanager
def use(body: str) -> Iterator[None]:
    """Within the block operators run TORCH on every device: for tests and benchmarks that compare bodies.

    Raises:
        ValueError: for another body than TORCH: which kernels run depends on the GPU alone.
    """
    if body != TORCH:
        raise ValueError(f"bodies.use: body must be {TORCH!r}, got {body!r}; a GPU's kernels run where they can anyway")
    _named.append(body)
    try:
        yield
    finally:
        _named.pop()


@contextmanager
def need_kernels() -> Iterator[None]:
    """Within the block an operator that has no kernel for its arguments raises `NoKernel`: for benchmarks and tests."""
    _needed.append(True)
    try:
        yield
    finally:
        _needed.pop()
