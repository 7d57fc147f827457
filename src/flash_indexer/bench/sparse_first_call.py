"""How long the first call of the sparse stage takes in a process that finds all kernels compiled.

A process of its own for each of NAMES makes a few tokens of that size's heads, waits for the GPU, and then times one
`dsa_attention(kl="backward")`, forward and backward: what it loads and launches. The process that measures has called
it before, so that the kernels are compiled; another call is timed last. These processes are forked from one that has
imported this module, with torch, and no more: that takes seconds, and is once enough. A backward of torch's own comes
first in each: torch imports sympy at the first that is given a gradient, which takes a second or more.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from flash_indexer.bench.sparse_problem import SIZES, make
from flash_indexer.bench.sparse_steps import Steps

NAME, NAMES = "sparse_first_call", ("v32", "gqa32")
TOKENS, KEYS, TOPK = 256, 512, 64
LIMIT = 120  # seconds of a process


def measure() -> dict[str, Any]:
    """Seconds of the first call and milliseconds of the next by size, each in a process of its own.

    Raises:
        RuntimeError: where a process fails or takes longer than LIMIT.
    """
    for name in NAMES:
        time_calls(name)
    return {"first_call": in_processes(time_calls, NAMES)}


def in_processes(call: Callable[[str], Any], names: tuple[str, ...]) -> dict[str, Any]:
    """call(name) by name, one after another, each in a new process.

    Raises:
        RuntimeError: as `measure`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    found = {}
    with context.Pool(1, maxtasksperchild=1) as processes:
        for name in names:
            try:
                found[name] = processes.apply_async(call, (name,)).get(LIMIT)
            except Exception as error:
                raise RuntimeError(
                    f"bench: the first call of {name} failed: {type(error).__name__}: {error}"
                ) from error
    return found


def line(record: dict[str, Any]) -> str:
    """One line for people."""
    times = (f"{name} {x['first_s']:.2f} s, then {x['next_ms']:.1f} ms" for name, x in record["first_call"].items())
    return f"{record['name']:<14} first call of a process: {'; '.join(times)}"


def time_calls(name: str, device: str = "cuda") -> dict[str, float]:
    """In this process: seconds of its first call and milliseconds of the one after, of the size's heads."""
    size = replace(SIZES[name], T=TOKENS, S=KEYS, K=TOPK)
    x = make(size, device, torch.bfloat16 if device == "cuda" else torch.float64)
    layer = Steps(size, x).by_name()["layer_any_order"]
    one = torch.ones(1, device=device)
    torch.autograd.backward(one.clone().requires_grad_() * 1, one)
    times = []
    for _ in range(2):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        layer()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return {"first_s": times[0], "next_ms": times[1] * 1e3}
