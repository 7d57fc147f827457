"""The stages by kernels: a chunk of score tiles, rank r a run of 128-token blocks, as `kl.plan_shards` cuts them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from flash_indexer.ops import launch
from flash_indexer.ops.blockwise import compute_dtype
from flash_indexer.ops.kl import gpu_body, gpu_fused
from flash_indexer.ops.kl.arithmetic import with_wide_teacher
from flash_indexer.ops.kl.gpu_fp8 import Fp8Index, Fp8Teacher, TeacherRows, has_fp8_teacher
from flash_indexer.ops.kl.plan import TileChunk
from flash_indexer.ops.kl.plan_shards import ShardPlan, shard_plan
from flash_indexer.ops.kl.stages import new_sums
from flash_indexer.ops.problem import Problem, Sums, WaitForKeys
from flash_indexer.ops.worklists import TILE


class GpuStages:
    """See `stages.Stages`. Buffers are made once, for the largest chunk, and used by every chunk."""

    left: gpu_fused.Left | None = None  # what scores leave, where they do
    side: torch.cuda.Stream | None = None  # of the teacher's scores: index scores take what multiprocessors they leave

    def __init__(self, problem: Problem, rank: int, world: int, wait_for_keys: WaitForKeys | None) -> None:
        self.wait_for_keys, self.scale = wait_for_keys, problem.softmax_scale
        self.logits, self.needs = problem.target == "sum_logits", tuple(problem.needs)
        with torch.cuda.device(problem.q.device):
            self.plan, fused = self._planned(problem, rank, world)
            self.chunks = len(self.plan.shards)
            gpu_body.prepare(problem, fused)
            self._take_teacher(problem)
            index_q, index_k, weights = map(launch.aligned, problem.leaves)
            self.leaves = (index_q, index_k, weights)
            self.scored = -1  # the chunk whose index scores are there
            self.fp8_index = None if problem.index_dtype is None else Fp8Index(self.leaves, problem.index_dtype)
            self.row_inputs = gpu_body.Rows(
                problem.key_start.contiguous(), problem.key_end.contiguous(), problem.weight.contiguous()
            )
            self.lse = None if problem.lse is None else problem.lse.contiguous()
            if not self.logits and self.lse is None and self.chunks:
                self._find_lse()
            own = self.plan.own
            self.sums = new_sums(
                problem, every_row_is_written=world == 1 and own.complete, every_key_is_written=own.writes_keys
            )
            self._allocate(self.plan, 1 if world == 1 else 2)
            if fused:
                self.left = gpu_fused.new_left(self.plan.own, index_q)
            if world == 1 and not self.logits and self.fp8_teacher is None and self.fp8_index is None:
                self.side = launch.side_stream(problem.q.device)

    @staticmethod
    def _planned(problem: Problem, rank: int, world: int) -> tuple[ShardPlan, bool]:
        """The plan, and whether KL and gradients are fused: not where rows are few and long, so that items are few."""
        for fused in (True, False) if gpu_fused.takes(problem, world) else (False,):
            sizes = gpu_body.plan_sizes(problem, fused)
            plan = shard_plan(problem.key_start, problem.key_end, sizes, rank, world)
            if gpu_body.row_kernel(plan.own) == "rows_warp":
                break
        return plan, fused

    def _take_teacher(self, problem: Problem) -> None:
        """Its queries and keys as the scores read them; e4m3 keys are made of all that there are."""
        self.fp8_teacher = None
        if problem.teacher_dtype is not None and self.wait_for_keys is not None:
            self.wait_for_keys(problem.k.shape[0])
        if has_fp8_teacher(problem):
            self.fp8_teacher = Fp8Teacher(problem)
        problem = with_wide_teacher(problem) if self.fp8_teacher is None else problem
        self.q, self.k = launch.aligned(problem.q), launch.aligned(problem.k)

    def _find_lse(self) -> None:
        if self.fp8_teacher is not None:
            self.lse = self.fp8_teacher.lse(*self.row_inputs[:2])
            return
        if self.wait_for_keys is not None:
            self.wait_for_keys(self.k.shape[0])
        self.lse = gpu_body.teacher_lse(self.q, self.k, *self.row_inputs[:2], self.scale)

    def _allocate(self, plan: ShardPlan, chunks_under_way: int) -> None:
        index_q, _, weights = self.leaves
        largest = max((shard.teacher.tiles for shard in plan.shards), default=0)
        piece = max((shard.piece for shard in plan.shards), default=0)
        wide = torch.empty(0, dtype=compute_dtype(self.q), device=self.q.device)
        self.scores = [wide.new_empty(largest * TILE, TILE) for _ in range(chunks_under_way)]
        self.index_scores = wide.new_empty(piece * TILE, TILE)
        self.di = torch.empty_like(self.index_scores, dtype=index_q.dtype)
        d_index_q, d_index_k, d_weights = self.sums.gradients
        if any(self.needs):  # one kernel makes both of the queries' and what that of the keys' begins with
            d_index_q = torch.empty_like(index_q) if d_index_q is None else d_index_q
            d_weights = torch.empty_like(weights) if d_weights is None else d_weights
            self.out = gpu_body.IndexGradients(d_index_q, d_index_k, d_weights)

    def rows(self, n: int) -> tuple[tuple[int, int], ...]:
        """First row and end of each rank's rows of chunk n."""
        return self.plan.shards[n].rows

    def teacher(self, n: int) -> Tensor:
        """Scores of chunk n over this rank's heads, in one piece for each rank."""
        chunk = self.plan.shards[n].teacher
        if self.wait_for_keys is not None:
            self.wait_for_keys(chunk.keys)
        out = self.scores[n % len(self.scores)][: chunk.tiles * TILE]
        with torch.cuda.device(self.q.device):
            if self.fp8_teacher is not None and self.lse is not None:
                self.fp8_teacher.scores(self._quantised(self.fp8_teacher, n), self.lse, chunk, out)
            elif self.logits:
                gpu_body.summed_logits(self.q, self.k, chunk, out, self.scale)
            else:
                left = () if self.left is None else (*self.row_inputs[:2], self.left.sums)
                with self._beside(chunk):
                    gpu_body.teacher_scores(self.q, self.k, self.lse, chunk, out, self.scale, left)
        return out

    def _quantised(self, teacher: Fp8Teacher, n: int) -> TeacherRows:
        """The teacher's rows of chunk n; on one process beside the chunk's index scores, where that is faster."""
        chunk, own = self.plan.shards[n].teacher, self.plan.shards[n].own
        rows, processors = slice(chunk.begin, chunk.end), launch.processors(self.q.device)
        if self.fp8_index is None or own is None or len(self.scores) > 1:
            return teacher.quantised(rows)
        share = self.fp8_index.share(own, teacher.traffic(rows), processors)
        if share == processors:
            return teacher.quantised(rows)
        here, side = torch.cuda.current_stream(), launch.side_stream(self.q.device)
        side.wait_stream(here)
        self.fp8_index.scores(own, self.index_scores[: own.tiles * TILE], share)  # first, so that it finds room
        with torch.cuda.stream(side):
            quantised = teacher.quantised(rows)
        here.wait_stream(side)
        for x in quantised:  # taken on the other stream, where calls on a third one may take it again
            x.record_stream(here)
        self.scored = n
        return quantised

    def index(self, n: int, p: Tensor) -> None:
        """KL and gradients of this rank's rows of chunk n, from its piece summed over ranks; p is overwritten."""
        own = self.plan.shards[n].own
        if own is None:
            return
        scores, di = self.index_scores[: p.shape[0]], self.di[: p.shape[0]]
        with torch.cuda.device(self.q.device):
            if self.left is not None:
                left = self.left.of(own.tiles)
                gpu_body.index_scores(*self.leaves, own, scores, (*self.row_inputs[:2], left.tops, left.masks))
                self._join()
                made = gpu_fused.Outputs(di, self.sums.kl, self.sums.entropy, self.out)
                gpu_fused.gradients((p, scores), left, self.leaves, self.plan.own, own, self.row_inputs, made)
                return
            if self.fp8_index is None:
                gpu_body.index_scores(*self.leaves, own, scores)
            elif self.scored != n:
                self.fp8_index.scores(own, scores)
            self._join()
            out = di, self.sums.kl, self.sums.entropy
            gpu_body.kl_rows(p, scores, self.plan.own, own, self.row_inputs, out, self.logits)
            if any(self.needs):
                gpu_body.index_gradients(di, self.leaves, self.plan.own, own, self.out, (p, scores))

    def _beside(self, chunk: TileChunk) -> AbstractContextManager[object]:
        """The side stream, where there is one, behind what has been launched; else the current stream.

        The chunk's lists are made before: index scores, which don't wait for the side stream, may have the same, and
        nothing that runs out of memory comes before the streams meet again.
        """
        if self.side is None:
            return nullcontext()
        for width in (self.q.shape[2], self.leaves[0].shape[2]):
            gpu_body.score_items(chunk, width)
        self.side.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.side)

    def _join(self) -> None:
        """The current stream goes on when the teacher's scores are there."""
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)

    def end(self) -> Sums:
        """The result, when every chunk is done."""
        return self.sums
