"""The recipe on a tiny model: it learns, every setting does what it says, and failures are clear and lose nothing."""

from __future__ import annotations

import errno
import io
import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig

from flash_indexer.files import checkpoint as checkpoint_module
from flash_indexer.files.native import read_native
from flash_indexer.models.attach import IndexerHandle
from flash_indexer.models.load import load_model
from flash_indexer.parallel.mesh import Parallel
from flash_indexer.recipe import loop
from flash_indexer.recipe.data import load_documents, pack
from flash_indexer.recipe.run_record import WarmupSettings, read_metrics, read_run, settings_from
from flash_indexer.recipe.warmup import warm_up

L = 32
Train = Callable[..., IndexerHandle]


@pytest.fixture
def settings(checkpoint: Path, texts: Path) -> Callable[..., WarmupSettings]:
    def build(**changes: Any) -> WarmupSettings:
        values = dict(
            model=str(checkpoint), data=str(texts), sequence_length=L, steps=4, warmup_steps=2, num_heads=4,
            head_dim=32, rope_dim=16, save_every=2,
        )  # fmt: skip
        return WarmupSettings(**(values | changes))

    return build


@pytest.fixture
def train(settings: Callable[..., WarmupSettings]) -> Train:
    """`train(out, resume=False, **settings)` without anything printed."""

    def run(out: Path, *, resume: bool = False, **changes: Any) -> IndexerHandle:
        return warm_up(settings(**changes), out, resume=resume, console=Console(file=io.StringIO()))

    return run


def rows(out: Path) -> list[dict[str, Any]]:
    """Metrics without what the clock decides."""
    return [{name: x for name, x in row.items() if name != "seconds"} for row in read_metrics(out / "metrics.jsonl")]


def weights(out: Path) -> bytes:
    return (out / "checkpoint" / "indexer.safetensors").read_bytes()


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    for name in ("indexer.safetensors", "optimizer.safetensors", "training_state.json"):
        assert (one / "checkpoint" / name).read_bytes() == (other / "checkpoint" / name).read_bytes(), name


def assert_nearly_same_run(one: Path, other: Path) -> None:
    """Equal up to the order of floating-point sums; AdamW lets that grow where a gradient is nearly zero."""
    for mine, theirs in zip(rows(one), rows(other), strict=True):
        assert mine["kl"] == pytest.approx(theirs["kl"], rel=1e-4)
        assert mine["uniform_kl"] == pytest.approx(theirs["uniform_kl"], rel=1e-4)
        assert (mine["tokens"], mine["lr"]) == (theirs["tokens"], theirs["lr"])
    first, second = (load_file(out / "checkpoint" / "indexer.safetensors") for out in (one, other))
    for name, tensor in first.items():
        assert (tensor - second[name]).norm() <= 1e-3 * tensor.norm() + 1e-5, name


def test_the_loss_falls_well_below_the_uniform_predictions(tmp_path: Path, train: Train) -> None:
    handle = train(tmp_path, steps=80, lr=1e-2, batch_size=4, num_heads=8, head_dim=64, save_every=80)
    found = rows(tmp_path)
    early, late = (sum(row["kl_over_uniform"] for row in part) / 5 for part in (found[:5], found[-5:]))
    assert 0.95 < early < 1.05 and late < 0.76, (early, late)
    last = [kl / uniform for kl, uniform in zip(found[-1]["kl"], found[-1]["uniform_kl"], strict=True)]
    assert last[0] < 0.55 and max(last) < 0.85, last
    saved = read_native(tmp_path / "checkpoint").state_dict
    assert all(torch.equal(saved[name], value) for name, value in handle.state_dict().items())


def test_a_row_for_every_step_with_every_number(tmp_path: Path, train: Train) -> None:
    train(tmp_path, steps=3, sequence_length=256, batch_size=2, accumulation=3, layers=(0, 2))
    found = read_metrics(tmp_path / "metrics.jsonl")
    names = {"step", "loss", "kl_over_uniform", "mass", "lr", "seconds", "tokens", "kl", "uniform_kl"}
    assert [row["step"] for row in found] == [1, 2, 3]
    for row in found:
        assert row.keys() == names
        assert row["tokens"] == row["step"] * 2 * 3 * 256
        assert len(row["kl"]) == len(row["uniform_kl"]) == 2
        assert row["loss"] == pytest.approx(sum(row["kl"]) / 2, rel=1e-5)
        assert row["kl_over_uniform"] == pytest.approx(sum(row["kl"]) / sum(row["uniform_kl"]), rel=1e-5)
    assert [row["seconds"] for row in found] == sorted(row["seconds"] for row in found)
    # Documents of at most 121 tokens: no query sees 4·64 keys, so there is no mass at 64 to tell.
    assert all(row["mass"] is None for row in found)


