"""The benchmark of the sparse stage's steps: sampled queries and keys are checked in float64, then they are timed.

    select          index scores of all visible keys, and the exact top-k          select_keys
    forward         attention over the selected keys, with its logsumexp
    backward        gradients of q, k and v, and the head-summed target; the same bits every time
    any_order       the same with deterministic=False
    backward_alone  without the target
    learn           KL, and the index tensors' gradients, from target and scores
    layer           all of it by `dsa_attention(kl="backward")`, forward and backward

The contestants take turns with a matrix product and, where the model's heads let them, with dense causal attention by
cuDNN and FlashAttention-2 and FlexAttention with a bit for each (query, key). A step that has no kernel is named with
the reason and not timed. Rates count the slots that hold a key: 2·H·(D + V) flops each forward, 2·H·(3·D + 2·V) back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flash_indexer.bench.baselines import attention_contestants, flex_attention_with_bits
from flash_indexer.bench.sparse_check import Answer, check
from flash_indexer.bench.sparse_problem import SIZES, SparseSize, Tensors, make
from flash_indexer.bench.timing import MATMUL, Size, environment, needs_gpu, time_in_turns
from flash_indexer.ops import (
    Needs,
    dsa_attention,
    select_keys,
    sparse_backward,
    sparse_forward,
    sparse_index_gradients,
    sparse_kl_rows,
)
from flash_indexer.ops.bodies import NoKernel, need_kernels

SUITE, RESULTS = "sparse", "sparse.jsonl"
ROUNDS = 8
ALL = (True, True, True)
STEPS = ("select", "forward", "backward", "any_order", "backward_alone", "learn", "layer")


def run(out: Path, *, commit: str = "unknown", say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Checks, measures and appends a line for each of SIZES to out/sparse.jsonl.

    Raises:
        OSError: without a GPU of compute capability 9.0. RuntimeError: where a result is wrong.
    """
    needs_gpu()
    out.mkdir(parents=True, exist_ok=True)
    records = []
    for name, size in SIZES.items():
        record = {**environment(commit), "name": name, **measure(size)}
        with (out / RESULTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        say(line(record))
        records.append(record)
        torch.cuda.empty_cache()
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
    steps, answer = contestants(size, x)
    ours, missing = with_kernels(steps)
    errors = check(size, x, answer())
    beside, reasons = peers(size, x)
    square = torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16)
    times = time_in_turns({**ours, **beside, "matmul": lambda: square @ square}, ROUNDS)
    slots = int(x.selection.count.sum())
    flops = {"forward": 2 * size.H * (size.D + size.V), "backward": 2 * size.H * (3 * size.D + 2 * size.V)}
    return {
        "size": asdict(size), "slots": slots, "pairs": size.pairs, "rounds": ROUNDS, **times, "errors": errors,
        "no_kernel": missing, "peers": list(beside), "notes": reasons,
        "tflops": {step: flops[step] * slots / times[step]["p50"] / 1e9 for step in flops if step in times},
        "matmul_tflops": 2 * MATMUL**3 / times["matmul"]["p50"] / 1e9,
    }  # fmt: skip


def contestants(size: SparseSize, x: Tensors) -> tuple[dict[str, Callable[[], Any]], Callable[[], Answer]]:
    """The steps by name, and a call that gives what those of them returned that have kernels, to be checked."""
    problem, loose = x.problem(size), x.problem(size, deterministic=False)
    weight = torch.full_like(x.index_weights[:, 0], 1 / size.T)
    own_values = x.v is not None
    with_target, alone = Needs(True, True, own_values, True), Needs(True, True, own_values, False)
    out, lse = sparse_forward(problem)
    p_sum = torch.rand_like(x.selection.scores)
    intervals: dict[str, Any] = dict(key_start=x.key_start, key_end=x.key_end, topk=size.K)
    settings = dict(softmax_scale=size.D**-0.5, value_dim=None if own_values else size.V, kl="backward") | intervals
    q, k, *index = (y.detach().requires_grad_() for y in (x.q, x.k, *x.leaves))
    v = x.v.detach().requires_grad_() if x.v is not None else None

    def learn() -> tuple[Any, Any]:
        rows = sparse_kl_rows(p_sum, x.selection.scores, x.selection.count, weight)
        return rows, sparse_index_gradients(rows.di, x.leaves, x.selection, ALL)

    def layer() -> None:
        dsa_attention(q, k, v, *index, **settings).out.backward(x.d_out)  # type: ignore[no-untyped-call]
        for leaf in (q, k, *index, *([] if v is None else [v])):
            leaf.grad = None

    def answer() -> Answer:
        with need_kernels():
            got = Answer(out, lse)
            try:
                gradients = sparse_backward(problem, x.d_out, out, lse, with_target)
            except NoKernel:
                return got
            got = got._replace(dq=gradients.dq, dk=gradients.dk, p_sum=gradients.p_sum)
            if gradients.p_sum is None:
                return got
            p_sum.copy_(gradients.p_sum)
            try:
                rows, found = learn()
            except NoKernel:
                return got
            return got._replace(kl=rows.kl, d_index_q=found.d_index_q)

    steps: dict[str, Callable[[], Any]] = {
        "select": lambda: select_keys(*x.leaves, **intervals),
        "forward": lambda: sparse_forward(problem),
        "backward": lambda: sparse_backward(problem, x.d_out, out, lse, with_target),
        "any_order": lambda: sparse_backward(loose, x.d_out, out, lse, with_target),
        "backward_alone": lambda: sparse_backward(problem, x.d_out, out, lse, alone),
        "learn": learn,
        "layer": layer,
    }
    return steps, answer


def with_kernels(steps: dict[str, Callable[[], Any]]) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Those that run by kernels alone, and why the others don't."""
    ours: dict[str, Callable[[], Any]] = {}
    missing: dict[str, str] = {}
    for name, step in steps.items():
        try:
            with need_kernels():
                step()
        except NoKernel as reason:
            missing[name] = str(reason)
        else:
            ours[name] = step
    return ours, missing


def peers(size: SparseSize, x: Tensors) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Attention of other libraries at the same heads, and why those that are absent are: of causal squares alone."""
    if size.T != size.S or size.D != size.V:
        return {}, {"dense": "no dense attention beside it: the queries are not all of a causal square, or D is not V"}
    dense = Size(size.H, size.G, size.D, 0, 0, (size.T,), size.V)
    beside, reasons = attention_contestants(dense)
    try:
        forward, backward = flex_attention_with_bits(x.q, x.k, x.values, x.selection.indices, x.d_out)
        forward()
        backward()
    except RuntimeError as error:
        reasons["flex"] = str(error).strip().split("\n")[0][:200]
    else:
        beside |= {"flex_forward": forward, "flex_backward": backward}
    return beside, reasons
