"""One problem of the warm-up loss and what is computed of it: the parcels that travel instead of loose values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

LEAVES = ("index_q", "index_k", "index_weights")
"""The arguments that get gradients, in the order of every tuple of three here."""

WaitForKeys = Callable[[int], object]
"""Called with n before a step reads the teacher's keys k[:n]; returns when these rows have arrived."""


class Problem(NamedTuple):
    """Checked arguments of `indexer_kl`, shapes as there, in the order of the custom operator's arguments.

    token_weight: None means 1/n for the n queries that see a key. needs: whether the gradient of each of LEAVES is
    wanted. softcap: of the teacher's logits. q_scale, k_scale: of q and k in e4m3, [T, H] and [S, G]; None where they
    are not.
    """

    q: Tensor
    k: Tensor
    index_q: Tensor
    index_k: Tensor
    index_weights: Tensor
    lse: Tensor | None
    key_start: Tensor
    key_end: Tensor
    token_weight: Tensor | None
    softmax_scale: float
    target: str
    workspace_bytes: int
    needs: Sequence[bool]
    q_scale: Tensor | None = None
    k_scale: Tensor | None = None
    index_dtype: str | None = None
    teacher_dtype: str | None = None
    softcap: float | None = None

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """index_q, index_k, index_weights."""
        return self.index_q, self.index_k, self.index_weights

    @property
    def weight(self) -> Tensor:
        """token_weight, where it has been filled in."""
        if self.token_weight is None:
            raise ValueError("Problem: token_weight must be [T] here, got None; fill it in with mean_weight first")
        return self.token_weight


class Sums(NamedTuple):
    """KL of each query and the gradients of sum_t token_weight[t] * kl[t], the sum over queries not yet rounded.

    kl, entropy: [T] ([T, H] for "per_head"), float32 at least. Gradients, None where not wanted: d_index_q and
    d_index_weights in their input's dtype, d_index_k in float32 at least.
    """

    kl: Tensor
    entropy: Tensor
    d_index_q: Tensor | None
    d_index_k: Tensor | None
    d_index_weights: Tensor | None

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of LEAVES."""
        return self.d_index_q, self.d_index_k, self.d_index_weights
