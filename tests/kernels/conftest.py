"""Kernels lowered to CUDA source (no compiler, no GPU), or compiled to machine code and taken apart (no GPU)."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flash_indexer.kernels import catalog

collect_ignore_glob = ["*"] if importlib.util.find_spec("tilelang") is None else []  # it is for Linux alone
OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_]+)*)", re.MULTILINE)
# text and the second half of the code of an instruction, whose first half ends its line; or a label
INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]+\*/\s+(.*?);?\s+/\* 0x[0-9a-f]{16} \*/\n\s+/\* 0x([0-9a-f]{16}) \*/|^\.L_x_\d+:()()", re.MULTILINE
)


@dataclass(frozen=True)
class Machine:
    """What ptxas said of a kernel, and how often each instruction stands in it (not how often it runs)."""

    registers: int
    spilled: int
    stack: int
    complaints: tuple[str, ...]
    opcodes: Counter[str]
    listing: str

    def loads_under_way(self) -> list[str]:
        """Arrivals that are issued while loads of shared memory are under way, as far as a basic block shows it.

        A load sets one of six scoreboards when its data is there, or leaves that to a later one, for they return in
        order; an instruction's control code says which scoreboards it waits for. An arrival by itself waits for none.
        """
        found, pending, sets, done = [], [], {}, 0
        for number, (text, code, *_) in enumerate(INSTRUCTION.findall(self.listing), 1):
            if not code:  # a label
                pending, sets = [], {}
                continue
            control = int(code, 16) >> 41
            for board in range(6):
                if control >> 11 + board & 1 and board in sets:
                    done = max(done, sets.pop(board))
            pending = [load for load in pending if load > done]
            if "FENCE.VIEW.ASYNC" in text or "BAR.SYNC" in text:
                pending = []
            if "SYNCS.ARRIVE" in text and pending:
                found.append(text.strip())
            board = control >> 5 & 7
            sets.pop(board, None)
            if re.search(r"\bLDSM?\b", text) and "RZ, [RZ]" not in text:
                pending.append(number)
                if board != 7:
                    sets[board] = number
        return found

    def read(self) -> int:
        """Instructions whose control codes are read."""
        return sum(code != "" for _, code, *_ in INSTRUCTION.findall(self.listing))

    def count(self, prefix: str) -> int:
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(prefix))


@functools.cache
def lower(name: str, static: tuple[tuple[str, int], ...]) -> str:
    import tilelang
    from tilelang import tvm

    function, configs = catalog.program((name, static))
    target = tvm.target.Target(catalog.TARGET)
    with target, tvm.transform.PassContext(opt_level=3, config={str(key.value): v for key, v in configs.items()}):
        return tilelang.lower(function, target=target, enable_device_compile=False).kernel_source


@functools.cache
def assemble(name: str, static: tuple[tuple[str, int], ...]) -> Machine:
    source = lower(name, static)
    with tempfile.TemporaryDirectory() as folder:
        program, cubin = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        program.write_text(source, encoding="utf-8")
        includes = [f"-I{os.environ[variable]}" for variable in ("TL_TEMPLATE_PATH", "TL_CUTLASS_PATH")]
        command = [find_nvcc(), "-std=c++20", "-O3", "-w", "-cubin", "-gencode", "arch=compute_90a,code=sm_90a"]
        command += ["--use_fast_math", "--ptxas-options=-v", *includes, "-o", str(cubin), str(program)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        text = done.stdout + done.stderr
        assert done.returncode == 0, text[-4000:]
        listing = subprocess.run(
            [find_nvdisasm(), "-c", "-hex", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    return Machine(
        registers=int(re.findall(r"Used (\d+) registers", text)[-1]),
        spilled=sum(map(int, re.findall(r"(\d+) bytes spill", text))),
        stack=sum(map(int, re.findall(r"(\d+) bytes stack frame", text))),
        complaints=tuple(re.findall(r".*C75\d\d.*", text)),
        opcodes=Counter(OPCODE.findall(listing)),
        listing=listing,
    )


def find_nvcc() -> str:
    """The compiler that TileLang takes."""
    from tilelang import env

    path = Path(env.CUDA_HOME, "bin", "nvcc")
    if not env.CUDA_HOME or not path.exists():
        pytest.skip("no nvcc on PATH or under CUDA_HOME: pip install 'flash-indexer[compiler]'")
    return str(path)


def find_nvdisasm() -> str:
    found = shutil.which("nvdisasm")
    if found is None:
        for file in importlib.metadata.files("nvidia-cuda-nvdisasm") or []:
            if file.name == "nvdisasm":
                return str(file.locate())
    assert found is not None, "no nvdisasm on PATH and no package nvidia-cuda-nvdisasm"
    return found


@pytest.fixture(scope="session")
def nvcc() -> str:
    """Skips where there is none."""
    return find_nvcc()


@pytest.fixture(scope="session")
def source() -> Callable[..., str]:
    """source(name, **static): the CUDA program."""
    return keyword(lower)


@pytest.fixture(scope="session")
def machine() -> Callable[..., Machine]:
    """machine(name, **static): the compiled kernel's numbers."""
    return keyword(assemble)


def keyword(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda name, **static: function(name, tuple(sorted(static.items())))
