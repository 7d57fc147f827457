"""`indexer_kl` with target="per_head" on a GPU: its kernels beside the torch body and `warmup_attention`.

    python benchmarks/bench_per_head.py --commit $(git rev-parse HEAD)

The problem is the smallest of the suite mqa64: 64 query heads on one key head, D=V=128, E=64, four documents of about
2,048 tokens. Loss, KL, entropy and gradients of the kernels are first held to those of the torch body; then each
contestant takes turns. Forward and gradients together. Appends one line to benchmarks/results/per_head.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_indexer import indexer_kl, warmup_attention
from flash_indexer.bench.per_head import SUITES, problem, sized
from flash_indexer.bench.timing import environment, time_in_turns
from flash_indexer.ops import bodies
from flash_indexer.ops.attention import per_head_op
from flash_indexer.ops.bodies import TORCH

ROUNDS, SLOW_ROUNDS = 15, 2
NAMES = ("loss", "kl", "entropy", "d_index_q", "d_index_k", "d_index_weights")
CLOSE = (1e-5, 1e-5, 1e-5, 2**-7, 2**-7, 2**-9)  # of the largest value, norms for gradients; theirs are from bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_per_head: needs a CUDA GPU of compute capability 9.0, got none")
    size = sized(SUITES["mqa64"], arguments.documents)
    tensors, others = problem(size)
    q, k, v = tensors[:3]
    leaves = [x.requires_grad_() for x in tensors[3:]]
    if per_head_op.body_of("bench_per_head", q, k, leaves[0]) == TORCH:
        raise SystemExit("bench_per_head: no kernel takes these sizes on this GPU: see the warning")

    def alone() -> list[Tensor]:
        result = indexer_kl(q, k, *leaves, **others, target="per_head")
        return [*result, *torch.autograd.grad(result.loss, leaves)]

    def in_torch() -> list[Tensor]:
        with bodies.use(TORCH):
            return alone()

    def forward() -> None:
        with torch.no_grad():
            indexer_kl(q, k, *leaves, **others, target="per_head")

    def beside_attention() -> None:
        torch.autograd.grad(warmup_attention(q, k, v, *leaves, **others, target="per_head").loss, leaves)

    contestants: dict[str, Callable[[], Any]] = {
        "indexer_kl": alone, "indexer_kl_forward": forward, "warmup_attention": beside_attention,
    }  # fmt: skip
    differences = compare(alone(), in_torch())
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    alone()
    extra = torch.cuda.max_memory_allocated() - before
    times = time_in_turns(contestants, ROUNDS) | time_in_turns({"torch_body": in_torch}, SLOW_ROUNDS)
    record = {
        **environment(arguments.commit), "size": asdict(size), "tokens": sum(size.documents), **times,
        "differences": differences, "extra_bytes": extra,
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "per_head.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps({name: times[name]["p50"] for name in times}, indent=1))
    print("largest differences from the torch body:", {name: f"{x:.1e}" for name, x in differences.items()})
    print(f"{extra / 2**20:.0f} MiB beside the inputs")


def compare(got: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Relative differences; raises RuntimeError where one is more than rounding."""
    differences = {}
    for name, close, a, b in zip(NAMES, CLOSE, got, expected, strict=True):
        a, b = a.detach().double(), b.detach().double()
        error, size = (a - b).abs(), b.abs()
        differences[name] = float(error.norm() / size.norm() if name.startswith("d_") else error.max() / size.max())
        if not differences[name] <= close:
            raise RuntimeError(f"bench_per_head: {name} differs from the torch body's by {differences[name]:.1e}")
    return differences


if __name__ == "__main__":
    main()
