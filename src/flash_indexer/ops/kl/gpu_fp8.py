"""The teacher and the indexer in e4m3 on GPUs with kernels: what is quantised when, and the launches of their scores.

Keys are quantised once a call, the teacher's queries a chunk of rows at a time, or all for their logsumexp. The index
queries are quantised once, together with their rounded values in bfloat16, from which the gradients are formed by the
same kernels as ever.
"""

from __future__ import annotations

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


def kernels(problem: Problem) -> list[launch.Wanted]:
    """What the problem's e4m3 parts need compiled, in place of the scores of wider rows."""
    D, E = problem.q.shape[2], problem.index_q.shape[2]
    found: list[launch.Wanted] = []
    if has_fp8_teacher(problem):
        found.append(("score_fp8", dict(D=D)))
        if D in SHARED_KEY_SCALES:
            found.append(wanted_keys(D, problem.k_scale is not None))
        if problem.lse is None:
            found.append(("lse_fp8", dict(D=D)))
        if problem.q_scale is None:
            found.append(wanted(D))
    if problem.index_dtype is not None:
        rotation = problem.index_dtype == FP8
        found += [("score_narrow_fp8", dict(E=E)), wanted_index(E, rotation)]
        if rotation and any(problem.needs):
            found += [("rotate", dict(E=E, wide=wide)) for wide in (0, 1)]
    return found


def has_fp8_teacher(problem: Problem) -> bool:
    """Whether the teacher's scores are formed from e4m3: "sum_logits" sums queries of heads, in a wider dtype."""
    return problem.teacher_dtype == FP8 and problem.target == "mean"


class Fp8Teacher:
    """q and k in e4m3: `scores` and `lse`."""

    def __init__(self, problem: Problem) -> None:
        self.scale = problem.softmax_scale
        self.q, self.q_scale = launch.aligned(problem.q), problem.q_scale
        k = launch.aligned(problem.k)
        if k.shape[2] in SHARED_KEY_SCALES:
            self.k, self.k_scale = quantize_keys(k, problem.k_scale)
        elif problem.k_scale is None:
            self.k, self.k_scale = quantize_rows(k, by_head=True)
        else:
            self.k, self.k_scale = k, scales_by_head(problem.k_scale)

    def queries(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Their values and flat scales."""
        if self.q_scale is None:
            return quantize_rows(self.q[rows])
        return self.q[rows], self.q_scale[rows].reshape(-1)

    def scores(self, lse: Tensor, chunk: TileChunk, out: Tensor) -> None:
        """out[t,s] = sum_h exp(scale * q̂[t,h]·k̂[s,g(h)] - lse[t,h]) in the chunk's tiles."""
        rows = slice(chunk.begin, chunk.end)
        values, scale = self.queries(rows)
        (count, H, D), (S, G), items = values.shape, self.k.shape[:2], chunk.score.numel() // 4
        launch.load("score_fp8", D=D)(
            values.view(count, -1), self.k.view(S, -1), lse[rows].reshape(-1), scale, self.k_scale, out, chunk.score,
            H, H // G, self.scale, chunk.begin, items, min(items, launch.processors(out.device)), padded_keys(S),
        )  # fmt: skip

    def lse(self, key_start: Tensor, key_end: Tensor) -> Tensor:
        """lse[t,h] = log sum over visible s of exp(scale * q̂[t,h]·k̂[s,g(h)]): float32 [T, H].

        All queries are quantised for it, and kept so for the scores.
        """
        T, H, D = self.q.shape
        lse = torch.empty(T, H, device=self.q.device)
        values, scale = self.queries(slice(0, T))
        self.q, self.q_scale = values, scale.view(T, H)
        S, G = self.k.shape[:2]
        grid = min(padded_keys(T) // 128 * H, launch.processors(self.q.device))
        launch.load("lse_fp8", D=D)(
            values.view(T, -1), self.k.view(S, -1), scale, self.k_scale.abs(), key_start, key_end, lse.view(-1),
            H, H // G, self.scale, grid, padded_keys(S),
        )  # fmt: skip
        return lse


class Fp8Index:
    """index_q and index_k in e4m3: `scores`, and `leaves`, the same in bfloat16 with the weights, for the gradients."""

    def __init__(self, leaves: tuple[Tensor, Tensor, Tensor], index_dtype: str | None) -> None:
        self.rows = quantize_index(*leaves, rotation=index_dtype == FP8)
        self.leaves = self.rows.rounded_q, self.rows.rounded_k, leaves[2]

    def scores(self, chunk: TileChunk, out: Tensor) -> None:
        """out[t,s] = sum_j w[t,j] * ReLU(index_q̂[t,j]·index_k̂[s]) in the chunk's tiles."""
        (T, I, E), items = self.rows.q.shape, chunk.narrow.numel() // 4
        launch.load("score_narrow_fp8", E=E)(
            self.rows.q.view(T, -1), self.rows.k, self.rows.scaled_weights, self.rows.k_scale, out, chunk.narrow,
            I, 0, items, min(items, launch.processors(out.device)),
        )  # fmt: skip
