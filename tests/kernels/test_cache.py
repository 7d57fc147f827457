"""What is compiled, when, by whom and what is said: by a child that only pretends to, or with the smallest kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from flash_indexer.kernels import cache, catalog
from flash_indexer.kernels.sm_90 import sizes
from flash_indexer.ops.attention import layout
from flash_indexer.testing import HEAD_CLASSES, KERNEL_CLASSES

SMALLEST, OTHER, THIRD = (catalog.kernel("gradients_reduce", E=width) for width in (32, 64, 128))
PRETEND = """
import os, sys
sys.path[:] = {path!r}
from flash_indexer.kernels import cache, catalog
kernel = catalog.parse({title!r})
with open(cache.folder() / "compiled", "a", encoding="utf-8") as file:
    file.write({title!r} + "\\n")
entry = cache.folder() / {title!r}.replace(":", "-")
entry.mkdir()
(entry / cache.EXECUTABLE).touch()
cache.record(kernel, entry)
"""
FAIL = "print('the reason', {title!r}); raise SystemExit(3)"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty kernel cache, of this process and of its children, who pretend to compile."""
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "need_compiler", lambda: None)
    monkeypatch.setattr(cache, "CHILD", PRETEND)
    return tmp_path


def compiled(folder):
    """Titles of what children compiled, in order."""
    file = folder / "compiled"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def pretend_compiled(kernel, folder):
    entry = folder / "entry"
    entry.mkdir(exist_ok=True)
    (entry / cache.EXECUTABLE).touch()
    cache.record(kernel, entry)
    return entry


def test_the_classes_cover_what_is_supported():
    assert len(KERNEL_CLASSES) <= 24 and len(set(KERNEL_CLASSES)) == len(KERNEL_CLASSES)
    assert {size.D for size in KERNEL_CLASSES} == set(sizes.HEAD_WIDTHS)
    assert {size[1:] for size in KERNEL_CLASSES} == set(product(sizes.INDEX_WIDTHS, sizes.PADDED_HEADS))


def test_only_what_is_missing_is_compiled(folder, capsys):
    cache.compile_missing([SMALLEST, OTHER, SMALLEST])
    assert sorted(compiled(folder)) == ["gradients_reduce:E=32", "gradients_reduce:E=64"]
    text = capsys.readouterr().err
    assert f"compiling 2 GPU kernels, once; cached in {folder}: gradients_reduce:E=32, gradients_reduce:E=64" in text
    assert "2 of 2 GPU kernels compiled" in text
    cache.compile_missing([SMALLEST, OTHER])
    assert len(compiled(folder)) == 2 and capsys.readouterr().err == ""
    cache.compile_missing([SMALLEST, THIRD])
    assert compiled(folder)[2:] == ["gradients_reduce:E=128"]


def test_a_note_of_a_deleted_entry_or_of_another_source_is_no_kernel(folder, monkeypatch):
    assert cache.entry(SMALLEST) is None
    entry = pretend_compiled(SMALLEST, folder)
    assert cache.entry(SMALLEST) == entry and cache.entry(OTHER) is None
    (entry / cache.EXECUTABLE).unlink()
    assert cache.entry(SMALLEST) is None
    (entry / cache.EXECUTABLE).touch()
    assert cache.entry(SMALLEST) == entry
    for note in folder.rglob("*.json"):
        note.write_text("torn", encoding="utf-8")
    assert cache.entry(SMALLEST) is None
    pretend_compiled(SMALLEST, folder)
    monkeypatch.setattr(cache, "version", lambda: "another")
    assert cache.entry(SMALLEST) is None


