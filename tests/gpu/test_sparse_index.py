"""The indexer at the selected keys by kernels, on given selections, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_indexer.ops.sparse import gpu_index, torch_index
from flash_indexer.testing import assert_close

pytestmark = pytest.mark.gpu
ROWS = [(1, 1), (5, 3), (70, 64), (33, 513), (200, 2048), (40, 4099), (20, 9000)]  # T, K


def rows(T: int, K: int, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p_sum, scores, count, weight; NaN behind each row's slots."""
    generator = torch.Generator("cuda").manual_seed(K)
    count = torch.randint(K + 1, (T,), device="cuda", generator=generator, dtype=torch.int32)
    count[: min(3, T)] = torch.tensor([K, 0, 1][: min(3, T)], dtype=torch.int32, device="cuda")
    scores = torch.randn(T, K, device="cuda", generator=generator)
    p = (torch.randn(T, K, device="cuda", generator=generator) * 2).exp()
    if kind == "peaked":
        p, scores = p**8, scores * 30
    if kind == "alike":  # KL is near zero
        p = (scores + 1e-3 * p).exp()
    if kind == "zeros":
        p = torch.where(scores > 0, p, 0.0)
        p[:, 0] += 1e-6
    behind = torch.arange(K, device="cuda") >= count[:, None]
    weight = torch.randn(T, device="cuda", generator=generator)
    return p.masked_fill(behind, torch.nan), scores.masked_fill(behind, torch.nan), count, weight


@pytest.mark.parametrize("kind", ["broad", "peaked", "alike", "zeros"])
@pytest.mark.parametrize("T, K", ROWS)
def test_kl_rows_against_float64(T: int, K: int, kind: str) -> None:
    p, scores, count, weight = rows(T, K, kind)
    got = gpu_index.kl_rows(p, scores, count, weight)
    truth = torch_index.kl_rows(p.double(), scores.double(), count, weight.double())
    eager = torch_index.kl_rows(p, scores, count, weight)
    for name, *each in zip(("kl", "entropy", "di"), got, truth, eager, strict=True):
        assert_close(name, *(x.reshape(1, -1) if x.ndim == 1 else x for x in each))
    behind = torch.arange(K, device="cuda") >= count[:, None]
    assert (got[2][behind] == 0).all() and (got[0][count == 0] == 0).all()


def test_kl_rows_of_nothing_and_of_what_is_no_distribution() -> None:
    empty = torch.zeros(4, 0, device="cuda")
    kl, entropy, di = gpu_index.kl_rows(empty, empty, torch.zeros(4, dtype=torch.int32, device="cuda"), torch.ones(4, device="cuda"))
    assert (kl == 0).all() and (entropy == 0).all() and di.shape == (4, 0)
    p, scores, count, weight = rows(6, 40, "broad")
    count[:] = 40
    p, scores = p.nan_to_num(1.0), scores.nan_to_num(0.5)
    p[2] = 0
    scores[4, 7] = torch.nan
    kl, _, di = gpu_index.kl_rows(p, scores, count, weight)
    wrong = torch.tensor([2, 4], device="cuda")
    assert kl[wrong].isnan().all() and di[wrong].isnan().all()
    right = torch.tensor([0, 1, 3, 5], device="cuda")
    assert kl[right].isfinite().all() and di[right].isfinite().all()
