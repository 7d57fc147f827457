"""Lists of work for the GPU kernels: balanced over the multiprocessors, and cached with the intervals they are made of.

The lists are made on the host from the intervals' contents. They live as long as the interval tensors do, unchanged, so
that the layers of a model, which share their intervals, wait for the device once a batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from flash_indexer.intervals import check_intervals

TILE = 128
"""Query tokens and keys of a score tile."""
_GREEDY_ROUNDS = 16
_Made = TypeVar("_Made")


class _Cached(NamedTuple):
    """What was made from a key_start tensor, with what must be unchanged for it to hold."""

    key_end: Tensor
    versions: tuple[int, int]
    num_keys: int
    on_host: tuple[Tensor, ...]
    made: dict[Hashable, Any]


_cache: Any = WeakTensorKeyDictionary()


def cached(
    key_start: Tensor, key_end: Tensor, num_keys: int, key: Hashable, make: Callable[[Tensor, Tensor], _Made]
) -> _Made:
    """make(key_start, key_end) of intervals checked and copied to the CPU; cached while the tensors live unchanged.

    Raises:
        ValueError: as `check_intervals`, when the contents are no valid intervals.
    """
    versions = None if key_start.is_inference() or key_end.is_inference() else (key_start._version, key_end._version)
    entry: _Cached | None = _cache.get(key_start) if versions is not None else None
    if entry is None or entry.key_end is not key_end or entry.versions != versions or entry.num_keys != num_keys:
        check_intervals(key_start, key_end, num_keys)
        entry = _Cached(key_end, versions or (0, 0), num_keys, _on_host(key_start, key_end), {})
        if versions is not None:
            _cache[key_start] = entry
    if key not in entry.made:
        entry.made[key] = make(*entry.on_host)
    return cast("_Made", entry.made[key])


def _on_host(*intervals: Tensor) -> tuple[Tensor, ...]:
    """Copies, on a CPU too: a cache that held its own key would never let it go."""
    return tuple(x.detach().to("cpu", copy=True) for x in intervals)


def mean_weight(key_start: Tensor, key_end: Tensor, num_keys: int) -> Tensor:
    """float32 [T] on the intervals' device: 1/n for the n queries that see a key, else 0; cached with the intervals."""

    def make(start: Tensor, end: Tensor) -> Tensor:
        seen = end > start
        return to_device((seen.double() / seen.sum().clamp_min(1)).float(), key_start.device)

    return cached(key_start, key_end, num_keys, "mean_weight", make)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on the device, without waiting for it."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def visible_tiles(key_start: Tensor, key_end: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """First and end key tile that any query of each group of `rows` tokens sees; equal where none sees a key."""
    T = key_start.shape[0]
    groups = -(-T // rows)
    seen = key_end > key_start
    big = torch.iinfo(torch.int32).max
    low = torch.full((groups * rows,), big, dtype=torch.int64)
    high = torch.zeros(groups * rows, dtype=torch.int64)
    low[:T] = torch.where(seen, key_start.long(), big)
    high[:T] = torch.where(seen, key_end.long(), 0)
    first = low.view(groups, rows).amin(1) // TILE
    end = (high.view(groups, rows).amax(1) + TILE - 1) // TILE
    return torch.where(end > 0, first, 0), end


def deal(items: Tensor, cost: Tensor, processors: int) -> Tensor:
    """Each item in turn to the CTA with the least work so far; CTAs that get fewer items than others get empty ones."""
    grid = min(processors, items.shape[0])
    loads = [(0, cta) for cta in range(grid)]
    hands: list[list[int]] = [[] for _ in range(grid)]
    for item, work in enumerate(cost.tolist()):
        load, cta = loads[0]
        hands[cta].append(item)
        heapq.heapreplace(loads, (load + work, cta))
    rounds = max(len(hand) for hand in hands)
    flat = torch.tensor([hand + [items.shape[0]] * (rounds - len(hand)) for hand in hands]).T.reshape(-1)
    empty = torch.tensor([[0, 0, 0, -1]], dtype=items.dtype)
    return torch.cat([items, empty])[flat]


def balance(items: Tensor, cost: Tensor, processors: int) -> Tensor:
    """Items in an order in which item n is CTA n % processors' and each CTA's cost about the same.

    Longest first, every second round of `processors` items backwards; in the last rounds the longest go to those CTAs
    that have least.
    """
    count, rounds = items.shape[0], -(-items.shape[0] // processors)
    order = torch.full((rounds * processors,), -1)
    order[:count] = torch.argsort(cost, descending=True, stable=True)
    order = order.view(rounds, processors)
    paired = max(rounds - _GREEDY_ROUNDS, 0)
    order[1:paired:2] = order[1:paired:2].flip(1)
    load = cost[order[:paired].flatten()].view(paired, processors).sum(0)
    for n in range(paired, rounds):
        here = order[n][order[n] >= 0]
        place = torch.argsort(load, stable=True)[: here.numel()]
        order[n] = -1
        order[n, place] = here
        load[place] += cost[here]
    if rounds:
        order = order[:, torch.argsort(order[-1] < 0, stable=True)]  # who has none of the last round comes last
    return items[order[order >= 0]]


def ragged(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For each unit of counts, its owner and its place among the owner's units."""
    owner = torch.repeat_interleave(torch.arange(counts.shape[0]), counts)
    return owner, torch.arange(owner.shape[0]) - (counts.cumsum(0) - counts)[owner]
