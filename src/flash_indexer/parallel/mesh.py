"""Who does what in a run of many processes: data parallel x context parallel x tensor parallel."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from flash_indexer.parallel.context import LAYOUTS

NAMES = ("dp", "cp", "tp")


@dataclass(frozen=True)
class Parallel:
    """This process's place: rank = (dp_rank · cp + cp_rank) · tp + tp_rank, world = dp · cp · tp.

    Attributes:
        dp, cp, tp: processes that share the data, each sequence, the heads.
        layout: how a sequence is cut over cp: see `flash_indexer.parallel.context`.
        mesh: the dimensions' process groups under the names dp, cp and tp; None in a run of one process.
    """

    dp: int = 1
    cp: int = 1
    tp: int = 1
    dp_rank: int = 0
    cp_rank: int = 0
    tp_rank: int = 0
    layout: str = "zigzag"
    mesh: DeviceMesh | None = None

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.dp * self.cp * self.tp

    def group(self, name: str) -> dist.ProcessGroup | None:
        """The process group of a dimension; None where that has one process."""
        if self.mesh is None or getattr(self, name) == 1:
            return None
        return self.mesh.get_group(name)


def make_parallel(
    device_type: str, *, cp: int = 1, tp: int = 1, layout: str = "zigzag", timeout: float = 600.0
) -> Parallel:
    """The place of this process among those of torch.distributed; every process calls it, with the same arguments.

    Args:
        device_type: "cpu" or "cuda". timeout: seconds after which a collective operation without answer fails.

    Raises:
        ValueError: the number of processes is no multiple of cp · tp.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    for name, size in (("cp", cp), ("tp", tp)):
        if size < 1:
            raise ValueError(f"make_parallel: {name} must be at least 1, got {size}")
    if layout not in LAYOUTS:
        raise ValueError(f"make_parallel: layout must be one of {LAYOUTS}, got {layout!r}")
    if world % (cp * tp):
        raise ValueError(
            f"make_parallel: the number of processes must be a multiple of cp * tp = {cp} * {tp}, got {world}; "
            f"start {cp * tp} processes, or a multiple, with torchrun or accelerate launch"
        )
    if world == 1:
        return Parallel(layout=layout)
    places = torch.arange(world).view(-1, cp, tp)
    groups = [_group(places.movedim(dim, -1).reshape(-1, places.shape[dim]), timeout) for dim in range(3)]
    mesh = DeviceMesh.from_group(groups, device_type, mesh=places, mesh_dim_names=NAMES)
    dp_rank, cp_rank, tp_rank = (int(x) for x in (places == dist.get_rank()).nonzero()[0])
    return Parallel(places.shape[0], cp, tp, dp_rank, cp_rank, tp_rank, layout, mesh)


def _group(ranks: torch.Tensor, timeout: float) -> dist.ProcessGroup:
    """The group of this process among rows of ranks. Made one by one, since a mesh makes them without a timeout."""
    limit = timedelta(seconds=timeout)
    made = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=limit)  # type: ignore[no-untyped-call]
    own: dist.ProcessGroup = made[0]
    return own
