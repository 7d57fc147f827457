"""The benchmark of `indexer_kl`: checked first, then timed beside FlashAttention-2, cuDNN and a matrix product.

    floor = (2·H·D + 8·I·E) · visible pairs / rate of a bfloat16 8192³ product measured in the same rounds

The teacher's logits are 2HD flops a pair, the index logits 2IE formed twice, the gradients' products 2IE each for
index_q and index_k. One call counts forward and backward. All contestants take turns, round by round, and are timed by
CUDA events behind a full queue, so that what is measured is the device and not the host's launches; the host's time
for a call is recorded beside. A wrong result is refused: there is no speed without truth. A size that runs for seconds
meets the power limit, at which the GPU lowers its clocks: beside it the first size is repeated for as many pairs, and
the clock behind every contestant is measured, as cycles that a spinning kernel counts over the time it takes. Its last
queries alone, as many pairs as the first size has, are measured beside that in one record (v32_late).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_indexer import causal_intervals, indexer_kl
from flash_indexer.bench.baselines import attention_contestants
from flash_indexer.bench.timing import MATMUL, Size, host_time, measured, memory, named, time_in_turns
from flash_indexer.ops import launch
from flash_indexer.ops.kl.gpu_body import teacher_lse
from flash_indexer.testing import Shape, assert_close, eager_indexer_kl, make_inputs, reference_indexer_kl

SAMPLED_ROWS = 6
ROUNDS, ROUNDS_LONG, LONG = 20, 3, 10**9
PROFILED, PAUSE = 5, 0.1  # steps; seconds before each
TOO_LONG = 10**5  # tokens of a document from which no attention is measured beside
SLICES = {
    "flash_indexer_score_narrow_fp8": "index", "flash_indexer_score_fp8": "teacher",
    "flash_indexer_score": "score", "flash_indexer_rows": "rows", "flash_indexer_gradient_query": "gradient_query",
    "flash_indexer_kl_gradients": "kl_gradients", "flash_indexer_gradient_key": "gradient_key",
    "flash_indexer_gradient_reduce": "gradient_reduce", "flash_indexer_finish": "finish",
    "flash_indexer_scale": "scale", "flash_indexer_lse": "lse", "flash_indexer_quantize": "quantize",
}  # fmt: skip

SIZES = {
    "v32_absorbed": Size(128, 1, 576, 64, 128, (8192,), 512),
    "v32_expanded": Size(128, 128, 192, 64, 128, (8192,), 128),
    "mqa64": Size(64, 1, 128, 64, 128, (8192,), 128),
    "gqa32": Size(32, 8, 128, 16, 64, (4096,) * 8, 128),
    "smollm2": Size(9, 3, 64, 8, 64, (8192,), 64),
    "v32_late": Size(128, 1, 576, 64, 128, (131072,), 512, queries=256),
    "v32_128k": Size(128, 1, 576, 64, 128, (131072,), 512),
}


def run(names: list[str], out: Path, *, commit: str = "unknown", say: Callable[[str], None] = print) -> None:
    """Measures the sizes named and appends a line for each to out/indexer_kl.jsonl.

    Raises:
        OSError: without a GPU of compute capability 9.0. RuntimeError: where a result is wrong.
        ValueError: for a size that is not in SIZES.
    """
    for record in measured(
        ((name, partial(measure, SIZES[name])) for name in named(names, SIZES)), out / "indexer_kl.jsonl", commit
    ):
        say(summary(record))


def summary(record: dict[str, Any]) -> str:
    """One line for people."""
    ours, memory = record["ours"], record["extra_bytes"] / 2**20
    return (
        f"{record['name']}: {ours['p50']:.3f} ms (p20 {ours['p20']:.3f}, p80 {ours['p80']:.3f}), "
        f"{record['over_floor']:.3f} x floor, matmul {record['matmul_tflops']:.0f} TFLOP/s, {memory:.0f} MiB extra; "
        + ", ".join(f"{name} {slice_['ms']:.3f}" for name, slice_ in record["passes"].items())
    )


def measure(size: Size) -> dict[str, Any]:
    """Checks and times one size; see the module's docstring."""
    check_gradients(size)
    tensors, others = problem(size)
    check_rows(size, tensors, others)
    step, leaves = call(tensors, others)
    peak, extra = memory(step, leaves)  # before the other contestants hold memory of their own
    rounds = ROUNDS_LONG if size.pairs > LONG else ROUNDS
    square = torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16)
    contestants: dict[str, Callable[[], Any]] = {"ours": step, "matmul": lambda: square @ square}
    beside, reasons = (
        attention_contestants(size) if max(size.documents) < TOO_LONG else ({}, {"all": "too long beside 128K tokens"})
    )
    short = SIZES["v32_absorbed"]
    if size.queries:
        contestants["short"], _ = call(*problem(short))
    if size.pairs > LONG:
        again, _ = call(*problem(short))
        repeats = size.pairs // short.pairs
        contestants["short_repeated"] = lambda: [again() for _ in range(repeats)]
        reasons |= {"short_repeated": f"v32_absorbed {repeats} times: {repeats * short.pairs} pairs"}
    times = time_in_turns(contestants | beside, rounds)
    matmul = 2 * MATMUL**3 / times["matmul"]["p50"] / 1e9
    floor = size.flops / matmul / 1e9
    return {
        "size": asdict(size), "pairs": size.pairs, "flops": size.flops, "rounds": rounds,
        **times, "notes": reasons, "matmul_tflops": matmul, "floor_ms": floor,
        "over_floor": times["ours"]["p50"] / floor, "picoseconds_a_pair": times["ours"]["p50"] * 1e9 / size.pairs,
        "peak_bytes": peak, "extra_bytes": extra, "host_ms": host_time(step), "passes": passes(step, size),
        "passes_in_turn": True,  # in a call scores of the teacher and of the indexer run side by side
    }  # fmt: skip


