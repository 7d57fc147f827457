"""What `score_narrow` leaves of each tile, against torch on the scores themselves, in memory that held NaN and junk."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import MASK_WORDS
from flash_indexer.ops import launch
from flash_indexer.ops.kl import gpu_body
from flash_indexer.ops.kl.plan import Plan, TileChunk, make_plan
from flash_indexer.ops.kl.plan_sizes import PlanSizes
from flash_indexer.ops.worklists import TILE
from flash_indexer.testing import Inputs, KernelClass

pytestmark = pytest.mark.gpu
LAYOUTS = ("causal", "documents", "window", "cached_prefix", "fewer_keys", "arbitrary", "long", "short")
TEACHERS = [(64, 9, 3), (64, 2, 2), (128, 8, 2), (128, 5, 1)]  # D, H, G
INDEXERS = [(32, 1), (32, 37), (64, 8), (64, 16), (64, 5), (128, 64), (128, 20)]  # E, I
JUNK = 0x5A5A5A5A


class Tile(NamedTuple):
    """A tile's rows of tokens that there are, from row `row` on; its first key, and what its tokens see of its keys."""

    token: int
    key: int
    row: int
    seen: Tensor


def planned(x: Inputs, heads: int) -> Plan:
    sizes = PlanSizes(len(x.k), 64, heads, True, 2**22, launch.processors(x.k.device), narrow=True)
    return make_plan(x.key_start.cpu(), x.key_end.cpu(), sizes, x.k.device)


def tiles_of(x: Inputs, work: Plan, chunk: TileChunk) -> list[Tile]:
    found = []
    for token in range(chunk.begin, chunk.end, TILE):
        base, first, end, _ = work.blocks.view(-1, 4)[token // TILE].tolist()
        here = slice(token, token + TILE)
        for key_tile in range(first, end):
            s = key_tile * TILE + torch.arange(TILE, device=x.k.device)
            seen = (s >= x.key_start[here, None]) & (s < x.key_end[here, None])
            found.append(Tile(token, key_tile * TILE, (base + key_tile) * TILE, seen))
    return found


def poisoned(chunk: TileChunk, *columns: int) -> Tensor:
    return torch.full((chunk.tiles * TILE, *columns), torch.nan, device="cuda")


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def positive(masks: Tensor, row: int, heads: int) -> Tensor:
    """[128, heads, 128]: the masks of a tile, as `device/mask_words.cuh` has them."""
    lines = masks[row // 16 * heads : (row // 16 + 8) * heads]
    words = lines.view(TILE, heads // 2, 4, 2)  # of two heads, by q and c
    found = words.new_empty(TILE, heads, TILE, dtype=torch.bool)
    for key in range(TILE):
        g, q, c = key // 8, key % 8 // 2, key % 2
        for j in range(2):
            found[:, j::2, key] = (words[..., q, c] >> 16 * j + 8 * (g % 2) + 7 - g // 2 & 1).bool()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("D", "H", "G"), TEACHERS)
@pytest.mark.parametrize("nan", [False, True])
def test_the_teachers_sums(D, H, G, layout, nan, problem):
    x = problem(f"sums {D} {H} {G} {layout}", KernelClass(D, 64, 8), layout, H=H, G=G)
    if nan and len(x.k):
        x.k[len(x.k) // 2, 0, 0] = torch.nan
    work = planned(x, 8)
    for chunk in work.chunks:
        expected, got, sums = poisoned(chunk, TILE), poisoned(chunk, TILE), poisoned(chunk)
        gpu_body.teacher_scores(x.q, x.k, x.lse, chunk, expected, x.softmax_scale)
        left = (x.key_start, x.key_end, sums)
        gpu_body.teacher_scores(x.q, x.k, x.lse, chunk, got, x.softmax_scale, left)
        assert same_bits(got, expected)
        for tile in tiles_of(x, work, chunk):
            rows = slice(tile.row, tile.row + len(tile.seen))
            wanted = torch.where(tile.seen, got[rows].double(), 0.0).sum(1)
            torch.testing.assert_close(sums[rows].double(), wanted, rtol=1e-6, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("E", "I"), INDEXERS)
@pytest.mark.parametrize("nan", [False, True])
def test_the_indexers_sums_and_masks(E, I, layout, nan, problem):
    """Logits are exact in float32, so that their signs are known, of zeros too."""
    x = problem(f"masks {E} {I} {layout}", KernelClass(64, E, 8), layout, H=2, G=1, I=I)
    if nan and len(x.k):
        x = replace(x, index_k=x.index_k.clone())
        x.index_k[len(x.k) // 2, 0] = torch.nan
    heads = gpu_body.padded_heads(I)
    work = planned(x, heads)
    for chunk in work.chunks:
        expected, got, tops = poisoned(chunk, TILE), poisoned(chunk, TILE), poisoned(chunk, 2)
        masks = torch.full((chunk.tiles * 8 * heads, MASK_WORDS), JUNK, dtype=torch.int32, device="cuda")
        leaves = (x.index_q, x.index_k, x.index_weights)
        gpu_body.index_scores(*leaves, chunk, expected)
        gpu_body.index_scores(*leaves, chunk, got, (x.key_start, x.key_end, tops, masks))
        assert same_bits(got, expected)
        for tile in tiles_of(x, work, chunk):
            rows, tokens = slice(tile.row, tile.row + len(tile.seen)), slice(tile.token, tile.token + TILE)
            scores = got[rows].double().masked_fill(~tile.seen, -torch.inf)
            top = scores.amax(1)
            assert torch.equal(tops[rows, 0].double().nan_to_num(nan=1e9), top.nan_to_num(nan=1e9))
            sums = (scores - top.masked_fill(top == -torch.inf, 0.0)[:, None]).exp().sum(1)
            known = ~top.isnan()
            torch.testing.assert_close(tops[rows, 1].double()[known], sums[known], rtol=1e-6, atol=0.0)
            keys = x.index_k[tile.key : tile.key + TILE].double()
            wanted = torch.einsum("tie,se->tis", x.index_q[tokens].double(), keys) > 0
            found = positive(masks, tile.row, heads)[: len(wanted), :I, : len(keys)]
            assert torch.equal(found, wanted), f"{int((found != wanted).sum())} of {wanted.numel()}"
