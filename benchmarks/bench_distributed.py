"""Context and tensor parallel beside one GPU: time of forward and backward, collectives included, and memory a rank.

    torchrun --nproc-per-node 2 benchmarks/bench_distributed.py --commit $(git rev-parse HEAD)
    torchrun --nproc-per-node 2 benchmarks/bench_distributed.py --sizes tiny --out /tmp          on CPUs, by gloo
    python benchmarks/bench_distributed.py --one-gpu --commit $(git rev-parse HEAD)

Every rank holds the whole problem, takes its shard for each way of sharding, and also computes it alone: KL and the
gradients of sampled queries are held to float64 with the result of one GPU as the baseline, the loss and d_index_k to
the result of one GPU; a wrong result ends the run and no speed is recorded. All ways take turns, round by round, behind
a barrier; a turn lasts until the slowest rank is done. --one-gpu measures time and memory against the sequence's length
and the number of heads, points for a model of scaling. Appends JSON lines to benchmarks/results/distributed.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flash_indexer import causal_intervals, indexer_kl
from flash_indexer.bench import kl as bench
from flash_indexer.bench import timing
from flash_indexer.ops.kl import gpu_body, torch_body
from flash_indexer.parallel import (
    context_parallel_indexer_kl,
    context_positions,
    gather_tokens,
    tensor_parallel_indexer_kl,
)
from flash_indexer.parallel.groups import reduce_scatter
from flash_indexer.testing import assert_close

SAMPLED = 48  # queries of a rank that are held to float64
COLLECTIVE_BYTES = 256 * 2**20
LENGTHS, HEADS = (8192, 16384, 32768, 65536, 131072), (16, 32, 64, 128)


@dataclass(frozen=True)
class Size:
    """One causal sequence."""

    H: int
    G: int
    D: int
    I: int
    E: int
    tokens: int


SIZES = {
    "v32_64k": Size(128, 1, 576, 64, 128, 65536),
    "v32_8k": Size(128, 1, 576, 64, 128, 8192),
    "v32_expanded_32k": Size(128, 128, 192, 64, 128, 32768),
    "tiny": Size(8, 4, 16, 3, 32, 256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="v32_64k", help="comma-separated, of " + ", ".join(SIZES))
    parser.add_argument("--ways", default="context,tensor", help="comma-separated, of context, contiguous, tensor")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--one-gpu", action="store_true", help="one process: time and memory by length and heads")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", default="unknown")
    arguments = parser.parse_args()
    if arguments.one_gpu:
        for record in one_gpu(arguments.rounds):
            append(arguments.out, {**timing.environment(arguments.commit), **record})
        return
    device = start()
    for name in arguments.sizes.split(","):
        record = measure(SIZES[name], arguments.ways.split(","), arguments.rounds, device)
        if dist.get_rank() == 0:
            append(arguments.out, {**environment(arguments.commit, device), "name": name, **record})
    dist.destroy_process_group()


def start() -> torch.device:
    """Joins the processes of torchrun: NCCL where there are GPUs, gloo where there are none."""
    rank = dist.get_node_local_rank(0)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, timeout=timedelta(minutes=5), device_id=device if device.type == "cuda" else None
    )  # fmt: skip
    return device


def environment(commit: str, device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return timing.environment(commit)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"timestamp": now, "commit": commit, "gpu": "none", "torch": torch.__version__}


def append(out: Path, record: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "distributed.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)


@dataclass
class Shard:
    """What one way of sharding calls: the operator, its tensors on this rank, and where its rows and keys stand."""

    function: Callable[..., Any]
    tensors: list[Tensor]
    options: dict[str, Any]
    rows: Tensor

    def step(self) -> list[Tensor]:
        """loss, kl and the gradients of index_q, index_k and the weights."""
        leaves = [x.detach().requires_grad_() for x in self.tensors[2:]]
        result = self.function(*self.tensors[:2], *leaves, **self.options)
        result.loss.backward()
        return [result.loss.detach(), result.kl, *(leaf.grad for leaf in leaves)]


def problem(size: Size, device: torch.device) -> Shard:
    """The whole problem, the same on every rank."""
    generator = torch.Generator(device).manual_seed(0)
    low = torch.bfloat16 if device.type == "cuda" else torch.float32
    T = size.tokens

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=low)

    tensors = [normal(T, size.H, size.D), normal(T, size.G, size.D), normal(T, size.I, size.E), normal(T, size.E)]
    tensors.append(torch.randn(T, size.I, generator=generator, device=device) * (size.I * size.E) ** -0.5)
    key_start, key_end = causal_intervals(torch.tensor([0, T], device=device))
    options = dict(softmax_scale=size.D**-0.5, key_start=key_start, key_end=key_end)
    lse = gpu_body.teacher_lse if device.type == "cuda" else torch_body.teacher_lse
    scale = (options["softmax_scale"],) if device.type == "cuda" else ()
    named = {} if scale else dict(softmax_scale=options["softmax_scale"])
    options["lse"] = lse(*tensors[:2], key_start, key_end, *scale, **named)
    return Shard(indexer_kl, tensors, options, torch.arange(T, device=device))


def shard(whole: Shard, way: str) -> Shard:
    """This rank's part of the problem."""
    rank, world = dist.get_rank(), dist.get_world_size()
    options = dict(whole.options, group=dist.group.WORLD)
    if way == "tensor":
        q, k, *index = whole.tensors
        if q.shape[1] % world or (k.shape[1] > 1 and k.shape[1] % world):
            heads = f"H={q.shape[1]} G={k.shape[1]}"
            raise SystemExit(f"bench_distributed: {heads} can't be shared out evenly over {world} ranks")
        q = q.chunk(world, 1)[rank].contiguous()
        k = k if k.shape[1] == 1 else k.chunk(world, 1)[rank].contiguous()
        options["lse"] = options["lse"].chunk(world, 1)[rank].contiguous()
        return Shard(tensor_parallel_indexer_kl, [q, k, *index], options, whole.rows)
    options["layout"] = {"context": "zigzag", "contiguous": "contiguous"}[way]
    mine = context_positions(whole.rows.shape[0], world, rank, layout=options["layout"]).to(whole.rows.device)
    options |= {name: options[name][mine] for name in ("lse", "key_start", "key_end")}
    return Shard(context_parallel_indexer_kl, [x[mine] for x in whole.tensors], options, mine)


