"""Peak memory of the sparse stage, forward plus backward: the workspace and a part of the tensors, never [T, S]."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKSPACE = 4 * 2**20
PROGRAM = """
import ctypes, json, re, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages round each buffer up by as much as 2 MiB
import torch
from flash_indexer import dsa_attention

def resident(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def problem(T, window):
    torch.manual_seed(0)
    H, G, D, I, E = 4, 1, 32, 2, 32
    shapes = (T, H, D), (T, G, D), (T, G, D), (T, I, E), (T, E), (T, I)
    end = torch.arange(1, T + 1)
    start = (end - window).clamp(min=0) if window else 0 * end
    return [torch.randn(shape).requires_grad_() for shape in shapes], dict(key_start=start.int(), key_end=end.int())

def run(tensors, intervals, kl):
    given = dict(kl_out=torch.zeros(len(tensors[0]))) if kl == "backward" else {}
    options = dict(softmax_scale=0.2, topk=64, kl=kl, workspace_bytes=int(sys.argv[2]))
    result = dsa_attention(*tensors, **options, **intervals, **given)
    (result.out.sum() + (0 if result.loss is None else result.loss)).backward()
    return result

def measure(window, kl):
    T = int(sys.argv[1])
    run(*problem(256, 0), kl)
    tensors, intervals = problem(T, window)
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system: no page is there already
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    result = run(tensors, intervals, kl)
    peak = resident("VmHWM")
    outputs = [result.out, result.lse, *result.selection, *(x.grad for x in tensors)]
    sizes = [sum(x.nbytes for x in group) for group in (outputs, (*tensors, *intervals.values()))]
    return dict(extra=peak - before - sizes[0], outputs=sizes[0], inputs=sizes[1], scores=4 * T * T)

print(json.dumps([measure(*way) for way in json.loads(sys.argv[3])]))
"""
WAYS = tuple((window, kl) for window in (0, 200) for kl in ("forward", "backward"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory counter")
def test_peak_memory() -> None:
    """Of every layout and place of the KL, one after the other, in a process of their own."""
    command = [sys.executable, "-c", PROGRAM, "4096", str(WORKSPACE), json.dumps(WAYS)]
    # buffers come from the system and go back to it one by one; each thread of a BLAS would keep megabytes of its own
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | exact)
    assert done.returncode == 0, done.stderr
    for way, measured in zip(WAYS, json.loads(done.stdout), strict=True):
        print(way, {name: f"{value / 2**20:.2f} MiB" for name, value in measured.items()})
        allowed = WORKSPACE + (measured["inputs"] + measured["outputs"]) / 4
        assert measured["extra"] <= allowed < measured["scores"] / 4, way
