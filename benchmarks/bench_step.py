"""What a step of `flash-indexer warmup` costs beside the model's own forward, at the layer shapes of a grouped model.

    python benchmarks/bench_step.py --length 32768 --commit $(git rev-parse HEAD)
    python benchmarks/bench_step.py --length 131072 --steps 3
    python benchmarks/bench_step.py --documents               packed documents, others in every step

The model has Qwen3-8B's shapes and random weights (4 layers, 32 heads over 8, D=128; 16 index heads of 128), attention
of its own forward is torch's. Steps are those of the command itself, one sequence each. Times are the host's, from one
synchronisation to the next: what waits for the host counts. The plain forward has its turns before and after the runs.

    overhead = step - time in which kernels of ours run - device time of the plain forward without its attention

is what is neither the model's forward nor our kernels: copies, casts, the indexers' projections and optimizer, the
step's log, waiting. Our kernels are the model's attention too. Appends a line for each --queries to
results/warmup_step.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from bench_warmup import write_tokenizer
from flash_indexer import cli
from flash_indexer.bench.timing import environment, percentiles
from flash_indexer.models.attach import IndexerHandle, attach
from flash_indexer.ops import bodies
from flash_indexer.recipe.progress import StepProgress

SHAPES = dict(
    vocab_size=1024, hidden_size=4096, intermediate_size=12288, num_hidden_layers=4, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
)  # fmt: skip
INDEXER = dict(num_heads=16, head_dim=128)
SHORT = 600  # tokens at which the loss is compared with the torch body's
WARM_UP = 2
OURS = "flash_indexer_"
KERNELS = ("score", "rows", "kl_gradients", "gradient", "finish", "scale", "lse", "attention")
ATTENTION = ("flash", "sdpa", "fmha")  # torch's
GPU = torch.profiler.ProfilerActivity.CUDA
Kernel = tuple[str, float, float]
"""Name, and milliseconds at which it began and ended."""


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(arguments.shapes, device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for record in measure(model, arguments, device):
        with (arguments.out / "warmup_step.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        shown = ("length", "queries", "plain", "step", "over_plain", "overhead", "share")
        print({name: record[name] for name in shown}, flush=True)


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
    config = Qwen3Config(**shapes, bos_token_id=None, eos_token_id=0)
    with device:  # a CPU would take longer to draw the weights than the GPU to measure
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


def measure(model: PreTrainedModel, arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """A record for each fraction of the queries."""
    length, steps = arguments.length, arguments.steps

    def plain(n: int) -> None:
        with torch.no_grad():
            model.model(**batch(length, n, arguments.documents, device), use_cache=False)

    before = clock(plain, steps, device)
    print(f"plain forward {percentiles(before)}", flush=True)
    forward = [] if device.type == "cpu" else profiled(lambda: plain(steps + WARM_UP))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        handle = attach(model, **arguments.indexer)
        check_loss(handle, device)
        handle.remove()
        model.save_pretrained(path / "model")
        write_tokenizer(path / "model", arguments.shapes["vocab_size"])
        write_texts(path / "texts.jsonl", arguments)
        runs = {fraction: train(path, fraction, arguments, device) for fraction in arguments.queries}
    plain_times = percentiles([*before, *clock(plain, steps, device)])
    for fraction, (times, kernels) in runs.items():
        step = percentiles(times)
        yield {
            **(environment(arguments.commit) if device.type == "cuda" else {}), "name": "qwen3_8b_shapes",
            "shapes": arguments.shapes, "indexer": arguments.indexer, "length": length, "queries": fraction,
            "documents": arguments.documents, "plain": plain_times, "step": step,
            "over_plain": step["p50"] / plain_times["p50"],
            "overhead": overhead(step["p50"], kernels, forward) if kernels else None,
            "share": shares(kernels) if kernels else None,
        }  # fmt: skip


def train(
    path: Path, fraction: float, arguments: argparse.Namespace, device: torch.device
) -> tuple[list[float], list[Kernel]]:
    """Milliseconds of each step of the command, and the kernels of one more."""
    steps, out = arguments.steps + WARM_UP + 2, path / f"run {fraction}"  # the last step is judged and saved
    indexer = [
        word for name, value in arguments.indexer.items() for word in (f"--{name.replace('_', '-')}", f"{value}")
    ]
    command = [
        "warmup", "--out", str(out), "--model", str(path / "model"), "--data", str(path / "texts.jsonl"),
        "--sequence-length", str(arguments.length), "--batch-size", "1", "--steps", str(steps), "--warmup-steps", "2",
        "--save-every", str(steps), "--evaluate-sequences", "0", "--queries", str(fraction), *indexer,
    ]  # fmt: skip
    watch = Watch(steps - 1, device)
    with watch.following(StepProgress):
        cli.app(command, standalone_mode=False)
    print(f"step with {fraction} of the queries {percentiles(watch.times[WARM_UP:])}", flush=True)
    return watch.times[WARM_UP:], watch.kernels


class Watch:
    """Milliseconds of each step before step `last`, from the end of the one before it, and the kernels of `last`."""

    def __init__(self, last: int, device: torch.device) -> None:
        self.last, self.device, self.times, self.kernels = last, device, list[float](), list[Kernel]()
        self._started, self._profiler = time.perf_counter(), torch.profiler.profile(activities=[GPU])

    @contextmanager
    def following(self, progress: type[StepProgress]) -> Iterator[None]:
        """Each step's end is when its row is shown."""
        shown = progress.step

        def step(bar: StepProgress, row: dict[str, Any]) -> None:
            self._ended(row["step"])
            shown(bar, row)
            self._started = time.perf_counter()

        with mock.patch.object(progress, "step", step):
            yield

    def _ended(self, step: int) -> None:
        wait(self.device)
        if step < self.last:
            self.times.append((time.perf_counter() - self._started) * 1e3)
        if self.device.type == "cuda" and step == self.last - 1:
            self._profiler.start()
        if self.device.type == "cuda" and step == self.last:
            self._profiler.stop()
            self.kernels = kernels_of(self._profiler)


