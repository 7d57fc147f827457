"""The indexer at the selected keys by kernels: KL of each row, and the gradients. See `torch_index`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import GATHERED_INDEX_WIDTHS, INDEX_TABLE_KEYS, MAX_INDEX_HEADS
from flash_indexer.ops import launch
from flash_indexer.ops.sparse import gpu_index_tiles
from flash_indexer.ops.sparse.problem import Leaves
from flash_indexer.ops.sparse.selection import Selection
from flash_indexer.ops.worklists import TILE

_WANTS_QUERY, _WANTS_KEY = 1, 2
_DENSE_PRODUCT, _DENSE_PAIR = 9.2e-6, 5e-3  # ns of a pair: for each head and column, and beside them
_LISTS = 3e5  # ns of making the lists of dense tiles: some 60 small launches
_SLOT, _SUM = 0.04, 1.64e-3  # ns of a slot with sums in integers: beside the additions, and for each column
_SLOT_ANY_ORDER, _SUM_ANY_ORDER = 0.003, 1.4e-3  # the same of float32 additions in any order
_TABLE_TOKENS = 32  # that a block of `sparse_index_table` takes at a time
_FINISH = 1024  # numbers that a block of `sparse_index_finish` takes


def refusal(leaves: Leaves) -> str | None:
    """Why `index_scores` and `index_gradients` can't take an indexer; None where they can."""
    I, E = leaves[0].shape[1:]
    if E not in GATHERED_INDEX_WIDTHS:
        widths = sorted(GATHERED_INDEX_WIDTHS)
        return f"index_q has kernels for E in {widths}, got E={E}; zero-pad it and index_k: the products stay the same"
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


class Tiles(NamedTuple):
    """How many dense tiles hold what a selection's queries select, on the host once `known` has come."""

    number: Tensor
    known: torch.Event


@torch.no_grad()
def count_tiles(leaves: Leaves, selection: Selection, deterministic: bool) -> Tiles | None:
    """For `index_gradients`; None where the number changes nothing. To be called before other work for the GPU, so that
    the host waits for what came before that work, not for the work."""
    (T, S), K = (len(x) for x in leaves[:2]), selection.indices.shape[1]
    if not (T and S and K) or dense_is_faster(_most_tiles(T, S), leaves, K, deterministic):
        return None
    if gathering_time(leaves, K, deterministic) <= _LISTS:
        return None
    with torch.cuda.device(selection.count.device):
        tiles = gpu_index_tiles.spans(selection, S, TILE)
        return Tiles(*launch.on_its_way((tiles.end - tiles.first).sum()))


