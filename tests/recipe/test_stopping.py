"""Ctrl-C and SIGTERM: the step is finished and saved, nothing is lost, and the exit code says what happened."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flash_indexer.recipe import loop, warmup
from flash_indexer.recipe.loop import TrainingLoop
from flash_indexer.recipe.stopping import Interrupted, StopSignals, signal_of

HANG = 240.0  # seconds after which a process is taken to hang
SIGNALS = [signal.SIGINT, signal.SIGTERM]
COMMAND = """
import os, sys
os.environ.update(environment)
sys.argv, sys.stderr = arguments, open(f"{out}.{environment['RANK']}", "a")
from flash_indexer.cli import main
"""
SEND = """
import os, signal
from flash_indexer.recipe.loop import TrainingLoop
batches = TrainingLoop._batches
def sending(self, step):
    yield from batches(self, step)
    for _ in range({times} if step == 7 else 0):
        os.kill(os.getpid(), signal.{name})
TrainingLoop._batches = sending
"""


def send(monkeypatch: pytest.MonkeyPatch, number: int, step: int) -> None:
    """The signal comes in the middle of a step: its forwards are done, and its gradients not yet summed."""
    original = TrainingLoop._batches

    def batches(self: TrainingLoop, current: int) -> Iterator[Any]:
        yield from original(self, current)
        if current == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(TrainingLoop, "_batches", batches)


@pytest.mark.parametrize(("step", "number"), [(1, SIGNALS[0]), (6, SIGNALS[1]), (12, SIGNALS[0])])
def test_the_step_is_finished_and_saved_and_the_run_goes_on_bit_for_bit(
    tmp_path: Path, recipe: Any, whole_run: Path, metrics: Any, same_bits: Any, monkeypatch: pytest.MonkeyPatch,
    number: int, step: int,
) -> None:  # fmt: skip
    before = [signal.getsignal(handled) for handled in SIGNALS]
    out = tmp_path / "cut"
    send(monkeypatch, number, step)
    with pytest.raises(Interrupted, match=rf"after step {step} of 12, which is saved in {out}/checkpoint; to go on: "):
        recipe(out)
    monkeypatch.undo()
    assert [signal.getsignal(handled) for handled in SIGNALS] == before
    assert [row["step"] for row in metrics(out)] == list(range(1, step + 1))
    recipe(out, resume=True)
    same_bits(whole_run, out)


def test_a_signal_while_the_last_step_is_saved(tmp_path: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.save_checkpoint

    def save(*args: Any, **options: Any) -> None:
        original(*args, **options)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    with pytest.raises(Interrupted, match="ended by Ctrl-C after step 3 of 3"):
        recipe(tmp_path / "run", steps=3)


def test_before_the_first_step_nothing_is_there(tmp_path: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(warmup, "load_model", load_model)
    with pytest.raises(KeyboardInterrupt, match=f"interrupted before a step was computed: {tmp_path}/run is as it was"):
        recipe(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_second_signal_ends_at_once(
    tmp_path: Path, runs: Any, recipe: Any, tiny_settings: Any, whole_run: Path, metrics: Any, same_bits: Any, name: str
) -> None:
    out = tmp_path / "cut"
    runs.finish([runs.start(SEND.format(times=2, name=name), tiny_settings(), out)], -getattr(signal, name))
    assert [row["step"] for row in metrics(out)] == list(range(1, 7))
    recipe(out, resume=True)
    same_bits(whole_run, out)


@pytest.mark.parametrize(
    ("rank", "name", "code"), [pytest.param(0, "SIGINT", 130, marks=pytest.mark.slow), (1, "SIGTERM", 143)]
)
def test_a_signal_to_one_process_ends_all_after_the_same_step(
    tmp_path: Path, runs: Any, tiny_settings: Any, metrics: Any, rank: int, name: str, code: int
) -> None:
    """The run that is ended is the command line's, whose exit code counts; `warm_up` goes on with it."""
    settings, parallel = tiny_settings(warmup_steps=20, num_heads=2, rope_dim=None), dict(cp=2)
    words = f"flash-indexer warmup --model {settings.model} --data {settings.data} --resume --timeout 60"
    sizes = "--sequence-length 32 --steps 12 --num-heads 2 --head-dim 32 --save-every 4 --evaluate-sequences 0 --cp 2"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = [*words.split(), *sizes.split(), "--out", str(cut)]
    runs.finish(runs.ranks(2, settings, whole, parallel=parallel))
    codes = [COMMAND + (SEND.format(times=1, name=name) if n == rank else "") + "main()" for n in (0, 1)]
    processes = runs.ranks(2, None, cut, codes=codes, arguments=arguments)
    for process in processes:
        process.join(HANG)
    ends = [process.exitcode for process in processes]
    assert ends == [code, code]
    assert [row["step"] for row in metrics(cut)] == list(range(1, 8))
    said = [Path(f"{cut}.{n}").read_text() for n in (0, 1)]
    asked = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM"}[name]
    assert f"warmup: ended by {asked} after step 7 of 12, which is saved in {cut}/checkpoint; to go on: " in said[0]
    assert f"flash-indexer warmup --out {cut} --resume" in said[0]
    assert "Traceback" not in said[0] + said[1] and "saved" not in said[1], said
    runs.finish(runs.ranks(2, settings, cut, parallel=parallel))
    assert metrics(cut) == metrics(whole)


def test_a_thread_that_is_not_the_first_trains_without_signals(tmp_path: Path, recipe: Any, metrics: Any) -> None:
    thread = threading.Thread(target=recipe, args=(tmp_path / "run",), kwargs=dict(steps=2))
    thread.start()
    thread.join()
    assert len(metrics(tmp_path / "run")) == 2


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals(quiet=True) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == 0 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("sums", "number"), [([0, 0], 0), ([2, 0], signal.SIGINT), ([0, 0.5], signal.SIGTERM), ([1, 1], signal.SIGTERM)]
)
def test_all_processes_know_which_signal_came_to_one(sums: list[float], number: int) -> None:
    assert signal_of(sums) == number
