"""Queries by sample: every token equally likely, shares equal, the same draw for the same step on any machine."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from flash_indexer.recipe import queries
from flash_indexer.recipe.queries import (
    block_tokens,
    check_fraction,
    draw_blocks,
    draw_queries,
    fewer_blocks_than_pieces,
)


def every_draw(monkeypatch: pytest.MonkeyPatch, blocks: int, fraction: float) -> Iterator[tuple[int, ...]]:
    """What `draw_blocks` gives for every outcome of its random numbers, each outcome as likely as any other.

    Whether to round up is told by halves, places within a run by what all lengths of runs divide, the cut by blocks.
    """
    most = int(blocks * fraction) + 1
    parts = math.lcm(*(size for count in range(max(most - 1, 1), most + 1) for size in _lengths(blocks, count)))
    places = [(n + 0.5) / parts for n in range(parts)]
    grids = [[0.25, 0.75], *[places] * most, [(n + 0.5) / blocks for n in range(blocks)]]
    for chance, *drawn, turn in itertools.product(*grids):
        unread = [0.0] * (blocks - most)
        numbers = torch.tensor([chance, *drawn, *unread, turn], dtype=torch.float64)
        monkeypatch.setattr(queries.torch, "rand", lambda *size, numbers=numbers, **_: numbers)
        yield tuple(draw_blocks(blocks, fraction, torch.Generator()).tolist())


def _lengths(blocks: int, count: int) -> tuple[int, int]:
    return blocks // count, -(-blocks // count)


@pytest.mark.parametrize(("blocks", "fraction"), [(5, 0.5), (6, 0.25), (7, 3 / 7), (6, 0.5), (5, 0.1), (3, 0.5)])
def test_over_all_draws_every_block_is_among_them_as_often_as_the_fraction_says(
    monkeypatch: pytest.MonkeyPatch, blocks: int, fraction: float
) -> None:
    found: Counter[int] = Counter()
    outcomes = 0
    for drawn in every_draw(monkeypatch, blocks, fraction):
        assert list(drawn) == sorted(set(drawn)) and set(drawn) <= set(range(blocks))
        assert len(drawn) in (int(blocks * fraction), int(blocks * fraction) + 1)
        found.update(drawn)
        outcomes += 1
    rounded_up = blocks * fraction % 1 > 1e-9
    assert not rounded_up or blocks * fraction % 1 == pytest.approx(0.5), "the grid tells halves alone"
    assert {block: found[block] / outcomes for block in range(blocks)} == pytest.approx(
        dict.fromkeys(range(blocks), fraction)
    )


@pytest.mark.parametrize("fraction", [1 / 2, 1 / 4, 1 / 8, 1 / 16])
def test_each_run_of_blocks_has_one_in_the_draw(fraction: float) -> None:
    for draw in range(5):
        tokens = draw_queries(32768, fraction, seed=3, draw=str(draw))
        assert len(tokens) == 32768 * fraction and bool((tokens[1:] > tokens[:-1]).all())
        blocks = tokens.view(-1, 128)
        assert bool((blocks[:, 0] % 128 == 0).all()) and bool((blocks == blocks[:, :1] + torch.arange(128)).all())
        assert (blocks[:, 0] // int(128 / fraction)).tolist() == list(range(len(blocks)))


def test_a_draw_is_a_function_of_seed_and_name() -> None:
    def draw(seed: int, name: str) -> Tensor:
        return draw_queries(4096, 0.25, seed=seed, draw=name)

    assert torch.equal(draw(1, "7"), draw(1, "7"))
    assert not torch.equal(draw(1, "7"), draw(1, "8")) and not torch.equal(draw(1, "7"), draw(2, "7"))
    assert draw(1, "7")[::128].tolist()[:4] == [384, 768, 1024, 1920], "runs drew otherwise before"


@pytest.mark.parametrize(
    ("length", "fraction"), [(1, 1.0), (3, 0.4), (100, 0.3), (1000, 1 / 16), (130, 0.99), (16, 1 / 16)]
)
def test_odd_lengths(length: int, fraction: float) -> None:
    counts = torch.zeros(length)
    sizes = []
    for draw in range(400):
        tokens = draw_queries(length, fraction, seed=0, draw=str(draw))
        assert 1 <= len(tokens) <= length and int(tokens[-1]) < length
        counts[tokens] += 1
        sizes.append(len(tokens))
    share = counts / 400
    assert float(share.mean()) == pytest.approx(fraction, rel=0.05)
    assert float((share - fraction).abs().max()) < 4.5 * (fraction * (1 - fraction) / 400) ** 0.5 + 1e-6


def test_short_sequences_are_drawn_in_smaller_blocks() -> None:
    found = [block_tokens(length, 0.25) for length in (1_000_000, 2048, 2047, 1024, 64, 16, 1)]
    assert found == [128, 128, 64, 64, 4, 1, 1]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_fractions_that_are_none_are_refused(fraction: float) -> None:
    for call in (lambda: check_fraction("op", fraction), lambda: draw_queries(9, fraction, seed=0, draw="")):
        with pytest.raises(ValueError, match="queries must be above 0 and at most 1"):
            call()


@pytest.mark.parametrize(
    ("length", "fraction", "pieces", "said"),
    [(8192, 1 / 8, 16, "draws 8 blocks"), (8192, 1 / 8, 8, None), (8192, 1.0, 16, None), (32, 1 / 8, 1, None)],
)
def test_more_pieces_than_blocks_are_told_of(length: int, fraction: float, pieces: int, said: str | None) -> None:
    told = fewer_blocks_than_pieces(length, fraction, pieces)
    assert told is None if said is None else said in str(told)
