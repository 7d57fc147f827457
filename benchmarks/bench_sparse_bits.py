"""Attention over selected keys in bit form on a GPU: beside dense attention, FlexAttention with bits, and gathering.

    python benchmarks/bench_sparse_bits.py --commit $(git rev-parse HEAD)

Two models' heads, causal, two selections: keys at random, and clustered (half the last keys, the rest in runs of 16
that 64 neighbouring queries share). Results are first held to those of the torch body; then the contestants take turns.
`--gather` times the last 512 queries of ever more keys beside torch, which gathers. Appends a line for each problem
to benchmarks/results/sparse_bits.jsonl. FlexAttention, beside keys at random alone, takes half a minute to
compile: `--without-flex` leaves it out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flash_indexer.bench.baselines import attention_contestants
from flash_indexer.bench.timing import MATMUL, environment, time_in_turns
from flash_indexer.ops import bodies
from flash_indexer.ops.bodies import TORCH
from flash_indexer.ops.sparse.problem import Needs, SparseProblem
from flash_indexer.ops.sparse.selection import Selection
from flash_indexer.ops.sparse.stages import sparse_backward, sparse_forward

ROUNDS, SLOW_ROUNDS = 11, 3
ALL, WITHOUT_TARGET = Needs(True, True, True, True), Needs(True, True, True, False)
NAMES = ("out", "lse", "dq", "dk", "dv", "p_sum")
CLOSE = (2**-7, 1e-5, 2**-7, 2**-7, 2**-7, 1e-4)  # of norms; theirs and ours are from bfloat16 products
RUN, SHARED = 16, 64  # keys of a run, neighbouring queries that share it


@dataclass(frozen=True)
class Size:
    """queries: the last of `keys`."""

    H: int
    G: int
    D: int
    keys: int
    K: int = 2048
    queries: int = 0

    @property
    def V(self) -> int:
        return self.D

    @property
    def documents(self) -> tuple[int, ...]:
        return (self.keys,)


SIZES = {"qwen3-8b": Size(32, 8, 128, 8192), "smollm2-135m": Size(9, 3, 64, 8192)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--without-flex", action="store_true")
    parser.add_argument("--gather", action="store_true")
    arguments = parser.parse_args()
    if bodies.no_kernels(torch.device("cuda")) is not None:
        raise SystemExit("bench_sparse_bits: needs a CUDA GPU of compute capability 9.0, got none")
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = environment(arguments.commit)
    if arguments.gather:
        records = [crossover(keys) for keys in (16384, 65536, 131072)]
    else:
        records = [
            beside_dense(name, selection, flex=selection == "random" and not arguments.without_flex)
            for name in SIZES
            for selection in ("random", "clustered")
        ]
    with (arguments.out / "sparse_bits.jsonl").open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(about | record) + "\n")


def beside_dense(name: str, selection: str, flex: bool) -> dict[str, Any]:
    size = SIZES[name]
    problem, d_out = make(size, selection)
    differences = compare(results(problem, d_out), in_torch(lambda: results(problem, d_out)))
    contestants = ours(problem, d_out)
    dense, reasons = attention_contestants(size)
    contestants |= dense
    if flex:
        contestants |= flex_contestants(problem, d_out)
    x = torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16)
    contestants["matmul"] = lambda: x @ x
    times = time_in_turns(contestants, ROUNDS)
    medians = {contestant: times[contestant]["p50"] for contestant in times}
    print(name, selection, {contestant: round(ms, 3) for contestant, ms in medians.items()}, flush=True)
    print("  differences from the torch body", {n: f"{x:.1e}" for n, x in differences.items()}, flush=True)
    if "cudnn_forward" in medians:
        cudnn = medians["cudnn_forward"] + medians["cudnn_backward"]
        for what, backward in (("without", "bits_backward"), ("with", "bits_backward_and_target")):
            ratio = (medians["bits_forward"] + medians[backward]) / cudnn
            print(f"  forward and backward {what} the target: {ratio:.2f} x cuDNN dense", flush=True)
    return {"size": name, "selection": selection, **times, "absent": reasons, "differences": differences}


def crossover(keys: int) -> dict[str, Any]:
    """Bits and torch's gathering, forward and backward with the target, of 512 queries."""
    problem, d_out = make(Size(32, 8, 128, keys, queries=512), "random")
    times = time_in_turns({"bits": lambda: results(problem, d_out)}, SLOW_ROUNDS)
    times |= time_in_turns({"torch": lambda: in_torch(lambda: results(problem, d_out))}, SLOW_ROUNDS)
    print(keys, {name: round(times[name]["p50"], 2) for name in times}, flush=True)
    return {"size": f"512 of {keys}", "selection": "random", **times}


