"""target="per_head" on a GPU: when its kernels run, and what is made of their results, the kernels played by torch."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from flash_indexer import indexer_kl, reference
from flash_indexer.ops import Problem, indexer_kl_sums
from flash_indexer.ops.attention import gpu_body as heads
from flash_indexer.ops.kl import op as operator
from flash_indexer.ops.kl import per_head, sums
from flash_indexer.testing import SHAPES, make_inputs

NEEDS = ((True, True, True), (False, True, False), (True, False, True), (False, False, False))


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability): torch believes in one, and that TileLang is there."""

    def pretend(capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(per_head, "_tilelang_is_here", lambda: True)

    return pretend


def tensors(D=128, E=64, H=4, G=1):
    return torch.empty(3, H, D), torch.empty(3, G, D), torch.empty(3, H, E)


@pytest.mark.parametrize(
    "sizes",
    [dict(), dict(D=256, E=128, H=64), dict(D=80, E=32, H=15, G=3), dict(H=128), dict(D=192, H=128)],
)
def test_sizes_that_the_kernels_take(gpu, sizes):
    gpu()
    assert per_head.refusal(*tensors(**sizes)) is None


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
def test_sizes_that_they_do_not(gpu, sizes, reason):
    gpu()
    assert re.search(reason, per_head.refusal(*tensors(**sizes)))


def test_machines_that_cannot_run_them(gpu, monkeypatch):
    gpu((8, 0))
    assert "compute capability 9.0 (H100, H200, GH200), got cpu of 8.0" in per_head.refusal(*tensors())
    gpu()
    monkeypatch.setattr(per_head, "_tilelang_is_here", lambda: False)
    assert "tilelang is not installed (pip install 'flash-indexer[kernels]')" in per_head.refusal(*tensors())
    monkeypatch.undo()
    if not torch.cuda.is_available():
        assert per_head.refusal(*tensors()) == "there is no GPU"


@pytest.mark.parametrize("reason", [None, "the sizes are wrong"])
@pytest.mark.parametrize("entry", ["operator", "sums"])
def test_the_torch_body_runs_where_the_kernels_cannot_and_says_why_once(monkeypatch, entry, reason):
    q = SimpleNamespace(device=torch.device("cuda"))
    others = [None] * 8
    ran = []
    monkeypatch.setattr(sums, "_said", set())
    monkeypatch.setattr(per_head, "refusal", lambda *_: reason)
    monkeypatch.setattr(per_head, "indexer_kl", lambda *_: ran.append("kernels"))
    monkeypatch.setattr(per_head, "sums", lambda *_: (ran.append("kernels"), None, (None,) * 3))
    monkeypatch.setattr(operator, "torch_body", lambda *_: ran.append("torch"))
    monkeypatch.setattr(sums, "blockwise", lambda *_: ran.append("torch"))
    call = operator._body if entry == "operator" else lambda *x: indexer_kl_sums(Problem(*x))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            call(q, *others, 1.0, "per_head", 1, [True] * 3)
    assert ran == ["kernels" if reason is None else "torch"] * 2
    assert [str(x.message) for x in said] == [] if reason is None else len(said) == 1
    if reason is not None:
        assert 'target="per_head" runs the blockwise torch body' in str(said[0].message)
        assert str(said[0].message).endswith(reason)


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
    return heads.Statistics(lse, scores.logsumexp(-1), kl, torch.special.entr(p).sum(-1))


def played_gradients(q, k, index, found, factor, key_start, key_end, scale, needs):
    expected = played_statistics(q, k, index, key_start, key_end, scale)
    assert torch.equal(found[0], expected.lse) and torch.equal(found[1], expected.lse_index)
    assert all(x.is_contiguous() for x in (*index, factor, key_start, key_end)) and type(needs) is tuple
    with torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in index]
        kl = pair((q, k), leaves, scale, key_start, key_end, token_weight=factor)[0] * q.shape[1]
        gradients = torch.autograd.grad(kl, leaves)
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


@pytest.fixture
def played(monkeypatch):
    """The kernels by the reference; a list of what was prepared."""
    prepared = []
    monkeypatch.setattr(heads, "prepare", lambda q, k, V, E, needs: prepared.append((V, E, tuple(needs))))
    monkeypatch.setattr(heads, "statistics", played_statistics)
    monkeypatch.setattr(heads, "per_head_gradients", played_gradients)
    return prepared


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("name", ["smollm2", "packed", "fewer_keys"])
def test_what_is_made_of_the_kernels_results(played, name, needs, weighted):
    x = make_inputs(replace(SHAPES[name], I=SHAPES[name].H), seed=3, dtype=torch.float64)
    weight = x.token_weight if weighted else None
    index = x.index_q, x.index_k, x.index_weights
    got = per_head.indexer_kl(x.q, x.k, index, x.key_start, x.key_end, weight, x.softmax_scale, needs)
    leaves = [leaf.clone().requires_grad_() for leaf in index]
    expected = indexer_kl(
        x.q, x.k, *leaves, softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end, target="per_head",
        token_weight=weight,
    )  # fmt: skip
    gradients = torch.autograd.grad(expected.loss, leaves)
    for mine, theirs in zip(got, (*expected, *gradients), strict=True):
        if mine.numel():
            torch.testing.assert_close(mine, theirs.detach(), rtol=1e-6, atol=1e-6)  # the mean weight is in float32
    assert [g.numel() > 0 for g in got[3:]] == list(needs)
    assert played == [(0, x.index_q.shape[2], needs)]


def test_all_keys_are_asked_for_before_anything_reads_them(played):
    x = make_inputs(replace(SHAPES["window"], I=SHAPES["window"].H), seed=3, dtype=torch.float64)
    k, asked = torch.full_like(x.k, torch.nan), []

    def before(end):
        asked.append(end)
        k[:end] = x.k[:end]

    index = [torch.stack([y, y], -1)[..., 0] for y in (x.index_q, x.index_k, x.index_weights)]
    starts, ends, weight = (torch.stack([y, y], -1)[..., 0] for y in (x.key_start, x.key_end, x.token_weight))
    kl, entropy, gradients = per_head.sums(
        x.q, k, tuple(index), starts, ends, weight, x.softmax_scale, (True,) * 3, before
    )
    assert asked == [x.k.shape[0]]
    assert all(y.isfinite().all() for y in (kl, entropy, *gradients))
