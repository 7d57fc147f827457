"""Compiled kernels: from memory, from TileLang's disk cache, or compiled side by side in processes of their own.

    python -m flash_indexer.kernels.cache                        every kernel of the package (a minute or two, once)
    python -m flash_indexer.kernels.cache score:D=128,mode=0 gradients_reduce:E=64

A kernel's cache entry is TileLang's. Beside it lies a small note that says which entry belongs to which kernel of which
version of this folder (any change in it makes a new version: no header and no import is overlooked). So a process knows
what is missing before it asks for anything, and loads what is there with TileLang's runtime library alone: importing
TileLang and reading the kernels' programs takes seconds. Several processes (the ranks of a node) take turns: the first
compiles, the others wait and load.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import metadata, util
from pathlib import Path

from flash_indexer.kernels import catalog

CHILD = "import sys; sys.path[:] = {path!r}; from flash_indexer.kernels.cache import main; main([{title!r}])"
EXECUTABLE = "executable.so"  # of a cache entry
NAMED = 8  # kernels that a progress line names


def load(name, **static):
    """The compiled kernel `name` with these static sizes, a callable on torch tensors.

    Raises:
        ImportError: without tilelang. RuntimeError: without a CUDA compiler, where the kernel is not cached.
    """
    return _load(catalog.kernel(name, **static))


@functools.cache
def prepare(*kernels):
    """Compiles those of `kernels`, each (name, ((size, value), ...)), that the disk cache lacks; says so on stderr."""
    wanted = [catalog.kernel(name, **dict(static)) for name, static in kernels]
    compile_missing(wanted)
    for kernel in wanted:
        _load(kernel)


def attempt(kernels):
    """Compiles those of `kernels` that the disk cache lacks; one that doesn't compile leaves the others alone.

    Yields (kernel, None), or (kernel, the end of what the compiler said), as soon as each is known.

    Raises:
        RuntimeError: where the cache is switched off, or without a CUDA compiler.
    """
    if not _settings().is_cache_enabled():
        raise RuntimeError("flash_indexer: TileLang's kernel cache must be on, got it disabled; enable it")
    kernels = list(dict.fromkeys(kernels))
    if all(entry(kernel) for kernel in kernels):
        yield from ((kernel, None) for kernel in kernels)
        return
    need_compiler()
    with _turn():
        missing = [kernel for kernel in kernels if entry(kernel) is None]
        yield from ((kernel, None) for kernel in kernels if kernel not in missing)
        yield from _one_after_another(missing)


@functools.cache
def _load(kernel):
    compile_missing([kernel])
    folder = entry(kernel)
    if folder is None:  # the cache is switched off
        return _compiled(kernel)
    return _runtime().load_module(str(folder / EXECUTABLE))["main"]


def _compiled(kernel):
    """Loads the kernel from TileLang's cache, or compiles it in this process and notes where its entry is."""
    tilelang = _tilelang()
    function, pass_configs = catalog.program(kernel)
    compiled = tilelang.compile(function, target=catalog.TARGET, pass_configs=pass_configs)
    folder_of_it = getattr(compiled, "_tilelang_cache_path", None)
    if folder_of_it is not None and entry(kernel) is None:
        record(kernel, folder_of_it)
    return compiled


def compile_missing(kernels):
    """Compiles those of `kernels` that the disk cache lacks, under a lock; whoever waited for it looks again.

    Raises:
        RuntimeError: without a CUDA compiler, or where one does not compile (with the end of what the compiler said).
    """
    if not _settings().is_cache_enabled() or all(entry(kernel) for kernel in kernels):
        return
    need_compiler()
    with _turn():
        missing = [kernel for kernel in dict.fromkeys(kernels) if entry(kernel) is None]
        if missing:
            _compile_side_by_side(missing)


def _compile_side_by_side(missing):
    started = time.monotonic()
    names = ", ".join(catalog.title(kernel) for kernel in missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
    count = f"{len(missing)} GPU kernel{'s' * (len(missing) > 1)}"
    _say(f"compiling {count}, once; cached in {folder()}: {names}")
    with contextlib.closing(_one_after_another(missing)) as compiled:
        for done, (kernel, complaint) in enumerate(compiled, 1):
            if complaint is not None:
                raise RuntimeError(f"flash_indexer: {catalog.title(kernel)} did not compile:\n{complaint}")
            _say(f"{done} of {count} compiled ({catalog.title(kernel)}), {time.monotonic() - started:.0f} s")


def _one_after_another(missing):
    """Compiles in processes of their own, side by side; yields what `attempt` does, in the order of their ends."""
    waiting, running, workers = list(missing), {}, os.cpu_count() or 1
    with contextlib.ExitStack() as outputs:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    kernel = waiting.pop(0)
                    output = outputs.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
                    command = [sys.executable, "-c", CHILD.format(path=sys.path, title=catalog.title(kernel))]
                    running[kernel] = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT), output
                time.sleep(0.05)
                for kernel, (process, output) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[kernel]
                    failed = process.returncode or entry(kernel) is None
                    output.seek(0)
                    yield kernel, "".join(output.readlines()[-20:]) if failed else None
        finally:
            for process, _ in running.values():
                process.kill()
                process.wait()


