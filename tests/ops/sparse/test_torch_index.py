"""ops.sparse.torch_index: scores at the selected keys, KL of rows, index gradients, against autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_indexer.ops.sparse.torch_index import index_gradients, index_scores, kl_rows
from flash_indexer.testing import Shape

FAR = Shape(((200, 200),), H=2, G=1, D=8, I=3, E=8)  # two keys of up to 200: gathered; elsewhere under a mask
ALL = (True, True, True)


def dense_scores(leaves: Any) -> Tensor:
    index_q, index_k, w = leaves
    return (w[..., None] * torch.einsum("tie,se->tis", index_q, index_k).relu()).sum(1)


@pytest.mark.parametrize("workspace_bytes", [1, 20_000, 2**29])
@pytest.mark.parametrize("shape, topk", [("packed", 7), ("fewer_keys", 3), (FAR, 2), (FAR, 40)])
def test_scores_and_gradients(
    make_case: Callable[..., Any], shape: str | Shape, topk: int, workspace_bytes: int
) -> None:
    case = make_case(shape, topk=topk)
    indices, _, scores = case.selection
    torch.testing.assert_close(index_scores(case.index, case.selection, workspace_bytes), scores)
    di = torch.randn(indices.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    junk = di.clone()  # behind the count nothing is read
    junk[indices < 0] = torch.nan
    di = di.masked_fill(indices < 0, 0.0)
    leaves = case.tensors()[3:]
    picked = dense_scores(leaves).gather(1, indices.long().clamp_min(0))
    expected = torch.autograd.grad((picked * di).sum(), leaves)
    d_index_k = torch.full_like(case.x.index_k, 3.0)
    got = index_gradients(junk, case.index, case.selection, ALL, d_index_k, True, workspace_bytes)
    for value, right in zip((got[0], d_index_k - 3.0, got[1]), expected, strict=True):
        torch.testing.assert_close(value, right)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)])
def test_what_is_not_wanted_is_not_made(make_case: Callable[..., Any], needs: tuple[int, ...]) -> None:
    case = make_case("packed")
    sums = [torch.zeros_like(case.x.index_k) for _ in range(2)]
    arguments = torch.ones_like(case.selection.scores), case.index, case.selection
    whole = index_gradients(*arguments, ALL, sums[0], True, 2**29)
    part = index_gradients(*arguments, tuple(map(bool, needs)), sums[1] if needs[1] else None, True, 2**29)
    for value, right, need in zip(part, whole, (needs[0], needs[2]), strict=True):
        assert (value is not None) == bool(need) and (value is None or torch.equal(value, right))
    assert torch.equal(sums[1], sums[0] if needs[1] else torch.zeros_like(sums[0]))


def test_kl_of_rows_is_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    p_sum = torch.rand(6, 5, dtype=torch.float64, generator=generator)
    scores = torch.randn(6, 5, dtype=torch.float64, generator=generator) * 3
    count, weight = torch.tensor([5, 0, 1, 3, 4, 2]), torch.tensor([1.0, 1.0, 2.0, -0.5, 0.0, 3.0]).double()
    p_sum[0, 2] = 0.0
    junk = [x.masked_fill(torch.arange(5) >= count[:, None], torch.nan) for x in (p_sum, scores)]
    kl, entropy, di = kl_rows(*junk, count, weight)
    for t, n in enumerate(count.tolist()):
        i = scores[t, :n].clone().requires_grad_()
        p = p_sum[t, :n] / p_sum[t, :n].sum()
        right = torch.nn.functional.kl_div(i.log_softmax(-1), p, reduction="sum")
        torch.testing.assert_close(kl[t], right.detach())
        torch.testing.assert_close(entropy[t], torch.special.entr(p).sum())
        expected = torch.autograd.grad(weight[t] * right, i)[0] if n else i.detach()
        torch.testing.assert_close(di[t, :n], expected)
        assert (di[t, n:] == 0).all()


def test_gradients_of_a_row_sum_to_zero_whatever_the_scores() -> None:
    """Softmax and target both sum to one; exp(i - logsumexp) would leave the rounding of a large logsumexp in all."""
    scores = 400 + torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    p_sum = torch.rand(50, 64, generator=torch.Generator().manual_seed(2))
    _, _, di = kl_rows(p_sum, scores, torch.full((50,), 64), torch.ones(50))
    assert float(di.double().sum(1).abs().max()) < 1e-6


def test_a_row_without_mass_and_a_nan_score() -> None:
    p_sum, scores = torch.ones(3, 4), torch.zeros(3, 4)
    p_sum[1], scores[2] = 0.0, torch.nan
    kl, entropy, di = kl_rows(p_sum, scores, torch.full((3,), 4), torch.ones(3))
    assert kl.isnan().tolist() == [False, True, True] and entropy.isnan().tolist() == [False, True, False]
    assert di.isnan().all(1).tolist() == [False, True, True]
