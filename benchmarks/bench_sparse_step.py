"""A training step of the sparse stage beside the same model's dense one, and a token of generation of each.

    python benchmarks/bench_sparse_step.py --model gqa --length 32768 --commit $(git rev-parse HEAD)
    python benchmarks/bench_sparse_step.py --model mla --length 65536 131072 --any-order

gqa: Qwen3-8B's layer shapes, 4 layers. mla: DeepSeek-V3.2's attention, 1 layer, its MLP narrow so that attention is
what is timed. Weights and text are random. A step is forward, backward and AdamW of all parameters in bfloat16; the
sparse one selects K=2048 keys a query and trains the indexers too (the recipe's loss, kl="backward"). The dense one
runs with each attention of torch that takes the model, and the fastest is named. Results of the kernels are first held
to the torch body's. Times are the host's, from one synchronisation to the next. Appends a line for each length to
results/sparse_step.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DeepseekV3Config, DynamicCache, PreTrainedModel, Qwen3Config

from bench_step import SHAPES, wait
from flash_indexer.bench.timing import MATMUL, environment, percentiles
from flash_indexer.models.attach import attach
from flash_indexer.ops import bodies

MLA = dict(
    vocab_size=1024, hidden_size=7168, intermediate_size=256, num_hidden_layers=1, num_attention_heads=128,
    num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128,
    v_head_dim=128, first_k_dense_replace=1, max_position_embeddings=131072,
)  # fmt: skip
MODELS: dict[str, tuple[Any, dict[str, int], dict[str, int]]] = {
    "gqa": (Qwen3Config, SHAPES, dict(num_heads=16, head_dim=128)),
    "mla": (DeepseekV3Config, MLA, dict(num_heads=64, head_dim=128)),
}
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}  # fmt: skip
SHORT, SHORT_K = 700, 128
ATTENTION = ("sdpa", "fmha", "flash", "cudnn::fusion")  # in the names of attention's kernels, ours among them
CLOSE = 2**-5  # of norms: four layers in bfloat16
WARM_UP = 1


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make, shapes, indexer = arguments.models[arguments.model]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:  # random weights are made where they stay
        model = AutoModelForCausalLM.from_config(make(**shapes), attn_implementation="sdpa", dtype=dtype)
    check(model, indexer, arguments, device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = environment(arguments.commit) if device.type == "cuda" else {}
    for length in arguments.length:
        record = about | measure(model, indexer, length, arguments, device)
        with (arguments.out / "sparse_step.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gqa")
    parser.add_argument("--length", type=int, nargs="+", default=[32768], help="tokens of a sequence")
    parser.add_argument("--topk", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--any-order", action="store_true", help="deterministic=False")
    parser.add_argument("--backends", nargs="*", choices=BACKENDS, default=list(BACKENDS), help="of dense attention")
    parser.add_argument("--generate", type=int, default=0, help="tokens of generation to time behind each length")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.set_defaults(models=MODELS)
    return parser.parse_args(words)


def check(model: PreTrainedModel, indexer: dict[str, int], arguments: argparse.Namespace, device: torch.device) -> None:
    """Raises RuntimeError where a short sequence's results are not the torch body's.

    Output and gradients where K covers all keys, so that both bodies select the same; scores that round differently
    choose others of nearly equal keys, which in a model of random weights changes its output by percents. With a
    smaller K their KL.
    """
    for topk, names in ((SHORT, ("output", "KL", "gradients")), (SHORT_K, ("KL",))):
        found = []
        for body in (nullcontext(), bodies.use(bodies.TORCH)):
            with body:
                found.append(results(model, indexer, topk, arguments, device))
        for name in names:
            got, expected = (x[name].double() for x in found)
            difference = float((got - expected).norm() / expected.norm())
            print(f"K={topk}: the {name} differs from the torch body's by {difference:.1e}", flush=True)
            if not difference <= CLOSE:
                raise RuntimeError(
                    f"bench_sparse_step: the {name} must be the torch body's, differs by {difference:.1e}"
                )


def results(
    model: PreTrainedModel, indexer: dict[str, int], topk: int, arguments: argparse.Namespace, device: torch.device
) -> dict[str, Tensor]:
    """Of a short sequence."""
    torch.manual_seed(1)
    handle = attach(model, **indexer, topk=topk)
    handle.deterministic = not arguments.any_order
    model.requires_grad_(True)
    hidden = model.model(**batch(SHORT, device), use_cache=False).last_hidden_state
    hidden.backward(upstream(hidden))  # type: ignore[no-untyped-call]
    kl = torch.stack([loss.kl for loss in handle.losses().values()])
    every = (*model.model.layers.parameters(), *handle.indexers.parameters())
    gradients = torch.cat([x.grad.flatten().float() for x in every if x.grad is not None])
    handle.remove()
    model.zero_grad(set_to_none=True)
    return {"output": hidden.detach(), "KL": kl, "gradients": gradients}


def measure(
    model: PreTrainedModel, indexer: dict[str, int], length: int, arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Dense steps by backend, sparse ones, and what each needs of memory."""
    record: dict[str, Any] = dict(
        model=arguments.model, length=length, topk=arguments.topk, deterministic=not arguments.any_order, dense={}
    )
    x = torch.randn(MATMUL, MATMUL, device=device, dtype=model.dtype) if device.type == "cuda" else None
    if x is not None:
        record["matmul"] = percentiles(clock(lambda: x @ x, 5, device)[0])
        del x
    if arguments.backends:
        model.requires_grad_(True)
        for name in arguments.backends if device.type == "cuda" else ["torch"]:
            context = sdpa_kernel(BACKENDS[name]) if name in BACKENDS else nullcontext()
            try:
                with context:
                    record["dense"][name] = train(model, [], length, arguments, device)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                record["dense"][name] = dict(absent=str(error).split("\n")[0][:200])
            model.zero_grad(set_to_none=True)
            gc.collect()
            print(arguments.model, length, "dense", name, shown(record["dense"][name]), flush=True)
        if arguments.generate:
            record["dense_token"] = percentiles(tokens(model, length, arguments.generate, device))
    torch.manual_seed(1)
    handle = attach(model, **indexer, topk=arguments.topk)
    handle.deterministic, handle.token_weight = not arguments.any_order, 1 / length
    model.requires_grad_(True)
    record["sparse"] = train(model, list(handle.indexers.parameters()), length, arguments, device)
    print(arguments.model, length, "sparse", shown(record["sparse"]), flush=True)
    if arguments.generate:
        handle.indexers.eval()
        record["sparse_token"] = percentiles(tokens(model, length, arguments.generate, device))
        print("ms a token", record.get("dense_token"), record["sparse_token"], flush=True)
    handle.remove()
    times = {name: x["ms"]["p50"] for name, x in record["dense"].items() if "ms" in x}
    if times:
        record["fastest"] = min(times, key=lambda name: times[name])
        record["over_dense"] = record["sparse"]["ms"]["p50"] / times[record["fastest"]]
        print(f"{arguments.model} {length}: {record['over_dense']:.3f} x {record['fastest']}", flush=True)
    return record


