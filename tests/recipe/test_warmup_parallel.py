"""Runs of 2 and 4 processes, in every way of sharing the work out, against one process: loss, gradients, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from flash_indexer.recipe.loop import micro_batches
from flash_indexer.recipe.run_record import WarmupSettings, read_metrics

STEPS = 6
LONG: dict[str, Any] = dict(sequence_length=640, batch_size=1, steps=1)
FIRST_GRADIENTS = """
from safetensors.torch import save_file
from flash_indexer.recipe import loop
summed = loop.sum_gradients
def sum_and_save(parameters, **options):
    parameters = list(parameters)
    summed(parameters, **options)
    loop.sum_gradients = summed
    save_file({str(n): parameter.grad for n, parameter in enumerate(parameters)}, out + ".gradients")
loop.sum_gradients = sum_and_save
"""
CHANGE = """
from flash_indexer.recipe import loop
forward = loop.forward
def changing(handle, batch):
    forward(handle, batch)
    handle.model.get_parameter("model.layers.1.mlp.up_proj.weight").to_local()[0, 0] += 1e-3
loop.forward = changing
"""
CATCH = """
import os
os.environ.update(environment)
from flash_indexer.recipe import warmup
original = warmup.warm_up
def caught(*args, **options):
    try:
        original(*args, **options)
    except RuntimeError as error:
        open(f"{out}.{environment['RANK']}", "w").write(str(error))
warmup.warm_up = caught
"""
WRONG_TEACHER = (
    CATCH.replace("RuntimeError", "ValueError")
    + """
from flash_indexer.models import verification
verification.difference = lambda got, wanted: 1.0
"""
)
STOP = """
from flash_indexer.recipe import loop
forward, steps = loop.forward, []
def stopping(handle, batch):
    steps.append(handle.token_weight)
    if len(steps) == 5:
        raise RuntimeError("stopped")
    forward(handle, batch)
