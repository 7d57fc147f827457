"""The stages of `indexer_kl` for ranks that hold shards of the teacher's heads; whoever owns the ranks owns the loop.

    for each chunk n:
        scores = stages.teacher(n)              [world * piece, C], the sum over this rank's heads, of all rows
        stages.index(n, piece of the sum)       KL and gradients of this rank's rows, from [piece, C] summed over ranks

Piece r of `scores` holds rank r's rows; what lies behind them is padding that nobody reads. Two chunks may be under
way: the scores of a chunk are overwritten by those of the second after it. Nothing here knows a process group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from flash_indexer.intervals import check_intervals
from flash_indexer.ops.kl import gpu_body as cuda
from flash_indexer.ops.kl import torch_body as cpu
from flash_indexer.ops.kl.plan import TILE
from flash_indexer.ops.kl.plan_shards import shard_plan
from flash_indexer.ops.kl.sums import Problem, Sums


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


def make_stages(problem: Problem, rank: int, world: int, before: Callable[[int], object] | None = None) -> Stages:
    """The stages on the tensors' device. The target is "mean" or "sum_logits"; before as in `indexer_kl_sums`."""
    kind = CudaStages if problem.q.device.type == "cuda" else CpuStages
    return kind(problem, rank, world, before)


def zero_sums(problem: Problem) -> Sums:
    """Zeros for this rank to write its rows to."""
    iq, ik, iw, needs = problem.index_q, problem.index_k, problem.index_weights, problem.needs
    wide = cpu.compute_dtype(ik)
    kl, entropy = (torch.zeros(iq.shape[0], dtype=wide, device=iq.device) for _ in range(2))
    return Sums(
        kl,
        entropy,
        torch.zeros(iq.shape, dtype=iq.dtype, device=iq.device) if needs[0] else None,
        torch.zeros(ik.shape, dtype=wide, device=iq.device) if needs[1] else None,
        torch.zeros(iw.shape, dtype=iw.dtype, device=iq.device) if needs[2] else None,
    )


