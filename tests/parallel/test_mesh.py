"""Places of processes, their groups and their sums, on four gloo processes; unusable sizes are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_indexer.parallel.gradients import all_sum, sum_gradients
from flash_indexer.parallel.mesh import Parallel, make_parallel

PLACE = """
import json, os
os.environ.update(environment)
import torch
import torch.distributed as dist
from flash_indexer.parallel.gradients import all_sum, sum_gradients
from flash_indexer.parallel.mesh import make_parallel
dist.init_process_group("gloo")
rank = dist.get_rank()
place = make_parallel("cpu", cp=2, tp=sizes, layout="contiguous", timeout=240)
groups = {name: place.group(name) and dist.get_process_group_ranks(place.group(name)) for name in ("dp", "cp", "tp")}
parameters = [torch.zeros(2, dtype=torch.bfloat16, requires_grad=True), torch.zeros(3, 1, requires_grad=True)]
parameters.append(torch.zeros(5, requires_grad=True))
parameters[0].grad = torch.tensor([rank, 100.0], dtype=torch.bfloat16)
parameters[1].grad = torch.full((3, 1), rank + 0.5)
sum_gradients(parameters, replicas=place.tp)
total = all_sum(torch.tensor([1.0 + rank])).item()
found = dict(
    place=[place.dp, place.cp, place.tp, place.dp_rank, place.cp_rank, place.tp_rank], groups=groups, total=total,
    layout=place.layout, gradients=[p.grad if p.grad is None else p.grad.flatten().tolist() for p in parameters],
)
open(f"{out}.{rank}", "w").write(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("tp", [1, 2])
def test_ranks_are_counted_tp_first_then_cp_then_dp(tmp_path: Path, runs: Any, tp: int) -> None:
    runs.finish(runs.ranks(4, None, tmp_path / "rank", codes=[PLACE] * 4, sizes=tp))
    for rank in range(4):
        found = json.loads((tmp_path / f"rank.{rank}").read_text())
        if tp == 1:
            assert found["place"] == [2, 2, 1, rank // 2, rank % 2, 0]
            assert found["groups"] == dict(dp=[rank % 2, rank % 2 + 2], cp=[rank // 2 * 2, rank // 2 * 2 + 1], tp=None)
        else:
            assert found["place"] == [1, 2, 2, 0, rank // 2, rank % 2]
            assert found["groups"] == dict(dp=None, cp=[rank % 2, rank % 2 + 2], tp=[rank // 2 * 2, rank // 2 * 2 + 1])
        assert found["layout"] == "contiguous" and found["total"] == 10
        assert found["gradients"] == [[6 / tp, 400 / tp], [8 / tp] * 3, None]


def test_one_process_is_a_place_too() -> None:
    assert make_parallel("cpu") == Parallel() and Parallel().world == 1 and Parallel().group("cp") is None
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.ones(2)
    sum_gradients([parameter])
    assert parameter.grad.tolist() == [1, 1] and all_sum(torch.tensor(3.0)) == 3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            dict(cp=2),
            r"must be a multiple of cp \* tp = 2 \* 1, got 1; start 2 processes, or a multiple, with torchrun",
        ),
        (dict(tp=3, cp=2), r"must be a multiple of cp \* tp = 2 \* 3, got 1"),
        (dict(tp=0), "tp must be at least 1, got 0"),
        (dict(layout="striped"), "layout must be one of .*'zigzag', 'contiguous'.*, got 'striped'"),
    ],
)
def test_unusable_sizes(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_parallel("cpu", **sizes)
