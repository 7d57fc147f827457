"""ops.sparse.torch_select: selection against its definition, key by key; the same bits whatever lies beside a row."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flash_indexer import reference
from flash_indexer.ops.sparse import torch_select
from flash_indexer.ops.sparse.selection import Selection
from flash_indexer.ops.sparse.torch_select import select, tiled_scores, top_keys
from flash_indexer.testing import SHAPES, make_inputs


def definition(
    scores: Tensor, start: list[int], end: list[int], k: int, always: tuple[int, int] = (0, 0)
) -> list[list[int]]:
    """Each row's visible keys by score, equal ones by position (Python calls -0.0 and 0.0 equal): the first k."""
    rows = []
    for row, first, last in zip(scores.tolist(), start, end, strict=True):
        visible = range(max(first, 0), min(last, len(row)))
        forced = {*visible[: always[0]], *visible[max(len(visible) - always[1], 0) :]}
        rows.append(sorted(sorted(visible, key=lambda s, row=row, forced=forced: (s not in forced, -row[s]))[:k]))
    return rows


def keys_of(selection: Selection) -> list[list[int]]:
    """The rows' keys, and that what lies behind them is -1 and -inf."""
    rows = []
    for indices, count, scores in zip(*(x.tolist() for x in selection), strict=True):
        assert indices[count:] == [-1] * (len(indices) - count)
        assert all(x == -math.inf for x in scores[count:])
        rows.append(indices[:count])
    return rows


