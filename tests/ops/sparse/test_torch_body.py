"""ops.sparse.torch_body: selection against its definition, key by key, and attention against a masked softmax."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from flash_indexer.ops.sparse.torch_body import Selection, sparse_attention, top_keys
from torch import Tensor

from flash_indexer import reference
from flash_indexer.intervals import causal_intervals
from flash_indexer.ops.sparse import torch_body

TINY = 2000  # bytes: a few queries a chunk


def definition(scores: Tensor, start: list[int], end: list[int], k: int) -> list[list[int]]:
    """Each row's visible keys by score, equal ones by position (Python calls -0.0 and 0.0 equal): the first k."""
    rows = []
    for row, first, last in zip(scores.tolist(), start, end, strict=True):
        visible = range(max(first, 0), min(last, len(row)))
        rows.append(sorted(sorted(visible, key=lambda s, row=row: -row[s])[:k]))
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


@pytest.mark.parametrize("k", [1, 3, 8, 31, 61, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selection_is_the_definition_where_scores_tie(dtype: torch.dtype, k: int) -> None:
    scores = tied_scores(40, 61, seed=k).to(dtype)
    start, end = [0] * 20 + intervals(20, 61)[0], [61] * 20 + intervals(20, 61)[1]
    got = top_keys(scores, torch.tensor(start), torch.tensor(end), k)
    expected = definition(scores, start, end, k)
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


def test_a_visible_nan_makes_the_rows_outputs_nan() -> None:
    scores = torch.arange(30.0).reshape(3, 10)
    scores[1, 4] = scores[2, 9] = torch.nan
    selection = top_keys(scores, torch.zeros(3), torch.tensor([10, 10, 9]), 3)
    assert selection.scores.isnan().tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert selection.count.tolist() == [3, 3, 3] and bool((selection.indices >= 0).all())
    q, k, v = torch.randn(3, 2, 4), torch.randn(10, 1, 4), torch.randn(10, 1, 4)
    out, lse = sparse_attention(q, k, v, selection, softmax_scale=0.5)
    assert out.isnan().all((1, 2)).tolist() == lse.isnan().all(1).tolist() == [False, True, False]
    assert not bool(out[::2].isnan().any())


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (3, 0), (1, 1)])
def test_empty_and_single_problems(rows: int, columns: int) -> None:
    zeros = torch.zeros(rows, dtype=torch.int32)
    selection = top_keys(torch.zeros(rows, columns), zeros, zeros + columns, 4)
    assert keys_of(selection) == [list(range(columns))] * rows
    q, k, v = torch.randn(rows, 2, 4), torch.randn(columns, 1, 4), torch.randn(columns, 1, 3)
    out, lse = sparse_attention(q, k, v, selection, softmax_scale=0.5)
    assert out.shape == (rows, 2, 3) and lse.shape == (rows, 2)
    if not columns:
        assert bool((out == 0).all()) and bool((lse == -torch.inf).all())


def make_problem(lengths_q: list[int], lengths_k: list[int], G: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, key_start, key_end with H=6, D=8, V=5."""
    generator = torch.Generator().manual_seed(1)
    bounds = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (lengths_q, lengths_k)]
    T, S = (int(x[-1]) for x in bounds)
    shapes = (T, 6, 8), (S, G, 8), (S, G, 5)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [*tensors, *causal_intervals(*bounds)]


def masked_softmax(q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float) -> tuple[Tensor, Tensor]:
    """float64, dense: softmax over the selected keys only; zeros and -inf where there is none."""
    chosen = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    for row, keys in enumerate(keys_of(selection)):
        chosen[row, keys] = True
    logits = reference.teacher_logits(q.double(), k.double(), scale).masked_fill(~chosen[:, None], -torch.inf)
    values = v.double().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.einsum("ths,shv->thv", logits.softmax(-1).nan_to_num(0.0), values), logits.logsumexp(-1)


@pytest.mark.parametrize("workspace_bytes", [1, TINY, 2**29])
@pytest.mark.parametrize("G", [1, 2, 6])
@pytest.mark.parametrize("lengths", [([67], [67]), ([1, 41, 1, 30], [1, 41, 1, 30]), ([20, 33, 5], [13, 33, 70])])
def test_attention_is_a_masked_softmax(lengths: tuple[list[int], list[int]], G: int, workspace_bytes: int) -> None:
    q, k, v, start, end = make_problem(*lengths, G, torch.float64)
    selection = top_keys(torch.randn(len(q), len(k), dtype=torch.float64), start, end, 9)
    got = sparse_attention(q, k, v, selection, softmax_scale=0.4, workspace_bytes=workspace_bytes)
    for x, expected in zip(got, masked_softmax(q, k, v, selection, 0.4), strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("workspace_bytes", [TINY, 2**29])
def test_keys_far_apart_are_gathered_and_near_ones_masked(
    workspace_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways give the same, and both are taken: 3 keys a query of up to 150, then of the last 30 that it sees."""
    ways: list[str] = []
    for name in ("_gathered", "_masked"):
        inner = getattr(torch_body, name)
        monkeypatch.setattr(torch_body, name, lambda *x, inner=inner, name=name: ways.append(name) or inner(*x))
    q, k, v, start, end = make_problem([150], [150], 2, torch.float64)
    scores = torch.randn(150, 150, dtype=torch.float64)
    for starts, way in ((start, "_gathered"), (torch.maximum(start, end - 30), "_masked")):
        selection = top_keys(scores, starts, end, 3)
        got = sparse_attention(q, k, v, selection, softmax_scale=0.4, workspace_bytes=workspace_bytes)
        for x, expected in zip(got, masked_softmax(q, k, v, selection, 0.4), strict=True):
            torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-12)
        assert way in ways
        ways.clear()


def test_bfloat16_is_rounded_once() -> None:
    q, k, v, start, end = make_problem([50], [50], 2, torch.bfloat16)
    selection = top_keys(torch.randn(50, 50), start, end, 12)
    out, lse = sparse_attention(q, k, v, selection, softmax_scale=0.4)
    single = sparse_attention(q.float(), k.float(), v.float(), selection, softmax_scale=0.4)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, single[0].bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(lse, single[1], rtol=0, atol=0)
    torch.testing.assert_close(lse.double(), masked_softmax(q, k, v, selection, 0.4)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["key", "value"])
def test_keys_that_are_not_selected_have_no_part(where: str) -> None:
    """NaN at key 0, which fills empty slots, and at a key that only one query selects."""
    q, k, v, _, end = make_problem([30], [30], 2, torch.float64)
    start = torch.ones_like(end)  # nobody sees key 0
    selection = top_keys(torch.randn(30, 30, dtype=torch.float64), start, end, 4)
    expected = sparse_attention(q, k, v, selection, softmax_scale=0.4)
    poisoned = [x.clone() for x in (k, v)]
    poisoned[where == "value"][0] = torch.nan
    for x, right in zip(sparse_attention(q, *poisoned, selection, softmax_scale=0.4), expected, strict=True):
        torch.testing.assert_close(x, right, rtol=0, atol=0)
    poisoned[where == "value"][17] = torch.nan
    out, _ = sparse_attention(q, *poisoned, selection, softmax_scale=0.4)
    assert out.isnan().any((1, 2)).tolist() == [17 in keys for keys in keys_of(selection)]
