"""NaN and inf in tokens that nobody sees, padding above all: made visible in the loss.

No score depends on such a token, so the loss would be finite; but products of whole tiles multiply its values by zero,
and 0 · NaN = NaN reaches the gradients of its neighbours, here and in the modules that produced the tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_indexer.ops.worklists import cached, to_device


def unseen_tokens(key_start: Tensor, key_end: Tensor, num_keys: int) -> tuple[Tensor, Tensor] | None:
    """Queries that see no key, and keys that no query sees, int64 indices; None where every token is seen. Cached."""

    def make(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor] | None:
        blind = end <= start
        steps = torch.zeros(num_keys + 1, dtype=torch.int64)
        steps.index_add_(0, start[~blind].long(), torch.ones(1, dtype=torch.int64).expand(int((~blind).sum())))
        steps.index_add_(0, end[~blind].long(), -torch.ones(1, dtype=torch.int64).expand(int((~blind).sum())))
        dark = steps.cumsum(0)[:num_keys] == 0
        if not blind.any() and not dark.any():
            return None
        queries, keys = (to_device(x.nonzero()[:, 0], key_start.device) for x in (blind, dark))
        return queries, keys

    return cached(key_start, key_end, num_keys, "unseen", make)


def with_unseen(loss: Tensor, leaves: tuple[Tensor, Tensor, Tensor], key_start: Tensor, key_end: Tensor) -> Tensor:
    """The loss, NaN where index_q, index_k or index_weights are not finite in a token that nobody sees.

    Costs nothing where every token is seen, one look at the others elsewhere.
    """
    index_q, index_k, index_weights = leaves
    unseen = unseen_tokens(key_start, key_end, index_k.shape[0])
    if unseen is None:
        return loss
    queries, keys = unseen
    for x, tokens in ((index_q, queries), (index_weights, queries), (index_k, keys)):
        if tokens.numel() and x[0].numel():
            loss = loss + 0.0 * x[tokens].abs().amax().to(loss.dtype)
    return loss