def measure(size: Size, ways: list[str], rounds: int, device: torch.device) -> dict[str, Any]:
    whole = problem(size, device)
    shards = {"one": whole} | {way: shard(whole, way) for way in ways}
    errors = compared(shards, whole)
    memory = {way: peak(part.step, device) for way, part in shards.items()}
    times: dict[str, list[float]] = {way: [] for way in shards}
    extra = collectives(whole, device)
    times |= {name: [] for name in extra}
    turns = {way: part.step for way, part in shards.items()} | extra
    for turn in range(rounds + 2):
        for name, contestant in turns.items():
            took = timed(contestant, device)
            if turn >= 2:
                times[name].append(took)
    found = {name: timing.percentiles(values) for name, values in times.items()}
    return {
        "size": asdict(size), "ranks": dist.get_world_size(), "rounds": rounds, "milliseconds": found,
        "speedup": {way: found["one"]["p50"] / found[way]["p50"] for way in ways},
        "extra_bytes": memory, "errors": errors,
        "input_bytes": {way: sum(x.nbytes for x in part.tensors) for way, part in shards.items()},
        "key_bytes": whole.tensors[1].nbytes + whole.tensors[3].nbytes, "collective_bytes": COLLECTIVE_BYTES,
    }  # fmt: skip


def compared(shards: dict[str, Shard], whole: Shard) -> dict[str, dict[str, float]]:
    """Errors of every way of sharding; ends the run on every rank where one rank's result is wrong."""
    alone, errors = whole.step(), {}
    for way, part in shards.items():
        failure = ""
        try:
            errors[way] = check(part, whole, alone)
        except AssertionError as error:
            failure = str(error)
        failures: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        if any(failures):
            raise SystemExit(f"bench_distributed: {way} is wrong, so no speed is reported: {failures}")
    return errors


