"""Peak memory of forward plus backward: the workspace and a quarter of the tensors, whatever the layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKSPACE = 8 * 2**20
PROGRAM = """
import ctypes, json, re, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages round each buffer up by as much as 2 MiB
import torch
from flash_indexer import indexer_kl

def resident(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def problem(T, layout, with_lse):
    torch.manual_seed(0)
    H, G, D, I, E = 9, 3, 64, 8, 64
    leaves = [x.requires_grad_() for x in (torch.randn(T, I, E), torch.randn(T, E), 0.05 * torch.randn(T, I))]
    t = torch.arange(T)
    start = {"causal": 0 * t, "packed": t // 50 * 50, "window": (t - 63).clamp(min=0)}[layout]
    lse = torch.full((T, H), 6.0) if with_lse else None
    intervals = dict(key_start=start.int(), key_end=(t + 1).int())
    return [torch.randn(T, H, D), torch.randn(T, G, D), *leaves], dict(intervals, lse=lse)

def run(tensors, others):
    result = indexer_kl(*tensors, softmax_scale=0.125, workspace_bytes=int(sys.argv[2]), **others)
    result.loss.backward()
    return result

def measure(layout, with_lse):
    run(*problem(256, layout, with_lse))
    tensors, others = problem(int(sys.argv[1]), layout, with_lse)
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system: no page is there already
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    result = run(tensors, others)
    peak = resident("VmHWM")
    outputs = sum(x.nbytes for x in result) + sum(x.grad.nbytes for x in tensors[2:])
    inputs = sum(x.nbytes for x in (*tensors, *others.values()) if x is not None)
    return dict(extra=peak - before - outputs, inputs=inputs, outputs=outputs)

print(json.dumps([measure(*way) for way in json.loads(sys.argv[3])]))
"""
WAYS = (("causal", True), ("causal", False), ("packed", True), ("window", True))
"""The layout, and whether the logsumexp is given."""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory counter")
@pytest.mark.parametrize("tokens", [2048, pytest.param(4096, marks=pytest.mark.slow)])
def test_peak_memory(tokens):
    """Of one layout after the other, in a process of their own."""
    command = [sys.executable, "-c", PROGRAM, str(tokens), str(WORKSPACE), json.dumps(WAYS)]
    # buffers come from the system and go back to it one by one; each thread of a BLAS would keep megabytes of its own
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | exact)
    assert done.returncode == 0, done.stderr
    for way, measured in zip(WAYS, json.loads(done.stdout), strict=True):
        print(way, {name: f"{value / 2**20:.2f} MiB" for name, value in measured.items()})
        assert measured["extra"] <= WORKSPACE + (measured["inputs"] + measured["outputs"]) / 4, way