loop.forward = stopping
"""


@pytest.fixture(scope="module")
def build(
    tiny_settings: Any, checkpoint: Path, mla_checkpoint: Path, window_checkpoint: Path, own_checkpoint: Path
) -> Any:
    paths = dict(llama=checkpoint, deepseek_v3=mla_checkpoint, mistral=window_checkpoint, own=own_checkpoint)

    def settings(model: str, dp: int = 1, **changes: Any) -> WarmupSettings:
        values = dict(
            model=str(paths[model]), sequence_length=64, steps=STEPS, save_every=STEPS, batch_size=4 // dp,
            rope_dim=None, indexers="own" if model == "own" else "fresh",
        )  # fmt: skip
        return tiny_settings(**(values | changes))

    return settings


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, runs: Any, build: Any) -> dict[str, Path]:
    """One process, 4 sequences of 64 tokens a step."""
    outs = {model: tmp_path_factory.mktemp("alone") / "run" for model in ("llama", "deepseek_v3", "own")}
    runs.finish([runs.start(FIRST_GRADIENTS, build(model), out) for model, out in outs.items()])
    return outs


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.txt"
    path.write_text(" ".join(f"w{n * n % 59}" for n in range(700)))
    return path


@pytest.fixture(scope="module")
def alone_long(tmp_path_factory: pytest.TempPathFactory, runs: Any, build: Any, long_text: Path) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    runs.finish([runs.start("", build("llama", **LONG, data=str(long_text)), out)])
    return out


def assert_same_training(one: Path, other: Path) -> None:
    """Equal but for the order of floating-point sums. Steps enlarge that, where a logit's sign decides a gradient."""
    mine, theirs = (read_metrics(out / "metrics.jsonl") for out in (one, other))
    assert len(mine) == len(theirs) == STEPS
    for row, same in zip(mine, theirs, strict=True):
        assert row["kl"] == pytest.approx(same["kl"], rel=2e-4)
        assert row["uniform_kl"] == pytest.approx(same["uniform_kl"], rel=1e-5)
        assert (row["tokens"], row["lr"]) == (same["tokens"], same["lr"])
    for file, tolerance in ((".gradients", 3e-5), ("/checkpoint/indexer.safetensors", 5e-2)):
        first, second = (load_file(f"{out}{file}") for out in (one, other))
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert (tensor - second[name]).norm() <= tolerance * tensor.norm(), (file, name)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(dict(count=2), dict(count=4), marks=pytest.mark.slow),
        pytest.param(dict(count=4, cp=2, tp=2), dict(count=1), marks=pytest.mark.slow),
        pytest.param(dict(count=1), dict(count=4, cp=2), marks=pytest.mark.slow),
        (dict(count=1), dict(count=2, cp=2)),
    ],
    ids=["2-4", "4 as cp x tp-1", "1-4 as dp x cp", "1-2 as cp"],
)
def test_a_run_goes_on_under_another_number_of_processes(
    tmp_path: Path, runs: Any, build: Any, alone: Any, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Ended by an error after 4 steps, with a checkpoint of step 3."""
    out, settings = tmp_path / "run", build("llama", save_every=3)
    codes, exitcode = [FIRST_GRADIENTS + STOP, STOP, STOP, STOP], 1
    for place in (before, after):
        sizes = {name: size for name, size in place.items() if name != "count"}
        dp = place["count"] // (sizes.get("cp", 1) * sizes.get("tp", 1))
        settings = build("llama", dp, save_every=3)
        runs.finish(runs.ranks(place["count"], settings, out, parallel=sizes, codes=codes), exitcode)
        codes, exitcode = [], 0
    assert_same_training(alone["llama"], out)


def test_windows_and_layers_without_indexers_see_all_processes_keys(tmp_path: Path, runs: Any, build: Any) -> None:
    """And heads of their own with target="per_head"."""
    settings = build("mistral", layers=(0, 2), target="per_head", num_heads=4)
    one, two = tmp_path / "one", tmp_path / "two"
    runs.finish([runs.start(FIRST_GRADIENTS, settings, one)])
    runs.finish(runs.ranks(2, settings, two, parallel=dict(cp=2), codes=[FIRST_GRADIENTS]))
    assert_same_training(one, two)


@pytest.mark.parametrize(
    "parallel", [dict(cp=2), dict(cp=2, layout="contiguous"), dict(tp=2)], ids=["zigzag", "contiguous", "tp"]
)
def test_mass_is_that_of_all_heads_and_keys(
    tmp_path: Path, runs: Any, build: Any, alone_long: Path, long_text: Path, parallel: dict[str, Any]
) -> None:
    settings = build("llama", **LONG, data=str(long_text))
    runs.finish(runs.ranks(2, settings, tmp_path / "run", parallel=parallel))
    (mine,), (theirs,) = (read_metrics(out / "metrics.jsonl") for out in (alone_long, tmp_path / "run"))
    assert 0 < mine["mass"] < 1 and mine["mass"] == pytest.approx(theirs["mass"], rel=1e-3)


def test_a_shard_that_changed_is_found(tmp_path: Path, runs: Any, build: Any) -> None:
    codes = [CHANGE + CATCH, CHANGE + CATCH]
    runs.finish(runs.ranks(2, build("llama", steps=1), tmp_path / "run", parallel=dict(fsdp=True), codes=codes))
    for rank in (0, 1):
        said = (tmp_path / f"run.{rank}").read_text()
        assert said == "warmup: the frozen model's parameters changed during training", said


@pytest.mark.parametrize("parallel", [dict(cp=2), dict(fsdp=True)], ids=["cp", "fsdp"])
def test_a_wrong_teacher_is_refused_by_every_process(
    tmp_path: Path, runs: Any, build: Any, parallel: dict[str, Any]
) -> None:
    runs.finish(runs.ranks(2, build("llama"), tmp_path / "run", parallel=parallel, codes=[WRONG_TEACHER] * 2))
    for rank in (0, 1):
        said = (tmp_path / f"run.{rank}").read_text()
        assert said.startswith("attach: the teacher must be the model's own attention, but layer 0: the output"), said
    assert not (tmp_path / "run").exists()


def test_a_step_that_cannot_be_shared_out_is_refused(build: Any) -> None:
    with pytest.raises(ValueError, match="processes must divide the 4 sequences of an optimizer step .*, got 3"):
        micro_batches(build("llama"), 4, 3)
    assert micro_batches(build("llama", batch_size=4), 12, 2) == (3, 2)


@pytest.mark.parametrize(
    ("model", "processes", "parallel"),
    [
        pytest.param("llama", 2, dict(cp=2), marks=pytest.mark.slow),
        ("llama", 2, dict(cp=2, layout="contiguous")),
        pytest.param("llama", 4, dict(cp=4), marks=pytest.mark.slow),
        pytest.param("llama", 4, dict(cp=2, layout="contiguous", fsdp=True), marks=pytest.mark.slow),
        pytest.param("llama", 2, dict(tp=2), marks=pytest.mark.slow),
        pytest.param("llama", 4, dict(tp=2, fsdp=True), marks=pytest.mark.slow),
        pytest.param("llama", 4, dict(cp=2, tp=2), marks=pytest.mark.slow),
        pytest.param("llama", 4, dict(cp=2, tp=2, fsdp=True), marks=pytest.mark.slow),
        pytest.param("llama", 4, dict(), marks=pytest.mark.slow),
        ("llama", 2, dict(fsdp=True)),
        pytest.param("deepseek_v3", 4, dict(fsdp=True), marks=pytest.mark.slow),
        pytest.param("deepseek_v3", 2, dict(cp=2), marks=pytest.mark.slow),
        pytest.param("deepseek_v3", 4, dict(cp=2, tp=2), marks=pytest.mark.slow),
        ("deepseek_v3", 2, dict(tp=2)),
        pytest.param("own", 4, dict(cp=2, tp=2), marks=pytest.mark.slow),
        ("own", 2, dict(cp=2)),
        ("own", 2, dict(fsdp=True)),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) or "dp" if isinstance(x, dict) else str(x),
)
def test_many_processes_train_what_one_does(
    tmp_path: Path, runs: Any, build: Any, alone: Any, model: str, processes: int, parallel: dict[str, Any]
) -> None:
    dp = processes // (parallel.get("cp", 1) * parallel.get("tp", 1))
    runs.finish(runs.ranks(processes, build(model, dp), tmp_path / "run", parallel=parallel, codes=[FIRST_GRADIENTS]))
    assert_same_training(alone[model], tmp_path / "run")
