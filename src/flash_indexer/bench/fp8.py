"""The benchmark of `indexer_kl` in e4m3: sampled queries are checked in float64, then it is timed beside bfloat16.

The contestants take turns: the loss with its gradients in bfloat16 and in e4m3 (both parts; the indexer's alone; the
teacher's alone; q and k handed over in e4m3), quantising included, with the teacher's logsumexp given and without.
Rates count the same flops as in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_indexer import Quantized, indexer_kl, quantize
from flash_indexer.bench.kl import SIZES, passes, problem
from flash_indexer.bench.timing import MATMUL, Size, measured, named, time_in_turns
from flash_indexer.ops.quantization import dequantize

SUITE, RESULTS = "fp8", "fp8.jsonl"
NAMES = ("v32_absorbed", "v32_expanded", "mqa64", "gqa32", "smollm2")
ROUNDS, SAMPLED_ROWS = 20, 6
BOTH: dict[str, Any] = dict(index_dtype="fp8", teacher_dtype="fp8")
KL_ERROR, GRADIENT_ERROR = 1e-3, 2**-6
"""Tensor cores keep 14 bits of a sum of e4m3 products: more is wrong. Gradients are rounded to bfloat16 besides, twice
where they are rotated."""


def run(
    out: Path, names: Sequence[str] | None = None, *, commit: str = "unknown", say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Checks, measures and appends a line for each of NAMES, or of `names` among them, to out/fp8.jsonl.

    Raises:
        OSError: without a GPU of compute capability 9.0. RuntimeError: where a result is wrong.
        ValueError: for a name that is none of them.
    """
    records = []
    for record in measured(
        ((name, partial(measure, SIZES[name])) for name in named(names, NAMES)), out / RESULTS, commit
    ):
        say(line(record))
        records.append(record)
    return records


def line(record: dict[str, Any]) -> str:
    """One line for people."""
    times = {name: record[name]["p50"] for name in ("both", "handed_over", "index", "teacher")}
    ratios = ", ".join(f"{name} {ms:.3f} ms ({ms / record['bf16']['p50']:.3f} x)" for name, ms in times.items())
    score = record["passes"]["both"]["teacher"]
    return (
        f"{record['name']:<12} bf16 {record['bf16']['p50']:.3f} ms; {ratios}; teacher scores {score['ms']:.3f} ms, "
        f"{score['tflops']:.0f} TFLOP/s; index scores {record['index_over_bf16']:.3f} x, quantising included"
    )


def measure(size: Size) -> dict[str, Any]:
    """Checks and times one size; see the module's docstring."""
    tensors, others = problem(size)
    check_rows(tensors, others)
    q, k = tensors[:2]
    index_q, index_k, weights = (x.requires_grad_() for x in tensors[2:])
    alone = {**others, "lse": None}
    square = torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16)

    def step(options: dict[str, Any], q: Tensor | Quantized = q, k: Tensor | Quantized = k) -> Callable[[], None]:
        def call() -> None:
            indexer_kl(q, k, index_q, index_k, weights, **options).loss.backward()  # type: ignore[no-untyped-call]
            for leaf in (index_q, index_k, weights):
                leaf.grad = None

        return call

    contestants: dict[str, Callable[[], Any]] = {
        "bf16": step(others),
        "both": step(others | BOTH),
        "handed_over": step(others | BOTH, quantize(q, rotation=True), quantize(k, rotation=True)),
        "index": step({**others, "index_dtype": "fp8"}),
        "index_unrotated": step({**others, "index_dtype": "fp8_unrotated"}),
        "teacher": step({**others, "teacher_dtype": "fp8"}),
        "teacher_unrotated": step({**others, "teacher_dtype": "fp8_unrotated"}),
        "bf16_without_lse": step(alone),
        "both_without_lse": step(alone | BOTH),
        "matmul": lambda: square @ square,
    }
    slices = {name: passes(contestants[name], size) for name in ("bf16", "both", "index")}
    times = time_in_turns(contestants, ROUNDS)
    index = slices["index"]["index"]["ms"] + slices["index"]["quantize"]["ms"]
    return {
        "size": asdict(size), "pairs": size.pairs, "rounds": ROUNDS, **times, "passes": slices,
        "index_over_bf16": index / slices["bf16"]["index"]["ms"],
        "matmul_tflops": 2 * MATMUL**3 / times["matmul"]["p50"] / 1e9,
    }  # fmt: skip


def check_rows(tensors: list[Tensor], others: dict[str, Any]) -> None:
    """KL, and the gradients of index_q and the weights, of a few queries of the very problem that is timed, in float64.

    Raises:
        RuntimeError: where one is further off than KL_ERROR or GRADIENT_ERROR of the tensors' own norm.
    """
    leaves = [x.clone().requires_grad_() for x in tensors[2:]]
    options = {**others, "lse": None} | BOTH
    result = indexer_kl(*tensors[:2], *leaves, **options)
    d_index_q, d_weights = torch.autograd.grad(result.loss, [leaves[0], leaves[2]])
    T, G = tensors[0].shape[0], tensors[1].shape[1]
    for row in torch.linspace(T // 3, T - 1, SAMPLED_ROWS).long().tolist():
        keys = slice(int(others["key_start"][row]), int(others["key_end"][row]))
        q, iq = (rounded(tensors[n][row]) for n in (0, 2))
        k, ik = (rounded(tensors[n][keys]) for n in (1, 3))
        w = tensors[4][row].double()
        logits = torch.einsum("ghd,sgd->ghs", q.view(G, -1, q.shape[-1]), k).flatten(0, 1) * others["softmax_scale"]
        p = logits.softmax(-1).mean(0)
        scores = w @ (iq @ ik.T).relu()
        kl = (torch.xlogy(p, p) - p * scores.log_softmax(-1)).sum()
        index_q, index_k = tensors[2][row].double(), tensors[3][keys].double()
        unscaled = ((scores.softmax(-1) - p) / T * (index_q @ index_k.T > 0)) @ index_k
        expected = {"d_index_q": w[:, None] * unscaled, "d_index_weights": (index_q * unscaled).sum(-1)}
        got = {"d_index_q": d_index_q[row], "d_index_weights": d_weights[row]}
        errors = {n: float((got[n].double() - e).norm() / e.norm()) for n, e in expected.items()}
        errors["kl"] = abs(float(result.kl[row]) - float(kl)) / float(kl)
        if not (errors["kl"] <= KL_ERROR and all(error <= GRADIENT_ERROR for error in errors.values())):
            raise RuntimeError(f"bench: query {row} is wrong, so no speed is reported: relative errors {errors}")


def rounded(x: Tensor) -> Tensor:
    """Rotated and in e4m3, as float64, by torch on the CPU."""
    return dequantize(quantize(x.cpu(), rotation=True), torch.float64).to(x.device)