class CpuStages:
    """The blockwise torch body: a chunk of R rows by C keys, rank r the r-th run of ceil(R / world) rows."""

    def __init__(self, problem: Problem, rank: int, world: int, before: Callable[[int], object] | None) -> None:
        check_intervals(problem.key_start, problem.key_end, problem.k.shape[0])
        self.problem, self.rank, self.world, self.before = problem, rank, world, before
        self.sums = zero_sums(problem)
        self.dtype = cpu.compute_dtype(problem.q)
        full, own = 3, 2 + 2 + 1 + problem.index_q.shape[1]  # tiles of all rows; of one rank's
        tiles = full + -(-own // world)
        self.plan = cpu.plan_chunks(
            problem.key_start, problem.key_end, tiles, self.dtype.itemsize, problem.workspace_bytes
        )
        self.chunks = len(self.plan)

    def rows(self, n: int) -> tuple[tuple[int, int], ...]:
        """First row and end of each rank's rows of chunk n."""
        begin, end, *_ = self.plan[n]
        piece = self._piece(n)
        return tuple(itertools.pairwise(min(begin + r * piece, end) for r in range(self.world + 1)))

    def _piece(self, n: int) -> int:
        begin, end, *_ = self.plan[n]
        return -(-(end - begin) // self.world)

    def _intervals(self, rows: slice, first: int, last: int) -> tuple[Tensor, Tensor]:
        starts, ends = self.problem.key_start[rows] - first, self.problem.key_end[rows] - first
        return starts.clamp_(0, last - first), ends.clamp_(0, last - first)

    def teacher(self, n: int) -> Tensor:
        """Scores of chunk n over this rank's heads, in one piece for each rank."""
        x, (begin, end, first, last) = self.problem, self.plan[n]
        if self.before is not None:
            self.before(last)
        out = torch.zeros(self.world * self._piece(n), last - first, dtype=self.dtype, device=x.q.device)
        here, p = slice(begin, end), out[: end - begin]
        q, k = x.q[here], x.k[first:last]
        if x.target == "sum_logits":
            cpu.summed_logits(q, k, softmax_scale=x.softmax_scale, out=p)
            return out
        starts, ends = self._intervals(here, first, last)
        lse = None if x.lse is None else x.lse[here].to(self.dtype)
        if lse is None:
            lse = cpu.teacher_lse(q, k, starts, ends, softmax_scale=x.softmax_scale)
        cpu.teacher_scores(q, k, lse, starts, ends, softmax_scale=x.softmax_scale, out=p)
        return out

    def index(self, n: int, p: Tensor) -> None:
        """KL and gradients of this rank's rows of chunk n, from its piece summed over ranks; p is overwritten."""
        x, sums, (_, _, first, last) = self.problem, self.sums, self.plan[n]
        rows = slice(*self.rows(n)[self.rank])
        if rows.start == rows.stop:
            return
        starts, ends = self._intervals(rows, first, last)
        p = p[: rows.stop - rows.start]
        if x.target == "sum_logits":
            cpu.exp_logits(p, starts, ends)
        iq, ik, iw = x.index_q[rows], x.index_k[first:last], x.index_weights[rows]
        scores, relu = cpu.index_scores(iq, ik, iw, starts, ends)
        weight = x.token_weight[rows].to(self.dtype)
        sums.kl[rows], sums.entropy[rows], di = cpu.kl_rows(p, scores, weight, starts, ends)
        if any(x.needs):
            cpu.index_gradients(
                di, relu, iq, ik, iw,
                d_index_q=sums.d_index_q[rows] if sums.d_index_q is not None else None,
                d_index_k=sums.d_index_k[first:last] if sums.d_index_k is not None else None,
                d_index_w=sums.d_index_weights[rows] if sums.d_index_weights is not None else None,
            )  # fmt: skip


class CudaStages:
    """The kernels: a chunk of score tiles, rank r a run of 128-token blocks, as `ops.kl.plan_shards` cuts them."""

    def __init__(self, problem: Problem, rank: int, world: int, before: Callable[[int], object] | None) -> None:
        q, k, index_q, index_k, index_weights, lse, key_start, key_end, token_weight, scale, target, *_ = problem
        cuda.check_supported(q, index_q)
        self.before, self.scale, self.logits = before, scale, target == "sum_logits"
        self.needs = tuple(problem.needs)
        self.sums = zero_sums(problem)
        with torch.cuda.device(q.device):
            self.processors = torch.cuda.get_device_properties(q.device).multi_processor_count
            sizes = cuda.plan_sizes(k, index_q, problem.workspace_bytes, self.processors)
            self.plan = shard_plan(key_start, key_end, sizes, rank, world)
            self.chunks = len(self.plan.shards)
            cuda.prepare_kernels(q, index_q, not self.logits, lse is None, self.needs)
            self.q, self.k = cuda.aligned(q), cuda.aligned(k)
            self.index_inputs = cuda.aligned(index_q), cuda.aligned(index_k), cuda.aligned(index_weights)
            self.row_inputs = key_start.contiguous(), key_end.contiguous(), token_weight.contiguous()
            if not self.logits and lse is None and self.chunks:
                if before is not None:
                    before(k.shape[0])
                lse = cuda.teacher_lse(self.q, self.k, *self.row_inputs[:2], scale)
            self.lse = None if lse is None else lse.contiguous()
            self._allocate()

    def _allocate(self) -> None:
        shards = self.plan.shards
        index_q, _, weights = self.index_inputs
        largest = max((shard.teacher.tiles for shard in shards), default=0)
        piece = max((shard.piece for shard in shards), default=0)
        slots = max((shard.own.slots for shard in shards if shard.own is not None), default=0)
        wide = torch.empty(0, dtype=cpu.compute_dtype(self.q), device=self.q.device)
        self.scores = [wide.new_empty(largest * TILE, TILE) for _ in range(min(len(shards), 2))]
        self.index_scores = wide.new_empty(piece * TILE, TILE)
        self.di = torch.empty_like(self.index_scores, dtype=index_q.dtype)
        self.partials = wide.new_empty(max(slots, 1) * TILE, index_q.shape[2])
        sums, queries = self.sums, self.needs[0] or self.needs[2]
        d_index_q, d_weights = sums.d_index_q, sums.d_index_weights
        if queries and d_index_q is None:
            d_index_q = torch.zeros_like(index_q)
        if queries and d_weights is None:
            d_weights = torch.zeros_like(weights)
        self.out = cuda.Gradients(d_index_q, sums.d_index_k, d_weights)

    def rows(self, n: int) -> tuple[tuple[int, int], ...]:
        """First row and end of each rank's rows of chunk n."""
        return self.plan.shards[n].rows

    def teacher(self, n: int) -> Tensor:
        """Scores of chunk n over this rank's heads, in one piece for each rank."""
        chunk = self.plan.shards[n].teacher
        if self.before is not None:
            self.before(chunk.keys)
        out = self.scores[n % 2][: chunk.tiles * TILE]
        with torch.cuda.device(self.q.device):
            if self.logits:
                cuda.summed_logits(self.q, self.k, chunk, out, self.scale, self.processors)
            else:
                cuda.teacher_scores(self.q, self.k, self.lse, chunk, out, self.scale, self.processors)
        return out

    def index(self, n: int, p: Tensor) -> None:
        """KL and gradients of this rank's rows of chunk n, from its piece summed over ranks; p is overwritten."""
        own = self.plan.shards[n].own
        if own is None:
            return
        scores, di = self.index_scores[: p.shape[0]], self.di[: p.shape[0]]
        with torch.cuda.device(self.q.device):
            cuda.index_scores(*self.index_inputs, own, scores, self.processors)
            out = di, self.sums.kl, self.sums.entropy
            cuda.kl_rows(p, scores, self.plan.own, own, self.row_inputs, out, self.logits)
            if any(self.needs):
                cuda.index_gradients(
                    di, *self.index_inputs, self.plan.own, own, self.partials, self.out, self.processors
                )
