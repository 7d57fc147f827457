"""Sums over processes: gradients in one flat all-reduce, and small tensors; each waited for with a timeout."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

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
    """gradient = sum over all processes of gradient / replicas, for every parameter, in one flat float32 all-reduce.

    Every process ends with the same bits, so parameters that began equal stay equal.

    Args:
        parameters: those with a gradient take part: the same ones on every process.
        replicas: processes that hold the same gradients, which tensor parallelism makes; each counts once.

    Raises:
        RuntimeError: as `all_sum`.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    flat = all_sum(torch.cat([g.flatten().float() for g in gradients]), timeout=timeout).div_(replicas)
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def unusable_gradient(modules: nn.ModuleDict) -> tuple[str, float] | None:
    """The first module whose max |gradient| is NaN or not below LARGEST_GRADIENT, and which; waits for the device."""
    gradients = {name: [p.grad for p in module.parameters() if p.grad is not None] for name, module in modules.items()}
    norms = {name: get_total_norm(each, norm_type=torch.inf) for name, each in gradients.items() if each}
    values = torch.stack([*norms.values()]).tolist() if norms else []
    return next(((name, x) for name, x in zip(norms, values, strict=True) if not x < LARGEST_GRADIENT), None)
