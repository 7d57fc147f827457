"""target="per_head" on a GPU: which sizes its kernels take, and what is made of their results, played by torch."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from flash_indexer import indexer_kl, reference
from flash_indexer.ops import Problem, bodies, indexer_kl_sums
from flash_indexer.ops.attention import gpu_body, per_head_op
from flash_indexer.ops.bodies import TORCH
from flash_indexer.testing import SHAPES, make_inputs

NEEDS = ((True, True, True), (False, True, False), (True, False, True), (False, False, False))


def tensors(D=128, E=64, H=4, G=1):
    return torch.empty(3, H, D), torch.empty(3, G, D), torch.empty(3, H, E)


@pytest.mark.parametrize(
    "sizes",
    [dict(), dict(D=256, E=128, H=64), dict(D=80, E=32, H=15, G=3), dict(H=128), dict(D=192, H=128)],
)
def test_sizes_that_the_kernels_take(sizes):
    q, k, index_q = tensors(**sizes)
    assert gpu_body.per_head_refusal(q, k, index_q) is None and gpu_body.refusal(q, k, k) is None


@pytest.mark.parametrize(
    "sizes, reason",
    [
        (dict(D=576), "q must have D of 1 to 256 .* got D=576"),
        (dict(E=16), r"index_q must have E in \{32, 64, 128\} on CUDA, got E=16"),
        (dict(E=128, H=65), "q must have at most 64 heads for each head of k .* got 65"),
        (dict(D=193, H=65), "q must have at most 64 heads for each head of k .* got 65"),
        (dict(H=129), "q must have 1 to 128 heads for each head of k on CUDA, got 129 for 1"),
    ],
)
def test_sizes_that_they_do_not(sizes, reason):
    q, k, index_q = tensors(**sizes)
    assert re.search(reason, gpu_body.per_head_refusal(q, k, index_q) or gpu_body.refusal(q, k, k))


def pair(x, index, scale, key_start, key_end, **weight):
    q, k = x
    return reference.indexer_kl(
        q, k, *index, softmax_scale=scale, key_start=key_start, key_end=key_end, target="per_head", **weight
    )


def played_statistics(q, k, index, key_start, key_end, scale):
    p = reference.target_distribution(q, k, scale, key_start, key_end, "per_head")
    scores = reference.indexer_scores(*index, key_start, key_end, "per_head")
    kl = pair((q, k), index, scale, key_start, key_end)[1]
    lse = reference.teacher_lse(q, k, scale, key_start, key_end)
    return gpu_body.Statistics(lse, scores.logsumexp(-1), kl, torch.special.entr(p).sum(-1))


def played_gradients(problem, lse_index):
    q, k, index, lse, needs = problem.q, problem.k, problem.leaves, problem.lse, problem.needs
    key_start, key_end, factor, scale = problem.key_start, problem.key_end, problem.weight, problem.softmax_scale
    expected = played_statistics(q, k, index, key_start, key_end, scale)
    assert torch.equal(lse, expected.lse) and torch.equal(lse_index, expected.lse_index)
    assert all(x.is_contiguous() for x in (*index, factor, key_start, key_end))
    with torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in index]
        kl = pair((q, k), leaves, scale, key_start, key_end, token_weight=factor)[0] * q.shape[1]
        gradients = torch.autograd.grad(kl, leaves)
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


@pytest.fixture
def played(monkeypatch):
    """The kernels by the reference; a list of what was prepared."""
    prepared = []
    monkeypatch.setattr(bodies, "choose", lambda op, device, refusal: "sm_90")
    monkeypatch.setattr(per_head_op, "kernels", lambda problem, V: (V, problem.index_q.shape[2], tuple(problem.needs)))
    monkeypatch.setattr(per_head_op.launch, "prepare", prepared.append)
    monkeypatch.setattr(gpu_body, "statistics", played_statistics)
    monkeypatch.setattr(per_head_op, "per_head_gradients", played_gradients)
    return prepared


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("name", ["smollm2", "packed", "fewer_keys"])
def test_what_is_made_of_the_kernels_results(played, monkeypatch, name, needs):
    x = make_inputs(replace(SHAPES[name], I=SHAPES[name].H), seed=3, dtype=torch.float64)
    index = x.index_q, x.index_k, x.index_weights
    intervals, scale = (x.key_start, x.key_end), x.softmax_scale
    got = indexer_kl_sums(Problem(x.q, x.k, *index, None, *intervals, x.token_weight, scale, "per_head", 2**20, needs))
    monkeypatch.setattr(bodies, "choose", lambda op, device, refusal: TORCH)
    leaves = [leaf.clone().requires_grad_() for leaf in index]
    expected = indexer_kl(
        x.q, x.k, *leaves, softmax_scale=scale, key_start=x.key_start, key_end=x.key_end, target="per_head",
        token_weight=x.token_weight,
    )  # fmt: skip
    gradients = torch.autograd.grad(expected.loss, leaves)
    wanted = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    for mine, theirs in zip(got, (expected.kl, expected.entropy, *wanted), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)
    assert played == [(0, x.index_q.shape[2], needs)]


def test_it_waits_for_all_keys_before_anything_reads_them(played):
    x = make_inputs(replace(SHAPES["window"], I=SHAPES["window"].H), seed=3, dtype=torch.float64)
    k, asked = torch.full_like(x.k, torch.nan), []

    def wait_for_keys(end):
        asked.append(end)
        k[:end] = x.k[:end]

    index = [torch.stack([y, y], -1)[..., 0] for y in (x.index_q, x.index_k, x.index_weights)]
    starts, ends, weight = (torch.stack([y, y], -1)[..., 0] for y in (x.key_start, x.key_end, x.token_weight))
    problem = Problem(
        x.q, k, *index, None, starts, ends, weight, x.softmax_scale, "per_head", 2**20, (True, True, True)
    )
    sums = per_head_op.per_head_sums(problem, wait_for_keys)
    assert asked == [x.k.shape[0]]
    assert all(y.isfinite().all() for y in sums)