@contextlib.contextmanager
def _turn():
    """One process at a time; without effect on file systems that can't lock."""
    ours = folder() / "flash-indexer"
    ours.mkdir(parents=True, exist_ok=True)
    with open(ours / "lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another process that compiles GPU kernels")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def _tilelang():
    try:
        import tilelang
    except ImportError as error:
        raise _no_tilelang() from error
    return tilelang


@functools.cache
def _runtime():
    """tvm_ffi, with the libraries in which TileLang's launches live; TileLang itself is not imported."""
    import tvm_ffi

    flags = ctypes.RTLD_GLOBAL | os.RTLD_LAZY
    solver = util.find_spec("z3")  # libtilelang's own path to it is wrong where packages are links
    if solver is not None and (Path(solver.origin).parent / "lib" / "libz3.so").exists():
        ctypes.CDLL(str(Path(solver.origin).parent / "lib" / "libz3.so"), flags)
    libraries = Path(util.find_spec("tilelang").origin).parent / "lib"
    ctypes.CDLL(str(libraries / "libtvm_runtime.so"), flags)
    ctypes.CDLL(str(libraries / "libtilelang.so"), os.RTLD_LAZY)
    return tvm_ffi


def _no_tilelang():
    return ImportError(
        "flash_indexer: CUDA tensors need tilelang 0.1.15; install it with pip install 'flash-indexer[kernels]'"
    )


def _settings():
    """TileLang's settings; where it isn't imported, read by its own module of settings, which needs nothing else."""
    return _tilelang().env if sys.modules.get("tilelang") is not None else _settings_alone()


@functools.cache
def _settings_alone():
    package = util.find_spec("tilelang") if "tilelang" not in sys.modules else None
    if package is None:
        raise _no_tilelang()
    specification = util.spec_from_file_location("flash_indexer_tilelang_env", Path(package.origin).with_name("env.py"))
    module = sys.modules[specification.name] = util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.env


def need_compiler():
    """Raises RuntimeError with the remedies where nvcc is not found."""
    home = _settings().CUDA_HOME
    if home and (Path(home) / "bin" / "nvcc").exists():
        return
    raise RuntimeError(
        "flash_indexer: compiling the GPU kernels needs nvcc (CUDA 12.8 or later), found none on PATH or under "
        "CUDA_HOME; install the CUDA toolkit (or pip install 'flash-indexer[compiler]'), or set CUDA_HOME to where it "
        f"is, or copy a filled kernel cache ({folder()}) from a machine that has it"
    )


def entry(kernel):
    """The folder in TileLang's cache that holds the kernel, made from this version of its source; None: none does."""
    try:
        place = folder() / json.loads(_note(kernel).read_text(encoding="utf-8"))["entry"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return place if (place / EXECUTABLE).is_file() else None


def record(kernel, place):
    """Notes that the folder `place` in TileLang's cache holds the kernel."""
    note = _note(kernel)
    note.parent.mkdir(parents=True, exist_ok=True)
    fresh = note.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps({"entry": os.path.relpath(place, folder())}), encoding="utf-8")
    os.replace(fresh, note)


def _note(kernel):
    name, static = kernel
    sizes = "-".join(f"{size}{value}" for size, value in static)
    return folder() / "flash-indexer" / version() / f"{name}-{sizes}.json"


def folder():
    """TileLang's disk cache."""
    return Path(_settings().TILELANG_CACHE_DIR)


@functools.cache
def version():
    """What a compiled kernel must have been made from to be loaded: `version_of` this folder, once a process."""
    return version_of(Path(__file__).parent)


def version_of(root):
    """Of every .py and .cuh file below a folder (path and content), of the target and of TileLang's version."""
    digest = hashlib.sha256(f"{metadata.version('tilelang')} {catalog.TARGET}".encode())
    for file in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".cuh")):
        content = file.read_bytes()
        digest.update(f"\n{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def _say(text):
    print(f"flash-indexer: {text}", file=sys.stderr, flush=True)


def main(titles):
    """Compiles the kernels named, or every one. Ends the process: TileLang's threads may hang at a normal exit."""
    try:
        kernels = [catalog.parse(title) for title in titles] or list(catalog.every_kernel())
    except ValueError as error:
        raise SystemExit(str(error)) from error
    status = 0
    try:
        if len(titles) == 1:
            _compiled(*kernels)
        else:
            compile_missing(kernels)
            _say(f"{len(kernels)} GPU kernels are cached in {folder()}")
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
