"""The gradients of "per_head" by kernels: one for those of queries, one for those of keys, or one for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import ONCE_WIDTHS
from flash_indexer.ops import launch
from flash_indexer.ops.attention.layout import (
    LOG2E,
    TileSizes,
    index_width,
    padded,
    padded_width,
    row_tiles,
    shapes,
    tile_sizes,
)
from flash_indexer.ops.attention.plan import GradientItems, Tiles, attention_items, gradient_items
from flash_indexer.ops.problem import Problem
from flash_indexer.ops.worklists import TILE

_SLOT_BYTES = 64 * 2**20  # at most this much holds partial sums of d_index_k

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of index_q, index_k (the sum in float32) and index_weights; None where not wanted."""


class _Call(NamedTuple):
    """What the launches share. operands: keys, index keys, weights, both logsumexps, factor, intervals."""

    q: Tensor
    index_q: Tensor
    operands: tuple[Tensor, ...]
    shape: dict[str, int]
    scale: float
    ctas: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """T, H, S."""
        return *self.q.shape[:2], self.operands[0].shape[0]


def per_head_gradients(
    problem: Problem, lse_index: Tensor, tiles: TileSizes | None = None, deterministic: bool = True
) -> Gradients:
    """Gradients of sum_t,h token_weight[t] * KL[t,h].

    Args:
        problem: lse, the attention's logsumexp, and token_weight filled in; index inputs aligned. lse_index: that of
            the indexer, [T, H].
        deterministic: False may add to index_k's by atomic additions, where that is faster and torch does not ask for
            deterministic algorithms.
    """
    T, S, needs = problem.q.shape[0], problem.k.shape[0], problem.needs
    if T == 0 or S == 0:
        a, b, c = (torch.zeros_like(x) if need else None for x, need in zip(problem.leaves, needs, strict=True))
        return a, None if b is None else b.float(), c
    width = problem.index_q.shape[2]
    with torch.cuda.device(problem.q.device):
        call = _prepared_call(problem, lse_index)
        once = formed_once(call.shape["D"], call.shape["E"], needs, deterministic)
        d_index_q, d_index_k, d_weights = _all_at_once(call) if once else _in_two_passes(call, problem, tiles)
        if d_index_q is not None and d_index_q.shape[-1] != width:
            d_index_q = d_index_q[..., :width].contiguous()
        if d_index_k is not None:
            d_index_k = d_index_k[:, :width].contiguous()
    return d_index_q if needs[0] else None, d_index_k, d_weights if needs[2] else None


def formed_once(D: int, E: int, needs: Sequence[bool], deterministic: bool) -> bool:
    """Whether one kernel makes all gradients, with atomic additions; others make one of them faster."""
    exact = deterministic or torch.are_deterministic_algorithms_enabled()
    return not exact and ONCE_WIDTHS[0] >= D and ONCE_WIDTHS[1] >= E and needs[1] and (needs[0] or needs[2])


