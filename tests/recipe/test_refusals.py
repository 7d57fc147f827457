"""What is refused leaves no folder behind, or the one that was there; what does nothing is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flash_indexer.recipe import judging, loop, warmup
from flash_indexer.recipe.processes import ParallelSettings, restart_warning
from flash_indexer.recipe.run_record import WarmupSettings, read_run

DOCS = Path(__file__).resolve().parents[2] / "docs"


def failing(*args: Any, **options: Any) -> None:
    raise ValueError("attach: refused in a forward")


def test_what_a_forward_refuses_is_refused_before_text_is_packed(
    tmp_path: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warmup, "forward", failing)
    monkeypatch.setattr(warmup, "pack", lambda *args, **options: pytest.fail("packed"))
    with pytest.raises(ValueError, match="refused in a forward"):
        recipe(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exists", [False, True])
def test_a_refusal_in_the_first_step_leaves_the_folder_usable(
    tmp_path: Path, recipe: Any, same_bits: Any, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    out = tmp_path / "run"
    if exists:
        out.mkdir()
    monkeypatch.setattr(loop, "forward", failing)
    with pytest.raises(ValueError, match="refused in a forward"):
        recipe(out, seed=1)
    monkeypatch.undo()
    assert out.exists() == exists and not (exists and list(out.iterdir()))
    recipe(out)  # of other settings, and no --resume needed
    recipe(tmp_path / "whole")
    same_bits(tmp_path / "whole", out)


def test_a_short_sequence_that_is_tried_changes_no_bit(
    tmp_path: Path, recipe: Any, same_bits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe(tmp_path / "tried")
    monkeypatch.setattr(warmup, "_try_short_sequence", lambda *args: None)
    recipe(tmp_path / "not tried")
    same_bits(tmp_path / "tried", tmp_path / "not tried")


@pytest.mark.parametrize(
    ("parallel", "changes", "said"),
    [
        (dict(fsdp=True), {}, "--fsdp does nothing in one process"),
        (dict(layout="contiguous"), {}, "--cp-layout contiguous does nothing without --cp"),
        ({}, dict(minutes=7.0), "--minutes 7 does nothing beside --steps 2"),
        (
            {},
            dict(warmup_steps=8),
            "2 steps are fewer than the 8 of --warmup-steps: the learning rate ends at 2.50e-04",
        ),
    ],
)
def test_settings_that_do_nothing_are_said(
    tmp_path: Path, recipe: Any, parallel: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    recipe(tmp_path / "plain", steps=2, warmup_steps=2)
    assert said not in recipe.printed
    recipe(tmp_path / "run", parallel=ParallelSettings(**parallel), **(dict(steps=2, warmup_steps=2) | changes))
    assert said in recipe.printed
    warnings = json.loads((tmp_path / "run" / "run.json").read_text())["warnings"]
    assert [said in warning for warning in warnings] == ([True] if "warmup_steps" in changes else [])


def test_queries_that_processes_cannot_share_evenly_are_said(recipe: Any) -> None:
    settings = recipe.build(queries=0.5, sequence_length=32, steps=2)
    (said,) = warmup.notes(settings, ParallelSettings(cp=4), 4, False)
    assert "warmup: --queries 0.5 draws 4 blocks of a sequence of 32 tokens, which is cut into 8 pieces" in said
    assert warmup.notes(settings, ParallelSettings(cp=4, layout="contiguous"), 4, False) == []


def test_each_thing_that_takes_time_is_said_as_it_begins(
    tmp_path: Path, recipe: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe(tmp_path / "run", steps=None, minutes=1e-9)
    order = [
        f"loading {checkpoint}",
        "trying a short",
        "reading the text",
        "measuring the time",
        "packing 1 sequence of ",
    ]
    places = [recipe.printed.find(words) for words in [*order, "step 1/1"]]
    assert -1 not in places and places == sorted(places), recipe.printed
    monkeypatch.setattr(warmup, "load_model", failing)
    with pytest.raises(ValueError, match="refused"):
        recipe(tmp_path / "other")
    assert "loading" in recipe.printed and "reading the text" not in recipe.printed


@pytest.mark.parametrize(
    ("run_id", "shared", "warned"), [(None, None, False), ("1", "True", True), ("1", "False", False)],
    ids=["no torchrun", "static, or c10d without the variable", "c10d with the variable"],
)  # fmt: skip
def test_a_launcher_that_cannot_start_the_run_again_is_said(
    tmp_path: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch, run_id: str | None, shared: str | None, warned: bool
) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", run_id), ("TORCHELASTIC_USE_AGENT_STORE", shared)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert ("--rdzv-backend c10d" in (restart_warning() or "")) == warned
    recipe(tmp_path / "run", steps=1)
    assert "torchrun" not in recipe.printed  # nobody restarts a run without --resume
    recipe(tmp_path / "run", resume=True)
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --rdzv-backend c10d" in recipe.printed) == warned


def test_time_that_ended_a_run_is_recorded_and_said(tmp_path: Path, recipe: Any) -> None:
    out = tmp_path / "run"
    recipe(out, steps=None, minutes=1e-9)
    run = read_run(out)
    assert run["ended_by"] == "time"
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    said = judging.ended_by_time(run, out)
    assert said is not None and f"KL/uniform is {row['kl_over_uniform']:.3f} now" in said
    more = -(-judging.LONGER_TOKENS // 32)  # as many tokens as the recorded run
    assert said.endswith(f"To go on: flash-indexer warmup --out {out} --resume --steps {more}")
    recipe(out, resume=True, to=run["steps"] + 1)
    assert judging.ended_by_time(read_run(out), out) is None
    recipe(tmp_path / "counted", steps=1)
    assert judging.ended_by_time(read_run(tmp_path / "counted"), tmp_path / "counted") is None


def test_the_longer_run_is_the_recorded_one() -> None:
    report = json.loads((DOCS / "smollm2-135m" / "report.json").read_text())
    training = report["training"]
    assert (training["steps"], training["tokens"]) == (judging.LONGER_STEPS, judging.LONGER_TOKENS)
    assert round(training["last_kl_over_uniform"], 3) == judging.LONGER_RATIO


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(head_dim="64"), "warmup: head_dim must be a whole number, got '64'"),
        (dict(steps=2.5), "warmup: steps must be a whole number, got 2.5"),
        (dict(seed=True), "warmup: seed must be a whole number, got True"),
        (dict(save_every=None), "warmup: save_every must be a whole number, got None"),
        (dict(lr="1e-3"), "warmup: lr must be a number, got '1e-3'"),
        (dict(num_heads=0), "warmup: num_heads must be positive and finite, got 0"),
        (dict(rope_dim=-2), "warmup: rope_dim must be positive and finite, got -2"),
        (dict(warmup_steps=-1), "warmup: warmup_steps must not be negative, got -1"),
        (dict(clip=0), "warmup: clip must be positive, got 0; leave it out"),
        (dict(queries=0), r"warmup: queries must be above 0 and at most 1 \(all of them\), got 0"),
        (dict(queries=1.5), "warmup: queries must be above 0 and at most 1"),
        (dict(queries="half"), "warmup: queries must be a number, got 'half'"),
        (dict(queries=0.05, sequence_length=10), "queries must leave one of the 10 tokens .*, at least 0.1, got 0.05"),
        (dict(target="median"), 'warmup: target must be "mean", "per_head" or "sum_logits", got \'median\''),
    ],
)
def test_settings_that_no_run_can_use(changes: dict[str, Any], message: str) -> None:
    WarmupSettings()
    with pytest.raises(ValueError, match=message):
        WarmupSettings(**changes)
