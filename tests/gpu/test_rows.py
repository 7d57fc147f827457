"""Both kernels of the KL rows on the same tiles, against float64: whichever a problem gets, by its shape, is right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_indexer.ops import launch
from flash_indexer.ops.kl.plan import Plan, make_plan
from flash_indexer.ops.kl.plan_sizes import PlanSizes
from flash_indexer.ops.worklists import TILE
from flash_indexer.testing import Shape, assert_close

pytestmark = pytest.mark.gpu
LAYOUTS = {
    "causal": Shape(((700, 700),), H=1, G=1, D=64, I=1, E=64),
    "short": Shape(((1, 1), (2, 2), (129, 129), (1, 1), (255, 255)), H=1, G=1, D=64, I=1, E=64),
    "window": Shape(((900, 900),), H=1, G=1, D=64, I=1, E=64, window=200),
    "prefix": Shape(((5, 9000), (200, 333), (3, 0)), H=1, G=1, D=64, I=1, E=64),
}


def tiles_of(dense: Tensor, work: Plan) -> Tensor:
    """[T, S] in the plan's tiles, NaN where a row sees nothing of a tile's columns."""
    tiles = torch.full((work.chunks[0].tiles * TILE, TILE), torch.nan, device=dense.device)
    for row, column, place in places(work, dense):
        part = dense[row : row + TILE, column : column + TILE]
        tiles[place : place + part.shape[0], : part.shape[1]] = part
    return tiles


def places(work: Plan, dense: Tensor) -> list[tuple[int, int, int]]:
    """First row, first column and first row among the tiles, of every tile."""
    found = []
    for n, (base, first, end, _) in enumerate(work.blocks.view(-1, 4).tolist()):
        found += [(n * TILE, tile * TILE, (base + tile) * TILE) for tile in range(first, end)]
    return found


def exactly(p: Tensor, scores: Tensor, seen: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL, entropy and di in the dtype of p, the log of the teacher's scores."""
    nothing = ~seen.any(1)
    x, log_p = (y.masked_fill(~seen, -torch.inf).masked_fill(nothing[:, None], 0.0) for y in (scores, p))
    log_p, log_x = log_p.log_softmax(-1), x.log_softmax(-1)
    share = log_p.exp().masked_fill(~seen, 0.0)
    terms = share * (log_p - log_x).masked_fill(~seen, 0.0)
    entropy = -share * log_p.masked_fill(~seen, 0.0)
    di = (log_x.exp() - share).masked_fill(~seen, 0.0) * weight[:, None]
    return terms.sum(1), entropy.sum(1), di


@pytest.mark.parametrize("apart", [2.0, 3e-3], ids=["far", "near"])
@pytest.mark.parametrize("logits", [0, 1])
@pytest.mark.parametrize("kernel", ["rows", "rows_warp"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_float64(layout: str, kernel: str, logits: int, apart: float) -> None:
    start, end = LAYOUTS[layout].intervals()
    T, S = start.shape[0], sum(keys for _, keys in LAYOUTS[layout].documents)
    generator = torch.Generator("cuda").manual_seed(0)
    scores = 2 * torch.randn(T, S, device="cuda", generator=generator)
    teacher = scores + apart * torch.randn(T, S, device="cuda", generator=generator)
    weight = torch.randn(T, device="cuda", generator=generator)
    work = make_plan(start, end, PlanSizes(S, 64, 8, True, 2**29, 132), torch.device("cuda"))
    start, end = start.int().cuda(), end.int().cuda()
    p = teacher if logits else teacher.exp()
    p, x = tiles_of(p, work), tiles_of(scores, work)
    kl, entropy = torch.full((2, T), torch.nan, device="cuda")
    di = torch.full_like(p, torch.nan, dtype=torch.bfloat16)
    launch.load(kernel, logits=logits)(p, x, work.blocks, start, end, weight, di, kl, entropy, 0, T, 132)
    key = torch.arange(S, device="cuda")
    seen = (key >= start[:, None]) & (key < end[:, None])
    log_p = teacher if logits else teacher.exp().double().log()
    truth = exactly(log_p.double(), scores.double(), seen, weight.double())
    eager = exactly(log_p.float(), scores, seen, weight)
    got = torch.zeros(T, S, device="cuda")
    for row, column, place in places(work, got):
        part = got[row : row + TILE, column : column + TILE]
        part += di[place : place + part.shape[0], : part.shape[1]].float()
        assert (di[place : place + part.shape[0], part.shape[1] :] == 0).all(), "columns that nobody sees are zero"
    assert_close("kl", kl, truth[0], eager[0])
    assert_close("entropy", entropy, truth[1], eager[1])
    assert_close("di", got.bfloat16(), truth[2], eager[2].bfloat16())