def test_a_process_that_waited_looks_again(folder, monkeypatch):
    """Another process holds the lock and compiles meanwhile."""
    program = (
        "import fcntl, sys\n"
        f"file = open({str(folder / 'flash-indexer' / 'lock')!r}, 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    (folder / "flash-indexer").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "ready\n"
        said = []

        class Listener:
            """Where messages go: at the first one, the other process ends."""

            def write(self, text):
                said.append(text)
                if len(said) == 1:
                    pretend_compiled(SMALLEST, folder)
                    other.communicate("\n")

            def flush(self):
                pass

        monkeypatch.setattr(sys, "stderr", Listener())
        cache.compile_missing([SMALLEST])
    assert "waiting for another process that compiles GPU kernels" in "".join(said)
    assert compiled(folder) == []


def test_a_failed_compilation_shows_its_output(folder, monkeypatch):
    monkeypatch.setattr(cache, "CHILD", FAIL)
    with pytest.raises(RuntimeError, match="gradients_reduce:E=32 did not compile:\nthe reason gradients_reduce:E=32"):
        cache.compile_missing([SMALLEST])


def test_attempts_go_on_after_a_failure(folder, monkeypatch):
    """What fails is told from what is there, what compiles and what comes after."""
    pretend_compiled(THIRD, folder)
    monkeypatch.setattr(cache, "CHILD", "if {title!r}.endswith('32'):\n    " + FAIL + PRETEND)
    monkeypatch.setattr(cache.os, "cpu_count", lambda: 1)
    attempts = list(cache.attempt([SMALLEST, THIRD, OTHER, SMALLEST]))
    assert attempts == [(THIRD, None), (SMALLEST, "the reason gradients_reduce:E=32\n"), (OTHER, None)]
    assert list(cache.attempt([OTHER, THIRD])) == [(OTHER, None), (THIRD, None)]
    assert compiled(folder) == ["gradients_reduce:E=64"]


def test_attempts_need_the_cache(folder, monkeypatch):
    monkeypatch.setenv("TILELANG_DISABLE_CACHE", "1")
    with pytest.raises(RuntimeError, match="TileLang's kernel cache must be on, got it disabled"):
        next(cache.attempt([SMALLEST]))


def run(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ | environment
    )


def test_without_a_compiler_the_remedies_are_named(tmp_path):
    program = """
from flash_indexer.kernels import cache
try:
    cache.load("rows", logits=0)
except RuntimeError as error:
    print(error)
"""
    done = run(program, TILELANG_CACHE_DIR=str(tmp_path), CUDA_HOME=str(tmp_path / "nothing"))
    for remedy in ("needs nvcc (CUDA 12.8 or later)", "flash-indexer[compiler]", "CUDA_HOME", str(tmp_path)):
        assert remedy in done.stdout


def test_without_tilelang_the_remedy_is_named():
    program = """
import sys
sys.modules["tilelang"] = None
from flash_indexer.kernels import cache
try:
    cache.load("rows", logits=0)
except ImportError as error:
    print(error)
"""
    assert "pip install 'flash-indexer[kernels]'" in run(program).stdout


@pytest.mark.slow
def test_a_kernel_is_compiled_once(tmp_path, nvcc):
    """In a process of its own; a second process loads it from disk without importing TileLang."""
    program = """
import sys
import torch
from flash_indexer.kernels import cache, catalog
cache.prepare(("gradients_reduce", (("E", 32),)))
kernel = cache.load("gradients_reduce", E=32)
assert callable(kernel) and kernel is cache.load("gradients_reduce", E=32)
print("tilelang" in sys.modules)
try:
    kernel(1)
except (RuntimeError, TypeError) as error:
    print(error)
import tilelang  # beside what is loaded already
catalog.program(catalog.kernel("gradients_reduce", E=32))
"""
    first, second = (run(program, TILELANG_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert f"compiling 1 GPU kernel, once; cached in {tmp_path}: gradients_reduce:E=32" in first.stderr
    assert "GPU kernel" not in second.stderr
    assert second.stdout.splitlines()[0] == "False"
    assert all("num_args should be 4" in done.stdout for done in (first, second))


def test_the_classes_of_the_tests_are_compiled_beforehand():
    """So that no test waits for a compiler: what the operators ask for, for every class of sizes."""
    listed = set(catalog.every_kernel())
    for sizes_of in HEAD_CLASSES:
        HG = sizes_of.heads
        D, V, E = layout.padded_width(sizes_of.D), layout.padded_width(sizes_of.V), layout.index_width(sizes_of.E, HG)
        if D <= 128 and E <= 64:
            assert catalog.kernel("head_gradients_once", D=D, E=E, HG=HG) in listed
        for kernel in (
            catalog.kernel("attention", D=D, V=V, E=0, HG=HG, **sizes.attention(D, V, 0, HG)),
            catalog.kernel("attention", D=D, V=V, E=E, HG=HG, **sizes.attention(D, V, E, HG)),
            catalog.kernel("head_gradients_query", D=D, E=E, HG=HG, **sizes.head_gradients_query(D, E)),
            catalog.kernel("head_gradients_key", D=D, E=E, HG=HG, **sizes.head_gradients_key(D, E)),
        ):
            assert kernel in listed


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
    before = cache.version_of(folder)
    assert cache.version_of(folder) == before
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "score.pyc").write_bytes(b"compiled")
    assert cache.version_of(folder) == before, "what Python leaves there is no source"
    change(folder)
    assert cache.version_of(folder) != before


def test_the_version_is_of_the_package():
    assert cache.version() == cache.version_of(Path(cache.__file__).parent)
