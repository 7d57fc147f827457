"""The sparse stage on the GPU against float64, by the ruler, of the selection that it made itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparse_problems import judge, make, step
from torch import Tensor

from flash_indexer import reference
from flash_indexer.ops import top_keys
from flash_indexer.ops.sparse import gpu_body
from flash_indexer.testing import SHAPES, Inputs, Shape
from flash_indexer.testing.sparse import selection_mask

pytestmark = pytest.mark.gpu
HEADS = {
    "latent": dict(H=32, G=1, D=64), "latent of 96 heads": dict(H=96, G=1, D=64), "grouped": dict(H=8, G=2, D=64),
    "as many keys": dict(H=4, G=4, D=64),
}  # fmt: skip
LONG = Shape(((1, 1), (300, 300), (3, 0), (150, 211)), H=1, G=1, D=1, I=4, E=32)


def problem(shape: Shape, V: int) -> tuple[Inputs, Tensor | None, Tensor]:
    return make(shape, V, "cuda")


@pytest.mark.parametrize("kl", ["forward", "backward"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("topk", [3, 40, 1000])
def test_against_float64(heads: str, topk: int, kl: str) -> None:
    x, v, d_out = problem(replace(LONG, **HEADS[heads]), -32 if "latent" in heads else 48)
    judge(x, v, d_out, step(x, v, d_out, topk=topk, kl=kl, workspace_bytes=2**22))


@pytest.mark.parametrize("kl", ["forward", "backward"])
@pytest.mark.parametrize("H", [32, 96])
def test_the_absorbed_form_runs_its_kernels(H: int, kl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("latent_attention", "latent_gradients"):
        kernel = getattr(gpu_body, name)
        monkeypatch.setattr(
            gpu_body, name, lambda *a, name=name, kernel=kernel, **o: calls.append(name) or kernel(*a, **o)
        )
    x, v, d_out = problem(replace(LONG, H=H, G=1, D=576), -512)
    made = step(x, v, d_out, topk=40, kl=kl, deterministic=False)
    assert sorted(calls) == ["latent_attention", "latent_gradients"]
    judge(x, v, d_out, made)


@pytest.mark.parametrize("topk, always", [(7, (0, 0)), (40, (2, 3)), (1000, (0, 0))])
def test_its_selection_is_right_for_its_scores(topk: int, always: tuple[int, int]) -> None:
    """Near ties aside the reference's; and the same at another workspace and of some of the rows."""
    x, v, d_out = problem(replace(LONG, **HEADS["grouped"]), 48)
    result, _ = step(x, v, d_out, topk=topk, always=always)
    other, _ = step(x, v, d_out, topk=topk, always=always, workspace_bytes=2**16)
    assert all(torch.equal(a, b) for a, b in zip(result.selection, other.selection, strict=True))
    wide = x.double()
    scores = reference.indexer_scores(wide.index_q, wide.index_k, wide.index_weights, x.key_start, x.key_end)
    expected = reference.selected_keys(scores, x.key_start, x.key_end, topk, always)
    got = selection_mask(result.selection, len(x.k))
    assert int((got != expected).sum()) <= 2 and torch.equal(got.sum(1), expected.sum(1))


def test_ties_go_to_the_lowest_key() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf])
    scores = values[torch.randint(6, (300, 700), generator=torch.Generator().manual_seed(0))]
    end = torch.arange(401, 701, dtype=torch.int32)
    expected = top_keys(scores, 0 * end, end, 64)
    got = top_keys(scores.cuda(), 0 * end.cuda(), end.cuda(), 64)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("kl", ["forward", "backward"])
@pytest.mark.parametrize("heads", ["latent", "grouped"])
def test_the_same_bits_every_time(heads: str, kl: str) -> None:
    x, v, d_out = problem(replace(LONG, **HEADS[heads]), -32 if heads == "latent" else 48)
    first, once = step(x, v, d_out, topk=9, kl=kl)
    for _ in range(5):
        second, again = step(x, v, d_out, topk=9, kl=kl)
        assert torch.equal(first.out, second.out) and torch.equal(first.kl, second.kl)
        assert all(torch.equal(y, again[name]) for name, y in once.items())


def test_queries_and_keys_of_any_number() -> None:
    for T, S in ((1, 1), (1, 5), (5, 1), (3, 0)):
        x, v, d_out = problem(replace(SHAPES["one_head"], documents=((T, S),), D=64, E=32), 64)
        result, gradients = step(x, v, d_out, topk=4, kl="backward")
        assert all(y.isfinite().all() for y in (result.out, result.kl, *gradients.values()))
