"""How long the first call of the sparse stage takes in a process that finds all kernels compiled.

A process of its own for each of NAMES makes a few tokens of that size's heads, waits for the GPU, and then times one
`dsa_attention(kl="backward")`, forward and backward: what it imports, loads and launches. A process before it has had
the kernels compiled, and another call of it is timed last.

    python -m flash_indexer.bench.sparse_first_call v32
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

from flash_indexer.bench.sparse_problem import SIZES, make
from flash_indexer.bench.sparse_steps import Steps

NAME, NAMES = "sparse_first_call", ("v32", "gqa32")
TOKENS, KEYS, TOPK = 256, 512, 64
LIMIT = 300  # seconds, kernels included


def measure() -> dict[str, Any]:
    """Seconds of the first call and milliseconds of the next by size, of the second of two processes.

    Raises:
        RuntimeError: where a process fails, with the end of what it said.
    """
    found = {}
    for name in NAMES:
        for _ in range(2):
            command = [sys.executable, "-m", __name__, name]
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
            if done.returncode:
                raise RuntimeError(f"bench: the first call of {name} failed: {done.stderr[-2000:]}")
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return {"first_call": found}


def line(record: dict[str, Any]) -> str:
    """One line for people."""
    times = (f"{name} {x['first_s']:.2f} s, then {x['next_ms']:.1f} ms" for name, x in record["first_call"].items())
    return f"{record['name']:<14} first call of a process: {'; '.join(times)}"


def time_calls(name: str, device: str = "cuda") -> dict[str, float]:
    """In this process: seconds of its first call and milliseconds of the one after, of the size's heads."""
    import torch

    size = replace(SIZES[name], T=TOKENS, S=KEYS, K=TOPK)
    x = make(size, device, torch.bfloat16 if device == "cuda" else torch.float64)
    layer = Steps(size, x).by_name()["layer_any_order"]
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


if __name__ == "__main__":
    print(json.dumps(time_calls(sys.argv[1])))
