"""The problems that the sparse stage is measured on: sizes, selections, tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_indexer.ops import Selection, SparseProblem
from flash_indexer.ops.blockwise import compute_dtype

RANDOM, CAUSAL, CLUSTERED = "random", "causal", "clustered"
RUN, NEIGHBOURS = 16, 64  # of a clustered selection: keys of a run, queries that share their runs
LATE = 512  # last queries of a long sequence, few enough for the torch body to run beside the kernels


@dataclass(frozen=True)
class SparseSize:
    """The last T of S positions ask; each selects K keys.

    V: below D where the values are the first V columns of the keys (MLA absorbed). selection: RANDOM keys among those
    visible; CAUSAL, the same where T = S, so that early rows are not full; CLUSTERED, half of them the most recent, the
    rest in runs of 16 keys that 64 neighbouring queries share.
    """

    H: int
    G: int
    D: int
    V: int
    I: int
    E: int
    T: int
    S: int
    K: int
    selection: str = RANDOM

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs, of which the selection ranks each."""
        first = self.S - self.T
        return self.T * first + self.T * (self.T + 1) // 2


SIZES = {
    "v32": SparseSize(128, 1, 576, 512, 64, 128, 8192, 16384, 2048),
    "v32_causal": SparseSize(128, 1, 576, 512, 64, 128, 8192, 8192, 2048, CAUSAL),
    "v32_clustered": SparseSize(128, 1, 576, 512, 64, 128, 8192, 16384, 2048, CLUSTERED),
    "v32_128k": SparseSize(128, 1, 576, 512, 64, 128, 8192, 131072, 2048),
    "v32_64_heads": SparseSize(64, 1, 576, 512, 64, 128, 8192, 16384, 2048),
    "gqa32": SparseSize(32, 8, 128, 128, 16, 64, 8192, 8192, 2048, CAUSAL),
    "gqa32_clustered": SparseSize(32, 8, 128, 128, 16, 64, 8192, 8192, 2048, CLUSTERED),
    "smollm2": SparseSize(9, 3, 64, 64, 8, 64, 8192, 8192, 2048, CAUSAL),
    "smollm2_clustered": SparseSize(9, 3, 64, 64, 8, 64, 8192, 8192, 2048, CLUSTERED),
    "gqa32_late_16k": SparseSize(32, 8, 128, 128, 16, 64, LATE, 16384, 2048),
    "gqa32_late_128k": SparseSize(32, 8, 128, 128, 16, 64, LATE, 131072, 2048),
    "mqa64_late_16k": SparseSize(64, 1, 128, 128, 16, 64, LATE, 16384, 2048),
    "mqa64_late_128k": SparseSize(64, 1, 128, 128, 16, 64, LATE, 131072, 2048),
}


class Tensors(NamedTuple):
    """Of a `SparseSize`, random. selection: the one that attention and learning are measured on."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    d_out: Tensor
    index_q: Tensor
    index_k: Tensor
    index_weights: Tensor
    key_start: Tensor
    key_end: Tensor
    selection: Selection

    def problem(self, size: SparseSize, *, deterministic: bool = True, workspace_bytes: int = 2**29) -> SparseProblem:
        """The attention over the selected keys."""
        scale = size.D**-0.5
        return SparseProblem(self.q, self.k, self.v, self.selection, scale, size.V, deterministic, workspace_bytes)

    @property
    def values(self) -> Tensor:
        """v; the keys where they hold the values."""
        return self.k if self.v is None else self.v

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """index_q, index_k, index_weights."""
        return self.index_q, self.index_k, self.index_weights


def make(size: SparseSize, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Random tensors, and a selection as the size says. Scores of the selection are those of the index tensors."""
    generator = torch.Generator(device).manual_seed(0)
    fixed: dict[str, Any] = dict(generator=generator, device=device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, **fixed).to(dtype)

    T, S = size.T, size.S
    q, k = normal(T, size.H, size.D), normal(S, size.G, size.D)
    v = None if size.V < size.D else normal(S, size.G, size.V)
    index_q, index_k = normal(T, size.I, size.E), normal(S, size.E)
    weights = torch.randn((T, size.I), **fixed).to(compute_dtype(q)) * (size.I * size.E) ** -0.5
    key_end = torch.arange(S - T + 1, S + 1, dtype=torch.int32, device=device)
    key_start = torch.zeros_like(key_end)
    indices, count = _keys(size, key_end, generator)
    scores = _scores(index_q, index_k, weights, indices, count)
    d_out = normal(T, size.H, size.V)
    return Tensors(
        q, k, v, d_out, index_q, index_k, weights, key_start, key_end, Selection(indices, count, scores)
    )  # fmt: skip


def _keys(size: SparseSize, key_end: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """indices [T, K], ascending, -1 behind the last, and count [T]."""
    K = min(size.K, size.S)
    indices = torch.full((size.T, K), -1, dtype=torch.int32, device=key_end.device)
    for start in range(0, size.T, 256):
        ends = key_end[start : start + 256, None].long()
        positions = torch.arange(size.S, device=key_end.device)
        rank = torch.rand((len(ends), size.S), generator=generator, device=key_end.device)
        if size.selection == CLUSTERED:
            runs = rank[::NEIGHBOURS, : -(-size.S // RUN)].repeat_interleave(RUN, 1)[:, : size.S]
            rank = runs.repeat_interleave(NEIGHBOURS, 0)[: len(ends)].masked_fill(positions >= ends - K // 2, 2.0)
        rank = rank.masked_fill(positions >= ends, -1.0)
        best = rank.topk(K, -1)
        keys = best.indices.masked_fill(best.values < 0, size.S).sort(-1).values
        indices[start : start + 256] = keys.masked_fill(keys == size.S, -1)
    return indices, (indices >= 0).sum(-1, dtype=torch.int32)


def _scores(index_q: Tensor, index_k: Tensor, weights: Tensor, indices: Tensor, count: Tensor) -> Tensor:
    """i[t,s] at the selected keys in the weights' dtype, -inf behind them."""
    scores = weights.new_empty(indices.shape)
    for rows in (slice(n, n + 64) for n in range(0, len(indices), 64)):
        keys = index_k[indices[rows].clamp_min(0).long()].to(weights.dtype)
        logits = torch.einsum("tje,tke->tjk", index_q[rows].to(weights.dtype), keys).relu()
        scores[rows] = torch.einsum("tj,tjk->tk", weights[rows], logits)
    return scores.masked_fill(torch.arange(indices.shape[1], device=count.device) >= count[:, None], -torch.inf)
