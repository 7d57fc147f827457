"""`flash-indexer tune`: the tiles that are fastest for given shapes on this GPU, written to the file that kernels read.

For each kernel: every candidate of `kernels.sm_90.sizes` is compiled, side by side; each is compared with the default's
results and timed beside the default in a process that may die (`tune_worker`); the best are measured again, longer. A
winner is faster than the default both times by more than noise. Where none is, the default stays.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flash_indexer.bench.timing import Size, needs_gpu
from flash_indexer.bench.tune_worker import Lost, Worker
from flash_indexer.files.checkpoint import write_json
from flash_indexer.kernels import cache as kernels
from flash_indexer.kernels import tuned
from flash_indexer.kernels.sm_90 import sizes as tiles
from flash_indexer.ops.attention import layout

NOISE = 0.01  # a winner's time is below 1 - NOISE of the default's
ROUNDS, FINAL_ROUNDS, FINALISTS = 12, 40, 3
DOCUMENTS = (2038, 2045, 2029, 2031)  # four of the suite mqa64

Sizes = dict[str, int]
Measure = Callable[[Sizes, int], tuple[float, float]]
"""measure(sizes, rounds): milliseconds of a candidate and of the default; raises Lost."""


class Stage(NamedTuple):
    """A kernel for one shape; `shape` are its static sizes but for those that are chosen."""

    title: str
    kernel: str
    shape: Sizes


class Result(NamedTuple):
    """Of one stage: best is default where no candidate won. Times are None where nothing was measured. lost: why."""

    default: Sizes
    best: Sizes
    ms: float | None
    default_ms: float | None
    lost: list[tuple[Sizes, str]]


def parse_size(
    heads: int, key_heads: int, head_dim: int, value_dim: int, index_dim: int, documents: str | None
) -> Size:
    """The problem to tune for; documents is like 2048x4,512, None is the suite mqa64's.

    Raises:
        ValueError: naming the option, what it must be and what it is.
    """
    if key_heads < 1 or heads < 1 or heads % key_heads or heads // key_heads > tiles.MAX_HEADS:
        raise ValueError(
            f"tune: --heads must be 1 to {tiles.MAX_HEADS} for each of --key-heads, got {heads} and {key_heads}"
        )
    for name, width in (("head-dim", head_dim), ("value-dim", value_dim)):
        if not 1 <= width <= tiles.WIDTHS[-1]:
            raise ValueError(
                f"tune: --{name} must be 1 to {tiles.WIDTHS[-1]}, got {width}; others have no tiles to choose"
            )
    if index_dim not in tiles.INDEX_WIDTHS:
        raise ValueError(f"tune: --index-dim must be of {', '.join(map(str, tiles.INDEX_WIDTHS))}, got {index_dim}")
    lengths = DOCUMENTS if documents is None else _lengths(documents)
    return Size(heads, key_heads, head_dim, heads, index_dim, lengths, value_dim)


def _lengths(text: str) -> tuple[int, ...]:
    lengths: list[int] = []
    for part in text.split(","):
        length, _, count = part.strip().partition("x")
        if not (length.isdecimal() and (count or "1").isdecimal() and int(length) * int(count or 1) > 0):
            raise ValueError(f"tune: --documents must be lengths like 2048x4,512, got {text!r}")
        lengths += [int(length)] * int(count or 1)
    return tuple(lengths)


def stages(size: Size) -> list[Stage]:
    """What a problem launches and can be tuned; the attention alone where the per-head pass does not take the shape."""
    shapes = layout.shapes(size.D, size.V, size.E, size.H // size.G)
    alone = Stage("attention alone", "attention", shapes["attention"] | {"E": 0})
    titles = {
        "attention": "attention and KL", "head_gradients_query": "gradient of index_q",
        "head_gradients_key": "gradient of index_k",
    }  # fmt: skip
    per_head = [Stage(title, kernel, shapes[kernel]) for kernel, title in titles.items()]
    takes_all = all(tiles.candidates(stage.kernel, stage.shape) for stage in per_head)
    return [*per_head[:1], alone, *per_head[1:]] if takes_all else [alone]


def search(
    candidates: Sequence[Sizes], measure: Measure, advance: Callable[[float | None], None] = lambda best: None
) -> Result:
    """The candidate that beats the first one, the default, by more than NOISE in a short and in a long measurement.

    Args:
        advance: called after each candidate with the best ratio so far, None before there is one.
    """
    default, *others = candidates
    lost: list[tuple[Sizes, str]] = []

    def measured(tried: Sequence[Sizes], rounds: int, advance: Callable[[float | None], None]) -> list[Any]:
        results: list[tuple[float, float, float, Sizes]] = []
        for sizes in tried:
            try:
                ms, default_ms = measure(sizes, rounds)
                results.append((ms / default_ms, ms, default_ms, sizes))
            except Lost as error:
                lost.append((sizes, str(error)))
            advance(min((result[0] for result in results), default=None))
        return sorted(results, key=lambda result: result[0])

    first = measured(others, ROUNDS, advance)
    finalists = [sizes for ratio, _, _, sizes in first if ratio < 1 - NOISE][:FINALISTS]
    final = measured(finalists, FINAL_ROUNDS, lambda best: None)
    if final and final[0][0] < 1 - NOISE:
        _, ms, default_ms, sizes = final[0]
        return Result(default, sizes, ms, default_ms, lost)
    usual = statistics.median(result[2] for result in first) if first else None
    return Result(default, default, usual, usual, lost)


def run(size: Size, *, out: Path | None, dry_run: bool, console: Console, worker: Worker | None = None) -> list[Result]:
    """Searches, prints what won, and writes the winners unless `dry_run`.

    Args:
        out: None means the file that the kernels read.

    Raises:
        OSError: without a GPU of compute capability 9.0, or where nothing could be measured. ValueError: where `out`
        holds something else.
    """
    needs_gpu("tune")
    path = location() if out is None else out
    if path.exists() and tuned.read(path) is None:
        raise ValueError(f"tune: --out must be a file of tune, or not exist, got {path}; delete it or choose another")
    todo = stages(size)
    with _progress(console) as bar, worker or Worker() as process:
        if not console.is_terminal:
            console.print("compiling the candidates that the kernel cache lacks")
        usable, failed = compile_candidates(todo, bar)
        results = []
        for stage, candidates, uncompiled in zip(todo, usable, failed, strict=True):
            result = _search_stage(stage, candidates, size, process, bar)
            results.append(result._replace(lost=[*uncompiled, *result.lost]))
            if not console.is_terminal:
                console.print(f"{stage.title}: {len(candidates)} candidates measured", highlight=False)
    console.print(table(todo, results))
    for stage, result in zip(todo, results, strict=True):
        for sizes, why in result.lost:
            console.print(f"{stage.title}: left out {written(sizes)}: {why}", highlight=False, markup=False)
    if all(result.ms is None for result in results) and any(result.lost for result in results):
        raise OSError("tune: nothing could be measured; the reasons are above, and nothing was written")
    if not dry_run:
        write(path, torch.cuda.get_device_name(), list(zip(todo, results, strict=True)), sum(size.documents))
    console.print(f"{'not written: --dry-run' if dry_run else path}", highlight=False, soft_wrap=True, markup=False)
    return results


def compile_candidates(todo: list[Stage], bar: Progress) -> tuple[list[list[Sizes]], list[list[tuple[Sizes, str]]]]:
    """Of each stage the candidates that compile, the default first, and those that don't, with the reason.

    Raises:
        OSError: where a default does not compile, or there is no compiler.
    """
    wanted = {
        (stage.kernel, tuple(sorted((stage.shape | sizes).items()))): (number, sizes)
        for number, stage in enumerate(todo)
        for sizes in tiles.candidates(stage.kernel, stage.shape)
    }
    reduce = [
        ("gradients_reduce", (("E", stage.shape["E"]),)) for stage in todo if stage.kernel == "head_gradients_key"
    ]
    failed: list[list[tuple[Sizes, str]]] = [[] for _ in todo]
    task = bar.add_task("compiling", total=len(wanted) + len(reduce), best="")
    try:
        with contextlib.closing(kernels.attempt([*wanted, *reduce])) as compiled:
            for kernel, complaint in compiled:
                if complaint is not None:
                    number, sizes = wanted.get(kernel, (-1, {}))
                    if number < 0 or sizes == tiles.default(todo[number].kernel, todo[number].shape):
                        raise OSError(f"tune: {kernel[0]} does not compile as it is shipped:\n{complaint}")
                    failed[number].append((sizes, f"does not compile: {complaint.strip().rpartition(chr(10))[2]}"))
                bar.advance(task)
    except (ImportError, RuntimeError) as error:
        raise OSError(f"tune: {error}") from error
    lost = [[sizes for sizes, _ in each] for each in failed]
    usable = [
        [sizes for sizes in tiles.candidates(stage.kernel, stage.shape) if sizes not in lost[number]]
        for number, stage in enumerate(todo)
    ]
    return usable, failed


def _search_stage(stage: Stage, candidates: list[Sizes], size: Size, worker: Worker, bar: Progress) -> Result:
    def measure(sizes: Sizes, rounds: int) -> tuple[float, float]:
        answer = worker.ask(
            {
                "size": asdict(size), "kernel": stage.kernel, "indexer": bool(stage.shape["E"]),
                "default": candidates[0], "sizes": sizes, "rounds": rounds,
            }
        )  # fmt: skip
        return answer["ms"], answer["default_ms"]

    task = bar.add_task(stage.title, total=len(candidates) - 1, best="")

    def advance(best: float | None) -> None:
        bar.update(task, advance=1, best="" if best is None else f"best {best:.3f} x default")

    return search(candidates, measure, advance)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[best]}"),
        TimeElapsedColumn(), console=console, disable=not console.is_terminal,
    )  # fmt: skip


def table(todo: list[Stage], results: list[Result]) -> Table:
    """A row for each stage."""
    made = Table("kernel", "default", "ms", "best", "ms", "ratio", "left out")
    for stage, result in zip(todo, results, strict=True):
        if result.ms is None or result.default_ms is None:
            times = ["-", "not measured", "-", "-"]
        else:
            best = written(result.best) if result.best != result.default else "the default"
            times = [f"{result.default_ms:.3f}", best, f"{result.ms:.3f}", f"{result.ms / result.default_ms:.3f}"]
        made.add_row(stage.title, written(result.default), *times, str(len(result.lost)))
    return made


def written(sizes: dict[str, Any]) -> str:
    """BN=96 QS=2."""
    return " ".join(f"{name}={value}" for name, value in sizes.items())


def write(path: Path, gpu: str, results: list[tuple[Stage, Result]], tokens: int) -> None:
    """Replaces the entries of every stage that was measured: by its winner, or by none where the default stays."""
    done = [(stage, result) for stage, result in results if result.ms is not None]
    replaced = [(stage.kernel, gpu, stage.shape) for stage, _ in done]
    entries = [
        entry
        for entry in tuned.read(path) or []
        if tuple(entry.get(k) for k in ("kernel", "gpu", "shape")) not in replaced
    ]
    when = datetime.now(UTC).isoformat(timespec="seconds")
    entries += [
        {
            "kernel": stage.kernel, "gpu": gpu, "source": tuned.source(stage.kernel), "shape": stage.shape,
            "sizes": result.best, "ms": result.ms, "default_ms": result.default_ms, "tokens": tokens, "measured": when,
        }
        for stage, result in done
        if result.best != result.default
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format": tuned.FORMAT, "version": tuned.VERSION, "entries": entries})
    tuned.forget()


def location() -> Path:
    """The file that the kernels read.

    Raises:
        OSError: without tilelang, beside whose cache it lies.
    """
    try:
        return Path(tuned.location())
    except ImportError as error:
        raise OSError(f"tune: {error}") from error


def show(path: Path, say: Callable[[str], None]) -> None:
    """Prints the entries of a file, and which of them count on this GPU."""
    entries = tuned.read(path)
    state = "not a file of tune: nothing of it is used" if entries is None else f"{len(entries)} entries"
    say(f"{path}: {state if path.exists() else 'there is none, the shipped tiles are used'}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    for entry in entries or []:
        refused = tuned.refusal(entry, gpu)
        parts = [written(x) if isinstance(x, dict) else str(x) for x in (entry.get("shape"), entry.get("sizes"))]
        use = "in use" if refused is None else f"not used: {refused}"
        say(f"{entry.get('kernel')} {parts[0]} on {entry.get('gpu')}: {parts[1]}; {use}")


def reset(path: Path, say: Callable[[str], None]) -> None:
    """Removes a file of tune: the shipped tiles are used again.

    Raises:
        ValueError: where it holds something else.
    """
    if path.exists() and path != location() and tuned.read(path) is None:
        raise ValueError(f"tune: --out must be a file of tune to be removed, got {path}; delete it yourself")
    say(f"removed {path}" if path.exists() else f"{path}: there is none")
    path.unlink(missing_ok=True)
    tuned.forget()
