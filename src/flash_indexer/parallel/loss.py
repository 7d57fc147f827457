"""The end of a forward on several processes: token weights over all of them, and a loss that knows its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from flash_indexer.ops import IndexerKL, Sums, scale_gradients


def wanted(leaves: Sequence[Tensor]) -> list[bool]:
    """Which gradients are to be computed; to be asked before autograd is switched off."""
    return [torch.is_grad_enabled() and leaf.requires_grad for leaf in leaves]


def mean_weight(key_start: Tensor, key_end: Tensor, like: Tensor, group: ProcessGroup | None) -> Tensor:
    """1/n for each query that sees a key, 0 for the others, n counted over the group: [T] in `like`'s dtype."""
    seen = key_end > key_start
    count = seen.sum()
    if group is not None:
        dist.all_reduce(count, group=group)
    return (seen.double() / count.clamp_min(1)).to(like.dtype)


def total(weight: Tensor, kl: Tensor, group: ProcessGroup | None) -> Tensor:
    """sum_t weight[t] * kl[t] over the group's tokens, summed in float64: a scalar, equal on all ranks."""
    per_token = kl.double() if kl.ndim == 1 else kl.double().mean(-1)
    loss = weight.double() @ per_token
    if group is not None:
        dist.all_reduce(loss, group=group)
    return loss.to(kl.dtype)


def finish(op: str, loss: Tensor, sums: Sums, leaves: Sequence[Tensor]) -> IndexerKL:
    """The result whose loss gives the leaves (index_q, index_k, index_weights) the gradients in sums, rounded once."""
    gradients = [
        None if gradient is None else gradient.to(leaf.dtype) for gradient, leaf in zip(sums[2:], leaves, strict=True)
    ]
    kernels = leaves[0].is_cuda and sums.kl.ndim == 1  # "per_head" may have run in torch, on any GPU
    known = _Known.apply(op, kernels, loss, gradients, *leaves)  # type: ignore[no-untyped-call]
    return IndexerKL(known, sums.kl, sums.entropy)


class _Known(torch.autograd.Function):
    """A loss whose gradients were computed with it: backward scales them, in place, so it may run once."""

    @staticmethod
    def forward(
        ctx: Any, op: str, kernels: bool, loss: Tensor, gradients: list[Tensor | None], *leaves: Tensor
    ) -> Tensor:
        ctx.op, ctx.kernels, ctx.gradients = op, kernels, gradients
        ctx.absent = [leaf.new_empty(0) for leaf in leaves]  # in each leaf's dtype, as the kernel that scales wants it
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(f"{ctx.op}: the loss has no second derivative; call backward without create_graph=True")
        if ctx.gradients is None:
            raise RuntimeError(
                f"{ctx.op}: backward already ran and scaled the gradients in place; compute the loss again for a "
                "second backward, or add the losses and call backward once"
            )
        gradients, ctx.gradients = ctx.gradients, None
        given = [none if x is None else x for x, none in zip(gradients, ctx.absent, strict=True)]
        scale_gradients(given, d_loss, ctx.kernels)
        return None, None, None, None, *gradients
