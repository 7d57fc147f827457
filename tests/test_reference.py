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
