"""Attention heads shared out over processes that hold the same tokens and compute everything else alike.

    forward     each process takes its heads of q, k and v, attends, and gets the outputs of all heads
    backward    each takes its heads' part of the output's gradient, and gets the gradients of all heads of q, k and v

So what comes before and behind is the same on each of them, gradients included: where the sum of the processes' losses
trains, each is to count 1/tp. A key head that all query heads share (MQA, MLA's latents) is attended to by every
process, and its gradient is the sum of their shares.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from flash_indexer.ops import DSAAttention
from flash_indexer.parallel.context import sum_dtype
from flash_indexer.parallel.groups import all_gather
from flash_indexer.parallel.mesh import Parallel
from flash_indexer.parallel.sparse import context_parallel_dsa_attention, tensor_parallel_dsa_attention

__all__ = ["all_heads", "own_heads", "shared_dsa_attention"]


def own_heads(x: Tensor, group: ProcessGroup, dim: int = 1) -> Tensor:
    """This process's heads of x, [..., H, ...] to [..., H / tp, ...]; x itself where it has one head.

    The gradient is that of all heads, on every process.

    Raises:
        ValueError: the processes can't have equally many heads.
    """
    heads, count = x.shape[dim], dist.get_world_size(group)
    if heads > 1 and heads % count:
        raise ValueError(f"attach: tp must divide the heads of every layer, got tp={count} for {heads} heads")
    if heads == 1:
        shared: Tensor = _Shared.apply(x, group)  # type: ignore[no-untyped-call]
        return shared
    own: Tensor = _Own.apply(x, group, dim)  # type: ignore[no-untyped-call]
    return own


def all_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """[T, H / tp, V] of this process's heads to [T, H, V]; the gradient is this process's part of what comes back."""
    joined: Tensor = _All.apply(x, group)  # type: ignore[no-untyped-call]
    return joined


def shared_dsa_attention(parallel: Parallel, *tensors: Tensor | None, **options: Any) -> DSAAttention:
    """`dsa_attention` of this process's tokens (cp > 1) and heads (tp > 1). tensors: q, k, v and the index tensors."""
    tokens, heads = parallel.group("cp"), parallel.group("tp")
    if tokens is None:
        assert heads is not None
        return tensor_parallel_dsa_attention(*tensors, group=heads, **options)  # type: ignore[arg-type]
    group = tokens if heads is None else (tokens, heads)
    return context_parallel_dsa_attention(*tensors, group=group, layout=parallel.layout, **options)  # type: ignore[arg-type]


def _part(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].contiguous()


def _joined(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    return all_gather(x.movedim(dim, 0), group).movedim(0, dim).contiguous()


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _part(x, group, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _joined(gradient, ctx.group, ctx.dim), None, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        whole = gradient.to(sum_dtype(gradient), copy=True)
        dist.all_reduce(whole, group=ctx.group)
        return whole.to(gradient.dtype), None


class _All(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _joined(x, group, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _part(gradient, ctx.group, 1), None
