"""ops.sparse.gpu_body refuses what its kernels don't take, before it looks at the device."""

from __future__ import annotations

import pytest
import torch

from flash_indexer.ops.sparse.gpu_body import latent_attention, latent_gradients


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
