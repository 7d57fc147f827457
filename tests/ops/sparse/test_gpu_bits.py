"""ops.sparse.gpu_bits refuses what its kernels do not take, before it looks at the device; bit_tables cuts rows."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from flash_indexer.ops.sparse.bit_tables import TILE, as_int32, row_runs
from flash_indexer.ops.sparse.gpu_bits import refusal
from flash_indexer.ops.sparse.problem import SparseProblem
from flash_indexer.ops.sparse.selection import Selection


def problem(
    H: int = 8, G: int = 2, D: int = 128, V: int = 128, dtype: torch.dtype = torch.bfloat16, scale: float = 0.1
) -> SparseProblem:
    q, k, v = (torch.zeros(*shape, dtype=dtype) for shape in ((2, H, D), (5, G, D), (5, G, V)))
    selection = Selection(torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, dtype=torch.int32), torch.zeros(2, 3))
    return SparseProblem(q, k, v, selection, scale, V, True, 2**20)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (dict(), None),
        (dict(H=128, G=128), None),
        (dict(H=9, G=3, D=64, V=64), None),
        (dict(D=96, V=17), None),
        (dict(D=192), "D and V of 1 to 128, got D=192, V=128"),
        (dict(V=129), "got D=128, V=129"),
        (dict(dtype=torch.float16), r"kernels for bfloat16, got torch\.float16"),
        (dict(H=129, G=129), "takes 1 to 128 heads, got H=129; split the heads"),
        (dict(scale=0.0), "takes a positive softmax_scale, got 0.0"),
        (dict(scale=float("nan")), "takes a positive softmax_scale, got nan"),
    ],
)
def test_which_problems_the_kernels_take(sizes: dict[str, Any], reason: str | None) -> None:
    found = refusal(problem(**sizes))
    assert found is None if reason is None else found is not None and re.search(reason, found)


@pytest.mark.parametrize("T", [1, 127, 128, 129, 5000])
@pytest.mark.parametrize("workspace", [1, 2**16, 2**20, 2**30])
def test_runs_of_rows_are_whole_tiles_that_fit_the_workspace(T: int, workspace: int) -> None:
    S = 1000
    runs = list(row_runs(T, S, workspace))
    assert [row for run in runs for row in range(run.start, run.stop)] == list(range(T))
    assert all(run.start % TILE == 0 for run in runs)
    bytes_of_a_row = 2 * 4 * (1024 // 32)
    assert all((run.stop - run.start) * bytes_of_a_row <= max(workspace, TILE * bytes_of_a_row) for run in runs)


def test_wide_integers_stay_out_of_range() -> None:
    x = torch.tensor([[-(2**40), -1, 0], [7, 2**32 + 5, 2**31]])
    assert as_int32(x, 100).tolist() == [-1, -1, 0, 7, 100, 100]
    narrow = x.clamp(-1, 50).int()
    assert as_int32(narrow, 3).tolist() == narrow.flatten().tolist()
