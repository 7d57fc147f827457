"""The teacher and the indexer in e4m3 on GPUs with kernels: what is quantised when, and the launches of their scores.

Keys are quantised once a call, the teacher's queries a chunk of rows at a time, or all for their logsumexp, and the
index queries once. The gradients are formed of the rows as they are, by the same kernels as ever.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import SHARED_KEY_SCALES
from flash_indexer.ops import launch
from flash_indexer.ops.kl.arithmetic import FP8
from flash_indexer.ops.kl.plan import TileChunk
from flash_indexer.ops.problem import Problem
from flash_indexer.ops.quantization_gpu import (
    padded_keys,
    quantize_index,
    quantize_keys,
    quantize_rows,
    scales_by_head,
    wanted,
    wanted_index,
    wanted_keys,
)
from flash_indexer.ops.worklists import TILE

# operations of index scores that a multiprocessor does in a second; bytes that pass in a second where one quantises,
# and where all of an H100 do; seconds that a second stream costs
SCORES, TRAFFIC, MEMORY, TURNING = 8.5e12, 4.6e10, 2.8e12, 2e-5


def kernels(problem: Problem) -> list[launch.Wanted]:
    """What the problem's e4m3 parts need compiled, in place of the scores of wider rows."""
    D, E = problem.q.shape[2], problem.index_q.shape[2]
    found: list[launch.Wanted] = []
    if has_fp8_teacher(problem):
        found.append(("score_fp8", dict(D=D)))
        if D in SHARED_KEY_SCALES:
            found.append(wanted_keys(D, problem.k_scale is not None, problem.teacher_dtype == FP8))
        if problem.lse is None:
            found.append(("lse_fp8", dict(D=D)))
        if problem.q_scale is None:
            found.append(wanted(D, problem.teacher_dtype == FP8))
    if problem.index_dtype is not None:
        found += [("score_narrow_fp8", dict(E=E)), wanted_index(E, problem.index_dtype == FP8)]
    return found


def has_fp8_teacher(problem: Problem) -> bool:
    """Whether the teacher's scores are formed from e4m3: "sum_logits" sums queries of heads, in a wider dtype."""
    return problem.teacher_dtype is not None and problem.target == "mean"


class TeacherRows(NamedTuple):
    """A chunk's queries in e4m3, [rows, H, D], all keys, [S, G, D], and their scales, flat; the keys' by head."""

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor


class Fp8Teacher:
    """q and k in e4m3, rotated before unless they are handed over so: `scores` and `lse`."""

    def __init__(self, problem: Problem) -> None:
        self.scale, self.rotation = problem.softmax_scale, problem.teacher_dtype == FP8
        self.q, self.q_scale = launch.aligned(problem.q), problem.q_scale
        self.given_keys = launch.aligned(problem.k), problem.k_scale
        self.keys: tuple[Tensor, Tensor] | None = None

    def traffic(self, rows: slice) -> int:
        """Bytes of bfloat16 that `quantised` reads for these rows, and half as many that it writes."""
        k, k_scale = self.given_keys
        queries = (rows.stop - rows.start) * self.q[0].nbytes if self.q_scale is None else 0
        keys = k.nbytes if self.keys is None and k_scale is None else 0
        return (queries + keys) * 3 // 2

    def quantised(self, rows: slice) -> TeacherRows:
        """The rows in e4m3; the keys only the first time."""
        if self.keys is None:
            k, k_scale = self.given_keys
            if k.shape[2] in SHARED_KEY_SCALES:
                self.keys = quantize_keys(k, k_scale, rotation=self.rotation)
            elif k_scale is None:
                self.keys = quantize_rows(k, rotation=self.rotation, by_head=True)
            else:
                self.keys = k, scales_by_head(k_scale)
        if self.q_scale is None:
            return TeacherRows(*quantize_rows(self.q[rows], rotation=self.rotation), *self.keys)
        return TeacherRows(self.q[rows], self.q_scale[rows].reshape(-1), *self.keys)

    def scores(self, rows: TeacherRows, lse: Tensor, chunk: TileChunk, out: Tensor) -> None:
        """out[t,s] = sum_h exp(scale * q̂[t,h]·k̂[s,g(h)] - lse[t,h]) in the chunk's tiles; rows: the chunk's."""
        (count, H, D), (S, G), items = rows.q.shape, rows.k.shape[:2], chunk.score.numel() // 4
        low = lse[chunk.begin : chunk.end].reshape(-1)
        launch.load("score_fp8", D=D)(
            rows.q.view(count, -1), rows.k.view(S, -1), low, rows.q_scale, rows.k_scale, out, chunk.score,
            H, H // G, self.scale, chunk.begin, items, min(items, launch.processors(out.device)), padded_keys(S),
        )  # fmt: skip

    def lse(self, key_start: Tensor, key_end: Tensor) -> Tensor:
        """lse[t,h] = log sum over visible s of exp(scale * q̂[t,h]·k̂[s,g(h)]): float32 [T, H].

        All queries are quantised for it, and kept so for the scores.
        """
        T, H, D = self.q.shape
        lse = torch.empty(T, H, device=self.q.device)
        rows = self.quantised(slice(0, T))
        self.q, self.q_scale = rows.q, rows.q_scale.view(T, H)
        S, G = rows.k.shape[:2]
        grid = min(padded_keys(T) // 128 * H, launch.processors(self.q.device))
        launch.load("lse_fp8", D=D)(
            rows.q.view(T, -1), rows.k.view(S, -1), rows.q_scale, rows.k_scale.abs(), key_start, key_end, lse.view(-1),
            H, H // G, self.scale, grid, padded_keys(S),
        )  # fmt: skip
        return lse


class Fp8Index:
    """index_q and index_k in e4m3: `scores`."""

    def __init__(self, leaves: tuple[Tensor, Tensor, Tensor], index_dtype: str | None) -> None:
        self.rows = quantize_index(*leaves, rotation=index_dtype == FP8)

    def scores(self, chunk: TileChunk, out: Tensor, processors: int | None = None) -> None:
        """out[t,s] = sum_j w[t,j] * ReLU(index_q̂[t,j]·index_k̂[s]) in the chunk's tiles; processors: all or fewer."""
        (T, I, E), items = self.rows.q.shape, chunk.narrow.numel() // 4
        processors = processors or launch.processors(out.device)
        launch.load("score_narrow_fp8", E=E)(
            self.rows.q.view(T, -1), self.rows.k, self.rows.half_weights, self.rows.k_scale, out, chunk.narrow,
            I, 0, items, min(items, processors),
        )  # fmt: skip

    def share(self, chunk: TileChunk, traffic: int, processors: int) -> int:
        """Multiprocessors on which to form the chunk's scores while the others quantise, which passes so many bytes.

        Quantising waits for memory, and a third of the multiprocessors ask it for most of what it gives; scores take
        longer by what they lack. All multiprocessors where one after the other is as fast: for little traffic.
        """
        if traffic < TURNING * MEMORY:
            return processors
        items = chunk.narrow.numel() // 4
        operations = 2 * chunk.tiles * TILE**2 * self.rows.q[0].numel() / items  # of an item

        def both(n: int) -> float:
            scores = -(-items // n) * operations / SCORES
            return scores + max(traffic - scores * min((processors - n) * TRAFFIC, MEMORY), 0) / MEMORY

        best = min(range(processors // 2, processors + 1), key=both)
        return best if both(best) + TURNING < both(processors) else processors
