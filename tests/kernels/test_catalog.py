"""Which kernels there are, how they are written for people, and what adding one takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flash_indexer import kernels
from flash_indexer.kernels import catalog

SRC = Path(kernels.__file__).parents[1]
ROW = '    "twice": Kernel("twice", "build", ({"N": 64},), streamed=False),\n'
MODULE = '''"""Y = 2 X."""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.macros import PASS_CONFIGS

__all__ = ["PASS_CONFIGS", "build"]
SOURCE = source(__file__)


def build(N):
    n = T.dynamic("n")

    @T.prim_func
    def flash_indexer_twice(X: T.Tensor((n, N), "float32"), Y: T.Tensor((n, N), "float32")):
        with T.Kernel(n, threads=32) as bx:
            T.import_source(SOURCE)
            T.call_extern("handle", f"twice<{N}>", T.address_of(X[bx, 0]), T.address_of(Y[bx, 0]))

    return flash_indexer_twice
'''
HEADER = """#pragma once
#include "../device/numbers.cuh"
template <int N>
static __device__ __forceinline__ void twice(const float* x, float* y) {
  for (int i = threadIdx.x; i < N; i += 32) y[i] = 2.f * relu(x[i]);
}
"""
LOWER = """
import tilelang
from tilelang import tvm
from flash_indexer.kernels import cache, catalog
assert catalog.parse("twice:N=64") in list(catalog.every_kernel())
function, configs = catalog.program(catalog.kernel("twice", N=64))
target = tvm.target.Target(catalog.TARGET)
with target, tvm.transform.PassContext(opt_level=3, config={str(key.value): v for key, v in configs.items()}):
    print(tilelang.lower(function, target=target, enable_device_compile=False).kernel_source)
print(cache.version())
"""


def test_every_kernel_is_listed_once():
    listed = list(catalog.every_kernel())
    assert len(set(listed)) == len(listed)
    assert {name for name, _ in listed} == set(catalog.names())
    assert all(static == tuple(sorted(static)) for _, static in listed)


def test_titles_are_read_back():
    for kernel in catalog.every_kernel():
        assert catalog.parse(catalog.title(kernel)) == kernel
    assert catalog.title(catalog.kernel("score", mode=0, D=64)) == "score:D=64,mode=0"


@pytest.mark.parametrize("title", ["", "scores:D=64", "score:D=x", "score:D", "score:=4x", "score:=4"])
def test_other_titles_are_refused(title):
    with pytest.raises(ValueError, match="a kernel is written name:SIZE=VALUE"):
        catalog.parse(title)


def test_adding_a_kernel_takes_its_two_files_and_a_row(tmp_path):
    """In a copy of the package: it is listed, lowered and versioned. Launch, test and docs make it six files."""
    copy = tmp_path / "flash_indexer"
    shutil.copytree(SRC, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    table = copy / "kernels" / "sm_90" / "sizes.py"
    text = table.read_text(encoding="utf-8")
    assert text.rstrip().endswith("}"), "BUILDERS ends the file"
    table.write_text(text.rstrip()[:-1] + ROW + "}\n", encoding="utf-8")
    (table.parent / "twice.py").write_text(MODULE, encoding="utf-8")
    (table.parent / "twice.cuh").write_text(HEADER, encoding="utf-8")
    changed = [p for p in copy.rglob("*") if p.is_file() and before.get(p) != p.read_bytes()]
    assert len(changed) == 3
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOWER], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "twice<64>((&(X[" in done.stdout and "max_or_nan" in done.stdout, "headers of headers are in the source"
    from flash_indexer.kernels import cache

    assert done.stdout.split()[-1] != cache.version()
