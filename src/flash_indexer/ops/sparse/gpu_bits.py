"""Attention over selected keys on the GPU, in bit form: dense tiles with a bit per (query, key), empty ones skipped.

For models with several key heads, and for narrow heads: gathering would read a query's keys once for each key head,
and few query heads share them. `forward`, `target` and `backward` are steps as `stages` describes them, for the
problems that `refusal` lets pass; all are the same to the bit in every run, and none waits for the GPU but for p_sum.

A key of which a number, in k or v of any key head, is NaN or infinite makes NaN of all results of the queries that
selected it, and has no part in others. A q or d_out that is not finite makes NaN of the gradients of keys in its tiles.

Shape legend: T queries, S keys, K slots of a query, H heads, G key heads; W the width that all rows are filled up to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import (
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
    if problem.k.shape[0] > BITS_MAX_KEYS:
        return (
            f"attention over selected keys in tiles takes up to {BITS_MAX_KEYS} keys, got "
            f"S={problem.k.shape[0]}; pack fewer documents together"
        )
    if not problem.softmax_scale > 0:
        return f"attention over selected keys takes a positive softmax_scale, got {problem.softmax_scale}"
    return None


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
    (T, H, D), (S, G, _) = problem.q.shape, problem.k.shape
    with torch.cuda.device(d_out.device):
        keys, W = _keys(problem), _width(problem)
        q, d_out, out = (_filled(x, W) for x in (problem.q, d_out, out))
        dq = torch.empty_like(q) if needs.q else None
        p_sum = torch.empty(problem.selection.indices.shape, device=q.device) if needs.p_sum else None
        for rows in row_runs(T, S, problem.workspace_bytes):
            selected = problem.rows(rows)
            bits = make_bits(selected.selection, keys)
            head_sums = _HeadSums(selected, bits) if p_sum is not None else None
            numbers = torch.empty(H * bits.rows * 2, device=q.device)
            launch.load("bits_numbers", D=W)(
                out[rows].view(-1, W), d_out[rows].view(-1, W), lse[rows].reshape(-1), numbers, rows.stop - rows.start,
                H, bits.rows,
            )  # fmt: skip
            operands = (
                *(x[rows].view(-1, H * W) for x in (q, d_out)), *(x.view(S, G * W) for x in (keys.k, keys.v)), numbers
            )  # fmt: skip
            if dq is not None:
                found, tiles = bits.of_queries(BITS_QUERY[W])
                launch.load("bits_gradients_query", D=W, N=BITS_QUERY[W])(
                    *operands, bits.bits, found, dq[rows].view(-1, H * W), H, H // G, bits.rows, bits.rows // TILE,
                    tiles, problem.softmax_scale,
                )  # fmt: skip
            if needs.k or needs.v:
                _add_key_gradients(selected, operands, bits, sums)
            if head_sums is not None and p_sum is not None:
                head_sums.write(lse[rows], p_sum[rows])
    return None if dq is None else dq[..., :D].contiguous(), p_sum


def _forward(problem: SparseProblem, keys: Keys) -> tuple[Tensor, Tensor]:
    (T, H, _), (S, G, W) = problem.q.shape, keys.k.shape
    q = _filled(problem.q, W)
    out, lse = torch.empty_like(q), torch.empty(T, H, device=q.device)
    for rows in row_runs(T, S, problem.workspace_bytes):
        bits = make_bits(problem.selection.rows(rows), keys)
        found, tiles = bits.of_queries(BITS_ATTENTION[W])
        launch.load("bits_attention", D=W, N=BITS_ATTENTION[W])(
            q[rows].view(-1, H * W), keys.k.view(S, G * W), keys.v.view(S, G * W), bits.bits, found, bits.bad,
            out[rows].view(-1, H * W), lse[rows].view(-1), H, H // G, bits.rows, bits.rows // TILE, tiles,
            problem.softmax_scale * _LOG2E,
        )  # fmt: skip
    return out[..., : problem.value_dim].contiguous(), lse


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
        self.counts, self.known = _on_its_way(self.occupied.sum(1))

    def write(self, lse: Tensor, p_sum: Tensor) -> None:
        """p_sum [T, K], contiguous; lse [T, H]."""
        W = _width(self.problem)
        q, k = (_filled(x, W) for x in (self.problem.q, self.problem.k))
        (indices, count, _), (T, K), tiles = self.problem.selection, p_sum.shape, self.occupied.shape[1]
        (S, G, _), H, lse = k.shape, q.shape[1], lse.contiguous()
        step = max(1, self.problem.workspace_bytes // (tiles * _TILE_BYTES))
        self.known.synchronize()
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
            scores = torch.empty(number * TILE, TILE, device=q.device)
            launch.load("score", D=W, mode=EXP)(
                q[rows].view(-1, H * W), k.view(S, G * W), lse[rows].view(-1), scores, items.view(-1), H, H // G,
                self.problem.softmax_scale, 0, number, min(number, launch.processors(q.device)),
            )  # fmt: skip
            launch.load("bits_slots")(
                scores, place, as_int32(indices[rows], S), as_int32(count[rows], K), p_sum[rows].view(-1), K, S, tiles,
                -(-K // _SLOTS),
            )  # fmt: skip


def _on_its_way(x: Tensor) -> tuple[Tensor, torch.Event]:
    """x on the host, once the event has come."""
    here = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    here.copy_(x, non_blocking=True)
    known = torch.Event("cuda")
    known.record()
    return here, known


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
