"""Selection by kernels: bitwise that of the definition's sort on the same scores."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from flash_indexer import causal_intervals
from flash_indexer.kernels.sm_90.sizes import SELECT_ORDERED, SELECT_ROW
from flash_indexer.ops import Selection, bodies, select_keys, top_keys
from flash_indexer.ops.sparse import gpu_select
from flash_indexer.ops.sparse.plan import TILE_BYTES, score_plan
from flash_indexer.ops.worklists import TILE

pytestmark = pytest.mark.gpu
LAYOUTS = ("causal", "packed", "window", "late", "gaps")
KINDS = ("normal", "zeros", "few_values", "tiny", "negative", "nan", "alike", "sampled", "unsampled", "recent")
LARGE = 2**30


def intervals(layout: str, T: int, S: int) -> tuple[Tensor, Tensor]:
    """key_start and key_end of T queries among S keys, on the CPU."""
    t = torch.arange(T, dtype=torch.int32)
    end = (t + 1 + (S - T)).clamp(0, S)
    if layout == "packed":
        cuts = sorted({0, T, T // 3, T // 3 + 1, 2 * T // 3 + 5})
        return tuple(x + (S - T) for x in causal_intervals(torch.tensor(cuts)))  # type: ignore[return-value]
    if layout == "window":
        return (end - 77).clamp_min(0), end
    if layout == "late":
        return torch.zeros_like(end), torch.full_like(end, S)
    start = torch.zeros_like(end)
    if layout == "gaps":  # queries that see nothing, between others and at the end
        hidden = (t % 7 == 3) | (t >= T - 2) | ((t >= 128) & (t < 256))
        start = torch.where(hidden, end, start).cummax(0).values
    return start, torch.maximum(start, end)


def make_scores(kind: str, T: int, S: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, S, generator=generator)
    if kind == "zeros":  # as sums of ReLU have, of either sign
        return torch.where(x > 0.5, x, torch.where(x > 0, 0.0, -0.0))
    if kind == "few_values":
        values = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf])
        return values[torch.randint(6, (T, S), generator=generator)]
    if kind == "tiny":  # denormal numbers are ranked too
        return (x * 1e-40).to(torch.float32)
    if kind == "negative":
        return -x.abs() * 1e30
    if kind == "alike":  # first digits tell nothing
        return 10 + 1e-3 * x
    if kind in ("sampled", "unsampled"):  # the kernel looks at one score in 16, or in 64, before it reads them all
        often = torch.arange(S) % 16 == 0
        return x + 100.0 * (often if kind == "sampled" else ~often)
    if kind == "recent":
        return x + 20.0 * (torch.arange(S) >= S - S // 8)
    if kind == "nan":
        x[torch.rand(T, S, generator=generator) < 0.3 / S] = torch.nan
    return x


def selected(scores: Tensor, start: Tensor, end: Tensor, topk: int, always: tuple[int, int]) -> Selection:
    """From given scores [T, S], as `select` goes about it; tiles hold NaN where nobody looks."""
    T, S = scores.shape
    start, end = start.cuda(), end.cuda()
    plan = score_plan(start, end, S, 5 * TILE_BYTES * -(-S // TILE))
    padded = torch.full((-(-T // TILE) * TILE, -(-S // TILE) * TILE), torch.nan, device="cuda")
    padded[:T, :S] = scores.cuda()
    columns = torch.arange(padded.shape[1], device="cuda")
    seen = (columns >= start[:, None]) & (columns < end[:, None])
    padded[:T].masked_fill_(~seen, torch.nan)
    padded[T:] = torch.nan
    K = min(topk, S)
    out = Selection(
        torch.full((T, K), 7, dtype=torch.int32, device="cuda"),
        torch.full((T,), 7, dtype=torch.int32, device="cuda"),
        torch.full((T, K), torch.nan, device="cuda"),
    )
    for chunk in plan.chunks:
        tiles = torch.full((max(chunk.tiles, 1) * TILE, TILE), torch.nan, device="cuda")
        for token, key, tile, _ in chunk.score.cpu().view(-1, 4).tolist():
            tiles[tile * TILE : (tile + 1) * TILE] = padded[token : token + TILE, key : key + TILE]
        gpu_select.top_rows(tiles, plan, chunk, (start, end), always, out)
    return out


def assert_same(got: Selection, expected: Selection) -> None:
    assert torch.equal(got.count.cpu(), expected.count)
    assert torch.equal(got.indices.cpu(), expected.indices)
    # of a row with NaN, slots behind its keys too
    has_nan = expected.scores.isnan().any(-1)
    assert got.scores.cpu()[has_nan].isnan().all()
    assert torch.equal(got.scores.cpu()[~has_nan], expected.scores[~has_nan])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("topk, always", [(1, (0, 0)), (64, (0, 0)), (64, (3, 10)), (13, (5, 8)), (2048, (0, 0))])
def test_bitwise_on_given_scores(layout: str, kind: str, topk: int, always: tuple[int, int]) -> None:
    rng = random.Random(f"{layout} {kind} {topk} {always}")
    T = rng.choice([300, 389, 450])
    S = T + rng.choice([0, 1, 70, 1900])
    start, end = intervals(layout, T, S)
    scores = make_scores(kind, T, S, rng.randrange(1000))
    assert_same(selected(scores, start, end, topk, always), top_keys(scores, start, end, topk, always))


LENGTHS = (SELECT_ROW - 5, SELECT_ROW, SELECT_ROW + 1, 2 * SELECT_ROW + 77, 8 * SELECT_ROW + 300)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("S", LENGTHS)
@pytest.mark.parametrize(
    "topk, always",
    [(1, (0, 0)), (2048, (0, 0)), (2048, (10, 1000)), (SELECT_ORDERED, (0, 0)), (SELECT_ORDERED + 9, (3, 4))],
)
def test_long_rows(S: int, kind: str, topk: int, always: tuple[int, int]) -> None:
    """About as many keys as the kernel holds, and more: these are listed, or read again for each digit."""
    T = 12
    start, end = intervals("causal", T, S)
    start[T // 2 :] = 333
    scores = make_scores(kind, T, S, seed=S + topk)
    assert_same(selected(scores, start, end, topk, always), top_keys(scores, start, end, topk, always))


def test_a_long_row_whose_keys_are_all_selected() -> None:
    T, S = 5, 2 * SELECT_ROW
    start, end = intervals("causal", T, S)
    scores = make_scores("nan", T, S, seed=0)
    assert_same(selected(scores, start, end, S - 2, (0, 0)), top_keys(scores, start, end, S - 2))


@pytest.mark.parametrize("T, S", [(1, 1), (1, 5), (5, 1), (129, 2), (2, 129)])
@pytest.mark.parametrize("topk", [1, 2, 100])
def test_small_problems(T: int, S: int, topk: int) -> None:
    end = (torch.arange(T, dtype=torch.int32) + 1).clamp_max(S)
    scores = make_scores("zeros", T, S, seed=T + S)
    assert_same(selected(scores, 0 * end, end, topk, (0, 0)), top_keys(scores, 0 * end, end, topk))


def leaves(T: int, S: int, I: int, E: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    index_q, index_k = (
        torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in ((T, I, E), (S, E))
    )
    return index_q, index_k, torch.randn(T, I, device="cuda", generator=generator)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("I, E", [(1, 64), (9, 64), (64, 128), (80, 128)])
@pytest.mark.parametrize("topk, always", [(50, (0, 0)), (333, (4, 64))])
def test_select_keys_is_right_for_its_scores_and_they_for_the_inputs(
    layout: str, I: int, E: int, topk: int, always: tuple[int, int]
) -> None:
    T, S = 400, 700
    start, end = (x.cuda() for x in intervals(layout, T, S))
    x = leaves(T, S, I, E)
    options = dict(key_start=start, key_end=end)
    every = select_keys(*x, topk=S, **options)
    scores = torch.full((T, S + 1), torch.nan, device="cuda")
    scores.scatter_(1, torch.where(every.indices < 0, S, every.indices).long(), every.scores)
    got = select_keys(*x, topk=topk, always=always, **options)
    assert_same(got, top_keys(scores[:, :S].cpu(), start.cpu(), end.cpu(), topk, always))
    with bodies.use("torch"):
        expected = select_keys(*(y.double().cpu() for y in x), topk=S, key_start=start.cpu(), key_end=end.cpu())
    assert torch.equal(every.indices.cpu(), expected.indices)
    behind = expected.indices < 0
    error = (every.scores.cpu().double() - expected.scores).masked_fill(behind, 0.0).abs().max()
    assert error <= 2e-5 * expected.scores.masked_fill(behind, 0.0).abs().max()


def test_the_same_bits_in_any_chunk_and_call() -> None:
    T, S = 900, 1500
    start, end = (x.cuda() for x in intervals("packed", T, S))
    x = leaves(T, S, 64, 128)
    whole = select_keys(*x, key_start=start, key_end=end, topk=200)
    for _ in range(100):
        again = select_keys(*x, key_start=start, key_end=end, topk=200)
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for workspace in (1, 7 * TILE_BYTES, 30 * TILE_BYTES):
        again = select_keys(*x, key_start=start, key_end=end, topk=200, workspace_bytes=workspace)
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for begin, stop in ((0, 1), (5, 300), (131, 900)):
        rows = slice(begin, stop)
        part = select_keys(x[0][rows], x[1], x[2][rows], key_start=start[rows], key_end=end[rows], topk=200)
        assert all(torch.equal(a[rows], b) for a, b in zip(whole, part, strict=True))


def test_nan_of_a_key_stays_with_those_who_see_it() -> None:
    T = S = 500
    start, end = (x.cuda() for x in intervals("causal", T, S))
    index_q, index_k, weights = leaves(T, S, 8, 64)
    index_k[300] = torch.nan
    got = select_keys(index_q, index_k, weights, key_start=start, key_end=end, topk=40)
    sees = end > 300
    assert got.scores[sees].isnan().all() and not got.scores[~sees].isnan().any()
    assert (got.count[sees] == 40).all()


def test_intervals_are_checked() -> None:
    x = leaves(3, 5, 4, 64)
    start, end = (torch.tensor(y, dtype=torch.int32, device="cuda") for y in ([0, 0, 0], [1, 2, LARGE]))
    with pytest.raises(ValueError, match="key_end"):
        select_keys(*x, key_start=start, key_end=end, topk=2)


def test_no_queries_and_no_keys() -> None:
    none = torch.zeros(0, dtype=torch.int32, device="cuda")
    assert select_keys(*leaves(0, 5, 4, 64), key_start=none, key_end=none, topk=2).indices.shape == (0, 2)
    zeros = torch.zeros(3, dtype=torch.int32, device="cuda")
    got = select_keys(*leaves(3, 0, 4, 64), key_start=zeros, key_end=zeros, topk=2)
    assert got.indices.shape == (3, 0) and (got.count == 0).all()
