"""The stages in torch: a chunk of R rows by C keys, rank r the r-th run of ceil(R / world) rows.

"per_head" is the "mean" problem of every pair of heads: a chunk is taken once for each head, on one process.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from flash_indexer.intervals import check_intervals
from flash_indexer.ops.blockwise import Chunk, compute_dtype, local_intervals, plan_chunks
from flash_indexer.ops.kl import torch_body
from flash_indexer.ops.kl.arithmetic import rotate_back, with_wide_index, with_wide_teacher
from flash_indexer.ops.kl.stages import new_sums
from flash_indexer.ops.problem import Problem, Sums, WaitForKeys


class TorchStages:
    """See `stages.Stages`. Buffers are made once, for the largest chunk, and used by every chunk."""

    def __init__(self, problem: Problem, rank: int, world: int, wait_for_keys: WaitForKeys | None) -> None:
        check_intervals(problem.key_start, problem.key_end, problem.k.shape[0])
        # rows whose gradients are formed, where they aren't those of the scores (`arithmetic`)
        per_head = problem.target == "per_head"
        through = problem.index_dtype is not None and not per_head
        self.unrounded = (problem.index_q, problem.index_k) if through else None
        self.index_dtype = problem.index_dtype if per_head else None
        if problem.teacher_dtype is not None and wait_for_keys is not None:
            wait_for_keys(problem.k.shape[0])
        problem = with_wide_index(with_wide_teacher(problem))
        self.problem, self.rank, self.world, self.wait_for_keys = problem, rank, world, wait_for_keys
        self.sums, self.dtype = new_sums(problem), compute_dtype(problem.q)
        self.weight = problem.weight.to(self.dtype)
        H = problem.q.shape[1]
        self.heads = [slice(h, h + 1) for h in range(H)] if problem.target == "per_head" else [slice(0, H)]
        index_heads = 1 if problem.target == "per_head" else problem.index_q.shape[1]
        self.relu_tiles = index_heads if any(problem.needs) else 1
        # tiles of all rows: teacher scores, of several ranks those of two chunks and room to compute in; of a rank's
        # own rows: index scores, ReLU terms, what logsumexp and entropy allocate, of several ranks the sums that arrive
        tiles = 1 + (1 + self.relu_tiles + 1) if world == 1 else 3 + -(-(1 + self.relu_tiles + 2 + 2) // world)
        self.plan = plan_chunks(problem.key_start, problem.key_end, tiles, self.dtype.itemsize, problem.workspace_bytes)
        self.chunks = len(self.plan) * len(self.heads)
        self._allocate()

    def _allocate(self) -> None:
        whole = max((self.world * self._piece(chunk) * (chunk.last - chunk.first) for chunk in self.plan), default=0)
        own = -(-whole // self.world)
        empty = torch.empty(0, dtype=self.dtype, device=self.problem.q.device)
        self._scores = [empty.new_empty(whole) for _ in range(1 if self.world == 1 else 2)]
        self._index_scores, self._relu = empty.new_empty(own), empty.new_empty(self.relu_tiles * own)
        self._scratch = self._relu if self.world == 1 else empty.new_empty(whole)

    def _at(self, n: int) -> tuple[Chunk, slice]:
        """The chunk of step n, and its teacher heads."""
        return self.plan[n // len(self.heads)], self.heads[n % len(self.heads)]

    def _piece(self, chunk: Chunk) -> int:
        return -(-(chunk.end - chunk.begin) // self.world)

    def rows(self, n: int) -> tuple[tuple[int, int], ...]:
        """First row and end of each rank's rows of chunk n."""
        chunk, _ = self._at(n)
        piece = self._piece(chunk)
        return tuple(itertools.pairwise(min(chunk.begin + r * piece, chunk.end) for r in range(self.world + 1)))

    def teacher(self, n: int) -> Tensor:
        """Scores of chunk n over this rank's heads, in one piece for each rank."""
        x, (chunk, heads) = self.problem, self._at(n)
        if self.wait_for_keys is not None:
            self.wait_for_keys(chunk.last)
        rows, columns = chunk.end - chunk.begin, chunk.last - chunk.first
        here, keys = slice(chunk.begin, chunk.end), slice(chunk.first, chunk.last)
        buffer = self._scores[n % len(self._scores)]
        scores = buffer[: self.world * self._piece(chunk) * columns].view(-1, columns)
        scores[rows:] = 0.0
        p, scratch = scores[:rows], self._scratch[: rows * columns].view(rows, columns)
        H, G = x.q.shape[1], x.k.shape[1]
        q, k = x.q[here, heads], x.k[keys, heads.start * G // H : (heads.stop - 1) * G // H + 1]
        if x.target == "sum_logits":
            torch_body.summed_logits(q, k, softmax_scale=x.softmax_scale, out=p.zero_())
            return scores
        starts, ends = local_intervals(x.key_start, x.key_end, here, chunk)
        if x.lse is None:
            lse = torch_body.teacher_lse(
                q, k, starts, ends, softmax_scale=x.softmax_scale, softcap=x.softcap, scratch=scratch
            )
        else:
            lse = x.lse[here, heads].to(self.dtype)
        torch_body.teacher_scores(
            q, k, lse, starts, ends, softmax_scale=x.softmax_scale, softcap=x.softcap, out=p, scratch=scratch
        )
        return scores

    def index(self, n: int, p: Tensor) -> None:
        """KL and gradients of this rank's rows of chunk n, from its piece summed over ranks; p is overwritten."""
        x, sums, (chunk, heads) = self.problem, self.sums, self._at(n)
        rows, keys = slice(*self.rows(n)[self.rank]), slice(chunk.first, chunk.last)
        if rows.start == rows.stop:
            return
        starts, ends = local_intervals(x.key_start, x.key_end, rows, chunk)
        p = p[: rows.stop - rows.start]
        if x.target == "sum_logits":
            torch_body.exp_logits(p, starts, ends)
        per_head = x.target == "per_head"
        index_heads = heads if per_head else slice(None)
        iq, ik, iw = x.index_q[rows, index_heads], x.index_k[keys], x.index_weights[rows, index_heads]
        relu = self._relu[: self.relu_tiles * p.numel()].view(self.relu_tiles, *p.shape)
        scores, _ = torch_body.index_scores(
            iq, ik, iw, starts, ends, out=self._index_scores[: p.numel()].view(p.shape), relu=relu
        )
        share = self.weight[rows] / len(self.heads)
        kl, entropy, di = torch_body.kl_rows(p, scores, share, starts, ends)
        place = (rows, heads.start) if per_head else rows
        sums.kl[place], sums.entropy[place] = kl, entropy
        if any(x.needs):
            if self.unrounded is not None:  # p is read no more
                iq, ik = self.unrounded[0][rows], self.unrounded[1][keys]
                torch_body.index_scores(iq, ik, iw, starts, ends, out=p, relu=relu)
            torch_body.index_gradients(
                di, relu, iq, ik, iw,
                d_index_q=sums.d_index_q[rows, index_heads] if sums.d_index_q is not None else None,
                d_index_k=sums.d_index_k[keys] if sums.d_index_k is not None else None,
                d_index_w=sums.d_index_weights[rows, index_heads] if sums.d_index_weights is not None else None,
            )  # fmt: skip
            if sums.d_index_q is not None:  # as each chunk ends: its rows may be sent to other ranks then
                rotate_back(sums.d_index_q[rows, index_heads], self.index_dtype)

    def end(self) -> Sums:
        """The result, when every chunk is done."""
        rotate_back(self.sums.d_index_k, self.index_dtype)
        return self.sums