def tied_scores(rows: int, columns: int, seed: int) -> Tensor:
    """Plateaus of exact zeros of both signs, of infinities, and a few values above and below."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0, 2.0, -1.0, torch.inf, -torch.inf])
    return values[torch.randint(len(values), (rows, columns), generator=generator)]


def intervals(rows: int, columns: int) -> tuple[list[int], list[int]]:
    """Among them intervals that see nothing, one key and all, and one that ends behind the last key."""
    return [min(7 * t, columns - 1) for t in range(rows)], [min(7 * t + 11 * (t % 5), columns + 3) for t in range(rows)]


ALWAYS = ((0, 0), (1, 0), (2, 3), (0, 8), (5, 3))


@pytest.mark.parametrize("k, always", [(k, n) for k in (1, 3, 8, 31, 61, 100) for n in ALWAYS if sum(n) <= k])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selection_is_the_definition_where_scores_tie(dtype: torch.dtype, k: int, always: tuple[int, int]) -> None:
    scores = tied_scores(40, 61, seed=k).to(dtype)
    start, end = [0] * 20 + intervals(20, 61)[0], [61] * 20 + intervals(20, 61)[1]
    got = top_keys(scores, torch.tensor(start), torch.tensor(end), k, always)
    expected = definition(scores, start, end, k, always)
    assert keys_of(got) == expected
    assert got.indices.dtype == got.count.dtype == torch.int32 and got.scores.dtype == dtype
    assert got.indices.shape == (40, min(k, 61))
    for row, keys in enumerate(expected):
        assert all(a < b for a, b in pairwise(keys))
        assert got.scores[row, : len(keys)].tolist() == scores[row, keys].tolist()


def test_selection_without_ties_is_that_of_topk() -> None:
    scores = torch.randn(50, 200, generator=torch.Generator().manual_seed(0))
    got = top_keys(scores, torch.zeros(50), torch.full((50,), 200), 17)
    assert torch.equal(got.indices.long(), scores.topk(17).indices.sort().values)


def test_the_same_keys_whatever_lies_beside_the_row() -> None:
    """More columns that the query does not see, of any value, and other rows: nothing moves."""
    scores, k = tied_scores(12, 40, seed=3), 9
    start, end = torch.full((12,), 2), torch.full((12,), 37)
    alone = [top_keys(scores[t : t + 1], start[:1], end[:1], k) for t in range(12)]
    beside = torch.cat([torch.full((12, 30), torch.nan), scores, torch.full((12, 700), 5.0)], 1)
    together = top_keys(beside, start + 30, end + 30, k)
    assert torch.equal(together.indices - 30, torch.cat([x.indices for x in alone]))
    assert torch.equal(together.scores, torch.cat([x.scores for x in alone]))


@pytest.mark.parametrize("always", [(0, 0), (1, 1), (2, 1)])
def test_a_visible_nan_makes_the_rows_scores_nan(always: tuple[int, int]) -> None:
    """Also where every key is forced and none is ranked."""
    scores = torch.arange(30.0).reshape(3, 10)
    scores[1, 4] = scores[2, 9] = torch.nan
    selection = top_keys(scores, torch.zeros(3), torch.tensor([10, 10, 9]), 3, always)
    assert selection.scores.isnan().tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert selection.count.tolist() == [3, 3, 3] and bool((selection.indices >= 0).all())


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (3, 0), (1, 1)])
def test_empty_and_single_problems(rows: int, columns: int) -> None:
    zeros = torch.zeros(rows, dtype=torch.int32)
    selection = top_keys(torch.zeros(rows, columns), zeros, zeros + columns, 4)
    assert keys_of(selection) == [list(range(columns))] * rows


@pytest.mark.parametrize("always", [(0, 0), (2, 3)])
@pytest.mark.parametrize("topk", [5, 7, 24, 1000])
@pytest.mark.parametrize("name", SHAPES)
def test_select_is_the_reference(name: str, topk: int, always: tuple[int, int]) -> None:
    x = make_inputs(SHAPES[name], seed=4, dtype=torch.float64)
    leaves = x.index_q, x.index_k, x.index_weights
    scores = reference.indexer_scores(*leaves, x.key_start, x.key_end)
    expected = reference.selected_keys(scores, x.key_start, x.key_end, topk, always)
    got = select(*leaves, x.key_start, x.key_end, topk, always, 2**29)
    assert got.indices.shape == (len(x.q), min(topk, len(x.k)))
    for t, keys in enumerate(keys_of(got)):
        assert keys == expected[t].nonzero()[:, 0].tolist()
        torch.testing.assert_close(got.scores[t, : len(keys)], scores[t, keys])


def case(E: int, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Index tensors of 150 causal queries and 700 keys; the queries are the last ones."""
    generator = torch.Generator().manual_seed(E)
    shapes = (150, 3, E), (700, E), (150, 3)
    leaves = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    end = torch.arange(551, 701, dtype=torch.int32)
    return (leaves[0], leaves[1], leaves[2]), torch.zeros_like(end), end


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("E", [7, 24, 64])
def test_the_same_bits_at_any_workspace_and_among_any_other_rows(E: int, dtype: torch.dtype) -> None:
    """A product of one row and one of many round differently, so that near ties would be broken otherwise."""
    leaves, start, end = case(E, dtype)
    whole = select(*leaves, start, end, 40, (0, 0), 2**29)
    one_by_one = torch.cat([leaves[0][t, j : j + 1] @ leaves[1].T for t in range(150) for j in range(3)])
    assert not torch.equal(one_by_one, leaves[0].flatten(0, 1) @ leaves[1].T), "the test could not fail"
    for workspace_bytes in (1, 200_000, 900_000):
        again = select(*leaves, start, end, 40, (0, 0), workspace_bytes)
        assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    for rows in (slice(1, 2), slice(3, 140), slice(77, 78), slice(37, 101)):
        part = select(leaves[0][rows], leaves[1], leaves[2][rows], start[rows], end[rows], 40, (0, 0), 2**29)
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_wherever_the_tensors_lie(dtype: torch.dtype) -> None:
    """A library's product of float64 depends on the alignment of its operands."""
    leaves, start, end = case(32, dtype)
    leaves, end = (leaves[0], leaves[1][:512].clone(), leaves[2]), end - 188  # whole tiles: nothing to pad
    whole = select(*leaves, start, end, 40, (0, 0), 2**29)
    for offset in (1, 3, 8):
        buffers = [torch.empty(x.numel() + offset, dtype=dtype)[offset:].view(x.shape).copy_(x) for x in leaves]
        again = select(*buffers, start, end, 40, (0, 0), 2**29)
        assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))


def test_scores_are_those_of_one_shape_of_product(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = set()
    inner = torch.mm
    monkeypatch.setattr(
        torch_select.torch, "mm", lambda a, b, out: shapes.add((a.shape, b.shape)) or inner(a, b, out=out)
    )
    leaves, _, _ = case(24, torch.float32)
    scores = tiled_scores(*leaves)
    rows, keys = torch_select.TILES["cpu"]
    assert shapes == {((rows, 32), (32, keys))}
    exact = (leaves[2].double()[..., None] * torch.einsum("tie,se->tis", *(x.double() for x in leaves[:2])).relu()).sum(
        1
    )
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)
