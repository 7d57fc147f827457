"""What is compiled, when, by whom and what is said: with the compiler replaced, or with the smallest kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest

from flash_indexer.kernels import cache as kernels
from flash_indexer.kernels.sm_90 import sizes as tiles
from flash_indexer.ops.attention import gpu_body as heads
from flash_indexer.ops.kl import gpu_body as cuda
from flash_indexer.testing import HEAD_CLASSES, KERNEL_CLASSES

SMALLEST, OTHER = (("gradients_reduce", (("E", width),)) for width in (32, 64))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty kernel cache of this process."""
    monkeypatch.setattr(kernels, "_cache_folder", lambda: tmp_path)
    monkeypatch.setattr(kernels, "_need_compiler", lambda: None)
    return tmp_path


def pretend_compiled(kernel, folder):
    note = kernels._note(*kernel)
    note.parent.mkdir(parents=True, exist_ok=True)
    (folder / "entry").mkdir(exist_ok=True)
    (folder / "entry" / kernels.EXECUTABLE).touch()
    note.write_text(json.dumps({"entry": "entry"}), encoding="utf-8")


def test_the_classes_cover_what_is_supported():
    assert len(KERNEL_CLASSES) <= 24 and len(set(KERNEL_CLASSES)) == len(KERNEL_CLASSES)
    assert {sizes.D for sizes in KERNEL_CLASSES} == set(kernels.HEAD_WIDTHS)
    assert {sizes[1:] for sizes in KERNEL_CLASSES} == set(product(kernels.INDEX_WIDTHS, kernels.PADDED_HEADS))
    assert kernels.HEAD_WIDTHS == cuda.HEAD_WIDTHS and kernels.INDEX_WIDTHS == cuda.INDEX_WIDTHS


def test_every_kernel_is_listed_once():
    listed = list(kernels.every_kernel())
    assert len(set(listed)) == len(listed)
    assert {name for name, _ in listed} == set(kernels.BUILDERS)
    assert all(static == tuple(sorted(static)) for _, static in listed)


@pytest.mark.parametrize("kernel", list(kernels.every_kernel()), ids=lambda kernel: kernels._title(*kernel))
def test_titles_are_read_back(kernel):
    assert kernels._parse(kernels._title(*kernel)) == kernel


@pytest.mark.parametrize("title", ["", "scores:D=64", "score:D=x", "score:D", "score:=4x"])
def test_other_titles_are_refused(title):
    with pytest.raises(SystemExit, match="kernels are written name:SIZE=VALUE"):
        kernels._parse(title)


def test_only_what_is_missing_is_compiled(cache, monkeypatch):
    compiled = []
    monkeypatch.setattr(kernels, "_compile_side_by_side", compiled.extend)
    kernels._compile_missing([SMALLEST, OTHER, SMALLEST])
    assert compiled == [SMALLEST, OTHER]
    pretend_compiled(OTHER, cache)
    kernels._compile_missing([SMALLEST, OTHER])
    assert compiled == [SMALLEST, OTHER, SMALLEST]
    pretend_compiled(SMALLEST, cache)
    kernels._compile_missing([SMALLEST, OTHER])
    assert len(compiled) == 3


def test_a_note_of_a_deleted_entry_or_of_another_source_is_no_kernel(cache, monkeypatch):
    pretend_compiled(SMALLEST, cache)
    assert kernels._entry(*SMALLEST) == cache / "entry"
    (cache / "entry" / kernels.EXECUTABLE).unlink()
    assert not kernels._entry(*SMALLEST)
    (cache / "entry" / kernels.EXECUTABLE).touch()
    kernels._note(*SMALLEST).write_text("torn", encoding="utf-8")
    assert not kernels._entry(*SMALLEST)
    pretend_compiled(SMALLEST, cache)
    monkeypatch.setattr(kernels, "version", lambda: "another")
    assert not kernels._entry(*SMALLEST)


def test_a_process_that_waited_looks_again(cache, monkeypatch, capsys):
    """Another process holds the lock and compiles meanwhile."""
    ready = cache / "ready"
    program = (
        "import fcntl, pathlib, sys, time\n"
        f"file = open({str(cache / 'flash-indexer' / 'lock')!r}, 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "sys.stdin.readline()\n"
    )
    (cache / "flash-indexer").mkdir()
    monkeypatch.setattr(kernels, "_compile_side_by_side", lambda missing: pytest.fail(f"compiled {missing}"))
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, text=True) as other:
        while not ready.exists():
            assert other.poll() is None
            time.sleep(0.01)
        original = kernels._say

        def finish_the_other(text):
            original(text)
            pretend_compiled(SMALLEST, cache)
            other.communicate("\n")

        monkeypatch.setattr(kernels, "_say", finish_the_other)
        kernels._compile_missing([SMALLEST])
    assert "waiting for another process that compiles GPU kernels" in capsys.readouterr().err


