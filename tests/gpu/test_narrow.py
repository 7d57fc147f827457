"""Scores by three warpgroups (`score_narrow`): the bits of `score`, every time, where runs of tiles end early too."""

from __future__ import annotations

import pytest
import torch

from flash_indexer import indexer_kl
from flash_indexer.kernels.sm_90.sizes import NARROW_STAGES
from flash_indexer.ops.kl import gpu_body
from flash_indexer.testing import Inputs, KernelClass

pytestmark = pytest.mark.gpu
CASES = {
    "smollm2": (KernelClass(64, 64, 8), "long", dict(H=9, G=3, I=8)),
    "a head a key head": (KernelClass(128, 32, 64), "documents", dict(H=8, G=8, I=37)),
    "four heads a key head": (KernelClass(128, 64, 8), "long", dict(H=12, G=3, I=5)),
}


def scores_alone(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and entropy without gradients, which would take another way from the scores."""
    result = indexer_kl(
        x.q, x.k, x.index_q, x.index_k, x.index_weights, softmax_scale=x.softmax_scale, key_start=x.key_start,
        key_end=x.key_end,
    )  # fmt: skip
    return result.kl, result.entropy


@pytest.mark.parametrize("case", CASES)
def test_the_bits_of_two_warpgroups(case, problem, monkeypatch):
    sizes, layout, fixed = CASES[case]
    x = problem(case, sizes, layout, **fixed)
    monkeypatch.setattr(gpu_body, "NARROW", ())
    expected = scores_alone(x)
    monkeypatch.setattr(gpu_body, "NARROW", tuple(NARROW_STAGES))
    for _ in range(50):
        for a, b in zip(scores_alone(x), expected, strict=True):
            assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} elements differ"
