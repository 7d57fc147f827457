"""Attention over selected keys on the GPU, in bit form: dense tiles with a bit per (query, key), empty ones skipped.

For models with several key heads, and for narrow heads: gathering would read a query's keys once for each key head,
and few query heads share them. `forward`, `target` and `backward` are steps as `stages` describes them, for the
problems that `refusal` lets pass; all are the same to the bit in every run, and none waits for the GPU but for p_sum.

A key of which a number, in k or v of any key head, is NaN or infinite makes NaN of all results of the queries that
selected it, and has no part in others. A q or d_out that is not finite makes NaN of the gradients of keys in its tiles.

Shape legend: T queries, S keys, K slots of a query, H heads, G key heads; W the width that all rows are filled up to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import (
    BITS_ALL_KEYS,
    BITS_ATTENTION,
    BITS_KEY,
    BITS_MAX_KEYS,
    BITS_QUERY,
    BITS_WIDTHS,
    EXP,
    MAX_HEADS,
)
from flash_indexer.ops import launch
from flash_indexer.ops.sparse import torch_attention
from flash_indexer.ops.sparse.bit_tables import TILE, Bits, Keys, as_int32, make_bits, make_keys, row_runs
from flash_indexer.ops.sparse.problem import KeySums, Needs, SparseProblem

_LOG2E = 1.4426950408889634
_TILE_BYTES = TILE * TILE * 4  # of scores summed over heads
_SLOTS = 1024  # of a thread block that gathers them
_MOST_NUMBERS = 2**31  # of all keys, that int32 can count
_PAIR = 5e-3  # ns of a query and a key in a tile, for each head, forward and backward with the target
_GATHERED, _GATHERED_HEAD = 16.0, 0.15  # ns of a query and a key that torch gathers, for each key head and each head
_CTAS = 2  # items of a processor, below which a key tile's queries are shared out


def refusal(problem: SparseProblem) -> str | None:
    """Why the kernels don't take a problem; None where they do."""
    q, widest = problem.q, BITS_WIDTHS[-1]
    if max(q.shape[2], problem.value_dim) > widest:
        return (
            f"attention over selected keys in tiles has kernels for D and V of 1 to {widest}, got D={q.shape[2]}, "
            f"V={problem.value_dim}"
        )
    if q.dtype != torch.bfloat16:
        return f"attention over selected keys has kernels for bfloat16, got {q.dtype}"
    if not 1 <= q.shape[1] <= MAX_HEADS:
        return f"attention over selected keys takes 1 to {MAX_HEADS} heads, got H={q.shape[1]}; split the heads"
    (S, G, _), K, W = problem.k.shape, problem.selection.indices.shape[1], _width(problem)
    if S * G * W >= _MOST_NUMBERS:
        return (
            f"attention over selected keys in tiles takes fewer than {_MOST_NUMBERS // W} rows of keys, got S={S}, "
            f"G={G}; split the heads"
        )
    if S > BITS_MAX_KEYS or (S > BITS_ALL_KEYS and not tiles_are_faster(S, K, q.shape[1], G)):
        return (
            f"attention over selected keys in tiles takes up to {BITS_ALL_KEYS} keys, and up to {BITS_MAX_KEYS} where "
            f"it is faster than gathering them, got S={S}, K={K}, H={q.shape[1]}, G={G}; pack fewer documents together"
        )
    if not problem.softmax_scale > 0:
        return f"attention over selected keys takes a positive softmax_scale, got {problem.softmax_scale}"
    return None


def tiles_are_faster(S: int, K: int, H: int, G: int) -> bool:
    """Whether visiting all tiles of S keys takes less time than gathering K keys in torch, a query, H heads on G.

    Nanoseconds of an H100 at D=V=128, docs/kernels.md: both grow with the width.
    """
    return S * H * _PAIR <= K * (G * _GATHERED + H * _GATHERED_HEAD)


def kernels(W: int) -> list[launch.Wanted]:
    """Every kernel of the three steps for rows of W columns."""
    width = dict(D=W)
    return [
        ("bits", {}), ("bits_keys", dict(W=W)), ("bits_lists", {}), ("bits_numbers", width), ("bits_slots", {}),
        ("bits_attention", width | dict(N=BITS_ATTENTION[W])), ("bits_gradients_query", width | dict(N=BITS_QUERY[W])),
        ("bits_gradients_key", width | dict(N=BITS_KEY[W])), ("score", width | dict(mode=EXP)),
    ]  # fmt: skip


def forward(problem: SparseProblem) -> tuple[Tensor, Tensor]:
    """out [T, H, V] in q's dtype and lse [T, H]: zeros and -inf for a query without keys, NaN where its scores are."""
    if not _has_tiles(problem):
        return torch_attention.forward(problem)
    with torch.cuda.device(problem.q.device):
        return _forward(problem, _keys(problem))


