"""`flash-indexer warmup` over several GPUs of a machine against one: the same losses, and what a dead process does.

    python benchmarks/check_processes.py --gpus 2        or 4, 8

Random weights (8 layers, H=16, G=4, D=64; index heads 8 of 64), so that nothing has to be downloaded; every way of
sharing the work out runs by torchrun with the same sequences a step. Prints the largest relative difference of a
layer's KL over all steps, and the seconds of a step; then kills one of two processes that no agent watches, and
prints after how many seconds the other ended, and what it said. Exits with 1 where a difference is above 3%.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench_warmup import median_step, write_model, write_texts

LARGEST = 3e-2  # bfloat16 sums in another order; a missing rank or head would be far above
TIMEOUT, LONGER = 15, 50  # seconds: of the runs that are cut off, and how much longer the other process may live


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sequence-length", type=int, default=8192)
    parser.add_argument("--ways", help="comma-separated, may be empty; default: all that so many GPUs allow")
    given = parser.parse_args()
    n, bad = given.gpus, []
    ways = {
        "dp": [],
        "dp + fsdp": ["--fsdp"],
        "cp": ["--cp", n],
        "cp contiguous": ["--cp", n, "--cp-layout", "contiguous"],
    }
    ways |= {"cp + fsdp": ["--cp", n, "--fsdp"], "tp": ["--tp", min(n, 4)]}
    if n >= 4:
        ways |= {"cp x tp": ["--cp", n // 2, "--tp", 2], "tp + fsdp": ["--tp", 2, "--fsdp"]}
    if given.ways is not None:
        ways = {name: ways[name] for name in given.ways.split(",") if name}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_model(
            path / "model", hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
            num_key_value_heads=4,
        )  # fmt: skip
        write_texts(path / "texts.jsonl", given.steps * given.sequence_length * n)
        if ways:
            want = warm_up(path, "one", given, 1, ["--batch-size", n])
            print(f"one GPU: {median_step(want):.3f} s a step")
        for name, options in ways.items():
            data_parallel = n // (options[1] if options and options[0] in ("--cp", "--tp") else 1)
            if name == "cp x tp":
                data_parallel = n // (options[1] * options[3])
            got = warm_up(path, name, given, n, [*options, "--batch-size", n // data_parallel])
            worst = max(
                abs(a - b) / abs(b)
                for mine, theirs in zip(got, want, strict=True)
                for a, b in zip(mine["kl"], theirs["kl"], strict=True)
            )
            bad += [name] if worst > LARGEST else []
            print(f"{name}: KL within {worst:.1e}, {median_step(got):.3f} s a step", flush=True)
        bad += watch_a_death(path, given, "tp", ["--tp", 2], 1)
        bad += watch_a_death(path, given, "dp, the first one", [], 0)
    if bad:
        raise SystemExit(f"check_processes: above {LARGEST}, or not ended as they should: {bad}")


def command(path: Path, name: str, given: argparse.Namespace, options: list[object]) -> list[str]:
    words = [
        "flash_indexer", "warmup", "--out", path / name, "--model", path / "model", "--data", path / "texts.jsonl",
        "--sequence-length", given.sequence_length, "--steps", given.steps, "--evaluate-sequences", 0,
        "--warmup-steps", 2, "--timeout", 300, *options,
    ]  # fmt: skip
    return [str(word) for word in words]


def warm_up(
    path: Path, name: str, given: argparse.Namespace, processes: int, options: list[object]
) -> list[dict[str, list[float]]]:
    """The rows of a run's metrics."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    done = subprocess.run([*start, *command(path, name, given, options)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"check_processes: {name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return [json.loads(line) for line in (path / name / "metrics.jsonl").read_text().splitlines()]


def watch_a_death(path: Path, given: argparse.Namespace, name: str, options: list[object], dying: int) -> list[str]:
    """Kills one of two processes that no agent watches; [name] where the other did not end as it should."""
    started, held = [], socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # bound as long as it lives: nobody else gets the port,
    held.bind(("", 0))  # while torch's store, which allows reuse as well, listens at it
    port = held.getsockname()[1]
    options = [*options, "--steps", 100000, "--timeout", TIMEOUT, "--save-every", 1]
    out = path / f"dead {dying}"
    for rank in (0, 1):
        place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        place["PYTHONFAULTHANDLER"] = 1  # where each thread is when it is ended
        environment = os.environ | {key: str(value) for key, value in place.items()}
        words = [sys.executable, "-m", *command(path, out.name, given, options)]
        started.append(subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True))
    while not (out / "checkpoint").exists():
        if any(process.poll() is not None for process in started):
            for process in started:
                process.kill()
            raise SystemExit(f"check_processes: a process ended by itself:\n{started[0].communicate()[1][-3000:]}")
        time.sleep(1)
    held.close()
    began, other = time.monotonic(), started[1 - dying]
    started[dying].send_signal(signal.SIGKILL)
    try:
        _, said = other.communicate(timeout=TIMEOUT + LONGER)
        ended = f"ended with {other.returncode} after {time.monotonic() - began:.0f} s (timeout {TIMEOUT} s)"
    except subprocess.TimeoutExpired:
        other.kill()
        _, said = other.communicate()
        ended = f"still ran {TIMEOUT + LONGER} s later"
    ours = [line for line in said.splitlines() if "lost contact" in line]  # traces of NCCL and Python come after it
    print(f"{name}: a process died: the other {ended}; it said:\n{ours[-1] if ours else said[-1200:]}", flush=True)
    return [] if other.returncode in (1, -signal.SIGABRT) and "lost contact" in said else [f"a death, {name}"]


if __name__ == "__main__":
    main()
