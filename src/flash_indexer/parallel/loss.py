"""The end of a forward on several processes: token weights over all of them, and a loss that knows its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from flash_indexer.ops import IndexerKL, Problem, Sums, known_loss, with_unseen


def wanted(leaves: Sequence[Tensor]) -> list[bool]:
    """Which gradients are to be computed; to be asked before autograd is switched off."""
    return [torch.is_grad_enabled() and leaf.requires_grad for leaf in leaves]


def mean_weight(key_start: Tensor, key_end: Tensor, like: Tensor, group: ProcessGroup | None) -> Tensor:
    """1/n for each query that sees a key, 0 for the others, n counted over the group: [T] in `like`'s dtype."""
    seen = key_end > key_start
    count = seen.sum()
    if group is not None:
        dist.all_reduce(count, group=group)
    return (seen.double() / count.clamp_min(1)).to(like.dtype)


def total(problem: Problem, kl: Tensor, group: ProcessGroup | None) -> Tensor:
    """sum_t weight[t] * kl[t] over the group's tokens, summed in float64: a scalar, equal on all ranks."""
    per_token = kl.double() if kl.ndim == 1 else kl.double().mean(-1)
    loss = problem.weight.double() @ per_token
    loss = with_unseen(loss, problem.leaves, problem.key_start, problem.key_end)
    if group is not None:
        dist.all_reduce(loss, group=group)
    return loss.to(kl.dtype)


def finish(op: str, body: str, loss: Tensor, sums: Sums, leaves: Sequence[Tensor]) -> IndexerKL:
    """The result whose loss gives the leaves (index_q, index_k, index_weights) the gradients in sums, rounded once."""
    return IndexerKL(known_loss(op, body, loss, sums.gradients, leaves), sums.kl, sums.entropy)
