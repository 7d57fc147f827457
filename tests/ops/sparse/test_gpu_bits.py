"""ops.sparse.gpu_bits: what it refuses; runs of rows; and its steps, their kernels in torch, beside the torch body."""

from __future__ import annotations

import contextlib
import re
from types import SimpleNamespace
from typing import Any

import bits_in_torch
import pytest
import torch
from torch import Tensor

from flash_indexer.kernels import catalog
from flash_indexer.kernels.sm_90 import sizes
from flash_indexer.ops import launch
from flash_indexer.ops.sparse import gpu_bits, torch_attention
from flash_indexer.ops.sparse.bit_tables import TILE, as_int32, row_runs
from flash_indexer.ops.sparse.gpu_bits import refusal
from flash_indexer.ops.sparse.problem import KeySums, Needs, SparseProblem, new_key_sums
from flash_indexer.ops.sparse.selection import Selection


def problem(
    H: int = 8, G: int = 2, D: int = 128, V: int = 128, S: int = 5, dtype: torch.dtype = torch.bfloat16,
    scale: float = 0.1, K: int = 3,
) -> SparseProblem:  # fmt: skip
    q, k, v = (torch.zeros((), dtype=dtype).expand(shape) for shape in ((2, H, D), (S, G, D), (S, G, V)))
    selection = Selection(torch.zeros(2, K, dtype=torch.int32), torch.ones(2, dtype=torch.int32), torch.zeros(2, K))
    return SparseProblem(q, k, v, selection, scale, V, True, 2**20)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (dict(), None),
        (dict(H=128, G=128), None),
        (dict(H=9, G=3, D=64, V=64), None),
        (dict(D=96, V=17), None),
        (dict(D=192), "D and V of 1 to 128, got D=192, V=128"),
        (dict(V=129), "got D=128, V=129"),
        (dict(dtype=torch.float16), r"kernels for bfloat16, got torch\.float16"),
        (dict(H=129, G=129), "takes 1 to 128 heads, got H=129; split the heads"),
        (dict(S=sizes.BITS_ALL_KEYS, H=64, G=1), None),
        (dict(S=sizes.BITS_ALL_KEYS + 1, H=64, G=1), "where it is faster than gathering them, got S=131073, K=3, H=64"),
        (dict(S=sizes.BITS_ALL_KEYS + 1, K=4096, H=64, G=1), None),
        (dict(S=sizes.BITS_MAX_KEYS, K=2048), None),
        (dict(S=sizes.BITS_MAX_KEYS + 1, K=2048), "and up to 1048576 where it is faster.* got S=1048577, K=2048"),
        (dict(S=2**17, H=128, G=128, K=2048), "fewer than 16777216 rows of keys, got S=131072, G=128; split the heads"),
        (dict(scale=0.0), "takes a positive softmax_scale, got 0.0"),
        (dict(scale=float("nan")), "takes a positive softmax_scale, got nan"),
    ],
)
def test_which_problems_the_kernels_take(fields: dict[str, Any], reason: str | None) -> None:
    found = refusal(problem(**fields))
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


@pytest.mark.parametrize("W", sizes.BITS_WIDTHS)
def test_its_kernels_are_compiled_with_the_package(W: int) -> None:
    assert {catalog.kernel(name, **static) for name, static in gpu_bits.kernels(W)} <= set(catalog.every_kernel())


EVERYTHING = Needs(True, True, True, True)


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "load", bits_in_torch.load)
    monkeypatch.setattr(launch, "prepare", lambda kernels: None)
    monkeypatch.setattr(launch, "processors", lambda device: 4)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(launch, "on_its_way", lambda x: (x, SimpleNamespace(synchronize=lambda: None)))


