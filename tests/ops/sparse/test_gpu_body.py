"""ops.sparse.gpu_body refuses what its kernels don't take, before it looks at the device."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from flash_indexer.ops.sparse.gpu_body import backward_refusal, forward_refusal, latent_attention, latent_gradients
from flash_indexer.ops.sparse.problem import Needs, SparseProblem
from flash_indexer.ops.sparse.selection import Selection


def tensors(heads: int, width: int, key_width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = torch.zeros(2, heads, width, dtype=torch.bfloat16), torch.zeros(5, key_width, dtype=torch.bfloat16)
    return q, k, torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((4, 128, 128), "expected width 576, got 128 and 128"),
        ((4, 576, 512), "expected width 576, got 576 and 512"),
        ((129, 576, 576), "expected 1 to 128 heads, got 129"),
        ((0, 576, 576), "expected 1 to 128 heads, got 0"),
    ],
)
def test_other_sizes_are_refused(sizes: tuple[int, int, int], message: str) -> None:
    x = tensors(*sizes)
    with pytest.raises(ValueError, match=message):
        latent_attention(*x, softmax_scale=1.0)
    out, lse = torch.zeros(2, sizes[0], 512), torch.zeros(2, sizes[0])
    with pytest.raises(ValueError, match=message):
        latent_gradients(*x, out, lse, out, softmax_scale=1.0)


def test_more_keys_than_offsets_reach_are_refused() -> None:
    q, _, indices, count = tensors(4, 576, 576)
    k = torch.zeros(1, dtype=torch.bfloat16).expand(2**31 // 576 + 1, 576)
    with pytest.raises(ValueError, match="expected fewer than 3728270 keys, got 3728271"):
        latent_attention(q, k, indices, count, softmax_scale=1.0)


def problem(H: int = 4, G: int = 1, D: int = 576, V: int = 512, with_v: bool = False, **options: bool) -> SparseProblem:
    q, k = torch.zeros(2, H, D, dtype=torch.bfloat16), torch.zeros(5, G, D, dtype=torch.bfloat16)
    v = torch.zeros(5, G, V, dtype=torch.bfloat16) if with_v else None
    selection = Selection(torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, dtype=torch.int32), torch.zeros(2, 3))
    return SparseProblem(q, k, v, selection, 1.0, V, options.get("deterministic", False), 2**20)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (dict(), None),
        (dict(H=128), None),
        (dict(H=129), "takes 1 to 128 heads, got H=129; split the heads"),
        (dict(G=2), "one key head of D=576 .* got G=2, D=576, V=512, v=None"),
        (dict(D=128, V=128), "got G=1, D=128, V=128"),
        (dict(with_v=True), "got G=1, D=576, V=512, a v of its own"),
    ],
)
def test_which_problems_the_kernels_take(sizes: dict[str, Any], reason: str | None) -> None:
    found = forward_refusal(problem(**sizes))
    assert found is None if reason is None else found is not None and re.search(reason, found)
    assert backward_refusal(problem(**sizes), Needs(True, True, False, True)) == found


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_kernels_take_either_order_of_sums(deterministic: bool) -> None:
    assert backward_refusal(problem(deterministic=deterministic), Needs(True, True, False, True)) is None
