"""Process groups from what callers hold (a group, a mesh, two groups), and the collectives that change shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

try:
    from torch.distributed import all_gather_single, reduce_scatter_single
except ImportError:  # their names before torch 2.13
    from torch.distributed import all_gather_into_tensor as all_gather_single
    from torch.distributed import reduce_scatter_tensor as reduce_scatter_single

Group = ProcessGroup | DeviceMesh | tuple[ProcessGroup, ProcessGroup]


def process_groups(op: str, group: Group, most: int) -> tuple[ProcessGroup, ...]:
    """The process groups of `group`, `most` of them at most: each dimension of a mesh, in order.

    Raises:
        ValueError, TypeError: naming what was expected.
    """
    expected = (
        "a process group or a mesh of one dimension"
        if most == 1
        else ("a process group, or (context, tensor) as a mesh of two dimensions or a pair of groups")
    )
    if isinstance(group, DeviceMesh):
        groups = tuple(group.get_all_groups())
    elif isinstance(group, tuple):
        groups = group
    else:
        groups = (group,)
    parts: tuple[object, ...] = groups
    for part in parts:
        if part is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{op}: group must hold this process, got one of others; pass the group that it is in")
        if not isinstance(part, ProcessGroup):
            raise TypeError(f"{op}: group must be {expected}, got {type(part).__name__}")
    if not 1 <= len(groups) <= most:
        raise ValueError(f"{op}: group must be {expected}, got {len(groups)} groups; slice the mesh by name")
    return groups


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """[n, ...] on each rank -> [n·world, ...], rank after rank."""
    out = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
    all_gather_single(out, x.contiguous(), group=group)
    return out


def reduce_scatter(x: Tensor, group: ProcessGroup) -> Callable[[], Tensor]:
    """Starts sum over ranks, [n·world, ...] -> this rank's [n, ...]; what is returned waits for it and gives it."""
    x = x.contiguous()
    out = x.new_empty(x.shape[0] // dist.get_world_size(group), *x.shape[1:])
    work = reduce_scatter_single(out, x, group=group, async_op=True)

    def arrived() -> Tensor:
        work.wait()
        return out

    return arrived
