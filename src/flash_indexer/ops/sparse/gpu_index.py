"""The indexer at the selected keys by kernels: KL of each row, and the gradients. See `torch_index`."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_indexer.ops import launch


@torch.no_grad()
def kl_rows(p_sum: Tensor, scores: Tensor, count: Tensor, token_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL [T], the target's entropy [T] and di [T, K]; slots behind a row's count are not read, and di is 0 there.

    A row without keys has KL 0. A row whose every p_sum is 0, because of an lse that is not its own, is NaN.
    """
    T, K = p_sum.shape
    kl, entropy = (torch.zeros(T, device=p_sum.device) for _ in range(2))
    di = torch.empty(T, K, device=p_sum.device)
    if di.numel():
        with torch.cuda.device(p_sum.device):
            p_sum, scores = launch.aligned(p_sum).view(-1), launch.aligned(scores).view(-1)
            launch.load("sparse_rows")(
                p_sum, scores, count.contiguous(), token_weight.contiguous(), di.view(-1), kl, entropy, K
            )
    return kl, entropy, di
