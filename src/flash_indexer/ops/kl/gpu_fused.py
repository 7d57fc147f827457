"""KL and gradients of a chunk from what its scores leave: no logit is formed again, no row of scores read twice.

    gpu_body.teacher_scores    scores, and of each row of a tile the sum over the keys that it sees
    gpu_body.index_scores      scores, the rows' maxima and sums of exponentials, and masks [logit > 0]
    gradients                  KL, entropy, di, d_index_q and d_index_w in one kernel; d_index_k from the masks

For one process: a rank's sums of rows are of its own heads, and not those of all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import MASK_WORDS, NARROW_STAGES
from flash_indexer.ops import launch
from flash_indexer.ops.blockwise import compute_dtype
from flash_indexer.ops.kl import gpu_body
from flash_indexer.ops.kl.gpu_fp8 import has_fp8_teacher
from flash_indexer.ops.kl.plan import Plan, TileChunk
from flash_indexer.ops.problem import Problem
from flash_indexer.ops.worklists import TILE


def takes(problem: Problem, world: int) -> bool:
    """Whether the problem's scores come from the kernel that leaves something, and what it leaves is wanted."""
    narrow = problem.q.shape[2] in NARROW_STAGES and problem.index_q.shape[2] in NARROW_STAGES
    wide = problem.index_dtype is None and not has_fp8_teacher(problem)
    return world == 1 and problem.target == "mean" and any(problem.needs) and narrow and wide


class Left(NamedTuple):
    """Of the rows of a chunk's tiles: the teacher's sums [n], the indexer's maxima and sums of exponentials [n, 2],
    masks [n // 16 * padded heads, MASK_WORDS] int32. scaled: w·index_q of the chunk's tokens, [rows, E]."""

    sums: Tensor
    tops: Tensor
    masks: Tensor
    scaled: Tensor

    def of(self, tiles: int) -> Left:
        """The first `tiles` score tiles'."""
        rows = tiles * TILE
        return self._replace(sums=self.sums[:rows], tops=self.tops[:rows])


def new_left(work: Plan, index_q: Tensor) -> Left:
    """Memory for any chunk of the plan."""
    I, E = index_q.shape[1:]
    padded = gpu_body.padded_heads(I)
    tiles = max((chunk.tiles for chunk in work.chunks), default=0)
    tokens = max((chunk.end - chunk.begin for chunk in work.chunks), default=0)
    sums = torch.empty(tiles * TILE, dtype=compute_dtype(index_q), device=index_q.device)
    return Left(
        sums,
        sums.new_empty(tiles * TILE, 2),
        torch.empty(tiles * TILE // 16 * padded, MASK_WORDS, dtype=torch.int32, device=index_q.device),
        index_q.new_empty(-(-tokens * padded // TILE) * TILE, E),
    )


class Outputs(NamedTuple):
    """di of the chunk's tiles, kl [T], entropy [T], and the gradients."""

    di: Tensor
    kl: Tensor
    entropy: Tensor
    gradients: gpu_body.IndexGradients


def gradients(
    scores: tuple[Tensor, Tensor],
    left: Left,
    leaves: tuple[Tensor, Tensor, Tensor],
    work: Plan,
    chunk: TileChunk,
    rows: gpu_body.Rows,
    out: Outputs,
) -> None:
    """What `gpu_body.kl_rows` and `gpu_body.index_gradients` make of the teacher's scores and the indexer's.

    The numbers of tiles of scores, left and di are alike.
    """
    (T, I, E), padded = leaves[0].shape, gpu_body.padded_heads(leaves[0].shape[1])
    queries, weights, base = gpu_body.padded_queries(leaves[0], leaves[2], chunk)
    if not work.complete:  # tokens of no item
        out.di.zero_()
        left.scaled.zero_()
    items = chunk.gradients.query
    count = items.numel() // 4
    launch.load("kl_gradients", E=E, IP=padded)(
        queries, leaves[1], weights, *scores, left.tops, left.sums, left.masks, work.blocks, *rows, out.di,
        out.gradients.index_q.view(-1, E), out.gradients.weights.view(-1), left.scaled, out.kl, out.entropy, items,
        I, base, T, count, min(count, launch.processors(out.di.device)), chunk.begin,
    )  # fmt: skip
    if out.gradients.index_k is not None:
        others = left.masks[4096 // 16 :] if padded > 32 else left.masks
        masks = gpu_body.Masks(left.masks, others, padded, padded)
        gpu_body.key_gradient(out.gradients.index_k, left.scaled, out.di, masks, work, chunk, T)
