"""The stages composed by hand: over chunks of rows, slices of keys, and teacher heads sharded over ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_indexer import indexer_kl, indexer_scores, reference
from flash_indexer.ops import index_gradients, index_scores, kl_rows, teacher_lse, teacher_scores
from flash_indexer.ops.blockwise import fill_unseen, plan_chunks
from flash_indexer.testing import SHAPES, Inputs, Shape, assert_close, make_inputs, reference_indexer_kl

CHUNK = 11


def shards(x: Inputs, parts: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k and lse of each tensor-parallel rank: a contiguous share of the heads and the key groups that they read."""
    H, G = x.q.shape[1], x.k.shape[1]
    heads = torch.arange(H).chunk(parts)
    groups = [(h * G // H).unique() for h in heads]
    return [(x.q[:, h], x.k[:, g], x.lse[:, h]) for h, g in zip(heads, groups, strict=True)]


def local(x: Inputs, begin: int, end: int) -> tuple[slice, slice, Tensor, Tensor]:
    """The rows, the keys that any of them sees, and their intervals counted from the first of those keys."""
    first, last = int(x.key_start[begin]), int(x.key_end[end - 1])
    here = slice(begin, end)
    start, stop = ((y[here] - first).clamp(0, last - first) for y in (x.key_start, x.key_end))
    return here, slice(first, last), start, stop


@pytest.mark.parametrize("shape, parts", [("smollm2", 3), ("cached_prefix", 2), ("fewer_keys", 2), ("window", 1)])
def test_head_sharded_teacher_equals_the_whole(shape, parts):
    x = make_inputs(SHAPES[shape], seed=4, dtype=torch.float64)
    T = len(x.q)
    loss, kl, entropy = torch.zeros(()).double(), torch.zeros(T).double(), torch.zeros(T).double()
    d_q, d_k, d_w = (torch.zeros_like(y) for y in (x.index_q, x.index_k, x.index_weights))
    for begin in range(0, T, CHUNK):
        here, keys, start, end = local(x, begin, min(T, begin + CHUNK))
        if keys.start >= keys.stop:
            continue
        p = sum(
            teacher_scores(q[here], k[keys], lse[here], start, end, softmax_scale=x.softmax_scale)
            for q, k, lse in shards(x, parts)
        )
        index = x.index_q[here], x.index_k[keys], x.index_weights[here]
        scores, relu = index_scores(*index, start, end)
        kl[here], entropy[here], di = kl_rows(p, scores, x.token_weight[here], start, end)
        index_gradients(di, relu, *index, d_index_q=d_q[here], d_index_k=d_k[keys], d_index_w=d_w[here])
        loss += (x.token_weight[here] * kl[here]).sum()
    truth = reference_indexer_kl(x, token_weight=x.token_weight)
    for got, expected in zip((loss, kl, entropy, d_q, d_k, d_w), truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_half_of_the_heads_is_another_distribution():
    """So that the test above can fail: the reduction between the first and the second stage matters."""
    x = make_inputs(SHAPES["cached_prefix"], seed=4, dtype=torch.float64)
    halves = [
        teacher_scores(q, k, lse, x.key_start, x.key_end, softmax_scale=x.softmax_scale) for q, k, lse in shards(x, 2)
    ]
    p = reference.target_distribution(x.q, x.k, x.softmax_scale, x.key_start, x.key_end)
    torch.testing.assert_close(sum(halves) / 6, p, rtol=1e-11, atol=1e-13)
    assert not torch.allclose(halves[0] / 3, p, rtol=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_teacher_lse(shape):
    x = make_inputs(SHAPES[shape], seed=1, dtype=torch.float64)
    lse = teacher_lse(x.q, x.k, x.key_start, x.key_end, softmax_scale=x.softmax_scale)
    seen = x.key_end > x.key_start
    torch.testing.assert_close(lse[seen], x.lse[seen], rtol=1e-12, atol=1e-12)
    assert (lse[~seen] < -1e300).all()
    scratch = torch.full((len(x.q), len(x.k)), torch.nan, dtype=torch.float64)
    again = teacher_lse(x.q, x.k, x.key_start, x.key_end, softmax_scale=x.softmax_scale, scratch=scratch)
    assert torch.equal(again, lse)


def test_teacher_scores_sum_logits_and_poisoned_buffers():
    x = make_inputs(SHAPES["window"], seed=1, dtype=torch.float64)
    out, scratch = (torch.full((len(x.q), len(x.k)), torch.nan, dtype=torch.float64) for _ in range(2))
    for target, lse in (("mean", x.lse), ("sum_logits", None)):
        p = teacher_scores(
            x.q, x.k, lse, x.key_start, x.key_end,
            softmax_scale=x.softmax_scale, target=target, out=out.fill_(torch.nan), scratch=scratch.fill_(torch.nan),
        )  # fmt: skip
        assert p.data_ptr() == out.data_ptr()
        p = p / p.sum(-1, keepdim=True).clamp_min(1e-300)
        expected = reference.target_distribution(x.q, x.k, x.softmax_scale, x.key_start, x.key_end, target)
        torch.testing.assert_close(p, expected, rtol=1e-11, atol=1e-13)


def test_teacher_scores_wants_lse():
    x = make_inputs(SHAPES["one_head"], seed=0)
    with pytest.raises(ValueError, match=r'teacher_scores: lse must be \[R, H\] for target="mean", got None'):
        teacher_scores(x.q, x.k, None, x.key_start, x.key_end, softmax_scale=1.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_indexer_scores(shape):
    x = make_inputs(SHAPES[shape], seed=2)
    index = x.index_q, x.index_k, x.index_weights
    y = x.double()
    truth = reference.indexer_scores(y.index_q, y.index_k, y.index_weights, y.key_start, y.key_end)
    eager = reference.indexer_scores(*index, x.key_start, x.key_end)
    got = indexer_scores(*index, x.key_start, x.key_end)
    assert got.dtype == torch.float32
    assert_close("scores", got, truth, eager)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(indexer_scores(*(z.requires_grad_() for z in index), x.key_start, x.key_end), got)


@pytest.mark.parametrize("value", [0.0, -7.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_fill_unseen(shape, value):
    key_start, key_end = SHAPES[shape].intervals()
    visible = reference.visible_keys(key_start, key_end, SHAPES[shape].S)
    expected = torch.ones(visible.shape).masked_fill(~visible, value)
    assert torch.equal(fill_unseen(torch.ones(visible.shape), key_start, key_end, value), expected)


@pytest.mark.parametrize("workspace", [1, 5_000, 100_000, 2**40])
@pytest.mark.parametrize("documents", [((300, 300),), ((10, 10),) * 40, ((40, 10), (1, 1), (90, 200)), ((5, 0),), ()])
@pytest.mark.parametrize("window", [None, 7])
def test_chunks_cover_every_visible_pair_and_fit(documents, window, workspace):
    shape = Shape(documents, H=1, G=1, D=1, I=1, E=1, window=window)
    key_start, key_end = shape.intervals() if documents else (torch.zeros(0, dtype=torch.int32),) * 2
    tiles, itemsize = 5, 4
    seen = torch.zeros(shape.T, dtype=torch.int64)
    for begin, end, first, last in plan_chunks(key_start, key_end, tiles, itemsize, workspace):
        assert begin < end and first < last
        assert end - begin == 1 or tiles * itemsize * (end - begin) * (last - first) <= workspace
        assert end - begin <= 16 or itemsize * (end - begin) * (last - first) <= 2**20
        rows = slice(begin, end)
        visible = key_end[rows] > key_start[rows]
        assert (key_start[rows][visible] >= first).all() and (key_end[rows] <= last).all()
        seen[rows] += 1
    assert (seen <= 1).all()
    assert (seen[key_end > key_start] == 1).all()


def test_one_chunk_when_everything_fits():
    x = make_inputs(SHAPES["smollm2"], seed=0)
    assert plan_chunks(x.key_start, x.key_end, 3, 4, 2**30) == [(0, 63, 0, 63)]
    fixed = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end)
    index = x.index_q, x.index_k, x.index_weights
    whole, cut = (indexer_kl(x.q, x.k, *index, **fixed, workspace_bytes=n) for n in (2**30, 9_000))
    torch.testing.assert_close(whole.kl, cut.kl)