def _most_tiles(T: int, S: int) -> int:
    return -(-T // TILE) * -(-S // TILE)


@torch.no_grad()
def index_gradients(
    di: Tensor,
    leaves: Leaves,
    selection: Selection,
    needs: tuple[bool, bool, bool],
    d_index_k: Tensor | None,
    deterministic: bool,
    workspace_bytes: int,
    tiles: Tiles | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """See `torch_index.index_gradients`. The same bits every time, but for d_index_k of gathered tiles where
    deterministic is False.

    From gathered tiles or from dense ones (`gpu_index_tiles`), whichever takes less time by `dense_is_faster`.

    tiles: what `count_tiles` returned for this selection. None: as many as a selection can have are counted on, for to
    ask now the host would wait for the GPU, and the GPU for the lists that the host makes then.
    """
    index_q, index_k, weights = map(launch.aligned, leaves)
    leaves = index_q, index_k, weights
    T, S, K = index_q.shape[0], index_k.shape[0], di.shape[1]
    with torch.cuda.device(di.device):
        queries = (torch.empty_like(index_q), torch.empty_like(weights)) if needs[0] or needs[2] else (None, None)
        out = queries[0], d_index_k if needs[1] else None, queries[1]
        selection = Selection(selection.indices.contiguous(), selection.count.contiguous(), selection.scores)
        if not (T and S and K):
            for x in queries:
                if x is not None:
                    x.zero_()
        elif any(x is not None for x in out):
            number = _most_tiles(T, S)
            if tiles is not None:
                tiles.known.synchronize()
                number = int(tiles.number)
            if dense_is_faster(number, leaves, K, deterministic):
                gpu_index_tiles.index_gradients(di.contiguous(), leaves, selection, out, workspace_bytes)
            else:
                gathered_gradients(di.contiguous(), leaves, selection, out, exact=deterministic)
    return out[0] if needs[0] else None, out[2] if needs[2] else None


def dense_is_faster(tiles: int, leaves: Leaves, K: int, deterministic: bool) -> bool:
    """Whether dense tiles, so many of 128 tokens by 128 keys, take less time than gathering T * K keys.

    Dense tiles take four products of every pair at the tensor cores' rate and two bytes of di; gathering is bound by
    additions to d_index_k, of E numbers a slot. Nanoseconds of an H100, docs/kernels-sparse.md.
    """
    I, E = leaves[0].shape[1:]
    pairs = tiles * TILE * TILE
    time = pairs * (gpu_index_tiles.padded_heads(I) * E * _DENSE_PRODUCT + _DENSE_PAIR) + _LISTS
    return time < gathering_time(leaves, K, deterministic)


def gathering_time(leaves: Leaves, K: int, deterministic: bool) -> float:
    """Nanoseconds of gathering K keys a query, with d_index_k."""
    T, _, E = leaves[0].shape
    slot, number = (_SLOT, _SUM) if deterministic else (_SLOT_ANY_ORDER, _SUM_ANY_ORDER)
    return T * K * (slot + E * number)


def gathered_gradients(
    di: Tensor,
    leaves: Leaves,
    selection: Selection,
    out: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    exact: bool,
) -> None:
    """As `gpu_index_tiles.index_gradients`. exact: d_index_k's sum in integers, and 8 bytes a key, beside the results;
    otherwise additions in any order.
    """
    (index_q, index_k, weights), d_index_k = leaves, out[1]
    (T, I, E), S, K = index_q.shape, index_k.shape[0], di.shape[1]
    rows = index_q.view(T * I, E), index_k, weights.view(-1)
    slots = di.view(-1), selection.indices.view(-1), selection.count
    exact = exact and d_index_k is not None
    sums = _KeySums.new(rows, slots, (S, E, I, K)) if exact else _KeySums.none(index_k, d_index_k)
    # where these are not wanted, something that is not written
    d_index_q, d_weights = (x if y is None else y for x, y in ((index_q, out[0]), (weights, out[2])))
    wants = _WANTS_QUERY * (out[0] is not None) + _WANTS_KEY * (d_index_k is not None)
    launch.load("sparse_index_gradients", E=E, exact=int(exact))(
        *rows, *slots, sums.bound, sums.most, d_index_q.view(-1, E), d_weights.view(-1), sums.total, T, I, S, K,
        sums.bits, wants, min(T, launch.processors(di.device)),
    )  # fmt: skip
    if exact and d_index_k is not None:
        sums.add_to(d_index_k)


class _KeySums(NamedTuple):
    """d_index_k as integers, total [S * E], in units of each row's scale, of which bound, most [S] and bits tell."""

    total: Tensor
    bound: Tensor
    most: Tensor
    bits: int

    @staticmethod
    def new(
        rows: tuple[Tensor, Tensor, Tensor], slots: tuple[Tensor, Tensor, Tensor], sizes: tuple[int, int, int, int]
    ) -> _KeySums:
        """Zeros, with their scales: rows are index_q, index_k and weights, slots di, indices and count."""
        (index_q, _, weights), (di, indices, count), (S, E, I, K) = rows, slots, sizes
        zeros = torch.zeros(S * E + 2 * S, dtype=torch.int32, device=di.device)
        total, bound, most = torch.split(zeros, [S * E, S, S])
        T, largest = len(count), torch.empty(len(count), device=di.device)
        sums = _KeySums(total, bound, most.view(torch.float32), 30 - T.bit_length())
        launch.load("sparse_index_largest", E=E)(index_q, weights, largest, I)
        runs = -(-S // INDEX_TABLE_KEYS)
        parts = max(1, min(launch.processors(di.device) // runs, -(-T // _TABLE_TOKENS)))
        for step in (0, 1):
            launch.load("sparse_index_table", sum=step)(
                di, indices, count, largest, sums.most, bound, K, sums.bits, runs, parts
            )
        return sums

    @staticmethod
    def none(like: Tensor, d_index_k: Tensor | None) -> _KeySums:
        """Of a call that makes no integers: d_index_k's own float32, or where that is not wanted what nobody reads."""
        unread = torch.empty(1, dtype=torch.int32, device=like.device)
        total = unread if d_index_k is None else d_index_k.view(torch.int32).view(-1)
        return _KeySums(total, unread, unread.view(torch.float32), 0)

    def add_to(self, out: Tensor) -> None:
        """out [S, E] += the sums, in float32."""
        S, E = out.shape
        blocks = -(-S * E // _FINISH)
        launch.load("sparse_index_finish", E=E)(self.total, self.bound, self.most, out, self.bits, blocks)
