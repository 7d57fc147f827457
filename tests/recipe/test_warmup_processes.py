"""Runs in processes of their own: killed by SIGKILL at any moment, and shared out over two ranks."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from flash_indexer.files.native import read_native
from flash_indexer.recipe.run_record import read_metrics

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
LATE = """
import time
from flash_indexer.recipe import warmup as training
look = training.read_record
training.read_record = lambda *args: (time.sleep(1), look(*args))[1]
"""
ELSEWHERE = """
import os
os.environ.update(environment)
from flash_indexer.recipe import warmup as training
original = training.warm_up
def caught(settings, _, **options):
    try:
        original(settings, {out!r}, **options)
    except Exception as error:
        open({out!r} + ".said", "w").write(type(error).__name__ + ": " + str(error))
training.warm_up = caught
"""


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


def test_killed_again_and_again_it_ends_bit_for_bit_the_same(tmp_path: Path, runs: Any, tiny_settings: Any) -> None:
    """Killed in a step, between a checkpoint's two renames, while deleting the old one, while writing a row."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    runs.finish([runs.start("", tiny_settings(), whole)])
    for owner, name, call, after in (
        ("flash_indexer.recipe.warmup", "write_json", 1, []),  # before anything is written
        ("flash_indexer.recipe.loop", "forward", 2, [1]),  # before the first checkpoint
        ("os", "rename", 1, [1, 2, 3, 4]),  # of the first checkpoint
        ("flash_indexer.recipe.loop", "forward", 6, [1, 2, 3, 4, 5]),
        ("os", "rename", 2, [1, 2, 3, 4, 5, 6, 7, 8]),  # the old one is moved away, the new one not yet there
        ("flash_indexer.files.checkpoint", "save_file", 1, [1, 2, 3, 4, 5, 6, 7, 8]),
    ):
        process = runs.start(DIE.format(owner=owner, name=name, call=call), tiny_settings(), cut)
        runs.finish([process], -signal.SIGKILL)
        assert steps(cut) == after, (owner, name)
        if (cut / "metrics.jsonl").exists():
            with (cut / "metrics.jsonl").open("a") as file:
                file.write('{"step": 9, "loss": 0.')
    assert read_native(cut / "checkpoint").config.num_heads == 4
    runs.finish([runs.start("", tiny_settings(), cut)])
    assert_same_run(whole, cut)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_random_times(tmp_path: Path, runs: Any, tiny_settings: Any, seed: int) -> None:
    """With a checkpoint at every step, most kills strike while one is being written."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    wanted = tiny_settings(steps=120, save_every=1)
    began = time.perf_counter()
    runs.finish([runs.start("", wanted, whole)])
    duration = time.perf_counter() - began
    draw, kills = random.Random(seed), 0
    for _ in range(200):
        before = len(steps(cut))
        process = runs.start("", wanted, cut)
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


@pytest.mark.parametrize("copied", [[], ["run.json"], ["run.json", "checkpoint"]], ids=["none", "record", "other"])
def test_ranks_that_see_different_folders_are_refused(
    tmp_path: Path, runs: Any, tiny_settings: Any, copied: list[str]
) -> None:
    """Without a shared disk: rank 1 has no record, no checkpoint, or a run of other settings."""
    outs, settings = [tmp_path / "0", tmp_path / "1"], tiny_settings(batch_size=2, steps=3)
    runs.finish([runs.start("", settings, outs[0])])
    outs[1].mkdir()
    for name in copied:
        source = outs[0] / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, outs[1] / name)
    if "checkpoint" in copied:
        record = json.loads((outs[1] / "run.json").read_text())
        record["settings"]["lr"] *= 2
        (outs[1] / "run.json").write_text(json.dumps(record))
    codes = [ELSEWHERE.format(out=str(out)) for out in outs]
    runs.finish(runs.ranks(2, settings, outs[0], codes=codes))
    for out in outs:
        said = out.with_name(f"{out.name}.said").read_text()
        assert said.startswith("ValueError: warmup: --out must be one folder that all processes see, got "), said


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_ranks_train_what_one_does(tmp_path: Path, runs: Any, tiny_settings: Any, accumulation: int) -> None:
    """Rank 1 looks late whether there is a run already."""
    single, shared = tmp_path / "single", tmp_path / "shared"
    runs.finish([runs.start("", tiny_settings(batch_size=4, accumulation=accumulation, steps=5), single)])
    wanted = tiny_settings(batch_size=2, accumulation=accumulation, steps=5)
    runs.finish(runs.ranks(2, wanted, shared, codes=["", LATE], resume=False))
    assert json.loads((shared / "run.json").read_text())["sequences_per_step"] == 4 * accumulation
    one, two = (read_metrics(out / "metrics.jsonl") for out in (single, shared))
    for mine, theirs in zip(one, two, strict=True):
        assert mine["kl"] == pytest.approx(theirs["kl"], rel=1e-4)
        assert mine["uniform_kl"] == pytest.approx(theirs["uniform_kl"], rel=1e-4)
        assert (mine["tokens"], mine["lr"]) == (theirs["tokens"], theirs["lr"])
    first, second = (load_file(out / "checkpoint" / "indexer.safetensors") for out in (single, shared))
    for name, tensor in first.items():
        assert (tensor - second[name]).norm() <= 1e-3 * tensor.norm() + 1e-5, name