def target(problem: SparseProblem, lse: Tensor | None) -> Tensor:
    """p_sum[t,s] = sum_h a[t,h,s] at the selected keys, 0 behind them: float32 [T, K]. lse [T, H]; None computes it."""
    if not _has_tiles(problem):
        return torch_attention.target(problem, lse)
    p_sum = torch.empty(problem.selection.indices.shape, device=problem.q.device)
    with torch.cuda.device(problem.q.device):
        keys = _keys(problem)
        lse = _forward(problem, keys)[1] if lse is None else lse
        for rows in row_runs(len(p_sum), len(keys.k), problem.workspace_bytes):
            _HeadSums(problem.rows(rows), make_bits(problem.selection.rows(rows), keys)).write(lse[rows], p_sum[rows])
    return p_sum


def backward(
    problem: SparseProblem, d_out: Tensor, out: Tensor, lse: Tensor, needs: Needs, sums: KeySums
) -> tuple[Tensor | None, Tensor | None]:
    """dq [T, H, D] in q's dtype and p_sum [T, K], None where not wanted; dk and dv are added to `sums`."""
    if not _has_tiles(problem):
        return torch_attention.backward(problem, d_out, out, lse, needs, sums)
    (T, _, D), S = problem.q.shape, len(problem.k)
    with torch.cuda.device(d_out.device):
        keys, W = _keys(problem), _width(problem)
        q, d_out, out = (_filled(x, W) for x in (problem.q, d_out, out))
        dq = torch.empty_like(q) if needs.q else None
        p_sum = torch.empty(problem.selection.indices.shape, device=q.device) if needs.p_sum else None
        for rows in row_runs(T, S, problem.workspace_bytes):
            some = _Rows(problem.rows(rows), *(x[rows] for x in (q, d_out, out, lse)))
            _gradients(
                some, keys, None if dq is None else dq[rows], sums if needs.k or needs.v else None,
                None if p_sum is None else p_sum[rows],
            )  # fmt: skip
    return None if dq is None else dq[..., :D].contiguous(), p_sum


def _forward(problem: SparseProblem, keys: Keys) -> tuple[Tensor, Tensor]:
    (T, H, _), W = problem.q.shape, _width(problem)
    q = _filled(problem.q, W)
    out, lse = torch.empty_like(q), torch.empty(T, H, device=q.device)
    for rows in row_runs(T, len(keys.k), problem.workspace_bytes):
        _attention(problem.rows(rows), keys, q[rows], out[rows], lse[rows])
    return out[..., : problem.value_dim].contiguous(), lse


# What follows takes one run of rows, whose tables are gone before the next run has its own.


class _Rows(NamedTuple):
    """A run of rows: its problem, and q, d_out, out [T, H, W] filled up to W columns, and lse [T, H]."""

    problem: SparseProblem
    q: Tensor
    d_out: Tensor
    out: Tensor
    lse: Tensor


def _attention(problem: SparseProblem, keys: Keys, q: Tensor, out: Tensor, lse: Tensor) -> None:
    """out and lse are written; q and out as in `_Rows`."""
    H, (S, G, W) = q.shape[1], keys.k.shape
    bits = make_bits(problem.selection, keys)
    found, tiles = bits.of_queries(BITS_ATTENTION[W])
    launch.load("bits_attention", D=W, N=BITS_ATTENTION[W])(
        q.view(-1, H * W), keys.k.view(S, G * W), keys.v.view(S, G * W), bits.bits, found, bits.bad,
        out.view(-1, H * W), lse.view(-1), H, H // G, bits.rows, bits.rows // TILE, tiles,
        problem.softmax_scale * _LOG2E,
    )  # fmt: skip


def _gradients(some: _Rows, keys: Keys, dq: Tensor | None, sums: KeySums | None, p_sum: Tensor | None) -> None:
    """dq [T, H, W] and p_sum [T, K] are written, sums added to; None: not wanted."""
    (T, H, W), (S, G, _) = some.q.shape, keys.k.shape
    bits = make_bits(some.problem.selection, keys)
    head_sums = None if p_sum is None else _HeadSums(some.problem, bits)
    numbers = torch.empty(H * bits.rows * 2, device=some.q.device)
    launch.load("bits_numbers", D=W)(
        some.out.view(-1, W), some.d_out.view(-1, W), some.lse.reshape(-1), numbers, T, H, bits.rows
    )
    operands = (
        *(x.view(-1, H * W) for x in (some.q, some.d_out)), *(x.view(S, G * W) for x in (keys.k, keys.v)), numbers
    )  # fmt: skip
    if dq is not None:
        found, tiles = bits.of_queries(BITS_QUERY[W])
        launch.load("bits_gradients_query", D=W, N=BITS_QUERY[W])(
            *operands, bits.bits, found, dq.view(-1, H * W), H, H // G, bits.rows, bits.rows // TILE, tiles,
            some.problem.softmax_scale,
        )  # fmt: skip
    if sums is not None:
        _add_key_gradients(some.problem, operands, bits, sums)
    if head_sums is not None and p_sum is not None:
        del bits, operands, numbers  # the GPU is done with them when it comes to what is allocated next
        head_sums.write(some.lse, p_sum)


