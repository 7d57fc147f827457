"""The unrounded sums on the GPU: index_k's in float32, and keys that arrive while they are computed."""

from __future__ import annotations

import pytest
import torch

from flash_indexer.ops import Problem, indexer_kl_sums
from flash_indexer.testing import KERNEL_CLASSES, KernelClass

pytestmark = pytest.mark.gpu


def keys_that_come_late(x, target, lse, workspace_bytes):
    """The sums of a problem whose keys are NaN until they are asked for, and up to which key that was."""
    k, asked = torch.full_like(x.k, torch.nan), []

    def before(end):
        asked.append(end)
        k[:end] = x.k[:end]

    got = indexer_kl_sums(
        Problem(
            x.q, k, x.index_q, x.index_k, x.index_weights, lse, x.key_start, x.key_end, x.token_weight,
            x.softmax_scale, target, workspace_bytes, (True,) * 3,
        ),
        before,
    )  # fmt: skip
    return got, asked


def check(got, expected):
    assert got.d_index_k.dtype == torch.float32
    for mine, theirs in zip(got, expected[1:], strict=True):
        assert torch.equal(mine.to(theirs.dtype), theirs)


@pytest.mark.parametrize("target", ["mean", "mean without lse", "sum_logits"])
@pytest.mark.parametrize("layout", ["long", "documents", "window", "fewer_keys"])
@pytest.mark.parametrize("sizes", [KERNEL_CLASSES[4], KernelClass(576, 128, 64)], ids=["smollm2", "deepseek"])
def test_no_key_is_read_before_it_is_asked_for(sizes, layout, target, problem, measure):
    x = problem("late keys", sizes, layout)
    lse = x.lse if target == "mean" else None
    options = dict(target=target.split()[0], workspace_bytes=2**21)
    got, asked = keys_that_come_late(x, lse=lse, **options)
    assert asked and max(asked) <= x.k.shape[0]
    if target == "mean without lse":
        assert asked[0] == x.k.shape[0]
    check(got, measure(x, lse=lse, token_weight=x.token_weight, **options))


def test_per_head_asks_for_all_keys_first(problem, measure):
    x = problem("late keys", KernelClass(128, 64, 8), "documents", H=12, G=3, I=12)
    got, asked = keys_that_come_late(x, "per_head", None, 2**21)
    assert asked == [x.k.shape[0]]
    check(got, measure(x, target="per_head", token_weight=x.token_weight))