def kernels(
    problem: Problem, V: int, deterministic: bool = True, tiles: TileSizes | None = None
) -> list[launch.Wanted]:
    """Every kernel of a call and of its gradients. V: width of the values, 0 for `statistics`."""
    (H, D), G, E, needs = problem.q.shape[1:], problem.k.shape[1], problem.index_q.shape[2], problem.needs
    of_kernel = shapes(D, V, E, H // G)
    once = formed_once(padded_width(D), index_width(E, H // G), needs, deterministic)
    names = ["attention"]
    if not once and (needs[0] or needs[2]):
        names.append("head_gradients_query")
    if not once and needs[1]:
        names.append("head_gradients_key")
    wanted: list[launch.Wanted] = [
        (name, of_kernel[name] | tile_sizes(name, of_kernel[name], problem.q.device, tiles)) for name in names
    ]
    if once:
        wanted.append(("head_gradients_once", of_kernel["head_gradients_query"]))
    elif needs[1]:
        wanted.append(("gradients_reduce", dict(E=of_kernel["attention"]["E"])))
    if V == 0 and any(needs):
        wanted.append(("scale", {}))
    return wanted


def _prepared_call(problem: Problem, lse_index: Tensor) -> _Call:
    (H, _), (S, G) = problem.q.shape[1:], problem.k.shape[:2]
    E = index_width(problem.index_q.shape[2], H // G)
    q, k = (launch.aligned(padded(x)) for x in (problem.q, problem.k))
    index_q, index_k = (padded(x, E) for x in (problem.index_q, problem.index_k))
    assert problem.lse is not None
    rows = (problem.index_weights.view(-1), problem.lse.view(-1), lse_index.view(-1))
    operands = (k.view(S, -1), index_k, *rows, problem.weight, problem.key_start, problem.key_end)
    shape = dict(D=q.shape[2], E=E, HG=H // G)
    return _Call(q, index_q, operands, shape, problem.softmax_scale * LOG2E, launch.processors(q.device))


def _in_two_passes(call: _Call, problem: Problem, tiles: TileSizes | None) -> Gradients:
    """The same bits every time."""
    _, _, S = call.sizes
    needs, (HG, E) = problem.needs, (call.shape["HG"], call.shape["E"])
    query, key = (tile_sizes(f"head_gradients_{kind}", call.shape, call.q.device, tiles) for kind in ("query", "key"))
    rows = Tiles(problem.k.shape[1], TILE // HG, query["N"], call.ctas)
    items = gradient_items(problem.key_start, problem.key_end, S, rows, key["N"] // HG, _SLOT_BYTES // (TILE * E * 4))
    d_index_q, d_weights = _of_queries(call, items, query) if needs[0] or needs[2] else (None, None)
    d_index_k = _of_keys(call, items, key, problem.k.shape[1]) if needs[1] else None
    return d_index_q, d_index_k, None if d_weights is None else d_weights.view_as(problem.index_weights)


def _of_queries(call: _Call, items: GradientItems, tiles: dict[str, int]) -> tuple[Tensor, Tensor]:
    """d_index_q [T, H, E], d_index_weights [T·H]."""
    (T, H, _), heads = call.sizes, call.shape["HG"]
    d_index_q, d_weights = torch.empty_like(call.index_q), torch.empty_like(call.operands[2])
    count = items.query.numel() // 8
    launch.load("head_gradients_query", **call.shape, **tiles)(
        row_tiles(call.q, heads, TILE), call.operands[0], row_tiles(call.index_q, heads, TILE), *call.operands[1:],
        items.query, d_index_q.view(-1, call.shape["E"]), d_weights, H, T, count, min(count, call.ctas), call.scale,
    )  # fmt: skip
    return d_index_q, d_weights


def _of_keys(call: _Call, items: GradientItems, tiles: dict[str, int], key_heads: int) -> Tensor:
    """The sum in float32 [S, E]."""
    (T, H, S), heads, E = call.sizes, call.shape["HG"], call.shape["E"]
    total = torch.zeros(S, E, device=call.q.device)
    partials = total.new_empty(max(items.slots, 1) * TILE, E)
    count = items.key.numel() // 8
    if count:
        launch.load("head_gradients_key", **call.shape, **tiles)(
            row_tiles(call.q, heads, tiles["N"]), call.operands[0], row_tiles(call.index_q, heads, tiles["N"]),
            *call.operands[1:], items.key, total, partials, H, key_heads, T, count, min(count, call.ctas), call.scale,
        )  # fmt: skip
    if items.slots:
        launch.load("gradients_reduce", E=E)(total, partials, items.reduce, items.reduce.numel() // 4)
    return total


def _all_at_once(call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    """d_index_q [T, H, E], the float32 sum for d_index_k [S, E], d_index_weights [T, H]; added up in any order."""
    (T, H, S), heads, E = call.sizes, call.shape["HG"], call.shape["E"]
    *_, key_start, key_end = call.operands
    items = attention_items(key_start, key_end, S, Tiles(H // heads, TILE // heads, TILE, call.ctas))
    d_index_q, d_weights = torch.empty_like(call.index_q), torch.empty_like(call.operands[2])
    total, count = torch.zeros(S, E, device=call.q.device), items.numel() // 8
    launch.load("head_gradients_once", **call.shape)(
        row_tiles(call.q, heads, TILE), call.operands[0], row_tiles(call.index_q, heads, TILE), *call.operands[1:],
        items, d_index_q.view(-1, E), d_weights, total, H, T, count, min(count, call.ctas), call.scale,
    )  # fmt: skip
    # the kernel adds column 16j + 8a + 2q + c (a, c < 2; q < 4) at 16j + 4q + 2a + c
    return d_index_q, total.view(S, -1, 4, 2, 2).transpose(2, 3).reshape(S, E), d_weights.view(T, H)
