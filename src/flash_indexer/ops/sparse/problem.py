"""The parcels of the sparse stage."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.ops.blockwise import compute_dtype
from flash_indexer.ops.sparse.selection import Selection

Leaves = tuple[Tensor, Tensor, Tensor]
"""index_q [T, I, E], index_k [S, E], index_weights [T, I]."""


class SparseProblem(NamedTuple):
    """Checked arguments of one attention over selected keys.

    q: [T, H, D]. k: [S, G, D]. v: [S, G, V], or None where the values are k[..., :value_dim]. selection: of the T
    queries. deterministic: sums over queries are taken in one order.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    selection: Selection
    softmax_scale: float
    value_dim: int
    deterministic: bool
    workspace_bytes: int

    def rows(self, rows: slice) -> SparseProblem:
        """The problem of some of the queries, with all keys."""
        return self._replace(q=self.q[rows], selection=self.selection.rows(rows))

    @property
    def values(self) -> Tensor:
        """v, or the first value_dim columns of k: [S, G, V]."""
        return self.k[..., : self.value_dim] if self.v is None else self.v


class Needs(NamedTuple):
    """Which results of the attention's backward are wanted."""

    q: bool
    k: bool
    v: bool
    p_sum: bool


class KeySums(NamedTuple):
    """Sums over queries of the keys' gradients, float32 at least; None: not wanted. Without v, dk holds both."""

    dk: Tensor | None
    dv: Tensor | None


def new_key_sums(problem: SparseProblem, needs: Needs) -> KeySums:
    """Zeros for `sparse_backward` to add to. They have a row for each key."""
    k, v, dtype = problem.k, problem.v, compute_dtype(problem.q)
    return KeySums(
        torch.zeros(k.shape, dtype=dtype, device=k.device) if needs.k else None,
        torch.zeros(v.shape, dtype=dtype, device=k.device) if needs.v and v is not None else None,
    )
