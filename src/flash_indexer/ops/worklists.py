"""Lists of work for the GPU kernels: balanced over the multiprocessors, and cached with the intervals they are made of.

The lists are made on the host from the intervals' contents. They live as long as the interval tensors do, unchanged, so
that the layers of a model, which share their intervals, wait for the device once a batch. Those of the last two
contents live on: batches of one document each have the same ones, step after step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
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
    contents: Contents


class Contents(NamedTuple):
    """Intervals on the host, valid for num_keys keys, and what was made of them for a device."""

    device: torch.device
    num_keys: int
    on_host: tuple[Tensor, Tensor]
    made: dict[Hashable, Any]


_cache: Any = WeakTensorKeyDictionary()
_recent: deque[Contents] = deque(
    maxlen=2
)  # last used last: of documents, and of a sliding window or a sample of queries


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's operators on the CPU in this thread alone.

    A list is made by some hundred operators of microseconds; several threads would meet behind each, and where other
    processes keep the cores busy, a meeting waits for the scheduler: milliseconds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cached(
    key_start: Tensor, key_end: Tensor, num_keys: int, key: Hashable, make: Callable[[Tensor, Tensor], _Made]
) -> _Made:
    """make(key_start, key_end) of intervals checked and copied to the CPU; cached while the tensors live unchanged.

    Tensors with the contents of a recent call's get what was made for those; reading them waits for the device.

    Raises:
        ValueError: as `check_intervals`, when the contents are no valid intervals.
    """
    contents = read(key_start, key_end, num_keys)
    if key not in contents.made:
        # what is kept is for training as well; lists are made on the CPU, whatever the default device
        with torch.inference_mode(False), one_thread(), torch.device("cpu"):
            contents.made[key] = make(*contents.on_host)
    return cast("_Made", contents.made[key])


def read(key_start: Tensor, key_end: Tensor, num_keys: int) -> Contents:
    """The intervals' contents on the host, kept as `cached` says; whoever calls this first waits for the device.

    Called before a forward has given the device work, it waits for nothing, and the host makes the lists of the first
    layer while the device computes what comes before them.

    Raises:
        ValueError: as `check_intervals`, when the contents are no valid intervals.
    """
    versions = None if key_start.is_inference() or key_end.is_inference() else (key_start._version, key_end._version)
    entry: _Cached | None = _cache.get(key_start) if versions is not None else None
    if entry is None or entry.key_end is not key_end or entry.versions != versions or entry.num_keys != num_keys:
        with one_thread():
            entry = _Cached(key_end, versions or (0, 0), num_keys, _read(key_start, key_end, num_keys))
        if versions is not None:
            _cache[key_start] = entry
            _keep(entry.contents)
    return entry.contents


def _keep(contents: Contents) -> None:
    """As the last used, beside the one used last of the others: a step's sample of queries displaces no documents."""
    recent = tuple(_recent)  # at once, as below
    if not recent or recent[-1] is not contents:
        _recent.extend([*[other for other in recent if other is not contents][-1:], contents])


def _read(key_start: Tensor, key_end: Tensor, num_keys: int) -> Contents:
    """Copies, on a CPU too: a cache that held its own key would never let it go."""
    with torch.inference_mode(False):
        start, end = (x.detach().to("cpu", copy=True) for x in (key_start, key_end))
    for contents in tuple(_recent):  # at once: another thread may add to it meanwhile
        if (contents.device, contents.num_keys) == (key_start.device, num_keys) and all(
            a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(contents.on_host, (start, end), strict=True)
        ):
            return contents
    check_intervals(start, end, num_keys)
    return Contents(key_start.device, num_keys, (start, end), {})


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
    """Items in an order in which item n is CTA n % processors', neighbours at about the same time.

    Of every `processors` neighbours the largest goes to the CTA with the least work so far, and so on. In the last
    round CTAs may get empty items.
    """
    count = items.shape[0]
    grid = min(processors, count)
    rounds = -(-count // grid)
    order, costs = np.full((rounds, grid), count), np.zeros((rounds, grid), dtype=np.int64)
    order.reshape(-1)[:count], costs.reshape(-1)[:count] = np.arange(count), cost.numpy()
    load = np.zeros(grid, dtype=np.int64)
    # where all costs of a round are alike, as most are in long documents, it stays as it is
    for n in np.flatnonzero((costs != costs[:, :1]).any(1)):
        here = costs[n, : count - n * grid]
        largest = np.argsort(-here, kind="stable")
        least = np.argsort(load, kind="stable")[: len(here)]
        order[n] = count
        order[n, least] = largest + n * grid
        load[least] += here[largest]
    empty = torch.tensor([[0, 0, 0, -1]], dtype=items.dtype)
    return torch.cat([items, empty])[torch.from_numpy(order.reshape(-1))]


def balance(items: Tensor, cost: Tensor, processors: int) -> Tensor:
    """Items in an order in which item n is CTA n % processors' and each CTA's cost about the same.

    Longest first, every second round of `processors` items backwards; in the last rounds the longest go to those CTAs
    that have least.
    """
    costs = cost.numpy()
    count, rounds = len(costs), -(-len(costs) // processors)
    order = np.full((rounds, processors), -1)
    order.reshape(-1)[:count] = np.argsort(-costs, kind="stable")
    paired = max(rounds - _GREEDY_ROUNDS, 0)
    order[1:paired:2] = order[1:paired:2, ::-1].copy()
    load = costs[order[:paired]].sum(0)
    for n in range(paired, rounds):
        here = order[n][order[n] >= 0]
        place = np.argsort(load, kind="stable")[: len(here)]
        order[n] = -1
        order[n, place] = here
        load[place] += costs[here]
    if rounds:
        order = order[:, np.argsort(order[-1] < 0, kind="stable")]  # who has none of the last round comes last
    return items[torch.from_numpy(order[order >= 0])]


def ragged(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For each unit of counts, its owner and its place among the owner's units."""
    owner = torch.repeat_interleave(torch.arange(counts.shape[0]), counts)
    return owner, torch.arange(owner.shape[0]) - (counts.cumsum(0) - counts)[owner]
