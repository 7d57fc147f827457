"""The indexer's loss over runs of rows: each brings its head-summed probabilities, and its KL and gradients follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.ops import bodies
from flash_indexer.ops.blockwise import compute_dtype
from flash_indexer.ops.problem import Sums
from flash_indexer.ops.sparse.gpu_index import Tiles
from flash_indexer.ops.sparse.problem import Leaves
from flash_indexer.ops.sparse.selection import Selection
from flash_indexer.ops.sparse.stages import (
    count_index_tiles,
    sparse_index_gradients,
    sparse_index_scores,
    sparse_kl_rows,
)
from flash_indexer.ops.worklists import TILE

_NUMBERS, _NUMBERS_TORCH = 4, 16  # of a slot that fit the workspace: p_sum, di, and what the gradients are made with
# (8 bytes of masks); in torch beside the stages' own chunks three that a run of rows holds, p_sum, scores and di, or
# eight with those that `sparse_kl_rows` makes


class Learner(NamedTuple):
    """The indexer's side of the sparse stage.

    leaves: index_q, index_k, index_weights. selection: of the T queries. token_weight: [T]. needs: whether the gradient
    of each leaf is wanted. scores_are_known: selection.scores are the leaves' own, not to be formed again.
    """

    leaves: Leaves
    selection: Selection
    token_weight: Tensor
    needs: tuple[bool, bool, bool]
    scores_are_known: bool
    deterministic: bool
    workspace_bytes: int

    def new_sums(self) -> Sums:
        """Zeros for `learn` to write a row's results to and to add d_index_k to."""
        index_q, index_k, weights = self.leaves
        dtype, T = compute_dtype(index_q), len(index_q)
        return Sums(
            index_q.new_zeros(T, dtype=dtype),
            index_q.new_zeros(T, dtype=dtype),
            torch.zeros(index_q.shape, dtype=index_q.dtype, device=index_q.device) if self.needs[0] else None,
            torch.zeros(index_k.shape, dtype=dtype, device=index_q.device) if self.needs[1] else None,
            torch.zeros(weights.shape, dtype=weights.dtype, device=index_q.device) if self.needs[2] else None,
        )

    def ahead(self, rows: slice) -> Tiles | None:
        """For `learn`, before the GPU is given what makes p_sum: the host then need not wait for that."""
        return count_index_tiles(*self._of(rows), deterministic=self.deterministic) if any(self.needs) else None

    def _of(self, rows: slice) -> tuple[Leaves, Selection]:
        index_q, index_k, weights = self.leaves
        return (index_q[rows], index_k, weights[rows]), self.selection.rows(rows)

    def learn(self, rows: slice, p_sum: Tensor, sums: Sums, tiles: Tiles | None = None) -> None:
        """KL, entropy and gradients of these rows from p_sum [rows, K] summed over all heads; tiles: of `ahead`."""
        made = self._made(rows, p_sum, sums.d_index_k, tiles)
        sums.kl[rows], sums.entropy[rows] = made.kl, made.entropy
        for whole, part in ((sums.d_index_q, made.d_index_q), (sums.d_index_weights, made.d_index_weights)):
            if whole is not None and part is not None:
                whole[rows] = part

    def learn_all(self, p_sum: Tensor, tiles: Tiles | None = None) -> Sums:
        """What `learn` makes of all rows in one run, without room to copy it to."""
        return self._made(slice(0, len(p_sum)), p_sum, None, tiles)

    def _made(self, rows: slice, p_sum: Tensor, d_index_k: Tensor | None, tiles: Tiles | None) -> Sums:
        """Of these rows, but for d_index_k, which is added to; None makes it."""
        leaves, chosen = self._of(rows)
        known = self.scores_are_known
        scores = chosen.scores if known else sparse_index_scores(leaves, chosen, self.workspace_bytes)
        kl, entropy, di = sparse_kl_rows(p_sum, scores, chosen.count, self.token_weight[rows])
        if not any(self.needs):
            return Sums(kl, entropy, None, None, None)
        made = sparse_index_gradients(
            di, leaves, chosen, self.needs, d_index_k=d_index_k, deterministic=self.deterministic,
            workspace_bytes=self.workspace_bytes, tiles=tiles,
        )  # fmt: skip
        return Sums(kl, entropy, *made)


def runs_of_rows(selection: Selection, workspace_bytes: int) -> Iterator[slice]:
    """Runs of query rows whose [rows, K] tensors fit workspace_bytes, of nearly one length; whole tiles for kernels.

    The same on ranks with other heads.
    """
    T, K = selection.indices.shape
    device = selection.indices.device
    by_kernels = device.type == "cuda" and bodies.generation(device) != bodies.TORCH
    numbers, unit = (_NUMBERS, TILE) if by_kernels else (_NUMBERS_TORCH, 1)
    yield from equal_runs(T, workspace_bytes // (max(1, K) * numbers * selection.scores.element_size()), unit)


def equal_runs(T: int, most: int, unit: int) -> Iterator[slice]:
    """As few runs of T rows, of at most `most` and at least one, as there can be, about equal: whole units, the last
    aside, where `most` holds one. A last run of a few rows would cost as many launches as a long one.
    """
    unit = unit if most >= unit else 1
    most = max(most // unit, 1)
    units = -(-T // unit)
    step = unit * -(-units // max(-(-units // most), 1))
    yield from (slice(begin, min(begin + step, T)) for begin in range(0, T, max(step, 1)))


def with_rows(whole: Tensor | None, rows: slice, part: Tensor, total: int) -> Tensor:
    """`whole`, of `total` rows, with `part` at these; None makes it. A part that has all rows is the whole."""
    if len(part) == total:
        return part
    if whole is None:
        whole = part.new_empty(total, *part.shape[1:])
    whole[rows] = part
    return whole


def mean_weight(selection: Selection) -> Tensor:
    """1/n for each of the n queries that have a key, 0 for the others: [T]."""
    seen = selection.count > 0
    return seen.to(selection.scores.dtype) / seen.sum().clamp_min(1)