def call(tensors: list[Tensor], others: dict[str, Any]) -> tuple[Callable[[], None], list[Tensor]]:
    """The operator as a training step calls it, forward and backward, and the tensors that get gradients."""
    leaves = [x.requires_grad_() for x in tensors[2:]]

    def step() -> None:
        indexer_kl(*tensors, **others).loss.backward()  # type: ignore[no-untyped-call]
        for leaf in leaves:
            leaf.grad = None

    return step, leaves


def problem(size: Size) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, index_q, index_k, index_weights and the keyword arguments, LSE given, random and on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    S = sum(size.documents)
    lengths = [size.queries or n for n in size.documents]
    T = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    tensors = [normal(T, size.H, size.D), normal(S, size.G, size.D), normal(T, size.I, size.E), normal(S, size.E)]
    weights = torch.randn(T, size.I, generator=generator, device="cuda") * (size.I * size.E) ** -0.5
    boundaries = [torch.tensor([0, *n], device="cuda").cumsum(0) for n in (lengths, size.documents)]
    key_start, key_end = causal_intervals(*boundaries)
    others = dict(softmax_scale=size.D**-0.5, key_start=key_start, key_end=key_end)
    lse = teacher_lse(tensors[0], tensors[1], key_start, key_end, size.D**-0.5)
    return [*tensors, weights], {**others, "lse": lse}


def check_gradients(size: Size) -> None:
    """All outputs at 1,000 tokens of the same heads, by the ruler."""
    options: dict[str, Any] = dict(dtype=torch.bfloat16, device="cuda")
    x = make_inputs(Shape(((1000, 1000),), size.H, size.G, size.D, size.I, size.E), seed=1, **options)
    leaves = [leaf.clone().requires_grad_() for leaf in (x.index_q, x.index_k, x.index_weights)]
    result = indexer_kl(
        x.q, x.k, *leaves, softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end, lse=x.lse
    )
    got = (result.kl, result.entropy, *torch.autograd.grad(result.loss, leaves))
    truth, eager = reference_indexer_kl(x), eager_indexer_kl(x, lse=x.lse)
    for name, *values in zip(truth._fields[1:], got, truth[1:], eager[1:], strict=True):
        assert_close(name, *values)