def check(part: Shard, whole: Shard, alone: list[Tensor]) -> dict[str, float]:
    """Against float64 (sampled queries) and against one GPU (the loss, d_index_k); errors for the record."""
    loss, kl, d_index_q, d_index_k, d_weights = part.step()
    assert abs(float(loss) - float(alone[0])) <= 1e-5 * (1 + abs(float(alone[0]))), f"loss {loss} for {alone[0]}"
    rows = part.rows if d_index_k.shape[0] == part.rows.shape[0] else whole.rows
    single = alone[3][rows]
    assert_close("d_index_k", d_index_k, single.double(), single)
    places = torch.linspace(1, part.rows.shape[0] - 1, SAMPLED, device=rows.device).long()
    sampled = part.rows[places]
    truth = [torch.stack(values) for values in zip(*(exact(whole, int(t)) for t in sampled), strict=True)]
    got, base = [x[places] for x in (kl, d_index_q, d_weights)], [alone[n][sampled] for n in (1, 2, 4)]
    for name, mine, expected, one in zip(("kl", "d_index_q", "d_index_weights"), got, truth, base, strict=True):
        assert_close(name, mine, expected, one)
    return {
        "loss": float((loss - alone[0]).abs()),
        "kl": float((got[0].double() - truth[0]).abs().max()),
        "kl_one": float((base[0].double() - truth[0]).abs().max()),
    }


def exact(whole: Shard, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """KL and the gradients of index_q and the weights of one causal query, in float64; token weight 1/T."""
    q, k, index_q, index_k, weights = whole.tensors
    G = k.shape[1]
    query, keys = q[row].double().view(G, -1, q.shape[2]), k[: row + 1].double()
    logits = torch.einsum("ghd,sgd->ghs", query, keys).flatten(0, 1) * whole.options["softmax_scale"]
    p = logits.softmax(-1).mean(0)
    iq, ik, w = index_q[row].double(), index_k[: row + 1].double(), weights[row].double()
    index_logits = iq @ ik.T
    scores = w @ index_logits.relu()
    kl = (torch.xlogy(p, p) - p * scores.log_softmax(-1)).sum()
    unscaled = ((scores.softmax(-1) - p) / q.shape[0] * (index_logits > 0)) @ ik
    return kl, w[:, None] * unscaled, (iq * unscaled).sum(-1)


def collectives(whole: Shard, device: torch.device) -> dict[str, Callable[[], Any]]:
    """The collectives alone: gathering the keys, and a reduce-scatter of COLLECTIVE_BYTES in float32."""
    world = dist.get_world_size()
    keys = [x.chunk(world)[dist.get_rank()].contiguous() for x in (whole.tensors[1], whole.tensors[3])]
    scores = torch.zeros(COLLECTIVE_BYTES // 4 if device.type == "cuda" else 2**16, device=device)
    return {
        "gather_keys": lambda: [gather_tokens(x, dist.group.WORLD) for x in keys],
        "reduce_scatter": lambda: reduce_scatter(scores, dist.group.WORLD)(),
    }


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds until the slowest rank is done."""
    dist.barrier()
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        end.synchronize()
        took = torch.tensor(begin.elapsed_time(end), device=device)
    else:
        started = time.perf_counter()
        step()
        took = torch.tensor((time.perf_counter() - started) * 1e3)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took)


def peak(step: Callable[[], Any], device: torch.device) -> int:
    """Bytes at the peak of a step beside what was there before, gradients included; the most of any rank."""
    if device.type != "cuda":
        step()
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    most = torch.tensor(torch.cuda.max_memory_allocated() - before, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def one_gpu(rounds: int) -> list[dict[str, Any]]:
    """DeepSeek-V3.2's absorbed sizes: every length with all heads, and 16K tokens with fewer."""
    timing.needs_gpu()
    records = []
    for tokens, heads in dict.fromkeys([*((n, 128) for n in LENGTHS), *((16384, h) for h in HEADS)]):
        size = timing.Size(heads, 1, 576, 64, 128, (tokens,), 512)
        tensors, others = bench.problem(size)
        bench.check_rows(size, tensors, others)
        step, leaves = bench.call(tensors, others)
        most, extra = timing.memory(step, leaves)
        few = rounds if size.pairs <= bench.LONG else bench.ROUNDS_LONG
        times = timing.time_in_turns({"ours": step}, few)["ours"]
        sizes = dict(tokens=tokens, H=heads, G=1, D=576, I=64, E=128)
        records.append(
            {"name": "one_gpu", "size": sizes, "pairs": size.pairs, "flops": size.flops, "rounds": few,
             "milliseconds": times, "peak_bytes": most, "extra_bytes": extra}
        )  # fmt: skip
        del tensors, others, step, leaves
        torch.cuda.empty_cache()
    return records


if __name__ == "__main__":
    main()
