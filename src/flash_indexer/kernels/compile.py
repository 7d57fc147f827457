"""Compiled kernels: from memory, from TileLang's disk cache, or compiled side by side in processes of their own.

    python -m flash_indexer.kernels.compile                        every kernel of the package (a minute or two, once)
    python -m flash_indexer.kernels.compile score:D=128,mode=0 rows:logits=0

A kernel's cache entry is TileLang's. Beside it lies a small note that says which entry belongs to which kernel of which
version of these sources, so that a process knows what is missing before it asks for anything.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

TARGET = {"kind": "cuda", "arch": "sm_90a"}
BUILDERS = {
    "score": ("score", "build"),
    "lse": ("lse", "build"),
    "rows": ("rows", "build"),
    "gradients_query": ("gradients", "build_query"),
    "gradients_key": ("gradients", "build_key"),
    "gradients_reduce": ("gradients", "build_reduce"),
}
HEAD_WIDTHS, INDEX_WIDTHS, PADDED_HEADS = (64, 96, 128, 192, 256, 576), (32, 64, 128), (8, 16, 32, 64)
EXP, RELU, SUM = 0, 1, 2


def load(name, **static):
    """The compiled kernel `name` with these static sizes, a callable on torch tensors.

    Raises:
        ImportError: without tilelang. RuntimeError: without a CUDA compiler, where the kernel is not cached.
    """
    return _load(name, tuple(sorted(static.items())))


@functools.cache
def prepare(*kernels):
    """Compiles those of `kernels`, each (name, ((size, value), ...)), that the disk cache lacks; says so on stderr."""
    missing = [kernel for kernel in kernels if not _cached(*kernel)]
    if len(missing) > 1:
        _compile_side_by_side(missing)
    for name, static in kernels:
        _load(name, tuple(sorted(static)))


def every_kernel():
    """(name, static sizes) of every kernel that the package can ask for."""
    yield from (("rows", (("logits", logits),)) for logits in (0, 1))
    for D in HEAD_WIDTHS:
        yield "lse", (("D", D),)
        yield "score", (("D", D), ("mode", EXP))
        yield "score", (("D", D), ("mode", SUM))
    for E in INDEX_WIDTHS:
        yield "score", (("D", E), ("mode", RELU))
        yield "gradients_reduce", (("E", E),)
    for name, E, IP in product(("gradients_query", "gradients_key"), INDEX_WIDTHS, PADDED_HEADS):
        yield name, (("E", E), ("IP", IP))


def program(name, static):
    """The kernel's TileLang program and its pass configuration."""
    _tilelang()
    module, builder = BUILDERS[name]
    module = importlib.import_module(f"flash_indexer.kernels.{module}")
    return getattr(module, builder)(**dict(static)), module.PASS_CONFIGS


@functools.cache
def _load(name, static):
    tilelang = _tilelang()
    function, pass_configs = program(name, static)
    if not _cached(name, static):
        _need_compiler()
        _say(f"compiling the GPU kernel {_title(name, static)}, once: it is cached in {_cache_folder()}")
    kernel = tilelang.compile(function, target=TARGET, pass_configs=pass_configs)
    _note(name, static).parent.mkdir(parents=True, exist_ok=True)
    if not _cached(name, static):
        fresh = _note(name, static).with_suffix(f".{os.getpid()}")
        entry = os.path.relpath(kernel._tilelang_cache_path, _cache_folder())
        fresh.write_text(json.dumps({"entry": entry}), encoding="utf-8")
        os.replace(fresh, _note(name, static))
    return kernel


def _compile_side_by_side(missing):
    _need_compiler()
    started, workers = time.monotonic(), os.cpu_count() or 1
    names = ", ".join(_title(*kernel) for kernel in missing[:4]) + (", ..." if len(missing) > 4 else "")
    _say(f"compiling {len(missing)} GPU kernels, {min(workers, len(missing))} at a time: {names}")
    _say(f"this happens once: they are cached in {_cache_folder()}")
    waiting, running, done = list(missing), {}, 0
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                kernel = waiting.pop(0)
                command = [sys.executable, "-m", "flash_indexer.kernels.compile", _title(*kernel)]
                running[kernel] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for kernel, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[kernel]
                if process.returncode:
                    tail = "".join(process.stdout.readlines()[-20:])
                    raise RuntimeError(f"flash_indexer: {_title(*kernel)} did not compile:\n{tail}")
                done += 1
                seconds = time.monotonic() - started
                _say(f"compiled {done} of {len(missing)} GPU kernels ({_title(*kernel)}), {seconds:.0f} s")
            time.sleep(0.05)
    finally:
        for process in running.values():
            process.kill()


@functools.cache
def _tilelang():
    try:
        import tilelang
    except ImportError as error:
        raise ImportError(
            "flash_indexer: CUDA tensors need tilelang 0.1.15; install it with pip install 'flash-indexer[kernels]'"
        ) from error
    return tilelang


def _need_compiler():
    from tilelang import env

    home = env.CUDA_HOME
    if shutil.which("nvcc") or (home and (Path(home) / "bin" / "nvcc").exists()):
        return
    raise RuntimeError(
        "flash_indexer: compiling the GPU kernels needs nvcc (CUDA 12.8 or later), found none on PATH or under "
        "CUDA_HOME; install the CUDA toolkit, or set CUDA_HOME to where it is, or copy a filled kernel cache "
        f"({_cache_folder()}) from a machine that has it"
    )


def _cached(name, static):
    note = _note(name, tuple(sorted(static)))
    try:
        return (_cache_folder() / json.loads(note.read_text(encoding="utf-8"))["entry"]).is_dir()
    except (OSError, ValueError, KeyError):
        return False


def _note(name, static):
    sizes = "-".join(f"{size}{value}" for size, value in static)
    return _cache_folder() / "flash-indexer" / _version() / f"{name}-{sizes}.json"


def _cache_folder():
    _tilelang()
    from tilelang import env

    return Path(env.TILELANG_CACHE_DIR)


@functools.cache
def _version():
    """Of these sources and of TileLang."""
    digest = hashlib.sha256(importlib.metadata.version("tilelang").encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _title(name, static):
    sizes = ",".join(f"{size}={value}" for size, value in static)
    return f"{name}:{sizes}" if sizes else name


def _parse(title):
    name, _, sizes = title.partition(":")
    if name not in BUILDERS:
        raise SystemExit(f"flash_indexer.kernels.compile: kernel must be one of {', '.join(BUILDERS)}, got {name!r}")
    pairs = (pair.partition("=") for pair in sizes.split(",") if pair)
    return name, tuple(sorted((size, int(value)) for size, _, value in pairs))


def _say(text):
    print(f"flash-indexer: {text}", file=sys.stderr, flush=True)


def main(titles):
    """Compiles the kernels named, or every one."""
    if len(titles) == 1:
        _load(*_parse(titles[0]))
    else:
        _compile_side_by_side([_parse(title) for title in titles] or [k for k in every_kernel() if not _cached(*k)])
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
