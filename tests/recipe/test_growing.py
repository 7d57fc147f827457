"""A run whose steps grow, and one that begins with trained indexers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flash_indexer.files.native import load_native, save_native
from flash_indexer.models.load import load_model
from flash_indexer.recipe import loop
from flash_indexer.recipe.loop import learning_rate
from flash_indexer.recipe.run_record import read_run, warmup_command


def stop(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The process as good as dies in that step of this run."""
    original, calls = loop.forward, iter(range(1, 99))

    def forward(handle: Any, batch: Any) -> None:
        if next(calls) == step:
            raise AssertionError("stopped")
        original(handle, batch)

    monkeypatch.setattr(loop, "forward", forward)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoint" / "indexer.safetensors")


@pytest.mark.parametrize("words", [{}, dict(steps=None, minutes=1e-9)], ids=["steps", "time"])
def test_a_finished_run_goes_on_with_the_learning_rates_of_a_longer_one(
    tmp_path: Path, recipe: Any, metrics: Any, words: dict[str, Any]
) -> None:
    out, began = tmp_path / "run", dict(steps=6) | words
    recipe(out, **began)
    first = metrics(out)
    recipe(out, resume=True, to=9)
    n = len(first)
    assert f"{n} steps become 9: from step {n + 1} on, the learning rate is that of a run of 9 steps" in recipe.printed
    longer = metrics(out)
    assert longer[:n] == first and [row["step"] for row in longer] == list(range(1, 10))
    settings = recipe.build(**began)
    assert [row["lr"] for row in longer] == [learning_rate(settings, s, n if s <= n else 9) for s in range(1, 10)]
    run = read_run(out)
    assert (run["steps"], run["ended_by"]) == (9, "steps")
    assert run["extensions"] == [{"after": n, "from": n, "to": 9}]
    commands = warmup_command(run, out).splitlines()
    assert f"--steps {n}" in commands[0] and commands[1:] == [f"flash-indexer warmup --out {out} --resume --steps 9"]
    recipe(out, resume=True)  # it is a run of 9 steps now
    assert metrics(out) == longer


def test_a_longer_run_sees_the_sequences_that_it_would_have_seen(tmp_path: Path, recipe: Any, metrics: Any) -> None:
    """Without decay a run of 4 steps, made 7, then 25, more than one pass over the text, is one of 25 steps."""
    plain = dict(decay="none", warmup_steps=0, sequence_length=128)
    recipe(tmp_path / "whole", steps=25, save_every=25, **plain)
    assert "epochs" in recipe.printed and "the text repeats" in recipe.printed
    recipe(tmp_path / "grown", steps=4, **plain)
    recipe(tmp_path / "grown", resume=True, to=7)
    recipe(tmp_path / "grown", resume=True, to=25)
    drop = [{name: x for name, x in row.items() if name != "mass"} for row in metrics(tmp_path / "grown")]
    assert drop == [{name: x for name, x in row.items() if name != "mass"} for row in metrics(tmp_path / "whole")]
    whole, grown = weights(tmp_path / "whole"), weights(tmp_path / "grown")
    assert all(torch.equal(whole[name], grown[name]) for name in whole)


