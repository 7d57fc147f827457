"""The indexer at the selected keys by kernels: KL of each row, and the gradients. See `torch_index`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import INDEX_WIDTHS, MAX_INDEX_HEADS
from flash_indexer.ops import launch
from flash_indexer.ops.sparse.problem import Leaves
from flash_indexer.ops.sparse.selection import Selection

_WANTS_QUERY, _WANTS_KEY = 1, 2
_FINISH = 1024  # numbers that a block of `sparse_index_finish` takes


def refusal(leaves: Leaves) -> str | None:
    """Why `index_scores` and `index_gradients` don't take an indexer; None where they do."""
    I, E = leaves[0].shape[1:]
    if E not in INDEX_WIDTHS:
        choice = ", ".join(map(str, INDEX_WIDTHS))
        return (
            f"index_q must have E in {{{choice}}} on CUDA, got E={E}; zero-pad the last dimension of index_q and "
            "index_k to the next of these (the products stay the same)"
        )
    if not 1 <= I <= MAX_INDEX_HEADS:
        return f"index_q must have 1 to {MAX_INDEX_HEADS} heads (I) on CUDA, got I={I}"
    return None


@torch.no_grad()
def index_scores(leaves: Leaves, selection: Selection, workspace_bytes: int) -> Tensor:
    """i[t,s] at the selected keys, -inf behind them: [T, K]."""
    index_q, index_k, weights = map(launch.aligned, leaves)
    (T, I, E), S, K = index_q.shape, index_k.shape[0], selection.indices.shape[1]
    out = torch.full((T, K), -torch.inf, device=index_q.device)
    if T and S and K:
        with torch.cuda.device(index_q.device):
            launch.load("sparse_index_scores", E=E)(
                index_q.view(T * I, E), index_k, weights.view(-1), selection.indices.contiguous().view(-1),
                selection.count.contiguous(), out.view(-1), T, I, S, K, min(T, launch.processors(index_q.device)),
            )  # fmt: skip
    return out


@torch.no_grad()
def kl_rows(p_sum: Tensor, scores: Tensor, count: Tensor, token_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL [T], the target's entropy [T] and di [T, K]; slots behind a row's count are not read, and di is 0 there.

    A row without keys has KL 0. A row whose every p_sum is 0, because of an lse that is not its own, is NaN.
    """
    T, K = p_sum.shape
    kl, entropy = (torch.zeros(T, device=p_sum.device) for _ in range(2))
    di = torch.empty(T, K, device=p_sum.device)
    if di.numel():
        with torch.cuda.device(p_sum.device):
            p_sum, scores = launch.aligned(p_sum).view(-1), launch.aligned(scores).view(-1)
            launch.load("sparse_rows")(
                p_sum, scores, count.contiguous(), token_weight.contiguous(), di.view(-1), kl, entropy, K
            )
    return kl, entropy, di


@torch.no_grad()
def index_gradients(
    di: Tensor,
    leaves: Leaves,
    selection: Selection,
    needs: tuple[bool, bool, bool],
    d_index_k: Tensor | None,
    deterministic: bool,
    workspace_bytes: int,
) -> tuple[Tensor | None, Tensor | None]:
    """See `torch_index.index_gradients`. The same bits every time, whether asked for or not.

    Beside the results it holds an integer sum of as many numbers as d_index_k, and 8 bytes a key.
    """
    index_q, index_k, weights = map(launch.aligned, leaves)
    (T, I, E), S, K = index_q.shape, index_k.shape[0], di.shape[1]
    want_query, want_key = needs[0] or needs[2], needs[1] and d_index_k is not None
    d_index_q, d_weights = torch.empty_like(index_q), torch.empty_like(weights)
    if not (T and S and K):
        d_index_q.zero_(), d_weights.zero_()
    elif want_query or want_key:
        with torch.cuda.device(di.device):
            rows = index_q.view(T * I, E), index_k, weights.view(-1)
            slots = di.contiguous().view(-1), selection.indices.contiguous().view(-1), selection.count.contiguous()
            sizes = S, E, I, K
            sums = _KeySums.new(rows, slots, sizes) if want_key else _KeySums.none(index_k)
            launch.load("sparse_index_gradients", E=E)(
                *rows, *slots, sums.bound, sums.most, d_index_q.view(T * I, E), d_weights.view(-1), sums.total, T, I,
                S, K, _WANTS_QUERY * want_query + _WANTS_KEY * want_key, min(T, launch.processors(di.device)),
            )  # fmt: skip
            if want_key and d_index_k is not None:
                sums.add_to(d_index_k)
    return d_index_q if needs[0] else None, d_weights if needs[2] else None


class _KeySums(NamedTuple):
    """d_index_k as integers, total [S * E], in units of each row's scale, which its bound [S] and `most` [1] tell."""

    total: Tensor
    bound: Tensor
    most: Tensor

    @staticmethod
    def new(
        rows: tuple[Tensor, Tensor, Tensor], slots: tuple[Tensor, Tensor, Tensor], sizes: tuple[int, int, int, int]
    ) -> _KeySums:
        """Zeros, with their scales: rows are index_q, index_k and weights, slots di, indices and count."""
        (index_q, _, weights), (di, indices, count), (S, E, I, K) = rows, slots, sizes
        total = torch.zeros(S * E, dtype=torch.int32, device=di.device)
        bound = torch.zeros(S, dtype=torch.int64, device=di.device)
        most, largest = torch.zeros(1, device=di.device), torch.empty(len(count), device=di.device)
        launch.load("sparse_index_largest", E=E)(index_q, weights, di, count, largest, most, I, K)
        launch.load("sparse_index_bounds")(di, indices, count, largest, most, bound, S, K)
        return _KeySums(total, bound, most)

    @staticmethod
    def none(like: Tensor) -> _KeySums:
        """Of a call that makes no sums: nobody reads them."""
        total, bound = (torch.empty(1, dtype=dtype, device=like.device) for dtype in (torch.int32, torch.int64))
        return _KeySums(total, bound, torch.zeros(1, device=like.device))

    def add_to(self, out: Tensor) -> None:
        """out [S, E] += the sums, in float32."""
        S, E = out.shape
        blocks = -(-S * E // _FINISH)
        launch.load("sparse_index_finish", E=E)(self.total, self.bound, self.most, out, S, blocks)
