"""Attention over selected keys on the GPU, in bit form: dense tiles with a bit per (query, key), empty ones skipped.

For models with several key heads, and for narrow heads: gathering would read a query's keys once for each key head,
and few query heads share them. `forward`, `target` and `backward` are steps as `stages` describes them, for the
problems that `refusal` lets pass; all are the same to the bit in every run.

A value, key, query or gradient that is not finite would reach rows that it has no part in, multiplied by the zero of an
unselected key: such problems run in torch (one look at the sums of the tensors, which waits for the GPU).

Shape legend: T queries, S keys, K slots of a query, H heads, G key heads; W the width that all rows are filled up to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import BITS_KEYS, BITS_STREAMED, BITS_WIDTHS, EXP, MAX_HEADS
from flash_indexer.ops import launch
from flash_indexer.ops.sparse import torch_attention
from flash_indexer.ops.sparse.bit_tables import TILE, Bits, as_int32, make_bits, row_runs
from flash_indexer.ops.sparse.problem import KeySums, Needs, SparseProblem
from flash_indexer.ops.sparse.selection import check_selection

_LOG2E = 1.4426950408889634
_TILE_BYTES = TILE * TILE * 4  # of scores summed over heads
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
    if not problem.softmax_scale > 0:
        return f"attention over selected keys takes a positive softmax_scale, got {problem.softmax_scale}"
    return None


def forward(problem: SparseProblem) -> tuple[Tensor, Tensor]:
    """out [T, H, V] in q's dtype and lse [T, H]: zeros and -inf for a query without keys, NaN where its scores are."""
    q, k = problem.q, problem.k
    (T, H, _), (S, G, _), V = q.shape, k.shape, problem.value_dim
    if not _has_tiles(problem) or not _are_finite(problem.values):
        check_selection(problem.selection, S)
        return torch_attention.forward(problem)
    with torch.cuda.device(q.device):
        q, k, v = _operands(problem)
        W = q.shape[2]
        out, lse = torch.empty_like(q), torch.empty(T, H, device=q.device)
        for rows in row_runs(T, S, problem.workspace_bytes):
            bits = make_bits(problem.selection.rows(rows), S)
            found, tiles = bits.of_queries(BITS_KEYS)
            launch.load("bits_attention", D=W)(
                q[rows].view(-1, H * W), k.view(S, G * W), v.view(S, G * W), bits.bits, found, bits.bad,
                out[rows].view(-1, H * W), lse[rows].view(-1), H, H // G, bits.rows, bits.rows // TILE, tiles,
                problem.softmax_scale * _LOG2E,
            )  # fmt: skip
    return out if V == W else out[..., :V].contiguous(), lse


def target(problem: SparseProblem, lse: Tensor | None) -> Tensor:
    """p_sum[t,s] = sum_h a[t,h,s] at the selected keys, 0 behind them: float32 [T, K]. lse [T, H]; None computes it."""
    if not _has_tiles(problem):
        return torch_attention.target(problem, lse)
    lse = forward(problem)[1] if lse is None else lse
    p_sum = torch.empty(problem.selection.indices.shape, device=problem.q.device)
    with torch.cuda.device(problem.q.device):
        q, k, _ = _operands(problem, values=False)
        for rows in row_runs(len(q), len(k), problem.workspace_bytes):
            selected = problem.rows(rows)
            bits = make_bits(selected.selection, len(k))
            _sum_heads(selected, q[rows], k, lse[rows].contiguous(), bits, p_sum[rows])
    return p_sum


def backward(
    problem: SparseProblem, d_out: Tensor, out: Tensor, lse: Tensor, needs: Needs, sums: KeySums
) -> tuple[Tensor | None, Tensor | None]:
    """dq [T, H, D] in q's dtype and p_sum [T, K], None where not wanted; dk and dv are added to `sums`."""
    if not _has_tiles(problem) or not _are_finite(problem.q, problem.k, problem.values, d_out):
        check_selection(problem.selection, problem.k.shape[0])
        return torch_attention.backward(problem, d_out, out, lse, needs, sums)
    (T, H, D), (S, G, _) = problem.q.shape, problem.k.shape
    with torch.cuda.device(d_out.device):
        q, k, v = _operands(problem)
        W = q.shape[2]
        d_out, out = (_filled(x, W) for x in (d_out, out))
        dq = torch.empty_like(q) if needs.q else None
        p_sum = torch.empty(problem.selection.indices.shape, device=q.device) if needs.p_sum else None
        for rows in row_runs(T, S, problem.workspace_bytes):
            selected, few, their_d_out = problem.rows(rows), q[rows], d_out[rows]
            bits = make_bits(selected.selection, S)
            their_lse = lse[rows].contiguous()
            numbers = torch.empty(H * bits.rows * 2, device=q.device)
            launch.load("bits_numbers", D=W)(
                out[rows].view(-1, W), their_d_out.view(-1, W), their_lse.view(-1), numbers, len(few), H, bits.rows
            )
            operands = few.view(-1, H * W), their_d_out.view(-1, H * W), k.view(S, G * W), v.view(S, G * W), numbers
            if dq is not None:
                found, tiles = bits.of_queries(BITS_STREAMED[W])
                launch.load("bits_gradients_query", D=W)(
                    *operands, bits.bits, found, dq[rows].view(-1, H * W), H, H // G, bits.rows, bits.rows // TILE,
                    tiles, problem.softmax_scale,
                )  # fmt: skip
            if needs.k or needs.v:
                _add_key_gradients(selected, operands, bits, H, sums)
            if p_sum is not None:
                _sum_heads(selected, few, k, their_lse, bits, p_sum[rows])
    return None if dq is None else dq if D == W else dq[..., :D].contiguous(), p_sum


