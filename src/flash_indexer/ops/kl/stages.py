"""The loop over chunks of query rows, for one process and for ranks that hold shards of the teacher's heads.

    for each chunk n:
        scores = stages.teacher(n)              [world * piece, C], the sum over this rank's heads, of all rows
        stages.index(n, piece of the sum)       KL and gradients of this rank's rows, from [piece, C] summed over ranks

Piece r of `scores` holds rank r's rows; what lies behind them is padding that nobody reads. One process is rank 0 of
one: its piece is the whole. Several ranks have two chunks under way: the scores of a chunk are overwritten by those of
the second after it. Nothing here knows a process group: whoever owns the ranks starts the sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from flash_indexer.ops.blockwise import compute_dtype
from flash_indexer.ops.problem import Problem, Sums


class Stages(Protocol):
    """The chunks of one problem, as one rank sees them. sums: zeros but for this rank's rows; d_index_k its share."""

    sums: Sums
    chunks: int

    def rows(self, n: int) -> tuple[tuple[int, int], ...]:
        """First row and end of each rank's rows of chunk n."""

    def teacher(self, n: int) -> Tensor:
        """Scores of chunk n over this rank's heads, in one piece for each rank."""

    def index(self, n: int, p: Tensor) -> None:
        """KL and gradients of this rank's rows of chunk n, from its piece summed over ranks; p is overwritten."""

    def end(self) -> Sums:
        """The result, when every chunk is done."""


def run_stages(
    stages: Stages,
    device: torch.device,
    start_sum: Callable[[Tensor], Callable[[], Tensor]] | None = None,
    after: Callable[[int], object] | None = None,
) -> Sums:
    """The loop, and its result.

    Args:
        start_sum: starts the sum over ranks of a chunk's scores and returns what waits for this rank's piece of it; the
            next chunk's scores are formed meanwhile. None where the stages are of one process.
        after: called with n when this rank's rows of chunk n are done.
    """
    with torch.autocast(device.type, enabled=False):
        coming: list[Callable[[], Tensor]] = []
        for n in range(stages.chunks + (start_sum is not None)):
            if n < stages.chunks:
                scores = stages.teacher(n)
                if start_sum is None:
                    stages.index(n, scores)
                    continue
                coming.append(start_sum(scores))
            if n > 0:
                stages.index(n - 1, coming.pop(0)())
                if after is not None:
                    after(n - 1)
        return stages.end()


def new_sums(problem: Problem, every_row_is_written: bool = False, every_key_is_written: bool = False) -> Sums:
    """Zeros for this rank to write its rows to and to add to; not filled where it writes every row, or key."""
    make: Callable[..., Tensor] = torch.empty if every_row_is_written else torch.zeros
    make_keys: Callable[..., Tensor] = torch.empty if every_key_is_written else torch.zeros
    q, index_q, index_k, weights, needs = problem.q, *problem.leaves, problem.needs
    wide, shape = compute_dtype(q), q.shape[:2] if problem.target == "per_head" else q.shape[:1]
    kl, entropy = (make(shape, dtype=wide, device=q.device) for _ in range(2))
    return Sums(
        kl,
        entropy,
        make(index_q.shape, dtype=index_q.dtype, device=q.device) if needs[0] else None,
        make_keys(index_k.shape, dtype=wide, device=q.device) if needs[1] else None,
        make(weights.shape, dtype=weights.dtype, device=q.device) if needs[2] else None,
    )