def train(
    model: PreTrainedModel, more: list[Tensor], length: int, arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Milliseconds of a step, the peak of memory, and where a step's device time went."""
    optimizer = torch.optim.AdamW([*model.model.layers.parameters(), *more], lr=1e-6)
    inputs = batch(length, device)

    def step() -> None:
        loss(model.model(**inputs, use_cache=False).last_hidden_state).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times, peak = clock(step, arguments.steps, device)
    return dict(ms=percentiles(times), peak_gb=peak, kernels=kernel_times(step, device))


def tokens(model: PreTrainedModel, length: int, count: int, device: torch.device) -> list[float]:
    """Milliseconds of each further token behind `length` tokens in the cache."""
    inputs, cache = batch(length, device), DynamicCache(config=model.config)
    with torch.no_grad():
        made = model(input_ids=inputs["input_ids"], past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids = made.logits[:, -1:].argmax(-1)

        def one() -> None:
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

        return clock(one, count, device)[0]


def batch(length: int, device: torch.device) -> dict[str, Tensor]:
    """input_ids and position_ids [1, length] of one document."""
    ids = torch.randint(0, SHAPES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(device), "position_ids": torch.arange(length, device=device)[None]}


def loss(hidden: Tensor) -> Tensor:
    """A scalar of gradient `upstream`, so that nobody but the graph holds the last hidden state in the backward."""
    return (hidden * upstream(hidden)).sum()


def upstream(hidden: Tensor) -> Tensor:
    """The gradient of the last hidden state: random, of the size that a mean over tokens has."""
    generator = torch.Generator(hidden.device).manual_seed(0)
    made = torch.randn(hidden.shape, device=hidden.device, dtype=hidden.dtype, generator=generator)
    return made.div_(hidden.shape[1])


def clock(action: Callable[[], Any], count: int, device: torch.device) -> tuple[list[float], float | None]:
    """Milliseconds of each, behind WARM_UP more, and the peak of allocated memory in GB."""
    times = []
    for n in range(count + WARM_UP):
        if n == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wait(device)
        started = time.perf_counter()
        action()
        wait(device)
        times.append((time.perf_counter() - started) * 1e3)
    return times[WARM_UP:], torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None


def kernel_times(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Milliseconds of device time by kernel, the largest first, of all attention's, and of a step without any."""
    if device.type == "cpu":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        wait(device)
    found, busy, end = Counter[str](), 0.0, 0.0
    events = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
    events.sort(key=lambda event: event.time_range.start)
    for event in events:
        found[event.name[:70]] += event.device_time / 1e3
        busy += max(0.0, event.time_range.end - max(event.time_range.start, end)) / 1e3
        end = max(end, event.time_range.end)
    idle = (end - events[0].time_range.start) / 1e3 - busy
    attention = sum(ms for name, ms in found.items() if any(word in name for word in ATTENTION))
    shown = {name: round(ms, 3) for name, ms in found.most_common(30)}
    return shown | {"attention": round(attention, 3), "idle": round(idle, 3)}


def shown(found: dict[str, Any]) -> Any:
    return found.get("absent") or (found["ms"]["p50"], found["peak_gb"], list(found["kernels"].items())[:24])


if __name__ == "__main__":
    main()