def profiled(action: Callable[[], None]) -> list[Kernel]:
    """The kernels of an action."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[GPU]) as profiler:
        action()
        torch.cuda.synchronize()
    return kernels_of(profiler)


def kernels_of(profiler: torch.profiler.profile) -> list[Kernel]:
    events = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
    return sorted(
        ((event.name, event.time_range.start / 1e3, event.time_range.end / 1e3) for event in events), key=lambda k: k[1]
    )


def overhead(step: float, kernels: Iterable[Kernel], forward: list[Kernel]) -> dict[str, float]:
    """See the module's docstring: milliseconds, and the part of the step.

    Raises:
        RuntimeError: where the plain forward's attention is not to be told from its other kernels.
    """
    ours = busy(kernel for kernel in kernels if kernel[0].startswith(OURS))
    attention = [kernel for kernel in forward if any(word in kernel[0].lower() for word in ATTENTION)]
    if not attention:
        raise RuntimeError(f"bench_step: the plain forward must have a kernel named like {ATTENTION}, got none")
    model = busy(forward) - busy(attention)
    left = step - ours - model
    return {"ms": left, "of_step": left / step, "ours": ours, "model": model, "plain_attention": busy(attention)}


def shares(kernels: list[Kernel]) -> dict[str, float]:
    """Milliseconds of device time by kernel of ours, of all else, and of the step in which the device had no work.

    Kernels that run side by side count twice, so that the sum can exceed the step.
    """
    found = dict.fromkeys((*KERNELS, "other kernels of ours", "model and others"), 0.0)
    for name, begin, end in kernels:
        own = next((kernel for kernel in KERNELS if name.startswith(OURS + kernel)), "other kernels of ours")
        found[own if name.startswith(OURS) else "model and others"] += end - begin
    idle = max(end for _, _, end in kernels) - kernels[0][1] - busy(kernels)
    return {name: round(ms, 3) for name, ms in found.items()} | {"idle": round(idle, 3)}


def busy(kernels: Iterable[Kernel]) -> float:
    """Milliseconds in which at least one of them, in the order of their beginning, runs."""
    total, reached = 0.0, float("-inf")
    for _, begin, end in kernels:
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def document_lengths(length: int, n: int, documents: bool) -> list[int]:
    """Of sequence n, one document or packed ones."""
    rng, ends = random.Random(n), [0]
    while ends[-1] < length:
        ends.append(min(ends[-1] + (rng.randint(1000, 12000) if documents else length), length))
    return [b - a for a, b in pairwise(ends)]


def batch(length: int, n: int, documents: bool, device: torch.device) -> dict[str, Tensor]:
    """input_ids and position_ids [1, length] of sequence n."""
    positions = torch.cat([torch.arange(size) for size in document_lengths(length, n, documents)])
    tokens = torch.randint(0, SHAPES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(n))
    return {"input_ids": tokens.to(device), "position_ids": positions[None].to(device)}


def write_texts(path: Path, arguments: argparse.Namespace) -> None:
    """As many sequences as the command's steps take; a document and the separator behind it fill its tokens."""
    rng, last = random.Random(0), SHAPES["vocab_size"] - 1
    with path.open("w", encoding="utf-8") as file:
        for n in range(arguments.steps + WARM_UP + 2):
            for size in document_lengths(arguments.length, n, arguments.documents):
                words = " ".join(f"w{rng.randint(1, last)}" for _ in range(size - 1))
                file.write(json.dumps({"text": words}) + "\n")


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


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
