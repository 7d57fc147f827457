"""The stages by kernels: a chunk of score tiles, rank r a run of 128-token blocks, as `kl.plan_shards` cuts them."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_indexer.ops import launch
from flash_indexer.ops.blockwise import compute_dtype
from flash_indexer.ops.kl import gpu_body
from flash_indexer.ops.kl.plan_shards import ShardPlan, shard_plan
from flash_indexer.ops.kl.stages import new_sums
from flash_indexer.ops.problem import Problem, WaitForKeys
from flash_indexer.ops.worklists import TILE


class GpuStages:
    """See `stages.Stages`. Buffers are made once, for the largest chunk, and used by every chunk."""

    def __init__(self, problem: Problem, rank: int, world: int, wait_for_keys: WaitForKeys | None) -> None:
        self.wait_for_keys, self.scale = wait_for_keys, problem.softmax_scale
        self.logits, self.needs = problem.target == "sum_logits", tuple(problem.needs)
        with torch.cuda.device(problem.q.device):
            self.plan = shard_plan(problem.key_start, problem.key_end, gpu_body.plan_sizes(problem), rank, world)
            self.chunks = len(self.plan.shards)
            gpu_body.prepare(problem)
            self.q, self.k, *leaves = map(launch.aligned, (problem.q, problem.k, *problem.leaves))
            self.leaves = (leaves[0], leaves[1], leaves[2])
            self.row_inputs = gpu_body.Rows(
                problem.key_start.contiguous(), problem.key_end.contiguous(), problem.weight.contiguous()
            )
            self.lse = None if problem.lse is None else problem.lse.contiguous()
            if not self.logits and self.lse is None and self.chunks:
                if wait_for_keys is not None:
                    wait_for_keys(self.k.shape[0])
                self.lse = gpu_body.teacher_lse(self.q, self.k, *self.row_inputs[:2], self.scale)
            self.sums = new_sums(problem, every_row_is_written=world == 1 and self.plan.own.complete)
            self._allocate(self.plan, 1 if world == 1 else 2)

    def _allocate(self, plan: ShardPlan, chunks_under_way: int) -> None:
        index_q, _, weights = self.leaves
        largest = max((shard.teacher.tiles for shard in plan.shards), default=0)
        piece = max((shard.piece for shard in plan.shards), default=0)
        slots = max((shard.own.slots for shard in plan.shards if shard.own is not None), default=0)
        wide = torch.empty(0, dtype=compute_dtype(self.q), device=self.q.device)
        self.scores = [wide.new_empty(largest * TILE, TILE) for _ in range(chunks_under_way)]
        self.index_scores = wide.new_empty(piece * TILE, TILE)
        self.di = torch.empty_like(self.index_scores, dtype=index_q.dtype)
        self.partials = wide.new_empty(max(slots, 1) * TILE, index_q.shape[2])
        d_index_q, d_index_k, d_weights = self.sums.gradients
        if self.needs[0] or self.needs[2]:  # one kernel makes both
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
            if self.logits:
                gpu_body.summed_logits(self.q, self.k, chunk, out, self.scale)
            else:
                gpu_body.teacher_scores(self.q, self.k, self.lse, chunk, out, self.scale)
        return out

    def index(self, n: int, p: Tensor) -> None:
        """KL and gradients of this rank's rows of chunk n, from its piece summed over ranks; p is overwritten."""
        own = self.plan.shards[n].own
        if own is None:
            return
        scores, di = self.index_scores[: p.shape[0]], self.di[: p.shape[0]]
        with torch.cuda.device(self.q.device):
            gpu_body.index_scores(*self.leaves, own, scores)
            out = di, self.sums.kl, self.sums.entropy
            gpu_body.kl_rows(p, scores, self.plan.own, own, self.row_inputs, out, self.logits)
            if any(self.needs):
                gpu_body.index_gradients(di, self.leaves, self.plan.own, own, self.partials, self.out)
