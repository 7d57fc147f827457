"""The benchmark of the sparse stage's steps: sampled queries and keys are checked in float64, then they are timed.

`sparse_steps` says which steps there are. The contestants take turns with a matrix product and with what `sparse_peers`
finds: cuDNN's own kernels for selected keys, dense causal attention, FlexAttention with a bit for each (query, key),
and for few queries the torch body. A step that has no kernel is named with the reason and not timed. Rates count the
slots that hold a key: 2·H·(D + V) flops each forward, 2·H·(3·D + 2·V) back. Last come a layer of 131,072 tokens, of
which the memory is what counts (`sparse_memory`), and the first call of a process (`sparse_first_call`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flash_indexer.bench import sparse_first_call, sparse_memory
from flash_indexer.bench.sparse_check import check
from flash_indexer.bench.sparse_peers import peers
from flash_indexer.bench.sparse_problem import SIZES, SparseSize, make
from flash_indexer.bench.sparse_steps import STEPS, Steps, with_kernels
from flash_indexer.bench.timing import MATMUL, measured, named, time_in_turns

SUITE, RESULTS = "sparse", "sparse.jsonl"
PARTS = (sparse_memory, sparse_first_call)
ROUNDS = 8


def run(
    out: Path, names: Sequence[str] | None = None, *, commit: str = "unknown", say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Checks, measures and appends a line for each of SIZES, for a long layer and for first calls to out/sparse.jsonl.

    names: of these alone, as the lines call them.

    Raises:
        OSError: without a GPU of compute capability 9.0. RuntimeError: where a result is wrong.
        ValueError: for a name that is none of them.
    """
    records = []
    lines = {part.NAME: part.line for part in PARTS}
    every: dict[str, Callable[[], dict[str, Any]]] = {name: partial(measure, size) for name, size in SIZES.items()}
    every |= {part.NAME: part.measure for part in PARTS}
    for record in measured(((name, every[name]) for name in named(names, every)), out / RESULTS, commit):
        say(lines.get(record["name"], line)(record))
        records.append(record)
    return records


def line(record: dict[str, Any]) -> str:
    """One line for people."""
    times = ", ".join(f"{step} {record[step]['p50']:.2f}" for step in STEPS if step in record)
    beside = ", ".join(f"{name} {record[name]['p50']:.2f}" for name in record["peers"])
    missing = f"; no kernel: {', '.join(record['no_kernel'])}" if record["no_kernel"] else ""
    return (
        f"{record['name']:<14} ms: {times}{'; beside ' + beside if beside else ''} "
        f"(product {record['matmul_tflops']:.0f} TFLOP/s){missing}"
    )


def measure(size: SparseSize) -> dict[str, Any]:
    """Checks and times one size; see the module's docstring."""
    x = make(size)
    steps = Steps(size, x)
    answers = steps.answers()
    errors = {name: check(size, x, answer) for name, answer in answers.items()}
    ours, missing = with_kernels(steps.by_name())
    beside, reasons = peers(size, x, answers)
    square = torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16)
    times = time_in_turns({**ours, **beside, "matmul": lambda: square @ square}, ROUNDS)
    slots = int(x.selection.count.sum())
    flops = {"forward": 2 * size.H * (size.D + size.V)}
    flops |= dict.fromkeys(("backward", "any_order"), 2 * size.H * (3 * size.D + 2 * size.V))
    return {
        "size": asdict(size), "slots": slots, "pairs": size.pairs, "rounds": ROUNDS, **times, "errors": errors,
        "no_kernel": missing, "peers": list(beside), "notes": reasons,
        "tflops": {step: flops[step] * slots / times[step]["p50"] / 1e9 for step in flops if step in times},
        "matmul_tflops": 2 * MATMUL**3 / times["matmul"]["p50"] / 1e9,
    }  # fmt: skip
