"""What every benchmark shares: the sizes of a problem, what a number depends on, and times of contestants in turns.

Contestants are timed by CUDA events behind a full queue, so that what is measured is the device and not the host's
launches; the clock behind every contestant is measured as cycles that a spinning kernel counts over the time it takes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_indexer.ops import bodies

MATMUL = 8192  # width of the square matrix product that is timed beside the contestants
_QUEUE_CYCLES = 6_000_000  # about 3 ms, in which the host gets ahead of the device
_CLOCK_CYCLES = 400_000  # about 0.2 ms of counting right behind a contestant: the clock that it left the GPU at


@dataclass(frozen=True)
class Size:
    """One problem: causal documents. V: the teacher's value width, for the attention beside it. queries: of each
    document only so many, the last; 0 means all."""

    H: int
    G: int
    D: int
    I: int
    E: int
    documents: tuple[int, ...]
    V: int
    queries: int = 0

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs."""
        asked = [(n, self.queries or n) for n in self.documents]
        return sum(q * (2 * n - q + 1) // 2 for n, q in asked)

    @property
    def flops(self) -> int:
        """Of the floor."""
        return (2 * self.H * self.D + 8 * self.I * self.E) * self.pairs


def named(names: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """The sizes of these names; None: all. Raises ValueError for one that is not known."""
    known = list(known)
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"bench: sizes must be of {', '.join(known)}, got {', '.join(unknown)}")
    return known if names is None else list(names)


def needs_gpu(command: str = "bench") -> None:
    """Raises OSError without a GPU that has kernels."""
    if bodies.no_kernels(torch.device("cuda")) is not None:
        present = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        raise OSError(f"{command}: needs a CUDA GPU of compute capability 9.0 (H100, H200) and tilelang, got {present}")


def measured(
    measurements: Iterable[tuple[str, Callable[[], dict[str, Any]]]], path: Path, commit: str
) -> Iterator[dict[str, Any]]:
    """The record of each measurement, as soon as it is a line of the file, behind its name and `environment`.

    Raises:
        OSError: without a GPU that has kernels.
    """
    needs_gpu()
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, measure in measurements:
        record = {**environment(commit), "name": name, **measure()}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        yield record
        torch.cuda.empty_cache()


def environment(commit: str) -> dict[str, Any]:
    """What a number depends on besides the code."""
    return {
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit,
        "gpu": torch.cuda.get_device_name(), "driver": driver(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "tilelang": metadata.version("tilelang"),
    }  # fmt: skip


def driver() -> str:
    """The driver's version, or unknown where nvidia-smi can't be asked."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def time_in_turns(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each, p20, p50 and p80 over `rounds` rounds in which each has one turn, after two to warm up.

    Beside them `sm_mhz`, the median clock of the multiprocessors right behind it.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    clocks: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 2):
        for name, contestant in contestants.items():
            begin, end, counted = (torch.Event("cuda", enable_timing=True) for _ in range(3))
            torch.cuda._sleep(_QUEUE_CYCLES)  # type: ignore[no-untyped-call]
            begin.record()
            contestant()
            end.record()
            torch.cuda._sleep(_CLOCK_CYCLES)  # type: ignore[no-untyped-call]
            counted.record()
            counted.synchronize()
            if turn >= 2:
                times[name].append(begin.elapsed_time(end))
                clocks[name].append(_CLOCK_CYCLES / end.elapsed_time(counted) / 1e3)
    return {name: percentiles(times[name]) | {"sm_mhz": statistics.median(clocks[name])} for name in contestants}


def percentiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    if len(values) < 2:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def memory(step: Callable[[], Any], leaves: list[Tensor]) -> tuple[int, int]:
    """Peak bytes of a step, and what of it is neither input nor output (each gradient once)."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return peak, peak - before - sum(leaf.nbytes for leaf in leaves)


def host_time(step: Callable[[], Any]) -> float:
    """Milliseconds until the host has launched a step: the median of as many as take 0.2 s, 5 to 100."""
    torch.cuda.synchronize()
    times = list[float]()
    while len(times) < 5 or (len(times) < 100 and sum(times) < 200):
        started = time.perf_counter()
        step()
        times.append((time.perf_counter() - started) * 1e3)
        torch.cuda.synchronize()
    return statistics.median(times)
