"""Sums over processes: gradients in flat all-reduces, and small tensors; each waited for with a timeout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

BUCKET = 2**26
"""Numbers of a flat all-reduce, unless one gradient alone has more."""
LARGEST_GRADIENT = 1e12
"""A gradient that is not smaller is no gradient: float32 squares of it, which clipping and Adam take, may overflow."""


def all_sum(x: Tensor, *, timeout: float = 600.0) -> Tensor:
    """Sum over all processes, in place; x itself where there is one.

    Raises:
        RuntimeError: from torch.distributed, where a process is gone or has not answered within `timeout` seconds.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        # NCCL's own wait returns at once and leaves the host unaware of a dead peer; with a timeout it raises here.
        dist.all_reduce(x, async_op=True).wait(timedelta(seconds=timeout))
    return x


def sum_gradients(parameters: Iterable[Tensor], *, replicas: int = 1, timeout: float = 600.0) -> None:
    """gradient = sum over all processes of gradient / replicas, for every parameter, in flat all-reduces.

    Sums are taken in float32 at least. Every process ends with the same bits, so parameters that began equal stay
    equal. The copies take as many numbers as
    BUCKET or the largest gradient has.

    Args:
        parameters: those with a gradient take part: the same ones on every process, see `complete_gradients`.
        replicas: processes that hold the same gradients, which tensor parallelism makes; each counts once.

    Raises:
        RuntimeError: as `all_sum`.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    bucket, size = list[Tensor](), 0
    for gradient in (p.grad for p in parameters if p.grad is not None):
        if bucket and size + gradient.numel() > BUCKET:
            _sum_bucket(bucket, replicas, timeout)
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        _sum_bucket(bucket, replicas, timeout)


def _sum_bucket(gradients: list[Tensor], replicas: int, timeout: float) -> None:
    wide = [g.flatten().to(torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    flat = all_sum(torch.cat(wide), timeout=timeout).div_(replicas)
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def complete_gradients(parameters: Sequence[Tensor], *, timeout: float = 600.0) -> None:
    """Zeros for each parameter that has a gradient on another process alone, as an expert that got no tokens here.

    A parameter without a gradient on any process keeps none: an optimizer passes it over.

    Raises:
        RuntimeError: as `all_sum`.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1 or not parameters:
        return
    has = [float(p.grad is not None) for p in parameters]
    counts = all_sum(torch.tensor(has, device=parameters[0].device), timeout=timeout).tolist()
    for parameter, count in zip(parameters, counts, strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def unusable_gradient(modules: nn.ModuleDict) -> tuple[str, float] | None:
    """The first module whose max |gradient| is NaN or not below LARGEST_GRADIENT, and which; waits for the device."""
    gradients = {name: [p.grad for p in module.parameters() if p.grad is not None] for name, module in modules.items()}
    every = [x for each in gradients.values() for x in each]
    if not every or float(get_total_norm(every, norm_type=torch.inf)) < LARGEST_GRADIENT:
        return None  # a few launches, as a rule all that is needed
    norms = {name: get_total_norm(each, norm_type=torch.inf) for name, each in gradients.items() if each}
    values = torch.stack([*norms.values()]).tolist()
    return next(((name, x) for name, x in zip(norms, values, strict=True) if not x < LARGEST_GRADIENT), None)
