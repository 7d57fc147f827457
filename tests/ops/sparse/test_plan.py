"""Score tiles of the selection: every tile that a query may see, once, in chunks that fit the workspace."""

from __future__ import annotations

import pytest
import torch

from flash_indexer import causal_intervals
from flash_indexer.ops.sparse.plan import TILE_BYTES, make_plan, score_plan

T, S = 700, 900


def layouts() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    t = torch.arange(T, dtype=torch.int32)
    end = t + 1 + S - T
    blind = torch.where((t >= 256) & (t < 384), end, torch.zeros_like(t)).cummax(0).values
    return {
        "causal": (torch.zeros_like(end), end),
        "packed": causal_intervals(torch.tensor([0, 200, 201, 700])),
        "window": ((end - 50).clamp_min(0), end),
        "some_see_nothing": (blind, torch.maximum(blind, end)),
        "nobody_sees": (end, end),
    }


@pytest.mark.parametrize("limit", [1, 5, 16, 10**4])
@pytest.mark.parametrize("layout", layouts())
def test_every_visible_tile_once(layout: str, limit: int) -> None:
    start, end = layouts()[layout]
    plan = make_plan(start, end, limit * TILE_BYTES, torch.device("cpu"))
    assert [c.begin for c in plan.chunks] == [0, *(c.end for c in plan.chunks[:-1])] and plan.chunks[-1].end == T
    blocks = plan.blocks.view(-1, 4)
    found = torch.zeros(-(-T // 128), -(-S // 128), dtype=torch.int64)
    for chunk in plan.chunks:
        items = chunk.score.view(-1, 4)
        assert chunk.tiles == len(items) and items[:, 2].tolist() == list(range(chunk.tiles))
        assert chunk.tiles <= limit or chunk.end - chunk.begin <= 128
        for token, key, tile, _ in items.tolist():
            base, first, stop, _ = blocks[token // 128].tolist()
            assert chunk.begin <= token < chunk.end and first <= key // 128 < stop and tile == base + key // 128
            found[token // 128, key // 128] += 1
    keys = torch.arange(S)
    seen = (keys >= start[:, None]) & (keys < end[:, None])
    needed = torch.zeros_like(found, dtype=torch.bool)
    t, s = seen.nonzero(as_tuple=True)
    needed[t // 128, s // 128] = True
    assert (found[needed] == 1).all() and found.max() <= 1


def test_the_plan_is_kept_with_its_intervals_and_checks_them() -> None:
    start, end = layouts()["causal"]
    assert score_plan(start, end, S, 2**29) is score_plan(start, end, S, 2**29)
    assert score_plan(start, end, S, 2**20) is not score_plan(start, end, S, 2**29)
    with pytest.raises(ValueError, match="key_end"):
        score_plan(start, end, S - 1, 2**29)


def test_no_queries() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    assert make_plan(none, none, 2**20, torch.device("cpu")).chunks == ()