def some_problem(
    T: int, S: int, H: int, G: int, D: int, V: int, workspace: int = 2**29, with_v: bool = True
) -> tuple[SparseProblem, Tensor]:
    """Float32 numbers, which the torch body works in: what differs is order alone. Queries select 0 to 9 keys."""
    generator = torch.Generator().manual_seed(T + S)
    q, d_out, k, v = (
        torch.randn(*shape, generator=generator) for shape in ((T, H, D), (T, H, V), (S, G, D), (S, G, V))
    )
    count = torch.randint(0, min(S, 9) + 1, (T,), generator=generator).int()
    keys = torch.rand(T, S, generator=generator).argsort(-1)[:, :9]
    absent = torch.arange(keys.shape[1]) >= count[:, None]
    keys = keys.masked_fill(absent, S).sort(-1).values
    indices = torch.where(keys == S, -1, keys).int()
    selection = Selection(indices, count, torch.zeros(indices.shape))
    return SparseProblem(q, k, v if with_v else None, selection, 0.3, V, True, workspace), d_out


@pytest.mark.usefixtures("without_a_gpu")
@pytest.mark.parametrize("with_v", [True, False])
@pytest.mark.parametrize("workspace", [1, 2**29])
@pytest.mark.parametrize(
    "numbers", [(1, 1, 1, 1, 64, 64), (130, 300, 4, 2, 40, 33), (270, 140, 3, 3, 128, 128), (300, 300, 6, 2, 64, 64)]
)
def test_steps_are_the_torch_bodys(numbers: tuple[int, ...], workspace: int, with_v: bool) -> None:
    """Runs of rows, parts of a key tile's queries, padded widths, sums over heads: all but the kernels themselves."""
    problem, d_out = some_problem(*numbers, workspace=workspace, with_v=with_v)
    at_once = problem._replace(workspace_bytes=2**29)
    out, lse = gpu_bits.forward(problem)
    expected_out, expected_lse = torch_attention.forward(at_once)
    torch.testing.assert_close(out, expected_out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-5)
    sums, expected_sums = (new_key_sums(problem, EVERYTHING) for _ in range(2))
    dq, p_sum = gpu_bits.backward(problem, d_out, out, lse, EVERYTHING, sums)
    expected = torch_attention.backward(at_once, d_out, out, lse, EVERYTHING, expected_sums)
    for got, right in zip((dq, p_sum, *sums), (*expected, *expected_sums), strict=True):
        if right is None:
            assert got is None
            continue
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gpu_bits.target(problem, lse), p_sum)
    torch.testing.assert_close(gpu_bits.target(problem, None), p_sum)


@pytest.mark.usefixtures("without_a_gpu")
def test_only_what_is_needed_is_made() -> None:
    problem, d_out = some_problem(130, 140, 4, 2, 64, 64)
    out, lse = gpu_bits.forward(problem)
    dq, p_sum = gpu_bits.backward(problem, d_out, out, lse, Needs(True, False, False, False), KeySums(None, None))
    assert dq is not None and p_sum is None
    sums = new_key_sums(problem, Needs(False, False, True, False))
    assert gpu_bits.backward(problem, d_out, out, lse, Needs(False, False, True, False), sums) == (None, None)
    assert sums.dk is None and sums.dv is not None and bool((sums.dv != 0).any())


@pytest.mark.usefixtures("without_a_gpu")
def test_nothing_to_select_from() -> None:
    for T, S in ((0, 5), (3, 0)):
        problem, d_out = some_problem(T, S, 4, 2, 64, 64)
        out, lse = gpu_bits.forward(problem)
        assert out.shape == (T, 4, 64) and bool((lse == -torch.inf).all())
        dq, p_sum = gpu_bits.backward(problem, d_out, out, lse, EVERYTHING, new_key_sums(problem, EVERYTHING))
        assert dq is not None and p_sum is not None and not bool(dq.any()) and not bool(p_sum.any())


@pytest.mark.parametrize(
    ("H", "G", "crossover"),
    [(32, 8, 1_700_000), (64, 1, 160_000), (128, 1, 110_000), (32, 32, 6_600_000)],
)
def test_from_how_many_keys_on_gathering_takes_less_time(H: int, G: int, crossover: int) -> None:
    """Measured are 142 and 10.7 ms at 131,072 keys of 32 heads on 8, 27.2 and 17.3 of 64 on 1, for 512 queries."""
    assert gpu_bits.tiles_are_faster(int(0.9 * crossover), 2048, H, G)
    assert not gpu_bits.tiles_are_faster(int(1.1 * crossover), 2048, H, G)
