"""What a warm-up step costs beside the model's own forward, at the layer shapes of a model with grouped heads.

    python benchmarks/bench_step.py --length 32768 --commit $(git rev-parse HEAD)
    python benchmarks/bench_step.py --length 131072 --steps 3
    python benchmarks/bench_step.py --documents               packed documents, others in every step

The model has Qwen3-8B's shapes and random weights (4 layers, 32 heads over 8, D=128; 16 index heads of 128), attention
of its own forward is torch's. A step is a forward with indexers attached, their gradients in it, and AdamW. Times are
the host's, from one synchronisation to the next: what waits for the host counts. The plain forward has its turns before
the indexers are attached and after they are taken off. Appends a line for each --queries to results/warmup_step.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from flash_indexer.bench.timing import environment, percentiles
from flash_indexer.models.attach import IndexerHandle, attach
from flash_indexer.ops import bodies
from flash_indexer.recipe.queries import draw_queries

SHAPES = dict(
    vocab_size=1024, hidden_size=4096, intermediate_size=12288, num_hidden_layers=4, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
)  # fmt: skip
INDEXER = dict(num_heads=16, head_dim=128)
SHORT = 600  # tokens at which the loss is compared with the torch body's
WARM_UP = 2
OURS = ("score", "rows", "gradient", "finish", "scale", "lse", "attention")


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(arguments.shapes, device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for record in measure(model, arguments, device):
        with (arguments.out / "warmup_step.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(
            {name: record[name] for name in ("length", "queries", "plain", "step", "over_plain", "share")}, flush=True
        )


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768, help="tokens of a sequence")
    parser.add_argument("--queries", type=float, nargs="+", default=[1.0, 0.25])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--documents", action="store_true", help="packed documents instead of one")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.set_defaults(shapes=SHAPES, indexer=INDEXER)
    return parser.parse_args(words)


def make_model(shapes: dict[str, int], device: torch.device) -> PreTrainedModel:
    """Random weights, in bfloat16 on a GPU."""
    torch.manual_seed(0)
    with device:  # a CPU would take longer to draw the weights than the GPU to measure
        model: PreTrainedModel = AutoModelForCausalLM.from_config(Qwen3Config(**shapes), attn_implementation="sdpa")
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


def measure(model: PreTrainedModel, arguments: argparse.Namespace, device: torch.device) -> Any:
    """A record for each fraction of the queries."""
    length, steps = arguments.length, arguments.steps

    def plain(n: int) -> None:
        with torch.no_grad():
            model.model(**batch(length, n, arguments.documents, device), use_cache=False)

    before = clock(plain, steps, device)
    print(f"plain forward {percentiles(before)}", flush=True)
    handle = attach(model, **arguments.indexer)
    check_loss(handle, device)
    runs = {fraction: train(handle, fraction, arguments, device) for fraction in arguments.queries}
    handle.remove()
    plain_times = percentiles([*before, *clock(plain, steps, device)])
    for fraction, (times, share) in runs.items():
        step = percentiles(times)
        yield {
            **(environment(arguments.commit) if device.type == "cuda" else {}), "name": "qwen3_8b_shapes",
            "shapes": arguments.shapes, "indexer": arguments.indexer, "length": length, "queries": fraction,
            "documents": arguments.documents, "plain": plain_times, "step": step,
            "over_plain": step["p50"] / plain_times["p50"], "share": share,
        }  # fmt: skip


def train(
    handle: IndexerHandle, fraction: float, arguments: argparse.Namespace, device: torch.device
) -> tuple[list[float], dict[str, float]]:
    """Milliseconds of each step, and of one more what its device time went to."""
    optimizer = torch.optim.AdamW(handle.indexers.parameters(), lr=1e-4)
    length = arguments.length
    handle.token_weight = 1 / (length * fraction)

    def step(n: int) -> None:
        handle.queries = None if fraction == 1 else draw_queries(length, fraction, seed=0, draw=str(n))
        with torch.no_grad():
            handle.decoder(**batch(length, n, arguments.documents, device), use_cache=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = clock(step, arguments.steps, device)
    print(f"step with {fraction} of the queries {percentiles(times)}", flush=True)
    return times, shares(step, arguments.steps + WARM_UP, device)


def batch(length: int, n: int, documents: bool, device: torch.device) -> dict[str, Tensor]:
    """input_ids and position_ids [1, length] of step n."""
    rng, ends = random.Random(n), [0]
    while ends[-1] < length:
        ends.append(min(ends[-1] + (rng.randint(1000, 12000) if documents else length), length))
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(ends)])
    tokens = torch.randint(0, SHAPES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(n))
    return {"input_ids": tokens.to(device), "position_ids": positions[None].to(device)}


def check_loss(handle: IndexerHandle, device: torch.device) -> None:
    """Raises RuntimeError where a short sequence's losses are not the torch body's, so that no speed is reported."""
    losses = []
    handle.indexers.eval()
    for body in (nullcontext(), bodies.use(bodies.TORCH)):
        with body, torch.no_grad():
            handle.decoder(**batch(SHORT, 0, False, device), use_cache=False)
        losses.append([float(loss.kl) for loss in handle.losses().values()])
    handle.indexers.train()
    if any(not abs(a - b) <= 1e-3 * abs(b) for a, b in zip(*losses, strict=True)):
        raise RuntimeError(f"bench_step: losses must be the torch body's {losses[1]}, got {losses[0]}")


def clock(action: Callable[[int], None], steps: int, device: torch.device) -> list[float]:
    """Milliseconds of action(n), n = 2, 3, ...; 0 and 1 warm up."""
    times = []
    for n in range(steps + WARM_UP):
        wait(device)
        started = time.perf_counter()
        action(n)
        wait(device)
        times.append((time.perf_counter() - started) * 1e3)
    return times[WARM_UP:]


def shares(step: Callable[[int], None], n: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of device time by kernel of ours, of all else, and of the step in which the device had no work."""
    if device.type == "cpu":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step(n)
        wait(device)
    found, busy, end = dict.fromkeys((*OURS, "model and others"), 0.0), 0.0, 0.0
    events = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
    events.sort(key=lambda event: event.time_range.start)
    for event in events:
        name = next((ours for ours in OURS if event.name.startswith(f"flash_indexer_{ours}")), "model and others")
        found[name] += event.device_time / 1e3
        busy += max(0.0, event.time_range.end - max(event.time_range.start, end)) / 1e3
        end = max(end, event.time_range.end)
    idle = (end - events[0].time_range.start) / 1e3 - busy
    return {name: round(ms, 3) for name, ms in found.items()} | {"idle": round(idle, 3)}


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
