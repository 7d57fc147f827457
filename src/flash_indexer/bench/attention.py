"""The benchmark of `ops.attention_forward` alone: sampled queries are checked in float64, then it is timed.

Beside it take turns cuDNN's attention, FlashAttention-2 where it takes the head width, and a matrix product, as in
`bench`. The rate counts 2·H·(D + V) flops a visible pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_indexer import causal_intervals
from flash_indexer.bench.baselines import attention_contestants
from flash_indexer.bench.timing import MATMUL, Size, measured, named, time_in_turns
from flash_indexer.ops import attention_forward

SUITE = "attention"
SIZES = {
    "gqa32": Size(32, 8, 128, 0, 0, (4096,) * 8, 128),
    "mqa64": Size(64, 1, 128, 0, 0, (2048,) * 16, 128),
    "mla": Size(128, 1, 576, 0, 0, (8192,), 512),
}
ROUNDS, SAMPLED_ROWS = 15, 6
RESULTS = "attention.jsonl"


def run(
    out: Path, names: Sequence[str] | None = None, *, commit: str = "unknown", say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Checks, measures and appends a line for each of SIZES, or of `names` among them, to out/attention.jsonl.

    Raises:
        OSError: without a GPU of compute capability 9.0. RuntimeError: where a result is wrong.
        ValueError: for a name that is none of them.
    """
    records = []
    for record in measured(
        ((name, partial(measure, SIZES[name])) for name in named(names, SIZES)), out / RESULTS, commit
    ):
        say(line(record))
        records.append(record)
    return records


def line(record: dict[str, Any]) -> str:
    """One line for people."""
    ratio = record["over_cudnn"]
    beside = f"cuDNN {record['cudnn_forward']['p50']:.3f} ms, {ratio:.2f} x" if ratio else record["notes"]["cudnn"]
    return (
        f"{record['name']:<6} {record['ours']['p50']:.3f} ms, {record['tflops']:.0f} TFLOP/s "
        f"(product {record['matmul_tflops']:.0f}); {beside}"
    )


def problem(size: Size, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> tuple[list[Tensor], Any]:
    """q, k, v and the keyword arguments, random; MLA's absorbed form (D=576) has its values in its keys."""
    generator = torch.Generator(device).manual_seed(0)
    T = sum(size.documents)
    q, k = (
        torch.randn(T, heads, size.D, generator=generator, device=device, dtype=dtype) for heads in (size.H, size.G)
    )
    v = torch.randn(T, size.G, size.V, generator=generator, device=device, dtype=dtype)
    key_start, key_end = causal_intervals(torch.tensor([0, *size.documents], device=device).cumsum(0))
    values = k[..., : size.V] if size.D > size.V else v
    return [q, k, values], dict(softmax_scale=size.D**-0.5, key_start=key_start, key_end=key_end)


def measure(size: Size) -> dict[str, Any]:
    """Checks sampled rows of the very problem that is timed, then times it."""
    tensors, others = problem(size)
    check_rows(tensors, others, *attention_forward(*tensors, **others))
    square = torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16)
    contestants: dict[str, Callable[[], Any]] = {
        "ours": lambda: attention_forward(*tensors, **others), "matmul": lambda: square @ square
    }  # fmt: skip
    beside, reasons = attention_contestants(size)
    forwards = {name: call for name, call in beside.items() if name.endswith("_forward")}
    times = time_in_turns(contestants | forwards, ROUNDS)
    ours, theirs = times["ours"]["p50"], times.get("cudnn_forward")
    return {
        "size": asdict(size), "pairs": size.pairs, "rounds": ROUNDS, **times, "notes": reasons,
        "tflops": 2 * size.H * (size.D + size.V) * size.pairs / ours / 1e9,
        "over_cudnn": ours / theirs["p50"] if theirs else None,
        "matmul_tflops": 2 * MATMUL**3 / times["matmul"]["p50"] / 1e9,
    }  # fmt: skip


def check_rows(tensors: list[Tensor], others: dict[str, Any], out: Tensor, lse: Tensor) -> None:
    """Output and logsumexp of a few queries of the very problem that is timed, in float64.

    Raises:
        RuntimeError: where one is off by more than rounding (2^-7 of the row's norm for the output, 1e-5 for lse).
    """
    q, k, v = tensors
    for row in torch.linspace(1, q.shape[0] - 1, SAMPLED_ROWS).long().tolist():
        keys = slice(int(others["key_start"][row]), int(others["key_end"][row]))
        groups = q.shape[1] // k.shape[1]
        key, value = (x[keys].double().repeat_interleave(groups, 1) for x in (k, v))
        logits = torch.einsum("hd,shd->hs", q[row].double(), key) * others["softmax_scale"]
        right = torch.einsum("hs,shv->hv", logits.softmax(-1), value)
        error = float((out[row].double() - right).norm() / right.norm())
        off = float((lse[row].double() - logits.logsumexp(-1)).abs().max())
        if not (error <= 2**-7 and off <= 1e-5 * (1 + float(logits.abs().max()))):
            raise RuntimeError(
                f"bench: query {row} is wrong, so no speed is reported: output off by {error:.1e} of its norm, "
                f"logsumexp by {off:.1e}"
            )