def test_mass_is_told_on_the_first_last_and_every_tenth_step(tmp_path: Path, train: Train) -> None:
    long = tmp_path / "long.txt"
    long.write_text(" ".join(f"w{n * n % 59}" for n in range(600)))
    train(tmp_path / "run", data=str(long), sequence_length=300, steps=12)
    mass = {row["step"]: row["mass"] for row in rows(tmp_path / "run") if row["mass"] is not None}
    assert sorted(mass) == [1, 10, 12] and all(0 < share <= 1 for share in mass.values())


def test_accumulation_is_a_larger_batch(tmp_path: Path, train: Train) -> None:
    train(tmp_path / "accumulated", accumulation=2)
    train(tmp_path / "batch", batch_size=2)
    assert_nearly_same_run(tmp_path / "accumulated", tmp_path / "batch")
    train(tmp_path / "single")
    assert rows(tmp_path / "single")[0]["kl"] != pytest.approx(rows(tmp_path / "batch")[0]["kl"], rel=1e-4)


def test_every_token_of_an_optimizer_step_weighs_the_same(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = loop.forward

    def forward(handle: IndexerHandle, batch: dict[str, torch.Tensor]) -> None:
        seen.append((handle.token_weight, tuple(batch["input_ids"].shape)))
        original(handle, batch)

    monkeypatch.setattr(loop, "forward", forward)
    train(tmp_path, steps=2, batch_size=2, accumulation=3)
    assert seen == [(pytest.approx(1 / (2 * 3 * L)), (2, L))] * 6


@pytest.mark.parametrize("decay", ["cosine", "none"])
def test_learning_rate(tmp_path: Path, train: Train, decay: str) -> None:
    train(tmp_path, steps=10, warmup_steps=4, lr=0.01, decay=decay)
    got = [row["lr"] for row in rows(tmp_path)]
    down = [0.5 + 0.5 * math.cos(math.pi * n / 7) for n in range(7)] if decay == "cosine" else [1.0] * 7
    assert got == pytest.approx([0.01 * x for x in (0.25, 0.5, 0.75, *down)])


def test_clipping_bounds_the_gradient(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []

    def step(self: Any, closure: Any = None) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(tmp_path / "free", steps=1)
    train(tmp_path / "clipped", steps=1, clip=norms[0] / 10)
    assert norms[1] == pytest.approx(norms[0] / 10, rel=1e-3)


def test_seed_decides_initialisation_and_order(tmp_path: Path, train: Train) -> None:
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        train(tmp_path / name, seed=seed, steps=2)
    assert_same_run(tmp_path / "one", tmp_path / "again")
    assert rows(tmp_path / "one")[0]["uniform_kl"] != rows(tmp_path / "two")[0]["uniform_kl"]


def test_minutes_choose_the_steps_and_the_trial_leaves_no_trace(tmp_path: Path, train: Train) -> None:
    train(tmp_path / "timed", steps=None, minutes=0.001, warmup_steps=2)
    record = json.loads((tmp_path / "timed" / "run.json").read_text())
    assert record["settings"]["steps"] is None and record["settings"]["minutes"] == 0.001
    assert read_run(tmp_path / "timed")["steps"] == record["steps"] == len(rows(tmp_path / "timed")) > 0
    train(tmp_path / "counted", steps=record["steps"], minutes=3.0, warmup_steps=2)
    assert_same_run(tmp_path / "timed", tmp_path / "counted")


def test_data_is_gone_through_again_in_another_order() -> None:
    n = 90
    drawn = [loop.sequence_drawn(i, n, seed=0) for i in range(3 * n)]
    assert drawn[:n] == list(range(n)) and sorted(drawn[n : 2 * n]) == sorted(drawn[2 * n :]) == list(range(n))
    assert drawn[n : 2 * n] != drawn[2 * n :] and drawn[n : 2 * n] != drawn[:n]


def _loop(settings: WarmupSettings, data: Any, *, world: int, rank: int) -> Any:
    parallel = Parallel(dp=world, dp_rank=rank)
    processes: Any = SimpleNamespace(parallel=parallel, device=torch.device("cpu"))
    per_step = settings.batch_size * settings.accumulation * world
    parts: Any = (settings, 4, per_step, Path(), None, data, processes, "", Console(), None)
    return loop.TrainingLoop(*parts)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_ranks_share_out_what_one_process_would_draw(
    settings: Any, texts: Path, checkpoint: Path, accumulation: int
) -> None:
    _, tokenizer = load_model(checkpoint, dtype=torch.float32)
    data = pack(load_documents(texts), tokenizer, sequence_length=L, seed=0)
    for step in (1, 2, 40):
        single = _loop(settings(batch_size=4, accumulation=accumulation), data, world=1, rank=0)
        want = list(single._batches(step))
        ranks = [_loop(settings(batch_size=2, accumulation=accumulation), data, world=2, rank=r) for r in (0, 1)]
        got = zip(*(run._batches(step) for run in ranks), strict=True)
        for whole, parts in zip(want, got, strict=True):
            assert not torch.equal(parts[0]["input_ids"], parts[1]["input_ids"])
            for name in ("input_ids", "position_ids"):
                assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "whole", steps=7)
    monkeypatch.setattr(loop, "save_checkpoint", _after(3, loop.save_checkpoint, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", steps=7)
    monkeypatch.undo()
    assert len(rows(tmp_path / "cut")) == 6
    # The settings are the recorded ones, whatever is given.
    train(tmp_path / "cut", resume=True, steps=2, lr=9.0, num_heads=2)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    before = weights(tmp_path / "cut")
    train(tmp_path / "cut", resume=True)
    assert weights(tmp_path / "cut") == before
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def _after(calls: int, function: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """`function`, which raises `error` instead of its n-th call."""
    count = 0

    def wrapper(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            raise error
        return function(*args, **options)

    return wrapper


def test_resume_where_nothing_is_starts_a_run(tmp_path: Path, train: Train) -> None:
    train(tmp_path / "a", resume=True)
    train(tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_an_existing_run_is_not_overwritten(tmp_path: Path, train: Train) -> None:
    train(tmp_path)
    before = weights(tmp_path)
    with pytest.raises(ValueError, match="already holds a run; pass --resume"):
        train(tmp_path, seed=9)
    assert weights(tmp_path) == before and len(rows(tmp_path)) == 4


def test_resuming_with_another_model_or_other_data_is_refused(
    tmp_path: Path, train: Train, checkpoint: Path, texts: Path
) -> None:
    model, data, out = (tmp_path / name for name in ("model", "data", "run"))
    shutil.copytree(checkpoint, model)
    shutil.copytree(texts, data)
    train(out, model=str(model), data=str(data))
    before = weights(out)
    for file in data.iterdir():
        file.write_text("w1 " + file.read_text())
    with pytest.raises(ValueError, match="data_fingerprint must be .* resume with the same model, tokenizer and data"):
        train(out, resume=True)
    shutil.copytree(texts, data, dirs_exist_ok=True)
    other = AutoModelForCausalLM.from_pretrained(model)
    other.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1e-3
    other.save_pretrained(model)
    with pytest.raises(ValueError, match="base_fingerprint must be"):
        train(out, resume=True)
    assert weights(out) == before and len(rows(out)) == 4


@pytest.mark.parametrize("name", ["checkpoint", ".checkpoint.old", "metrics.jsonl", "indexer_config.json"])
@pytest.mark.parametrize("resume", [False, True])
def test_what_a_run_without_a_record_left_is_not_taken_for_ours(
    tmp_path: Path, train: Train, name: str, resume: bool
) -> None:
    (tmp_path / name).write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(
        ValueError, match=rf"--out must be a new folder or that of a run, got .*, which holds {name} and no"
    ):
        train(tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == '{"step": 1, "loss": 2.0}\n'


def test_a_file_where_the_folder_should_be(tmp_path: Path, train: Train) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(ValueError, match=r"warmup: --out must be a folder, got .*, where .*file is a file"):
            train(out)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_clock_goes_on_with_a_resumed_run(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = loop.forward, iter(range(1, 99))

    def forward(handle: IndexerHandle, batch: dict[str, torch.Tensor]) -> None:
        if next(calls) == 6:
            raise KeyboardInterrupt
        original(handle, batch)

    monkeypatch.setattr(loop, "forward", forward)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, steps=8)
    monkeypatch.undo()
    file = tmp_path / "metrics.jsonl"
    before = [row | dict(seconds=1000.0 + row["step"]) for row in read_metrics(file)]
    file.write_text("".join(json.dumps(row) + "\n" for row in before))
    train(tmp_path, resume=True)
    seconds = [row["seconds"] for row in read_metrics(file)]
    assert seconds[:4] == [1001.0, 1002.0, 1003.0, 1004.0] and seconds == sorted(seconds) and len(seconds) == 8


@pytest.mark.parametrize("content", ["", "{", "[]", '{"steps": 3}'])
def test_a_foreign_run_record_is_refused(tmp_path: Path, train: Train, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run.json is not a run's record"):
        train(tmp_path, resume=True)


def test_a_nan_in_the_model_names_layer_and_step(tmp_path: Path, train: Train, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.model.layers[1].self_attn.q_proj.weight.data[3, 3] = math.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(
        FloatingPointError, match="the loss of layer 1 is nan at step 1; no checkpoint was written: start a new run"
    ):
        train(tmp_path / "run", model=str(tmp_path / "model"))
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_loss_that_turns_nan_keeps_the_checkpoint(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "whole", steps=8)
    original, calls = loop.forward, iter(range(1, 99))

    def forward(handle: IndexerHandle, batch: dict[str, torch.Tensor]) -> None:
        if next(calls) == 6:
            handle.indexers["2"].wk.weight.data[0, 0] = math.nan
        original(handle, batch)

    monkeypatch.setattr(loop, "forward", forward)
    with pytest.raises(FloatingPointError, match="layer 2 is nan at step 6; the checkpoint in .* smaller --lr"):
        train(tmp_path / "run", steps=8)
    monkeypatch.undo()
    assert len(rows(tmp_path / "run")) == 5
    assert json.loads((tmp_path / "run" / "checkpoint" / "training_state.json").read_text()) == {"step": 4}
    train(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (1e20, r"1e\+20")])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_none_ends_the_run_before_its_step(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, value: float, shown: str, clip: float | None
) -> None:
    """While the loss is as ever."""
    train(tmp_path / "whole", steps=6, clip=clip)
    original, calls = loop.sum_gradients, iter(range(1, 99))

    def sum_gradients(parameters: Iterable[torch.Tensor], **options: Any) -> None:
        parameters = list(parameters)
        if next(calls) == 4:
            gradient = handles[-1].indexers["1"].wk.weight.grad
            gradient[0, 0] = value
        original(parameters, **options)

    handles: list[IndexerHandle] = []
    forward = loop.forward
    monkeypatch.setattr(loop, "forward", lambda handle, batch: (handles.append(handle), forward(handle, batch))[1])
    monkeypatch.setattr(loop, "sum_gradients", sum_gradients)
    with pytest.raises(FloatingPointError, match=f"the gradient of layer 1 reaches {shown} at step 4; the checkpoint"):
        train(tmp_path / "run", steps=6, clip=clip)
    monkeypatch.undo()
    assert len(rows(tmp_path / "run")) == 3
    assert json.loads((tmp_path / "run" / "checkpoint" / "training_state.json").read_text()) == {"step": 2}
    train(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_full_disk_keeps_the_earlier_checkpoint(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "whole", steps=6)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoint_module, "save_file", _after(2, checkpoint_module.save_file, full))
    with pytest.raises(OSError, match="no space left while writing .*checkpoint; .*free some space"):
        train(tmp_path / "run", steps=6)
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint", "metrics.jsonl", "run.json"]
    assert json.loads((tmp_path / "run" / "checkpoint" / "training_state.json").read_text()) == {"step": 2}
    train(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("harm", ["value", "gradient"])
def test_the_audit_finds_a_model_that_was_not_frozen(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    original = loop.forward

    def forward(handle: IndexerHandle, batch: dict[str, torch.Tensor]) -> None:
        original(handle, batch)
        parameter = handle.model.get_parameter("model.layers.1.mlp.up_proj.weight")
        if harm == "gradient":
            parameter.grad = torch.zeros_like(parameter)
        else:
            parameter.data[0, 0].nextafter_(torch.tensor(9.0))

    monkeypatch.setattr(loop, "forward", forward)
    message = {"value": "parameters changed during training", "gradient": r"got gradients: .*up_proj"}[harm]
    with pytest.raises(RuntimeError, match=message):
        train(tmp_path, steps=1)


def test_the_text_is_described_before_training_and_recorded(tmp_path: Path, settings: Any) -> None:
    text, screen = tmp_path / "text.txt", io.StringIO()
    text.write_text("w1 w2 w3 " * 36, encoding="utf-8")
    warm_up(settings(data=str(text), steps=5, batch_size=2), tmp_path / "run", console=Console(file=screen, width=500))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["text"] == dict(
        documents=1, tokens=96, sequences=3, sequence_length=32, sequences_needed=10, dropped_tokens=13,
        empty_documents=0, is_whole_text=True,
    )  # fmt: skip
    printed = screen.getvalue()
    assert "text: 1 document, 96 tokens in 3 sequences of 32; 3.33 epochs; 13 tokens left over" in printed
    assert "the text repeats: the steps draw 10 sequences, 3.3 times what there is" in printed
    assert record["warnings"] == [] and "warning" not in printed


def test_sequences_above_the_models_context_are_told_once_and_recorded(tmp_path: Path, settings: Any) -> None:
    screen = io.StringIO()
    warm_up(settings(steps=1, warmup_steps=1, sequence_length=300), tmp_path, console=Console(file=screen, width=500))
    (warning,) = json.loads((tmp_path / "run.json").read_text())["warnings"]
    assert "sequence_length = 300 is above the model's max_position_embeddings = 256" in warning
    assert screen.getvalue().count(warning) == 1


def test_what_was_left_out_of_the_text_is_told_and_recorded(tmp_path: Path, settings: Any) -> None:
    (tmp_path / "data").mkdir()
    for name, word in (("train", "w1 "), ("test", "w2 ")):
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps({"text": word * 99}) + "\n")
    screen = io.StringIO()
    data = str(tmp_path / "data")
    warm_up(settings(steps=1, warmup_steps=1, data=data), tmp_path / "run", console=Console(file=screen, width=500))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(record["warnings"]) == 1 and "'train' is read, the others are not" in record["warnings"][0]
    assert f"warning: {record['warnings'][0]}" in screen.getvalue()
    assert record["text"]["documents"] == 1 and "text: 1 document, 32 tokens" in screen.getvalue()


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_written(
    tmp_path: Path, train: Train, checkpoint: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.resize_token_embeddings(50)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    for changes in ({}, dict(steps=None)):
        with pytest.raises(
            ValueError, match=r"ids must be below the model's vocab_size = 50, got \d+; use the tokenizer"
        ):
            train(tmp_path / "run", model=str(tmp_path / "model"), **changes)
    assert not (tmp_path / "run").exists()


def test_missing_model_and_empty_data(tmp_path: Path, train: Train) -> None:
    with pytest.raises(FileNotFoundError, match="no directory"):
        train(tmp_path / "run", model=str(tmp_path / "nowhere"))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="must hold at least one non-empty document"):
        train(tmp_path / "run", data=str(tmp_path / "empty.txt"))
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    with pytest.raises(ValueError, match="one sequence needs sequence_length=32 tokens, got 4"):
        train(tmp_path / "run", data=str(tmp_path / "short.txt"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(sequence_length=1), "sequence_length must be at least 2, got 1"),
        (dict(lr=-1e-3), "lr must be positive and finite, got -0.001"),
        (dict(lr=math.nan), "lr must be positive and finite, got nan"),
        (dict(lr=math.inf), "lr must be positive and finite, got inf"),
        (dict(minutes=math.inf), "minutes must be positive and finite, got inf"),
        (dict(seed=2**32), "seed must be from 0 to 4294967295, got 4294967296"),
        (dict(save_every=0), "save_every must be positive"),
        (dict(decay="linear"), 'decay must be "cosine" or "none", got \'linear\''),
        (dict(dtype="float16"), 'dtype must be "auto", "float32" or "bfloat16", got \'float16\''),
    ],
)
def test_unusable_settings(settings: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_settings_are_recorded(tmp_path: Path, train: Train, settings: Any) -> None:
    train(tmp_path, layers=(1,), target="sum_logits", clip=1.0)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["settings"]["layers"] == [1] and record["torch"] == torch.__version__
    assert {"base_fingerprint", "data_fingerprint", "sequences_per_step", "steps"} < record.keys()
    wanted = settings(layers=(1,), target="sum_logits", clip=1.0, dtype="float32")  # what "auto" means here
    assert settings_from(record["settings"]) == wanted


def test_a_refused_model_leaves_nothing_and_the_right_one_runs_there(
    tmp_path: Path, train: Train, checkpoint: Path
) -> None:
    """Refused at attach (no attention function), and at the first forward (a window that the mask alone has is "
    "hidden)."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=len(tokenizer), eos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    with pytest.raises(ValueError, match="got BloomForCausalLM, .*0-1: BloomAttention does not call"):
        train(tmp_path / "run", model=str(tmp_path / "bloom"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flash_indexer.models.verification.difference", lambda got, wanted: 1.0)
        with pytest.raises(ValueError, match="layer 0: the output of LlamaAttention differs"):
            train(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train(tmp_path / "run", steps=1).description == "indexers on 3 of 3 layers: 0-2"
