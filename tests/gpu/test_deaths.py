"""A process that waits for its GPU, behind a collective operation of NCCL that another process will never join."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
PROGRAM = """
import ctypes, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from flash_indexer.parallel.heartbeat import Heartbeat
from flash_indexer.recipe.processes import ParallelSettings, Processes
out, timeout, patience, holding = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), sys.argv[4] == "True"
Heartbeat.PATIENCE = patience
processes = Processes(ParallelSettings(timeout=timeout))
with processes.telling(out):
    processes.wait()
    (out / f"began {processes.rank}").touch()
    if processes.rank == 0:
        dist.all_reduce(torch.zeros(1, device=processes.device), async_op=True)
        library = ctypes.PyDLL if holding else ctypes.CDLL
        library(f"libcudart.so.{torch.version.cuda.split('.')[0]}").cudaDeviceSynchronize()
    time.sleep(600)
"""
TIMEOUT, PATIENCE = 8.0, 3.0
HANG = 120.0  # seconds after which a process is taken to hang


@pytest.mark.parametrize("holding", [False, True], ids=["waits", "waits with Python's lock"])
def test_who_waits_for_its_gpu_is_ended(tmp_path: Path, ports: Any, holding: bool) -> None:
    """And says why, whether or not its threads can run."""
    words = [sys.executable, "-c", PROGRAM, str(tmp_path), str(TIMEOUT), str(PATIENCE), str(holding)]
    first, second = (
        subprocess.Popen(words, env=os.environ | place, stderr=subprocess.PIPE, text=True) for place in ports.places(2)
    )
    try:
        while not all((tmp_path / f"began {rank}").exists() for rank in (0, 1)):
            assert first.poll() is None and second.poll() is None
            time.sleep(0.1)
        second.send_signal(signal.SIGKILL)
        _, said = first.communicate(timeout=HANG)
    finally:
        first.kill()
        second.kill()
    assert first.returncode == (-signal.SIGABRT if holding else 1), said
    assert "error warmup: process 0 of 2 lost contact with another process" in said, said
    assert ("lets no thread of it run" in said) == holding, said
