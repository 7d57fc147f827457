"""Rows of weight zero on the GPU: what is left by the ruler, nothing launched for what is not, as many tiles less."""

from __future__ import annotations

import pytest
import torch

from flash_indexer.ops.kl import gpu_body
from flash_indexer.testing import KERNEL_CLASSES, Result, assert_close, reference_indexer_kl

pytestmark = pytest.mark.gpu


def sparse_weight(x, kind):
    """Weights of about a third of the rows: whole blocks of 128, or single rows."""
    row = torch.arange(len(x.token_weight), device=x.token_weight.device)
    place = row // 128 if kind == "blocks" else row
    return torch.where(place % 3 == 1, x.token_weight, 0.0)


@pytest.mark.parametrize("kind", ["blocks", "rows"])
@pytest.mark.parametrize("target", ["mean", "mean with lse", "sum_logits"])
@pytest.mark.parametrize("layout", ["long", "documents", "window"])
@pytest.mark.parametrize("sizes", KERNEL_CLASSES[::3], ids=lambda sizes: "D{}-E{}-IP{}".format(*sizes))
def test_against_float64(sizes, layout, target, kind, problem, measure, baseline):
    x = problem(f"weighted {sizes} {layout}", sizes, layout)
    weight = sparse_weight(x, kind)
    common = dict(target=target.split()[0], token_weight=weight, d_loss=-1.3)
    lse = x.lse if target == "mean with lse" else None
    got = measure(x, lse=lse, workspace_bytes=2**22, **common)
    counts = weight != 0
    truth = reference_indexer_kl(x, **common)
    truth = truth._replace(kl=truth.kl * counts, entropy=truth.entropy * counts)
    eager = baseline(x, truth, lse=lse, **common)
    eager = eager._replace(kl=eager.kl * counts, entropy=eager.entropy * counts)
    for field, *tensors in list(zip(Result._fields, got, truth, eager, strict=True))[1:]:
        assert_close(field, *tensors)
    again = measure(x, lse=lse, workspace_bytes=2**22, **common)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("options", [dict(), dict(index_dtype="fp8", teacher_dtype="fp8"), dict(target="per_head")])
def test_the_same_as_the_rows_alone(options, problem, measure):
    heads = dict(H=8, G=2, I=8) if options.get("target") == "per_head" else {}
    x = problem("rows alone", KERNEL_CLASSES[1], "long", **heads)
    weight = sparse_weight(x, "blocks")
    rows = weight.nonzero()[:, 0]
    names = ("q", "index_q", "index_weights", "key_start", "key_end", "lse", "token_weight")
    part = type(x)(**{f: getattr(x, f)[rows] if f in names else getattr(x, f) for f in x.__dataclass_fields__})
    got, want = measure(x, token_weight=weight, **options), measure(part, token_weight=weight[rows], **options)
    assert torch.equal(got.d_index_k, want.d_index_k) and torch.equal(got.kl[rows], want.kl)
    assert torch.equal(got.d_index_q[rows], want.d_index_q)
    for value in (got.kl, got.d_index_q, got.d_index_weights):
        others = torch.ones(len(value), dtype=torch.bool, device=value.device)
        others[rows] = False
        assert (value[others] == 0).all()


def test_no_tile_is_scored_for_them(problem, measure, monkeypatch):
    x = problem("tiles", KERNEL_CLASSES[1], "long")
    tiles, original = [], gpu_body.index_scores

    def counted(index_q, index_k, index_weights, chunk, *others):
        tiles.append(chunk.score.numel() // 4)
        original(index_q, index_k, index_weights, chunk, *others)

    monkeypatch.setattr(gpu_body, "index_scores", counted)
    found = []
    for weight in (torch.ones_like(x.token_weight), sparse_weight(x, "blocks"), torch.zeros_like(x.token_weight)):
        tiles.clear()
        measure(x, token_weight=weight)
        found.append(sum(tiles))
    assert 0 < found[1] < 0.45 * found[0] and found[2] == 0