def test_a_run_that_is_killed_after_it_grew_goes_on_bit_for_bit(
    tmp_path: Path, recipe: Any, metrics: Any, same_bits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    outs = tmp_path / "whole", tmp_path / "cut"
    for out in outs:
        stop(monkeypatch, 7)  # unfinished: 6 steps, saved after 4
        with pytest.raises(AssertionError, match="stopped"):
            recipe(out)
        monkeypatch.undo()
    recipe(outs[0], resume=True, to=15)
    assert read_run(outs[0])["extensions"] == [{"after": 4, "from": 12, "to": 15}]
    stop(monkeypatch, 1)  # before the first longer step: still a run of 12
    with pytest.raises(AssertionError, match="stopped"):
        recipe(outs[1], resume=True, to=15)
    monkeypatch.undo()
    assert read_run(outs[1])["steps"] == 12
    stop(monkeypatch, 3)
    with pytest.raises(AssertionError, match="stopped"):
        recipe(outs[1], resume=True, to=15)
    monkeypatch.undo()
    recipe(outs[1], resume=True)
    same_bits(*outs)


def test_steps_only_grow_and_the_text_stays(tmp_path: Path, recipe: Any, texts: Path, metrics: Any) -> None:
    out, data = tmp_path / "run", tmp_path / "texts"
    shutil.copytree(texts, data)
    recipe(out, steps=6, data=str(data))
    with pytest.raises(ValueError, match="--steps of a resumed run must be at least the 6 that it has, got 5; leave"):
        recipe(out, resume=True, to=5)
    recipe(out, resume=True, to=6)
    for file in data.iterdir():
        file.write_text("w1 " + file.read_text())
    before = (out / "run.json").read_text()
    for to in (None, 9):
        with pytest.raises(
            ValueError, match="data_fingerprint must be .* resume with the same model, tokenizer and data"
        ):
            recipe(out, resume=True, to=to)
    assert (out / "run.json").read_text() == before and len(metrics(out)) == 6


def test_steps_of_a_new_run(tmp_path: Path, recipe: Any, metrics: Any) -> None:
    recipe(tmp_path, resume=True, to=2)
    assert len(metrics(tmp_path)) == 2 and json.loads((tmp_path / "run.json").read_text())["settings"]["steps"] == 2


def test_a_run_begins_with_the_indexers_of_another(tmp_path: Path, recipe: Any, metrics: Any, same_bits: Any) -> None:
    handle = recipe(tmp_path / "first", lr=1e-2)
    save_native(handle, tmp_path / "native", base_name="tiny")
    recipe(tmp_path / "fresh", steps=1, seed=3)
    for name in ("first", "native"):
        recipe(tmp_path / f"from {name}", steps=1, seed=3, init_from=str(tmp_path / name), lr=1e-12)
        fresh, row = metrics(tmp_path / "fresh")[0], metrics(tmp_path / f"from {name}")[0]
        assert row["uniform_kl"] == fresh["uniform_kl"] and row["loss"] < 0.98 * fresh["loss"]
        began = weights(tmp_path / "first")
        assert all((x - began[key]).abs().max() < 1e-9 for key, x in weights(tmp_path / f"from {name}").items())
    same_bits(tmp_path / "from first", tmp_path / "from native")


def test_indexers_that_do_not_fit_are_refused(tmp_path: Path, recipe: Any, mla_checkpoint: Path) -> None:
    recipe(tmp_path / "first", steps=1)
    for changes, message in (
        (dict(init_from=str(tmp_path / "first"), num_heads=2), "--init-from must .* num_heads 4, attached are 2"),
        (dict(init_from=str(tmp_path / "first"), layers=(0,)), r"--init-from must .* layers \(0, 1, 2\), attached"),
        (dict(init_from=str(tmp_path / "first"), model=str(mla_checkpoint), rope_dim=None), "another base model"),
        (dict(init_from=str(tmp_path / "none")), "--init-from must name a run or an indexer .*no directory"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            recipe(tmp_path / "run", **changes)
        assert not (tmp_path / "run").exists()


def test_other_weights_of_the_base_are_said(tmp_path: Path, recipe: Any, checkpoint: Path) -> None:
    recipe(tmp_path / "first", steps=1)
    model, tokenizer = load_model(checkpoint, dtype=torch.float32)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    words = dict(steps=1, init_from=str(tmp_path / "first"))
    recipe(tmp_path / "same", **words)
    assert "with other weights" not in recipe.printed
    recipe(tmp_path / "changed", model=str(tmp_path / "other"), **words)
    assert "were trained on a model of the same sizes with other weights" in recipe.printed


def test_a_run_that_lost_its_beginning_is_not_begun_from_another(
    tmp_path: Path, recipe: Any, metrics: Any, same_bits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, source = recipe(tmp_path / "first", steps=2), tmp_path / "source"
    save_native(first, source, base_name="tiny")
    recipe(tmp_path / "whole", init_from=str(source))
    out = tmp_path / "cut"
    stop(monkeypatch, 3)
    with pytest.raises(AssertionError, match="stopped"):
        recipe(out, init_from=str(source))
    monkeypatch.undo()
    assert len(metrics(out)) == 2 and not (out / "checkpoint").exists()
    model, _ = load_model(recipe.build().model, dtype=torch.float32)
    changed = load_native(model, source)
    changed.indexers["1"].wk.weight.data[0, 0] += 1
    save_native(changed, source, base_name="tiny", overwrite=True)
    with pytest.raises(ValueError, match="init_fingerprint must be .* as when the run began"):
        recipe(out, resume=True)
    save_native(first, source, base_name="tiny", overwrite=True)
    stop(monkeypatch, 6)
    with pytest.raises(AssertionError, match="stopped"):
        recipe(out, resume=True)
    monkeypatch.undo()
    shutil.rmtree(source)  # with a checkpoint of its own it needs that no more
    recipe(out, resume=True)
    same_bits(tmp_path / "whole", out)
