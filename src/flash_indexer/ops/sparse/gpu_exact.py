"""Sums of the keys' gradients that are the same bits in whatever order a GPU adds: see kernels/device/exact_sums.cuh.

Shape legend: T queries, at most TOKENS; S keys; H heads; K slots of a query.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import INDEX_TABLE_KEYS, MLA_WIDTHS
from flash_indexer.ops import launch

TOKENS = 8192  # whose terms for one key the integers hold
_TABLE_TOKENS = 32  # that a block of `sparse_exact_table` takes at a time


class ExactSums(NamedTuple):
    """Integers: total holds low sums [S * 576], high sums [S * 576], and [S] that are not 0 where the sum is NaN.

    grid: float32 [S], a power of two for each key, by which its terms are multiplied before they are rounded.
    """

    total: Tensor
    grid: Tensor

    @staticmethod
    def new(most: Tensor, k: Tensor, indices: Tensor, count: Tensor, heads: int) -> ExactSums:
        """Zeros, and the grid of every key.

        most: float32 [T]; heads * most[t] is as large as any element of the token's term for a key.
        """
        S = len(k)
        numbers = S * MLA_WIDTHS[0]
        ints = torch.zeros(2 * numbers + 3 * S, dtype=torch.int32, device=k.device)
        total, terms, shares = torch.split(ints, [2 * numbers + S, S, S])
        bound = most * heads
        largest = bound.nan_to_num(0.0, 0.0, 0.0).amax().reshape(1)
        _count_terms(indices, count, bound, largest, terms, shares)
        grid = torch.empty(S, device=k.device)
        launch.load("sparse_exact_grid")(terms, shares, largest, grid)
        return ExactSums(total, grid)

    def add_to(self, dk: Tensor) -> None:
        """dk [S, 576] float32 += the sums."""
        launch.load("sparse_exact_finish")(self.total, self.grid, dk)


def largest_value(k: Tensor, indices: Tensor, count: Tensor) -> Tensor:
    """[1]: the largest norm of values among the selected keys that are finite."""
    terms, shares = torch.zeros(2, len(k), dtype=torch.int32, device=k.device)
    ones = torch.ones(len(count), device=k.device)
    _count_terms(indices, count, ones, ones[:1], terms, shares)
    norms: Tensor = torch.linalg.vector_norm(k[:, : MLA_WIDTHS[1]], dim=1, dtype=torch.float32)
    return norms.masked_fill(terms == 0, 0.0).nan_to_num(0.0, 0.0, 0.0).amax().reshape(1)


def _count_terms(indices: Tensor, count: Tensor, bound: Tensor, largest: Tensor, terms: Tensor, shares: Tensor) -> None:
    """terms += the number of tokens that select each key, shares += the sums of their bounds; see the kernel."""
    T, K = indices.shape
    runs = -(-len(terms) // INDEX_TABLE_KEYS)
    parts = max(1, min(launch.processors(indices.device) // runs, -(-T // _TABLE_TOKENS)))
    launch.load("sparse_exact_table")(indices.view(-1), count, bound, largest, terms, shares, K, runs, parts)