def ours(problem: SparseProblem, d_out: Tensor) -> dict[str, Callable[[], Any]]:
    out, lse = sparse_forward(problem)
    return {
        "bits_forward": lambda: sparse_forward(problem),
        "bits_backward": lambda: sparse_backward(problem, d_out, out, lse, WITHOUT_TARGET),
        "bits_backward_and_target": lambda: sparse_backward(problem, d_out, out, lse, ALL),
    }


def results(problem: SparseProblem, d_out: Tensor) -> list[Tensor]:
    out, lse = sparse_forward(problem)
    return [x for x in (out, lse, *sparse_backward(problem, d_out, out, lse, ALL)) if x is not None]


def in_torch(step: Callable[[], Any]) -> Any:
    with bodies.use(TORCH):
        return step()


def make(size: Size, selection: str) -> tuple[SparseProblem, Tensor]:
    """Random tensors, and the gradient of out; each query selects K of the keys up to its own, or all of them."""
    torch.manual_seed(0)
    S, T = size.keys, size.queries or size.keys
    q, d_out, k, v = (
        torch.randn(*shape, device="cuda").bfloat16()
        for shape in ((T, size.H, size.D), (T, size.H, size.V), (S, size.G, size.D), (S, size.G, size.V))
    )
    indices = torch.full((T, min(size.K, S)), -1, dtype=torch.int32, device="cuda")
    count = torch.empty(T, dtype=torch.int32, device="cuda")
    here = torch.arange(S, device="cuda")
    for begin in range(0, T, 1024):
        rows = torch.arange(begin, min(begin + 1024, T), device="cuda")
        own = (rows + S - T)[:, None]
        scores = torch.rand(len(rows), S, device="cuda")
        if selection == "clustered":
            runs = torch.rand(-(-len(rows) // SHARED), -(-S // RUN), device="cuda")
            scores = runs.repeat_interleave(SHARED, 0)[: len(rows)].repeat_interleave(RUN, 1)[:, :S]
            scores = torch.where(here > own - size.K // 2, 2.0, scores)
        best, keys = scores.masked_fill_(here > own, -1.0).topk(indices.shape[1], -1)
        keys = torch.where(best < 0, S, keys).sort(-1).values
        count[rows] = (keys < S).sum(-1).int()
        indices[rows] = torch.where(keys == S, -1, keys).int()
    chosen = Selection(indices, count, torch.zeros(indices.shape, device="cuda"))
    return SparseProblem(q, k, v, chosen, size.D**-0.5, size.V, True, 512 * 2**20), d_out


def compare(got: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Relative differences of norms; raises RuntimeError where one is more than rounding."""
    differences = {}
    for name, close, a, b in zip(NAMES, CLOSE, got, expected, strict=True):
        differences[name] = float((a.double() - b.double()).norm() / b.double().norm())
        if not differences[name] <= close:
            raise RuntimeError(f"bench_sparse_bits: {name} differs from the torch body's by {differences[name]:.1e}")
    return differences


def flex_contestants(problem: SparseProblem, d_out: Tensor) -> dict[str, Callable[[], Any]]:
    """FlexAttention whose every causal block asks a bit from memory for each (query, key)."""
    S, scale = problem.k.shape[0], problem.softmax_scale
    slots = torch.arange(problem.selection.indices.shape[1], device="cuda")
    keys = torch.where(slots < problem.selection.count[:, None], problem.selection.indices, S).long()
    selected = torch.zeros(len(keys), S + 1, dtype=torch.int64, device="cuda").scatter_(1, keys, 1)[:, :S]
    bits = (selected.view(len(keys), S // 32, 32) << torch.arange(32, device="cuda")).sum(-1).int()

    def is_selected(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (((bits[i, j >> 5] >> (j & 31)) & 1) == 1)

    blocks = S // 128
    counts = torch.arange(1, blocks + 1, device="cuda", dtype=torch.int32)
    order = torch.arange(blocks, device="cuda", dtype=torch.int32).expand(blocks, -1).contiguous()
    mask = BlockMask.from_kv_blocks(counts[None, None], order[None, None], BLOCK_SIZE=128, mask_mod=is_selected)
    q, k, v = (x.transpose(0, 1)[None].contiguous().requires_grad_() for x in (problem.q, problem.k, problem.v))
    upstream = d_out.transpose(0, 1)[None].contiguous()
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward() -> Tensor:
        return compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)

    expected = sparse_forward(problem)[0].transpose(0, 1)[None].double()
    difference = float((forward().detach().double() - expected).norm() / expected.norm())
    if not difference <= CLOSE[0]:
        raise RuntimeError(f"bench_sparse_bits: FlexAttention's out differs from ours by {difference:.1e}")
    return {
        "flex_forward": forward,
        "flex_forward_and_backward": lambda: torch.autograd.grad(forward(), (q, k, v), upstream),
    }


if __name__ == "__main__":
    main()