def _add_key_gradients(problem: SparseProblem, operands: tuple[Tensor, ...], bits: Bits, sums: KeySums) -> None:
    """sums.dk, sums.dv += those of these queries; without v both to sums.dk."""
    H, (S, G, D), V, W = problem.q.shape[1], problem.k.shape, problem.value_dim, _width(problem)
    device = operands[0].device
    found, tiles = bits.of_keys(BITS_KEY[W])
    key_tiles = found.numel() // (tiles + 1)
    most = max(1, problem.workspace_bytes // (8 * S * G * W))
    parts = max(1, min(most, -(-_CTAS * launch.processors(device) // (key_tiles * G)), tiles * H // G))
    targets = sums.dk, sums.dv if problem.v is not None else None
    # a sum is added to by the kernel itself, where one CTA alone has a key, and rows are as wide as the kernel's
    totals = [
        x if x is not None and parts == 1 and x.shape[2] == W and x.is_contiguous() and x.dtype == torch.float32
        else torch.zeros(parts, S, G, W, device=device)
        for x in targets
    ]  # fmt: skip
    launch.load("bits_gradients_key", D=W, N=BITS_KEY[W])(
        *operands, bits.turned, found, totals[0].view(-1), totals[1].view(-1), H, H // G, bits.rows, bits.words * 32,
        key_tiles, tiles, parts, problem.softmax_scale,
    )  # fmt: skip
    for x, total, width in zip(targets, totals, (D, V), strict=True):
        if x is not None and x is not total:
            x += total.sum(0)[..., :width]
    if problem.v is None and sums.dk is not None:
        sums.dk[..., :V] += totals[1].sum(0)[..., :V]


class _HeadSums:
    """p_sum of some queries, by the kernel that sums scores over heads, in the tiles that hold a bit.

    How many these are of each tile of queries is asked at once, and waited for where it is needed: meanwhile the GPU
    has other work.
    """

    def __init__(self, problem: SparseProblem, bits: Bits) -> None:
        self.problem, self.occupied = problem, bits.tiles()
        self.counts, self.known = launch.on_its_way(self.occupied.sum(1))

    def write(self, lse: Tensor, p_sum: Tensor) -> None:
        """p_sum [T, K], contiguous; lse [T, H]."""
        W = _width(self.problem)
        q, k = (_filled(x, W) for x in (self.problem.q, self.problem.k))
        (indices, count, _), (T, K), tiles = self.problem.selection, p_sum.shape, self.occupied.shape[1]
        (S, G, _), H, lse = k.shape, q.shape[1], lse.contiguous()
        step = max(1, self.problem.workspace_bytes // (tiles * _TILE_BYTES))
        self.known.synchronize()
        most = max(int(counts.sum()) for counts in torch.split(self.counts, step))
        room = torch.empty(most * TILE, TILE, device=q.device)
        for first in range(0, len(self.occupied), step):
            some, number = self.occupied[first : first + step], int(self.counts[first : first + step].sum())
            rows = slice(first * TILE, min((first + step) * TILE, T))
            if number == 0:
                p_sum[rows] = 0.0
                continue
            place = (some.flatten().cumsum(0) - 1).int()
            items = torch.zeros(number, 4, dtype=torch.int32, device=q.device)
            items[:, :2] = torch.nonzero_static(some, size=number) * TILE
            items[:, 2] = torch.arange(number, device=q.device)
            scores = room[: number * TILE]
            launch.load("score", D=W, mode=EXP)(
                q[rows].view(-1, H * W), k.view(S, G * W), lse[rows].view(-1), scores, items.view(-1), H, H // G,
                self.problem.softmax_scale, 0, number, min(number, launch.processors(q.device)),
            )  # fmt: skip
            launch.load("bits_slots")(
                scores, place, as_int32(indices[rows], S), as_int32(count[rows], K), p_sum[rows].view(-1), K, S, tiles,
                -(-K // _SLOTS),
            )  # fmt: skip


def _keys(problem: SparseProblem) -> Keys:
    """The first thing that each step needs; a process's first step has all kernels compiled, side by side."""
    launch.prepare(kernels(_width(problem)))
    return make_keys(problem.k, problem.v, problem.value_dim, _width(problem))


def _width(problem: SparseProblem) -> int:
    """Columns of the rows that kernels work on."""
    widest = max(problem.q.shape[2], problem.value_dim)
    return next(width for width in BITS_WIDTHS if width >= widest)


def _filled(x: Tensor, width: int) -> Tensor:
    return launch.aligned(x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])))


def _has_tiles(problem: SparseProblem) -> bool:
    return problem.selection.indices.numel() > 0 and problem.k.numel() > 0