def test_a_failed_compilation_shows_its_output(cache, monkeypatch):
    monkeypatch.setattr(kernels, "CHILD", "print('the reason', {title!r}); raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="gradients_reduce:E=32 did not compile:\nthe reason gradients_reduce:E=32"):
        kernels._compile_side_by_side([SMALLEST])


def test_attempts_go_on_after_a_failure(cache, monkeypatch):
    """What fails is told from what is there, what compiles and what comes after."""
    third = ("gradients_reduce", (("E", 128),))
    pretend_compiled(third, cache)
    program = "print('the reason {title}'); raise SystemExit({title!r}.endswith('32'))"
    monkeypatch.setattr(kernels, "CHILD", program)
    monkeypatch.setattr(kernels.os, "cpu_count", lambda: 1)
    attempts = kernels.attempt([SMALLEST, third, OTHER, SMALLEST])
    assert next(attempts) == (third, None)
    assert next(attempts) == (SMALLEST, "the reason gradients_reduce:E=32\n")
    pretend_compiled(OTHER, cache)
    assert list(attempts) == [(OTHER, None)]
    assert list(kernels.attempt([OTHER, third])) == [(OTHER, None), (third, None)]


def test_attempts_need_the_cache(cache, monkeypatch):
    settings = kernels._settings()
    monkeypatch.setattr(type(settings), "is_cache_enabled", lambda self: False)
    with pytest.raises(RuntimeError, match="TileLang's kernel cache must be on, got it disabled"):
        next(kernels.attempt([SMALLEST]))


def test_without_a_compiler_the_remedies_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_cache_folder", lambda: tmp_path)
    monkeypatch.setattr(type(kernels._settings()), "CUDA_HOME", "")
    with pytest.raises(RuntimeError, match=r"needs nvcc \(CUDA 12.8 or later\).*flash-indexer\[compiler\].*CUDA_HOME"):
        kernels._compile_missing([SMALLEST])


def test_without_tilelang_the_remedy_is_named():
    program = """
import sys
sys.modules["tilelang"] = None
from flash_indexer.kernels import cache as compile
try:
    compile.load("rows", logits=0)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'flash-indexer[kernels]'" in done.stdout


def test_kernels_are_compiled_once(tmp_path, nvcc):
    """In processes of their own, with a line of progress each; a second process finds them on disk."""
    program = f"""
import sys, time
import torch
from flash_indexer.kernels import cache as compile
started = time.monotonic()
compile.prepare({SMALLEST!r}, {OTHER!r})
kernel = compile.load("gradients_reduce", E=32)
assert callable(kernel) and kernel is compile.load("gradients_reduce", E=32)
print(time.monotonic() - started, "tilelang" in sys.modules)
try:
    kernel(1)
except (RuntimeError, TypeError) as error:
    print(error)
import tilelang  # beside what is loaded already
compile.program("gradients_reduce", (("E", 32),))
"""
    environment = os.environ | {"TILELANG_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, env=environment) for _ in range(2)]
    first, second = (run.stderr for run in runs)
    assert f"compiling 2 GPU kernels, once; cached in {tmp_path}: gradients_reduce:E=32, gradients_reduce:E=64" in first
    assert "2 of 2 GPU kernels compiled" in first
    assert "GPU kernel" not in second
    seconds, imported = runs[1].stdout.splitlines()[0].split()
    assert float(seconds) < 1 and imported == "False"
    assert all("num_args should be 4" in run.stdout for run in runs)


def test_the_classes_of_the_tests_are_compiled_beforehand():
    """So that no test waits for a compiler: what the operators ask for, for every class of sizes."""
    listed = set(kernels.every_kernel())
    for sizes in HEAD_CLASSES:
        D, V, E = heads._width(sizes.D), heads._width(sizes.V), heads._index_width(sizes.E, sizes.heads)
        if D <= 128 and E <= 64:
            assert ("head_gradients_once", (("D", D), ("E", E), ("HG", sizes.heads))) in listed
        for name, static in (
            ("attention", dict(D=D, V=V, E=0, HG=sizes.heads, **tiles.attention(D, V, 0, sizes.heads))),
            ("attention", dict(D=D, V=V, E=E, HG=sizes.heads, **tiles.attention(D, V, E, sizes.heads))),
            ("head_gradients_query", dict(D=D, E=E, HG=sizes.heads, **tiles.head_gradients_query(D, E))),
            ("head_gradients_key", dict(D=D, E=E, HG=sizes.heads, **tiles.head_gradients_key(D, E))),
        ):
            assert (name, tuple(sorted(static.items()))) in listed, (name, static)


def shared_header(folder):
    (folder / "device").mkdir(exist_ok=True)
    (folder / "device" / "shared.cuh").write_text("// included by another header alone", encoding="utf-8")


def imported_module(folder):
    """As `from flash_indexer.kernels import macros` would read it: its name stands in no import of a dotted module."""
    (folder / "macros.py").write_text("X = 1", encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        shared_header,
        imported_module,
        lambda folder: (folder / "wgmma.cuh").write_text("// another", encoding="utf-8"),
        lambda folder: (folder / "score.py").write_text("# another", encoding="utf-8"),
        lambda folder: (folder / "score.py").rename(folder / "scores.py"),
        lambda folder: (folder / "score.py").unlink(),
    ],
    ids=["a new header", "a new module", "a header", "a module", "a name", "a module less"],
)
def test_any_change_of_the_folder_is_another_version(change, tmp_path):
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "score.py").write_text("# one", encoding="utf-8")
    (folder / "wgmma.cuh").write_text("// one", encoding="utf-8")
    before = kernels.version_of(folder)
    assert kernels.version_of(folder) == before
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "score.pyc").write_bytes(b"compiled")
    assert kernels.version_of(folder) == before, "what Python leaves there is no source"
    change(folder)
    assert kernels.version_of(folder) != before


def test_the_version_is_of_the_package():
    assert kernels.version() == kernels.version_of(Path(kernels.__file__).parent)
