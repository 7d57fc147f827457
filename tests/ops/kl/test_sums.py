"""The unrounded sums: what `indexer_kl` returns is made of them, and keys may arrive while they are computed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from flash_indexer import indexer_kl
from flash_indexer.ops import Problem, indexer_kl_sums
from flash_indexer.ops.kl import gpu_body
from flash_indexer.testing import SHAPES, Inputs, make_inputs


def problem(x: Inputs, k: Tensor, *, lse: bool = True, target: str = "mean", needs: tuple[bool, ...] = (True,) * 3):
    return Problem(
        x.q, k, x.index_q, x.index_k, x.index_weights, x.lse if lse else None, x.key_start, x.key_end, x.token_weight,
        x.softmax_scale, target, 2**15, needs,
    )  # fmt: skip


@pytest.mark.parametrize("target", ["mean", "sum_logits", "per_head"])
@pytest.mark.parametrize("name", ["smollm2", "packed", "window"])
def test_no_key_is_read_before_it_is_asked_for(name: str, target: str) -> None:
    shape = SHAPES[name]
    x = make_inputs(shape if target != "per_head" else type(shape)(**(vars(shape) | dict(I=shape.H))), seed=1)
    leaves = [y.clone().requires_grad_() for y in (x.index_q, x.index_k, x.index_weights)]
    expected = indexer_kl(
        x.q, x.k, *leaves, softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end, target=target,
        lse=x.lse if target == "mean" else None, token_weight=x.token_weight, workspace_bytes=2**15,
    )  # fmt: skip
    gradients = torch.autograd.grad(expected.loss, leaves)
    k, asked = torch.full_like(x.k, torch.nan), []

    def before(end: int) -> None:
        asked.append(end)
        k[:end] = x.k[:end]

    got = indexer_kl_sums(problem(x, k, lse=target == "mean", target=target), before)
    assert asked == sorted(asked) and len(asked) > 1 and asked[0] < asked[-1] <= shape.S
    for mine, theirs in zip(got, (expected.kl, expected.entropy, *gradients), strict=True):
        assert torch.equal(mine, theirs)


def test_what_is_not_wanted_is_not_made() -> None:
    x = make_inputs(SHAPES["packed"], seed=1)
    got = indexer_kl_sums(problem(x, x.k, needs=(False, True, False)))
    assert got.d_index_q is None and got.d_index_weights is None and got.d_index_k is not None


@pytest.mark.parametrize("at_once", [1, 100, 2**24], ids=["row by row", "a few rows", "all rows"])
def test_summed_queries_are_three_bfloat16_terms_however_many_at_once(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    q = torch.randn(50, 12, 16, generator=torch.Generator().manual_seed(3)).bfloat16()
    k, given = torch.zeros(50, 3, 16).bfloat16(), {}
    monkeypatch.setattr(gpu_body, "_SUMMED", at_once)
    monkeypatch.setattr(
        gpu_body, "_score", lambda mode, terms, *_, first_row: given.update(terms=terms, first_row=first_row)
    )
    gpu_body.summed_logits(q, k, SimpleNamespace(begin=8, end=47), torch.empty(0), 0.5)  # type: ignore[arg-type]
    assert given["first_row"] == 8 and given["terms"].dtype == torch.bfloat16
    terms = given["terms"].view(39, 3, 3, 16).double()
    exact = q[8:47].view(39, 3, 4, 16).double().sum(2)
    assert (terms.sum(2) - exact).abs().max() <= 2**-20 * exact.abs().max()
    assert (terms[:, :, 0] - exact).abs().max() > 2**-10 * exact.abs().max()
