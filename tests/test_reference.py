"""The definition against naive loops over tokens, heads and keys, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flash_indexer import reference
from flash_indexer.testing import SHAPES, Inputs, make_inputs

TARGETS = ("mean", "per_head", "sum_logits")


def small(shape: str, target: str) -> Inputs:
    sizes = SHAPES[shape]
    return make_inputs(replace(sizes, I=sizes.H) if target == "per_head" else sizes, seed=5, dtype=torch.float64)


def arguments(x: Inputs) -> dict[str, Tensor | float]:
    names = ("q", "k", "index_q", "index_k", "index_weights", "softmax_scale", "key_start", "key_end")
    return {name: getattr(x, name) for name in names}


def dot(a: Tensor, b: Tensor) -> float:
    return math.fsum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(x - top) for x in logits]
    return [x / math.fsum(powers) for x in powers]


def naive_target(x: Inputs, t: int, target: str) -> list[list[float]]:
    """p over the visible keys of query t: one list, or one for each head."""
    H, G = x.q.shape[1], x.k.shape[1]
    keys = range(int(x.key_start[t]), int(x.key_end[t]))
    logits = [[x.softmax_scale * dot(x.q[t, h], x.k[s, h // (H // G)]) for s in keys] for h in range(H)]
    if target == "sum_logits":
        return [softmax([math.fsum(column) for column in zip(*logits, strict=True)])]
    heads = [softmax(row) for row in logits]
    return heads if target == "per_head" else [[math.fsum(column) / H for column in zip(*heads, strict=True)]]


def naive_scores(x: Inputs, t: int, target: str) -> list[list[float]]:
    keys = range(int(x.key_start[t]), int(x.key_end[t]))
    heads = [
        [float(x.index_weights[t, j]) * max(0.0, dot(x.index_q[t, j], x.index_k[s])) for s in keys]
        for j in range(x.index_q.shape[1])
    ]
    return heads if target == "per_head" else [[math.fsum(column) for column in zip(*heads, strict=True)]]


def naive_kl(p: list[float], scores: list[float]) -> float:
    top = max(scores)
    lse = top + math.log(math.fsum(math.exp(i - top) for i in scores))
    return math.fsum(a * (math.log(a) - (i - lse)) for a, i in zip(p, scores, strict=True) if a > 0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", ["packed", "cached_prefix", "fewer_keys", "window", "one_head"])
def test_against_naive_loops(shape, target):
    x = small(shape, target)
    T, S = x.q.shape[0], x.k.shape[0]
    p = reference.target_distribution(x.q, x.k, x.softmax_scale, x.key_start, x.key_end, target)
    scores = reference.indexer_scores(x.index_q, x.index_k, x.index_weights, x.key_start, x.key_end, target)
    loss, kl = reference.indexer_kl(**arguments(x), target=target, token_weight=x.token_weight)
    p, scores, kl = (y if target == "per_head" else y[:, None] for y in (p, scores, kl))
    assert p.shape == scores.shape == (*kl.shape, S)
    expected_loss = 0.0
    for t in range(T):
        first, last = int(x.key_start[t]), int(x.key_end[t])
        unseen = torch.ones(S, dtype=torch.bool)
        unseen[first:last] = False
        assert (p[t, :, unseen] == 0).all() and (scores[t, :, unseen] == -torch.inf).all()
        if first == last:
            assert (kl[t] == 0).all()
            continue
        expected_p, expected_i = naive_target(x, t, target), naive_scores(x, t, target)
        expected_kl = [naive_kl(*rows) for rows in zip(expected_p, expected_i, strict=True)]
        for got, expected in (
            (p[t, :, first:last], expected_p),
            (scores[t, :, first:last], expected_i),
            (kl[t], expected_kl),
        ):
            torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13)
        expected_loss += float(x.token_weight[t]) * sum(expected_kl) / len(expected_kl)
    assert math.isclose(loss.item(), expected_loss, rel_tol=1e-11)


@pytest.mark.parametrize("target", TARGETS)
def test_default_weight_is_the_mean_over_queries_that_see_a_key(target):
    x = small("fewer_keys", target)
    loss, kl = reference.indexer_kl(**arguments(x), target=target)
    seen = x.key_end > x.key_start
    assert 0 < seen.sum() < len(seen)
    torch.testing.assert_close(loss, kl[seen].mean(), rtol=1e-13, atol=0)


def test_teacher_lse_normalises_the_teacher():
    x = small("window", "mean")
    lse = reference.teacher_lse(x.q, x.k, x.softmax_scale, x.key_start, x.key_end)
    logits = reference.teacher_logits(x.q, x.k, x.softmax_scale)
    visible = reference.visible_keys(x.key_start, x.key_end, x.k.shape[0])
    mass = (logits - lse[..., None]).exp().masked_fill(~visible[:, None], 0).sum(-1)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-12, atol=0)


def test_heads_read_their_own_key_group():
    x = small("smollm2", "mean")
    grouped = reference.teacher_logits(x.q, x.k, 1.0)
    for h in range(9):
        torch.testing.assert_close(grouped[:, h], x.q[:, h] @ x.k[:, h // 3].T)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", ["cached_prefix", "window"])
def test_gradient_by_the_scores_is_softmax_minus_p(shape, target):
    """dKL[t]/di[t,s] = softmax(i[t,:])[s] - p[t,s], by autograd through an additive probe on the scores."""
    x = small(shape, target)
    scores = reference.indexer_scores(x.index_q, x.index_k, x.index_weights, x.key_start, x.key_end, target)
    p = reference.target_distribution(x.q, x.k, x.softmax_scale, x.key_start, x.key_end, target)
    probe = torch.zeros_like(scores, requires_grad=True)
    original = reference.indexer_scores
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "indexer_scores", lambda *args: original(*args) + probe)
        loss, _ = reference.indexer_kl(**arguments(x), target=target, token_weight=torch.ones(len(x.q)).double())
    loss.backward()
    heads = x.q.shape[1] if target == "per_head" else 1
    expected = (scores.softmax(-1).nan_to_num() - p) / heads
    torch.testing.assert_close(probe.grad, expected, rtol=1e-12, atol=1e-14)
    assert probe.grad.sum(-1).abs().max() < 1e-13


def test_nothing_visible_anywhere():
    x = small("packed", "mean")
    empty = torch.zeros_like(x.key_start)
    leaves = [y.clone().requires_grad_() for y in (x.index_q, x.index_k, x.index_weights)]
    loss, kl = reference.indexer_kl(x.q, x.k, *leaves, softmax_scale=1.0, key_start=empty, key_end=empty)
    loss.backward()
    assert loss.item() == 0 and (kl == 0).all()
    assert all((y.grad == 0).all() for y in leaves)


def selection_of(x: Inputs, topk: int, always: tuple[int, int] = (0, 0)) -> Tensor:
    scores = reference.indexer_scores(x.index_q, x.index_k, x.index_weights, x.key_start, x.key_end)
    return reference.selected_keys(scores, x.key_start, x.key_end, topk, always)


@pytest.mark.parametrize("always", [(0, 0), (2, 0), (1, 2), (2, 3)])
@pytest.mark.parametrize("topk", [5, 6, 1000])
def test_selected_keys_are_those_that_few_others_beat(topk, always):
    """A key is beaten by a larger score, and by a lower key of equal score; forced keys beat and are not beaten."""
    x = small("packed", "mean")
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf], dtype=torch.float64)
    scores = values[torch.randint(6, (len(x.q), len(x.k)), generator=torch.Generator().manual_seed(0))]
    got = reference.selected_keys(scores, x.key_start, x.key_end, topk, always)
    for t, (start, end) in enumerate(zip(x.key_start.tolist(), x.key_end.tolist(), strict=True)):
        forced = {*range(start, end)[: always[0]], *range(start, end)[max(end - start - always[1], 0) :]}
        rank = {s: (s not in forced, -float(scores[t, s]), s) for s in range(start, end)}
        expected = [s for s in rank if sum(other < rank[s] for other in rank.values()) < topk]
        assert got[t].nonzero()[:, 0].tolist() == expected


def test_sparse_attention_and_kl_against_naive_loops():
    x = small("fewer_keys", "mean")
    selected, v = selection_of(x, 4), torch.randn(*x.k.shape[:2], 3, dtype=torch.float64)
    out, lse = reference.sparse_attention(x.q, x.k, v, selected, x.softmax_scale)
    names = [name for name in arguments(x) if name not in ("key_start", "key_end")]
    loss, kl = reference.sparse_indexer_kl(
        **{name: arguments(x)[name] for name in names}, selected=selected, token_weight=x.token_weight
    )
    H, per_group, expected_loss = x.q.shape[1], x.q.shape[1] // x.k.shape[1], 0.0
    for t in range(len(x.q)):
        keys = selected[t].nonzero()[:, 0].tolist()
        if not keys:
            assert (out[t] == 0).all() and (lse[t] == -torch.inf).all() and kl[t] == 0
            continue
        p = [0.0] * len(keys)
        for h in range(H):
            logits = [x.softmax_scale * dot(x.q[t, h], x.k[s, h // per_group]) for s in keys]
            a = softmax(logits)
            value = sum(w * v[s, h // per_group] for w, s in zip(a, keys, strict=True))
            torch.testing.assert_close(out[t, h], value, rtol=1e-12, atol=1e-13)
            natural = max(logits) + math.log(math.fsum(math.exp(y - max(logits)) for y in logits))
            assert math.isclose(float(lse[t, h]), natural, rel_tol=1e-11)
            p = [old + w / H for old, w in zip(p, a, strict=True)]
        scores = [
            math.fsum(float(x.index_weights[t, j]) * max(0.0, dot(x.index_q[t, j], x.index_k[s])) for j in range(5))
            for s in keys
        ]
        assert math.isclose(float(kl[t]), naive_kl(p, scores), rel_tol=1e-10, abs_tol=1e-13)
        expected_loss += float(x.token_weight[t]) * float(kl[t])
    assert math.isclose(loss.item(), expected_loss, rel_tol=1e-11)


def test_of_all_keys_the_sparse_stage_is_the_dense_one():
    x = small("packed", "mean")
    selected, v = selection_of(x, 1000), torch.randn(*x.k.shape[:2], 3, dtype=torch.float64)
    assert torch.equal(selected, reference.visible_keys(x.key_start, x.key_end, len(x.k)))
    bounds = x.key_start, x.key_end
    for got, expected in (
        (
            reference.sparse_attention(x.q, x.k, v, selected, x.softmax_scale),
            reference.attention(x.q, x.k, v, x.softmax_scale, *bounds),
        ),
        (
            reference.sparse_indexer_kl(
                x.q, x.k, x.index_q, x.index_k, x.index_weights, selected, softmax_scale=x.softmax_scale
            ),
            reference.indexer_kl(**arguments(x)),
        ),
    ):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_queries_that_selected_nothing_have_no_gradient():
    x = small("fewer_keys", "mean")
    selected = selection_of(x, 3)
    leaves = [y.clone().requires_grad_() for y in (x.q, x.k, x.index_q, x.index_k, x.index_weights)]
    out, _ = reference.sparse_attention(leaves[0], leaves[1], leaves[1], selected, x.softmax_scale)
    loss, _ = reference.sparse_indexer_kl(*leaves, selected, softmax_scale=x.softmax_scale)
    (out.sum() + loss).backward()
    none = ~selected.any(-1)
    assert none.any()
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
    assert all((leaves[n].grad[none] == 0).all() for n in (0, 2, 4))
