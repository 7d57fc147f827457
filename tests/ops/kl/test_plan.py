"""Plans: every visible score once, each gradient's work once, within the workspace, evenly dealt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_indexer.intervals import causal_intervals
from flash_indexer.kernels.sm_90.sizes import kl_parts
from flash_indexer.ops.kl import plan as kl_plan
from flash_indexer.ops.kl.gpu_body import row_kernel
from flash_indexer.ops.kl.plan import Plan, TileChunk, make_plan, plan
from flash_indexer.ops.kl.plan_sizes import BYTES_PER_TILE, PlanSizes, cut
from flash_indexer.ops.worklists import TILE
from flash_indexer.recipe.queries import block_tokens, draw_queries

CPU = torch.device("cpu")


def intervals(documents: list[tuple[int, int]], window: int | None = None) -> tuple[Tensor, Tensor, int]:
    bounds = torch.tensor([(0, 0), *documents]).cumsum(0)
    key_start, key_end = causal_intervals(bounds[:, 0], bounds[:, 1])
    if window is not None:
        key_start = torch.maximum(key_start, key_end - window)
    return key_start, key_end, int(bounds[-1, 1])


LAYOUTS = {
    "causal": intervals([(1000, 1000)]),
    "aligned": intervals([(512, 512)]),
    "packed": intervals([(300, 300), (1, 1), (129, 129), (570, 570), (1, 1)]),
    "prefix": intervals([(5, 900), (200, 333), (1, 700)]),
    "fewer_keys": intervals([(400, 130), (3, 0), (250, 20)]),
    "window": intervals([(1500, 1500), (77, 77)], window=100),
    "one": intervals([(1, 1)]),
    "blind_middle": intervals([(100, 100), (700, 60), (130, 130), (400, 0), (200, 90)]),
    "blind_start": (torch.tensor([0] * 200 + [0] * 60), torch.tensor([0] * 200 + [300] * 60), 300),
}


def sizes(S: int, workspace: int = 2**29, heads: int = 64, grouped: bool = False, processors: int = 8) -> PlanSizes:
    return PlanSizes(S, 128, heads, grouped, workspace, processors)


def rows(items: Tensor) -> list[list[int]]:
    return [[int(x) for x in row] for row in items.view(-1, 4)]


def tile_of(made: Plan, token: int, key_tile: int) -> int:
    return int(made.blocks.view(-1, 4)[token // TILE, 0]) + key_tile


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, int]:
    return LAYOUTS[request.param]


@pytest.mark.parametrize("workspace", [2**29, 3 * BYTES_PER_TILE, 20 * BYTES_PER_TILE])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_visible_score_has_one_tile(layout: tuple[Tensor, Tensor, int], workspace: int, grouped: bool) -> None:
    key_start, key_end, S = layout
    made = make_plan(key_start, key_end, sizes(S, workspace, grouped=grouped), CPU)
    held: set[tuple[int, int]] = set()
    for chunk in made.chunks:
        seen_tiles = set()
        for token, key, tile, _ in rows(chunk.score):
            assert token % TILE == key % TILE == 0 and chunk.begin <= token < chunk.end
            assert tile == tile_of(made, token, key // TILE)
            assert (token // TILE, key // TILE) not in held
            held.add((token // TILE, key // TILE))
            seen_tiles.add(tile)
        assert seen_tiles == set(range(chunk.tiles))
    needed = {
        (t // TILE, key_tile)
        for t, (a, b) in enumerate(zip(key_start.tolist(), key_end.tolist(), strict=True))
        if b > a
        for key_tile in range(a // TILE, -(-b // TILE))
    }
    assert needed <= held


@pytest.mark.parametrize("workspace", [2**29, 3 * BYTES_PER_TILE, 20 * BYTES_PER_TILE])
@pytest.mark.parametrize("grouped", [False, True])
def test_runs_of_tiles_have_each_half_of_each_tile_once(
    layout: tuple[Tensor, Tensor, int], workspace: int, grouped: bool
) -> None:
    key_start, key_end, S = layout
    for chunk in make_plan(key_start, key_end, sizes(S, workspace, grouped=grouped), CPU).chunks:
        wanted = {(token + half, key, tile) for token, key, tile, _ in rows(chunk.score) for half in (0, TILE // 2)}
        held = []
        for token, key, tile, tiles in rows(chunk.narrow):
            assert 1 <= tiles <= 3
            held += [(token, key + n * TILE, tile + n) for n in range(tiles)]
        assert len(held) == len(set(held)) and set(held) == wanted


def test_runs_of_tiles_fill_the_processors_rounds() -> None:
    key_start, key_end, S = intervals([(4096, 4096)] * 8)
    for narrow in (False, True):
        made = make_plan(key_start, key_end, sizes(S, 2**27, grouped=True, processors=132)._replace(narrow=narrow), CPU)
        lists = [chunk.narrow if narrow else chunk.score for chunk in made.chunks[:-1]]
        filled = [x.numel() // 4 / 132 for x in lists]
        assert len(filled) > 3 and all(1 - n / -(-n // 1) < 0.03 for n in filled), (narrow, filled)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("heads", [8, 16, 32, 64])
def test_query_items_cover_what_their_tokens_see(layout: tuple[Tensor, Tensor, int], heads: int, fused: bool) -> None:
    key_start, key_end, S = layout
    of = sizes(S, 10 * BYTES_PER_TILE, heads)._replace(fused=fused)
    made = make_plan(key_start, key_end, of, CPU)
    tokens = TILE * kl_parts(of.E) // heads if fused else TILE // heads
    covered = torch.zeros(key_start.shape[0], dtype=torch.bool)
    for chunk in made.chunks:
        for token, first, count, base in rows(chunk.gradients.query):
            assert token % tokens == 0 and count >= 1 and chunk.begin <= token < chunk.end
            assert base == int(made.blocks.view(-1, 4)[token // TILE, 0])
            assert base + first >= 0 and base + first + count <= chunk.tiles
            here = slice(token, token + tokens)
            assert not covered[here].any()
            covered[here] = True
            seen = key_end[here] > key_start[here]
            assert int(key_start[here][seen].min()) >= first * TILE
            assert int(key_end[here][seen].max()) <= (first + count) * TILE
            if token + tokens > key_start.shape[0]:  # masks of its rows past the last one
                assert [first, first + count] == made.blocks.view(-1, 4)[token // TILE, 1:3].tolist()
    assert covered[key_end > key_start].all()
    assert made.complete == bool(covered.all())


@pytest.mark.parametrize("workspace", [2**29, 20 * BYTES_PER_TILE])
@pytest.mark.parametrize("cached_bytes", [0, 2**40])
@pytest.mark.parametrize("processors", [8, 132])
def test_key_items_take_each_tile_once_and_reductions_every_slot(
    layout: tuple[Tensor, Tensor, int],
    workspace: int,
    cached_bytes: int,
    processors: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether the cache holds what is read again or not. A block may see one tile of a pair alone.

    No part is of quarters alone that hold no token: the kernel passes it by, and its slots would hold what was there.
    """
    monkeypatch.setattr(kl_plan, "_CACHED_BYTES", cached_bytes)
    key_start, key_end, S = layout
    made = make_plan(key_start, key_end, sizes(S, workspace, processors=processors), CPU)
    for chunk in made.chunks:
        taken, direct, slots = set(), [], {}
        for pair, begin, end, slot in rows(chunk.gradients.key):
            key_tiles = (2 * pair, 2 * pair + 1)
            for quarter in range(begin, end):
                first, last = made.blocks.view(-1, 4)[quarter // 4, 1:3].tolist()
                seen = [key_tile for key_tile in key_tiles if first <= key_tile < last]
                assert seen
                for tile in (tile_of(made, quarter * TILE // 4, key_tile) for key_tile in seen):
                    assert (tile, quarter % 4) not in taken
                    taken.add((tile, quarter % 4))
            for v, key_tile in enumerate(key_tiles):
                if end > begin and slot < 0:
                    direct.append(key_tile)
                elif slot >= 0:
                    slots[slot + v * (chunk.gradients.slots // 2)] = key_tile
        assert taken == {
            (tile_of(made, token, key_tile), token * 4 // TILE % 4)
            for token in range(chunk.begin, chunk.end, TILE // 4)
            for key_tile in range(*made.blocks.view(-1, 4)[token // TILE, 1:3].tolist())
        }
        assert len(direct) == len(set(direct))
        assert set(slots) == set(range(chunk.gradients.slots))
        reduced = {s: kt for kt, low, high, _ in rows(chunk.gradients.reduce) for s in range(low, high)}
        assert reduced == slots


@pytest.mark.parametrize(
    ("name", "workspace", "written"),
    [("causal", 2**29, True), ("packed", 2**29, True), ("window", 2**29, True), ("one", 2**29, True),
     ("causal", 3 * BYTES_PER_TILE, False), ("blind_start", 2**29, True), ("blind_middle", 2**29, True)],
)  # fmt: skip
def test_the_first_chunk_writes_the_keys_gradient_where_it_sees_every_pair_of_tiles(
    name: str, workspace: int, written: bool
) -> None:
    key_start, key_end, S = LAYOUTS[name]
    made = make_plan(key_start, key_end, sizes(S, workspace), CPU)
    pairs = {pair for pair, _, _, slot in rows(made.chunks[0].gradients.key) if slot < 0}
    assert made.writes_keys == written == (pairs == set(range(-(-S // (2 * TILE)))))
    assert all(chunk.adds for chunk in made.chunks[1:])
    assert not make_plan(key_start, key_end, sizes(S + 2 * TILE, workspace), CPU).writes_keys, "keys that nobody sees"


def work(tokens: Tensor, length: int) -> Tensor:
    """Of some queries of one long document: score tiles, and the work of d_index_q and of d_index_k, float64 [3]."""
    made = make_plan(torch.zeros_like(tokens), tokens + 1, sizes(length, 2**30, processors=132), CPU)
    total = torch.zeros(3, dtype=torch.float64)
    for chunk in made.chunks:
        query, key = (items.view(-1, 4).double() for items in (chunk.gradients.query, chunk.gradients.key))
        total += torch.stack([torch.tensor(chunk.score.numel() / 4), query[:, 2].sum(), (key[:, 2] - key[:, 1]).sum()])
    return total


def parts_of_the_work(length: int, fraction: float, draws: int = 20) -> Tensor:
    """What each of some draws takes, over the fraction of what all queries take: float64 [draws, 3]."""
    drawn = [draw_queries(length, fraction, seed=0, draw=str(draw)) for draw in range(draws)]
    return torch.stack([work(tokens, length) for tokens in drawn]) / (fraction * work(torch.arange(length), length))


@pytest.mark.parametrize(
    ("length", "fraction"),
    [(2048, 1 / 4), (4096, 1 / 4), (4096, 1 / 8), *((n, f) for n in (8192, 32768) for f in (1 / 4, 1 / 8, 1 / 16))],
)
def test_a_part_of_the_queries_is_as_small_a_part_of_the_work(length: int, fraction: float) -> None:
    """Drawn in m blocks of whole tiles: a draw may be off by an m-th, its blocks lying early or late in their runs."""
    assert block_tokens(length, fraction) == TILE
    found, blocks = parts_of_the_work(length, fraction), length * fraction / TILE
    assert float((found - 1).abs().max()) < 1 / blocks
    assert float((found.mean(0) - 1).abs().max()) < 0.02


@pytest.mark.parametrize(
    ("length", "fraction", "block", "most"),
    [(2048, 1 / 8, 64, 1.3), (4096, 1 / 16, 64, 1.3), (4096, 0.1, 64, 1.3), (2048, 1 / 16, 32, 1.8),
     (2048, 0.1, 32, 1.8), (1024, 1 / 16, 16, 3.5)],
)  # fmt: skip
def test_blocks_that_share_a_tile_cost_more_than_their_part(
    length: int, fraction: float, block: int, most: float
) -> None:
    """A tile's rows take the keys of the last of them. d_index_q, which takes few rows at a time, stays linear."""
    assert block_tokens(length, fraction) == block
    scores, query, key = parts_of_the_work(length, fraction).mean(0).tolist()
    assert 1.05 < scores < most and 1.05 < key < most
    assert query == pytest.approx(1, abs=0.05)


def test_lists_are_made_when_they_are_asked_for() -> None:
    key_start, key_end, S = intervals([(4000, 4000)])
    chunks = make_plan(key_start, key_end, sizes(S, 2**23), CPU).chunks
    assert len(chunks) > 2 and not any({"score", "gradients"} & vars(chunk).keys() for chunk in chunks)
    assert chunks[1].score is chunks[1].score and "gradients" not in vars(chunks[1])
    assert chunks[1].gradients is chunks[1].gradients and not {"score", "gradients"} & vars(chunks[2]).keys()


def test_memory_stays_within_the_workspace() -> None:
    key_start, key_end, S = intervals([(4000, 4000)])
    for workspace in (2**23, 2**25, 2**27):
        made = make_plan(key_start, key_end, sizes(S, workspace), CPU)
        for chunk in made.chunks:
            held = chunk.tiles * BYTES_PER_TILE + chunk.gradients.slots * TILE * 128 * 4
            assert held <= workspace or chunk.end - chunk.begin <= TILE
        for heads in (8, 64):
            wanted = sizes(S, workspace, heads)._replace(fused=True)
            for chunk in make_plan(key_start, key_end, wanted, CPU).chunks:
                tokens, pairs = chunk.end - chunk.begin, chunk.tiles * TILE**2
                held = pairs * (10 + heads // 8) + chunk.tiles * TILE * 12 + tokens * heads * 128 * 2
                held += chunk.gradients.slots * TILE * 128 * 4
                assert held <= workspace or tokens <= TILE
    assert len(make_plan(key_start, key_end, sizes(S, 2**29), CPU).chunks) == 1


def test_runs_of_blocks_fit_and_few_are_more_than_must_be() -> None:
    random = torch.Generator().manual_seed(0)
    for n in range(300):
        blocks = int(torch.randint(1, 60, (), generator=random))
        counts = torch.randint(0, 1 + n % 40, (blocks,), generator=random)
        counts *= torch.rand(blocks, generator=random) < 0.9
        limit = int(torch.randint(1, 90, (), generator=random)) * BYTES_PER_TILE
        for processors in (1, 7):  # one fills every round
            runs = cut(torch.zeros_like(counts), counts, sizes(128, -(-limit * 8 // 7), processors=processors))
            assert [x for run in runs for x in range(*run) if counts[x]] == counts.nonzero()[:, 0].tolist()
            for begin, stop in runs:
                assert int(counts[begin:stop].sum()) * BYTES_PER_TILE <= limit or stop == begin + 1
            fewest, held = 0, limit + 1
            for tiles in counts[counts > 0].tolist():
                held += tiles * BYTES_PER_TILE
                if held > limit:
                    fewest, held = fewest + 1, tiles * BYTES_PER_TILE
            assert len(runs) <= (fewest if processors == 1 else 2 * fewest)


def test_eight_documents_take_two_runs_where_two_fit() -> None:
    """Three were taken, for the first of them filled the processors better as a short one: 6% of the whole call."""
    key_start, key_end, S = intervals([(4096, 4096)] * 8)
    wanted = PlanSizes(S, 64, 16, True, 2**29, 132, narrow=True, fused=True)
    assert len(make_plan(key_start, key_end, wanted, CPU).chunks) == 2


@pytest.mark.parametrize("heads", [8, 64])
@pytest.mark.parametrize("which", ["query", "key"])
def test_work_is_dealt_evenly(which: str, heads: int) -> None:
    """Key tiles in few parts where the cache holds the queries (8 heads), in more where it does not."""
    key_start, key_end, S = intervals([(8192, 8192)])
    chunk: TileChunk = make_plan(key_start, key_end, sizes(S, heads=heads, processors=132), CPU).chunks[0]
    assert which == "query" or chunk.gradients.slots == 2 * {8: 124, 64: 496}[heads]
    items = getattr(chunk.gradients, which).view(-1, 4).double()
    cost = items[:, 2] if which == "query" else items[:, 2] - items[:, 1]
    load = torch.zeros(132, dtype=torch.float64).index_add_(0, torch.arange(items.shape[0]) % 132, cost)
    assert float(load.max() / load.mean()) < 1.03


def test_nothing_visible_makes_no_chunk() -> None:
    empty = torch.zeros(300, dtype=torch.int32)
    made = make_plan(empty, empty, sizes(10), CPU)
    assert made.chunks == () and not made.complete


def test_contents_are_checked_before_planning() -> None:
    key_start, key_end, _ = intervals([(50, 50)])
    with pytest.raises(ValueError, match="key_end"):
        plan(key_start, key_end + 1, sizes(50))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_have_one_kernel_at_any_workspace(layout: tuple[Tensor, Tensor, int]) -> None:
    """For the two kernels of a row's KL add it up in other orders."""
    key_start, key_end, S = layout
    found = {row_kernel(make_plan(key_start, key_end, sizes(S, n), CPU)) for n in (1, 2**20, 2**21, 2**29)}
    assert len(found) == 1


@pytest.mark.parametrize(
    ("documents", "kernel"),
    [([(8192, 8192)], "rows_warp"), ([(100, 100)], "rows_warp"), ([(4096, 4096)] * 8, "rows_warp"),
     ([(256, 131072)], "rows"), ([(32768, 32768)], "rows")],
)  # fmt: skip
def test_a_warp_takes_a_row_where_rows_are_many(documents: list[tuple[int, int]], kernel: str) -> None:
    key_start, key_end, S = intervals(documents)
    assert row_kernel(make_plan(key_start, key_end, sizes(S), CPU)) == kernel