def _add_key_gradients(problem: SparseProblem, operands: tuple[Tensor, ...], bits: Bits, H: int, sums: KeySums) -> None:
    """sums.dk, sums.dv += those of these queries; without v both to sums.dk."""
    (S, G, D), V, W = problem.k.shape, problem.value_dim, operands[2].shape[1] // problem.k.shape[1]
    device = operands[0].device
    found, tiles = bits.of_keys(BITS_STREAMED[W])
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
    launch.load("bits_gradients_key", D=W)(
        *operands, bits.turned, found, totals[0].view(-1), totals[1].view(-1), H, H // G, bits.rows, bits.words * 32,
        key_tiles, tiles, parts, problem.softmax_scale,
    )  # fmt: skip
    for x, total, width in zip(targets, totals, (D, V), strict=True):
        if x is not None and x is not total:
            x += total.sum(0)[..., :width]
    if problem.v is None and sums.dk is not None:
        sums.dk[..., :V] += totals[1].sum(0)[..., :V]


def _sum_heads(problem: SparseProblem, q: Tensor, k: Tensor, lse: Tensor, bits: Bits, p_sum: Tensor) -> None:
    """p_sum [T, K] of these queries, by the kernel that sums scores over heads in the tiles that hold a bit."""
    indices, count, _ = problem.selection
    (T, H, W), (S, G, _), K = q.shape, k.shape, indices.shape[1]
    occupied = bits.tiles()
    tiles = occupied.shape[1]
    step = max(1, problem.workspace_bytes // (tiles * _TILE_BYTES))
    for first in range(0, len(occupied), step):
        some = occupied[first : first + step]
        place = (some.flatten().cumsum(0) - 1).int()
        at = some.nonzero()
        rows = slice(first * TILE, min((first + step) * TILE, T))
        if not len(at):
            p_sum[rows] = 0.0
            continue
        items = torch.zeros(len(at), 4, dtype=torch.int32, device=q.device)
        items[:, :2] = at * TILE
        items[:, 2] = torch.arange(len(at), device=q.device)
        scores = torch.empty(len(at) * TILE, TILE, device=q.device)
        launch.load("score", D=W, mode=EXP)(
            q[rows].view(-1, H * W), k.view(S, G * W), lse[rows].view(-1), scores, items.view(-1), H, H // G,
            problem.softmax_scale, 0, len(at), min(len(at), launch.processors(q.device)),
        )  # fmt: skip
        launch.load("bits_slots")(
            scores, place, as_int32(indices[rows], S), as_int32(count[rows], K), p_sum[rows].view(-1),
            rows.stop - rows.start, K, S, tiles,
        )  # fmt: skip


def _operands(problem: SparseProblem, values: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, filled up with zeros to the width that kernels work on; without `values` k in v's place."""
    widest = max(problem.q.shape[2], problem.value_dim)
    W = next(width for width in BITS_WIDTHS if width >= widest)
    q, k = (_filled(x, W) for x in (problem.q, problem.k))
    return q, k, _filled(problem.values, W) if values else k


def _filled(x: Tensor, width: int) -> Tensor:
    return launch.aligned(x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])))


def _has_tiles(problem: SparseProblem) -> bool:
    return problem.selection.indices.numel() > 0 and problem.k.numel() > 0


def _are_finite(*tensors: Tensor) -> bool:
    """False where a tensor holds NaN or inf (or numbers so large that their sum does)."""
    return bool(torch.stack([x.sum(dtype=torch.float32) for x in tensors]).sum().isfinite())
