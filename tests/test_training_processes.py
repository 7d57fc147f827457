"""Runs in processes of their own: killed by SIGKILL at any moment, and shared out over two ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from flash_indexer.integration.native import read_native
from flash_indexer.run_record import WarmupSettings, read_metrics

RUN = """
import io
from rich.console import Console
from flash_indexer.run_record import WarmupSettings
from flash_indexer.training import warm_up
warm_up(WarmupSettings(**settings), out, resume=resume, console=Console(file=io.StringIO()))
"""
DIE = """
import os, signal
def dying(function, call):
    left = [call]
    def wrapper(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return wrapper
import {owner} as owner
owner.{name} = dying(owner.{name}, {call})
"""
RANK = """
import os
os.environ.update(environment)
"""
LATE = """
import time
from flash_indexer import training
look = training.read_record
training.read_record = lambda *args: (time.sleep(1), look(*args))[1]
"""


@pytest.fixture(scope="module")
def context() -> Any:
    """New processes come, within milliseconds, from a server that has imported everything and run nothing."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["flash_indexer.training", "transformers.models.llama.modeling_llama"])
    first = server.Process(target=exec, args=("",))
    first.start()
    first.join()
    return server


@pytest.fixture
def settings(checkpoint: Path, texts: Path) -> Callable[..., WarmupSettings]:
    def build(**changes: Any) -> WarmupSettings:
        values = dict(
            model=str(checkpoint), data=str(texts), sequence_length=32, steps=12, warmup_steps=3, num_heads=4,
            head_dim=32, rope_dim=16, save_every=4,
        )  # fmt: skip
        return WarmupSettings(**(values | changes))

    return build


def start(context: Any, code: str, settings: WarmupSettings, out: Path, **names: Any) -> BaseProcess:
    names = dict(settings=asdict(settings), out=str(out), resume=True) | names
    process: BaseProcess = context.Process(target=exec, args=(code + RUN, names))
    process.start()
    return process


def finish(process: BaseProcess, exitcode: int) -> None:
    process.join(120)
    assert process.exitcode == exitcode


def steps(out: Path) -> list[int]:
    return [row["step"] for row in read_metrics(out / "metrics.jsonl")]


def assert_same_run(one: Path, other: Path) -> None:
    rows = [
        [{name: x for name, x in row.items() if name != "seconds"} for row in read_metrics(out / "metrics.jsonl")]
        for out in (one, other)
    ]
    assert rows[0] == rows[1]
    for name in ("indexer.safetensors", "optimizer.safetensors", "training_state.json"):
        assert (one / "checkpoint" / name).read_bytes() == (other / "checkpoint" / name).read_bytes(), name
    assert sorted(path.name for path in other.iterdir()) == ["checkpoint", "metrics.jsonl", "run.json"]


def test_killed_again_and_again_it_ends_bit_for_bit_the_same(tmp_path: Path, context: Any, settings: Any) -> None:
    """Killed in a step, between a checkpoint's two renames, while deleting the old one, while writing a row."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(start(context, "", settings(), whole), 0)
    for owner, name, call, after in (
        ("flash_indexer.training", "write_json", 1, []),  # before anything is written
        ("flash_indexer.training", "forward", 2, [1]),  # before the first checkpoint
        ("os", "rename", 1, [1, 2, 3, 4]),  # of the first checkpoint
        ("flash_indexer.training", "forward", 6, [1, 2, 3, 4, 5]),
        ("os", "rename", 2, [1, 2, 3, 4, 5, 6, 7, 8]),  # the old one is moved away, the new one not yet there
        ("flash_indexer.checkpoint", "save_file", 1, [1, 2, 3, 4, 5, 6, 7, 8]),
    ):
        process = start(context, DIE.format(owner=owner, name=name, call=call), settings(), cut)
        finish(process, -signal.SIGKILL)
        assert steps(cut) == after, (owner, name)
        if (cut / "metrics.jsonl").exists():
            with (cut / "metrics.jsonl").open("a") as file:
                file.write('{"step": 9, "loss": 0.')
    assert read_native(cut / "checkpoint").config.num_heads == 4
    finish(start(context, "", settings(), cut), 0)
    assert_same_run(whole, cut)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_random_times(tmp_path: Path, context: Any, settings: Any, seed: int) -> None:
    """With a checkpoint at every step, most kills strike while one is being written."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    wanted = settings(steps=120, save_every=1)
    began = time.perf_counter()
    finish(start(context, "", wanted, whole), 0)
    duration = time.perf_counter() - began
    draw, kills = random.Random(seed), 0
    for _ in range(200):
        before = len(steps(cut))
        process = start(context, "", wanted, cut)
        process.join(draw.uniform(0, 0.3) * duration)
        if process.exitcode is None:
            os.kill(process.pid or 0, signal.SIGKILL)
            kills += 1
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert len(steps(cut)) >= before - 1, "more than the step under way was lost"
    assert process.exitcode == 0 and kills >= 3, kills
    assert_same_run(whole, cut)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_ranks_train_what_one_process_does(tmp_path: Path, context: Any, settings: Any, accumulation: int) -> None:
    """The environment is torchrun's; rank 1 looks late whether there is a run already."""
    single, shared = tmp_path / "single", tmp_path / "shared"
    finish(start(context, "", settings(batch_size=4, accumulation=accumulation, steps=5), single), 0)
    port, ranks = free_port(), []
    for rank in (0, 1):
        environment = dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
        )  # fmt: skip
        late = LATE if rank == 1 else ""
        wanted = settings(batch_size=2, accumulation=accumulation, steps=5)
        ranks.append(start(context, RANK + late, wanted, shared, environment=environment, resume=False))
    for process in ranks:
        finish(process, 0)
    assert json.loads((shared / "run.json").read_text())["processes"] == 2
    one, two = (read_metrics(out / "metrics.jsonl") for out in (single, shared))
    for mine, theirs in zip(one, two, strict=True):
        assert mine["kl"] == pytest.approx(theirs["kl"], rel=1e-4)
        assert mine["uniform_kl"] == pytest.approx(theirs["uniform_kl"], rel=1e-4)
        assert (mine["tokens"], mine["lr"]) == (theirs["tokens"], theirs["lr"])
    first, second = (load_file(out / "checkpoint" / "indexer.safetensors") for out in (single, shared))
    for name, tensor in first.items():
        assert (tensor - second[name]).norm() <= 1e-3 * tensor.norm() + 1e-5, name
