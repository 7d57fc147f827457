"""KL, entropy, di and the gradients of index_q and its weights by one kernel, against float64; scores are torch's.

All memory that a kernel writes holds NaN before, and so do scores and sums in rows past the last token; masks there are
junk. d_index_k is formed of what the kernel leaves for it.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import MASK_WORDS
from flash_indexer.ops import launch
from flash_indexer.ops.kl import gpu_body, gpu_fused
from flash_indexer.ops.kl.plan import Plan, TileChunk, make_plan
from flash_indexer.ops.kl.plan_sizes import PlanSizes
from flash_indexer.ops.worklists import TILE
from flash_indexer.testing import Shape, assert_close

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
INDEXERS = [(32, 30), (32, 64), (64, 5), (64, 16), (64, 20), (128, 8), (128, 64)]  # E, I
DOCUMENTS = {
    "causal": (((385, 385),), None),
    "documents": (((1, 1), (130, 130), (255, 255), (3, 3), (200, 200)), None),
    "window": (((500, 500),), 200),
    "prefix": (((5, 700), (200, 333)), None),
    "nothing": (((300, 150), (77, 0), (90, 90)), None),  # queries at their documents' begins see no key
}
SMALL_WORKSPACE = 2**20


class Problem(NamedTuple):
    """index_q [T, I, E] and index_k in bfloat16; weights [T, I]; of each pair [T, S] both scores, and whether it is
    seen; positive [T, padded I, S]: masks."""

    start: Tensor
    end: Tensor
    index_q: Tensor
    index_k: Tensor
    weights: Tensor
    token_weight: Tensor
    teacher: Tensor
    scores: Tensor
    seen: Tensor
    positive: Tensor


class Results(NamedTuple):
    """di [T, S]; d_index_k in float32."""

    kl: Tensor
    entropy: Tensor
    di: Tensor
    d_index_q: Tensor
    d_weights: Tensor
    d_index_k: Tensor


def make(layout: str, E: int, I: int) -> Problem:
    documents, window = DOCUMENTS[layout]
    shape = Shape(documents, H=1, G=1, D=64, I=I, E=E, window=window)
    start, end = (x.int().to(DEVICE) for x in shape.intervals())
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=DEVICE, generator=generator)

    T, S = shape.T, shape.S
    key = torch.arange(S, device=DEVICE)
    teacher = (2 * normal(T, S)).exp()
    teacher[(normal(T, S) < -2) & (key != start[:, None])] = 0.0  # but not all that a token sees
    return Problem(
        start, end, normal(T, I, E).bfloat16(), normal(S, E).bfloat16(), normal(T, I), normal(T), teacher,
        2 * normal(T, S), (key >= start[:, None]) & (key < end[:, None]),
        normal(T, gpu_body.padded_heads(I), S) > 0,
    )  # fmt: skip


def planned(x: Problem, workspace: int = 2**40) -> Plan:
    heads, E = x.positive.shape[1], x.index_k.shape[1]
    sizes = PlanSizes(len(x.index_k), E, heads, True, workspace, 5, narrow=True, fused=True)
    return make_plan(x.start.cpu(), x.end.cpu(), sizes, DEVICE)


def places(work: Plan, chunk: TileChunk) -> list[tuple[int, int, int]]:
    """First token, first key and first row of every tile."""
    found = []
    for token in range(chunk.begin, chunk.end, TILE):
        base, first, end, _ = work.blocks.view(-1, 4)[token // TILE].tolist()
        found += [(token, tile * TILE, (base + tile) * TILE) for tile in range(first, end)]
    return found


def lines_of(positive: Tensor) -> Tensor:
    """[128, heads, 128] as `device/mask_words.cuh` says, [8 * heads, MASK_WORDS]."""
    key = torch.arange(TILE, device=positive.device)
    g, q, c = key // 8, key % 8 // 2, key % 2
    bits = positive.long() << 8 * (g % 2) + 7 - g // 2
    halves = bits.new_zeros(*positive.shape[:2], 8).index_add_(2, 2 * q + c, bits)
    words = halves[:, ::2] | halves[:, 1::2] << 16  # an even row's below the next one's
    words = torch.where(words >= 2**31, words - 2**32, words).int()
    return words.reshape(-1, MASK_WORDS)


def fill(x: Problem, work: Plan, chunk: TileChunk, left: gpu_fused.Left) -> tuple[Tensor, Tensor]:
    """Both scores in the chunk's tiles, and what their kernels leave, in `left`."""
    teacher, scores = torch.full((2, chunk.tiles * TILE, TILE), torch.nan, device=DEVICE)
    left.sums.fill_(torch.nan)
    left.tops.fill_(torch.nan)
    heads = x.positive.shape[1]
    for token, key, row in places(work, chunk):
        tile = (slice(token, token + TILE), slice(key, key + TILE))
        seen = x.seen[tile]
        rows, columns = seen.shape
        teacher[row : row + rows, :columns] = x.teacher[tile]
        scores[row : row + rows, :columns] = x.scores[tile]
        left.sums[row : row + rows] = x.teacher[tile].double().masked_fill(~seen, 0.0).sum(1)
        masked = x.scores[tile].double().masked_fill(~seen, -torch.inf)
        top = masked.amax(1)
        left.tops[row : row + rows, 0] = top
        left.tops[row : row + rows, 1] = (masked - top.masked_fill(top == -torch.inf, 0.0)[:, None]).exp().sum(1)
        positive = torch.rand(TILE, heads, TILE, device=DEVICE) < 0.5
        positive[:rows, :, :columns] = x.positive[tile[0], :, tile[1]]
        left.masks[row // 16 * heads : (row // 16 + 8) * heads] = lines_of(positive)
    return teacher, scores


def run(x: Problem, work: Plan) -> Results:
    """As `ops.kl.gpu_stages` does, chunk after chunk."""
    before = torch.nan if work.complete else 0.0
    kl, entropy, d_index_q, d_weights = (
        torch.full_like(y, before) for y in (x.token_weight, x.token_weight, x.index_q, x.weights)
    )
    d_index_k = torch.zeros_like(x.index_k, dtype=torch.float32)
    got = Results(kl, entropy, torch.zeros_like(x.scores), d_index_q, d_weights, d_index_k)
    left = gpu_fused.new_left(work, x.index_q)
    for chunk in work.chunks:
        left.scaled.fill_(torch.nan)
        left.masks.random_(-(2**31), 2**31 - 1)
        filled = fill(x, work, chunk, left)
        di = torch.full((chunk.tiles * TILE, TILE), torch.nan, device=DEVICE, dtype=torch.bfloat16)
        made = gpu_body.IndexGradients(got.d_index_q, got.d_index_k, got.d_weights)
        gpu_fused.gradients(
            filled, left.of(chunk.tiles), (x.index_q, x.index_k, x.weights), work, chunk,
            gpu_body.Rows(x.start, x.end, x.token_weight), gpu_fused.Outputs(di, got.kl, got.entropy, made),
        )  # fmt: skip
        for token, key, row in places(work, chunk):
            part = got.di[token : token + TILE, key : key + TILE]
            rows, columns = part.shape
            part += di[row : row + rows, :columns]
            assert (di[row : row + rows, columns:] == 0).all(), "columns past the last key are zero"
    return got


def expected(x: Problem, di: Tensor, dtype: torch.dtype) -> Results:
    """By torch; the gradients from the di that the kernel made and rounded to bfloat16."""
    teacher = x.teacher.to(dtype).masked_fill(~x.seen, 0.0)
    share = (teacher / teacher.sum(1, keepdim=True)).masked_fill(~x.seen, 0.0)
    scores = x.scores.to(dtype).masked_fill(~x.seen, -torch.inf).masked_fill(~x.seen.any(1)[:, None], 0.0)
    log_softmax, log_share = scores.log_softmax(1).masked_fill(~x.seen, 0.0), share.clamp_min(1e-30).log()
    exactly = (log_softmax.exp() - share).masked_fill(~x.seen, 0.0) * x.token_weight.to(dtype)[:, None]
    chosen = di.to(dtype)[:, None] * x.positive[:, : x.weights.shape[1]]
    sums, weights = torch.einsum("tis,se->tie", chosen, x.index_k.to(dtype)), x.weights.to(dtype)
    scaled = (x.weights[..., None] * x.index_q.float()).bfloat16().to(dtype)
    return Results(
        (share * (log_share - log_softmax)).sum(1), -(share * log_share).sum(1), exactly, sums * weights[..., None],
        (sums * x.index_q.to(dtype)).sum(2), torch.einsum("tis,tie->se", chosen, scaled),
    )  # fmt: skip


@pytest.mark.parametrize("layout", DOCUMENTS)
@pytest.mark.parametrize(("E", "I"), INDEXERS)
def test_against_float64_and_always_the_same_bits(E, I, layout, monkeypatch):
    x = make(layout, E, I)
    work = planned(x)
    got = run(x, work)
    truth, eager = (expected(x, got.di, dtype) for dtype in (torch.float64, torch.float32))
    for name, a, b, c in zip(Results._fields, got, truth, eager, strict=True):
        narrow = name in ("di", "d_index_q", "d_index_k")  # what is in bfloat16, or will be
        assert_close(name, *((a.bfloat16(), b, c.bfloat16()) if narrow else (a, b, c)))
    chunked = planned(x, SMALL_WORKSPACE)
    assert len(chunked.chunks) > 1
    for name, a, b in zip(Results._fields[:-1], run(x, chunked), got, strict=False):
        assert torch.equal(a, b), f"{name} in {len(chunked.chunks)} chunks"
    monkeypatch.setattr(launch, "processors", lambda device: 3)
    for name, a, b in zip(Results._fields, run(x, work), got, strict=True):
        assert torch.equal(a, b), f"{name} on three processors"


@pytest.mark.parametrize("where", ["teacher", "scores"])
@pytest.mark.parametrize(("E", "I"), [(64, 5), (64, 16)])
def test_a_nan_that_a_token_sees_is_in_its_kl_alone(E, I, where):
    x = make("causal", E, I)
    before, token = run(x, planned(x)), 200
    getattr(x, where)[token, 150] = torch.nan
    after = run(x, planned(x))
    others = torch.arange(len(before.kl), device=DEVICE) != token
    assert after.kl[token].isnan() and after.d_index_q[token].isnan().any()
    for name, a, b in zip(Results._fields[:-1], after, before, strict=False):
        assert torch.equal(a[others], b[others]), name


def test_a_nan_that_no_token_sees_is_nowhere():
    x = make("window", 64, 16)
    before = run(x, planned(x))
    x.teacher[~x.seen], x.scores[~x.seen] = torch.nan, torch.nan
    for name, a, b in zip(Results._fields, run(x, planned(x)), before, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("tokens", [1, 129])
@pytest.mark.parametrize(("E", "I"), [(64, 8), (128, 64)])
def test_few_tokens(E, I, tokens, monkeypatch):
    monkeypatch.setitem(DOCUMENTS, "few", (((tokens, tokens),), None))
    x = make("few", E, I)
    got = run(x, planned(x))
    truth, eager = (expected(x, got.di, dtype) for dtype in (torch.float64, torch.float32))
    assert_close("kl", got.kl, truth.kl, eager.kl)
    assert_close("d_index_q", got.d_index_q, truth.d_index_q, eager.d_index_q.bfloat16())
    assert_close("d_index_k", got.d_index_k.bfloat16(), truth.d_index_k, eager.d_index_k.bfloat16())
