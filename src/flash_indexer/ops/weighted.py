"""Rows of weight zero cost nothing: the problem of the other rows, and its result put back among zeros.

    loss = sum over t with token_weight[t] != 0 of token_weight[t] * KL[t]

Every query is a problem of its own over the keys, and intervals that do not decrease still do not where rows are left
out. So what is left is a smaller problem of the same kind, T' queries over the same S keys, and no kernel, plan or body
knows of the rows that are gone: not the teacher's scores, not the gradients of the keys.

Which rows have weight is read from the device, once for each token_weight tensor, as the intervals' contents are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from flash_indexer.ops.problem import Problem, Sums

MOST = 0.75
"""Rows are left out where at most this part of all has weight: what remains is copied, in q as long as all of it."""


class _Found(NamedTuple):
    """The rows of a token_weight tensor (None: all count), and key_start -> (key_end, versions, those of the rows)."""

    version: int
    rows: Tensor | None
    intervals: Any


_cache: Any = WeakTensorKeyDictionary()


def weighted_part(problem: Problem) -> tuple[Problem, Tensor | None]:
    """The problem of the rows that have weight, and which they are, int64 [T']; or the problem itself and None.

    The same intervals and token_weight, unchanged, give the same tensors again, whose plans are kept.
    """
    if problem.token_weight is None:
        return problem, None
    found = _find(problem.token_weight)
    rows = found.rows
    if rows is None:
        return problem, None
    key_start, key_end = _intervals(found, rows, problem.key_start, problem.key_end)
    part = problem._replace(
        q=_take(problem.q, rows),
        q_scale=None if problem.q_scale is None else problem.q_scale[rows],
        index_q=problem.index_q[rows],
        index_weights=problem.index_weights[rows],
        lse=None if problem.lse is None else problem.lse[rows],
        key_start=key_start,
        key_end=key_end,
        token_weight=problem.token_weight[rows],
    )
    return part, rows


def among_all(sums: Sums, rows: Tensor | None, num_queries: int) -> Sums:
    """The sums of `weighted_part`, those of each row at its place among all, zeros elsewhere."""
    if rows is None:
        return sums

    def spread(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.new_zeros(num_queries, *x.shape[1:]).index_copy_(0, rows, x)

    kl, entropy = (x.new_zeros(num_queries, *x.shape[1:]).index_copy_(0, rows, x) for x in (sums.kl, sums.entropy))
    return Sums(kl, entropy, spread(sums.d_index_q), sums.d_index_k, spread(sums.d_index_weights))


def _find(token_weight: Tensor) -> _Found:
    version = None if token_weight.is_inference() else token_weight._version
    found: _Found | None = _cache.get(token_weight) if version is not None else None
    if found is None or found.version != version:
        with torch.inference_mode(False):  # what is kept is for training as well
            rows = token_weight.nonzero()[:, 0]
        few = rows.shape[0] <= MOST * token_weight.shape[0] and rows.shape[0] < token_weight.shape[0]
        found = _Found(version or 0, rows if few else None, WeakTensorKeyDictionary())
        if version is not None:
            _cache[token_weight] = found
    return found


def _intervals(found: _Found, rows: Tensor, key_start: Tensor, key_end: Tensor) -> tuple[Tensor, Tensor]:
    if key_start.is_inference() or key_end.is_inference():
        return key_start[rows], key_end[rows]
    versions = (key_start._version, key_end._version)
    kept = found.intervals.get(key_start)
    if kept is None or kept[0] is not key_end or kept[1] != versions:
        with torch.inference_mode(False):
            kept = found.intervals[key_start] = (key_end, versions, (key_start[rows], key_end[rows]))
    part: tuple[Tensor, Tensor] = kept[2]
    return part


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], for values in 8 bits too."""
    return x.view(torch.uint8)[rows].view(x.dtype) if x.dtype.itemsize == 1 else x[rows]