def check_rows(size: Size, tensors: list[Tensor], others: dict[str, Any]) -> None:
    """KL, and the gradients of index_q and the weights, of a few queries of the very problem that is timed, in float64.

    Raises:
        RuntimeError: where one is off by more than rounding (1e-5 for KL, 2^-7 of the row's norm for gradients).
    """
    leaves = [x.clone().requires_grad_() for x in tensors[2:]]
    result = indexer_kl(*tensors[:2], *leaves, **others)
    d_index_q, d_weights = torch.autograd.grad(result.loss, [leaves[0], leaves[2]])
    T = tensors[0].shape[0]
    for row in torch.linspace(1, T - 1, SAMPLED_ROWS).long().tolist():
        keys = slice(int(others["key_start"][row]), int(others["key_end"][row]))
        q, iq, w = (tensors[n][row].double() for n in (0, 2, 4))
        k, ik = (tensors[n][keys].double() for n in (1, 3))
        logits = torch.einsum("ghd,sgd->ghs", q.view(size.G, -1, size.D), k).flatten(0, 1) * others["softmax_scale"]
        p = logits.softmax(-1).mean(0)
        index_logits = iq @ ik.T
        scores = w @ index_logits.relu()
        kl = (torch.xlogy(p, p) - p * scores.log_softmax(-1)).sum()
        masked = (scores.softmax(-1) - p) / T * (index_logits > 0)
        unscaled = masked @ ik
        expected = {"d_index_q": w[:, None] * unscaled, "d_index_weights": (iq * unscaled).sum(-1)}
        got = {"d_index_q": d_index_q[row], "d_index_weights": d_weights[row]}
        errors = {n: float((got[n].double() - e).norm() / e.norm().clamp_min(1e-30)) for n, e in expected.items()}
        wrong = {n: error for n, error in errors.items() if not error <= 2**-7}
        if not abs(float(result.kl[row]) - float(kl)) <= 1e-5 * (1 + float(kl)) or (
            wrong and keys.stop > keys.start + 1
        ):
            raise RuntimeError(
                f"bench: query {row} is wrong, so no speed is reported: kl {float(result.kl[row])} for {float(kl)}; "
                f"relative errors {errors}"
            )


def passes(step: Callable[[], Any], size: Size) -> dict[str, dict[str, float]]:
    """Milliseconds of each kernel in one step, and TFLOP/s of the flops that it does: medians of PROFILED steps, each
    after a pause that lets the clock rise again; one step of a problem that is timed in few rounds.

    Each gradient is counted with logits of its own, 4IE flops a pair, so that records compare. Those that take masks do
    2IE. The step runs on the side stream itself, so that kernels which share the multiprocessors elsewhere come one
    after the other.
    """
    step()
    steps = [slices(profiled(step)) for _ in range(1 if size.pairs > LONG else PROFILED)]
    totals = {name: statistics.median(times[name] for times in steps) for name in steps[0]}
    per_pair = {"teacher": 2 * size.H * size.D, "index": 2 * size.I * size.E}
    per_pair |= dict.fromkeys(("gradient_query", "kl_gradients", "gradient_key"), 4 * size.I * size.E)
    rate = {name: flops * size.pairs / totals[name] / 1e9 for name, flops in per_pair.items() if totals.get(name)}
    return {name: {"ms": ms} | ({"tflops": rate[name]} if name in rate else {}) for name, ms in totals.items()}


def profiled(step: Callable[[], Any]) -> list[tuple[str, float]]:
    """(name, milliseconds) of the kernels of a step, in the order of their beginning."""
    torch.cuda.synchronize()
    time.sleep(PAUSE)
    device = torch.device("cuda", torch.cuda.current_device())
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    with torch.cuda.stream(launch.side_stream(device)), profile as profiler:
        step()
        torch.cuda.synchronize()
    events = (event for event in profiler.events() or () if event.device_type.name == "CUDA")
    ordered = sorted(events, key=lambda event: event.time_range.start)
    return [(event.name, event.device_time / 1e3) for event in ordered]


def slices(kernels: list[tuple[str, float]]) -> dict[str, float]:
    """Sums of (name, time) by SLICES, in the order of their beginning; the rest is torch's.

    Scores in bfloat16 have kernels that teacher and indexer share: each other one is the indexer's, where none of the
    two has scores in e4m3.
    """
    found: dict[str, list[float]] = {"teacher": [], "index": []}
    for name, ms in kernels:
        short = next((short for long, short in SLICES.items() if name.startswith(long)), "torch")
        found.setdefault(short, []).append(ms)
    scores = found.pop("score", [])
    if found["index"]:
        found["teacher"] += scores
    elif found["teacher"]:
        found["index"] += scores
    else:
        found |= {"teacher": scores[::2], "index": scores[1::2]}
    return {name: sum(times) for name, times in found.items()}
