"""The sparse stage as a run: what trains and what doesn't, resumption to the bit, what is warned of and refused."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from flash_indexer.cli import app
from flash_indexer.files.export import export
from flash_indexer.files.native import load_native, save_native
from flash_indexer.files.trained import load_sparse, read_sparse_config
from flash_indexer.models.attach import attach
from flash_indexer.models.load import load_model
from flash_indexer.models.sparse import SparseHandle
from flash_indexer.recipe.judging import load_trained
from flash_indexer.recipe.language_loss import labels, language_loss
from flash_indexer.recipe.run_record import read_metrics
from flash_indexer.recipe.sparse import train_sparsely
from flash_indexer.recipe.sparse_loop import SparseLoop
from flash_indexer.recipe.sparse_record import SparseRunSettings, read_any_run, sparse_command
from flash_indexer.recipe.sparse_start import TOPK
from flash_indexer.recipe.stopping import Interrupted
from flash_indexer.recipe.warmup import warm_up

RUN = """
import io
from rich.console import Console
from flash_indexer.recipe.sparse import train_sparsely
from flash_indexer.recipe.sparse_record import SparseRunSettings
train_sparsely(SparseRunSettings(**chosen), out, resume=True, console=Console(file=io.StringIO()))
"""
KILL = """
import os, signal
from flash_indexer.{module} import {owner} as owner
function, left = owner.{name}, [{call}]
def wrapper(*args, **options):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **options)
owner.{name} = wrapper
"""
Run = Callable[..., SparseHandle]


@pytest.fixture(scope="module")
def base(warm: Path, texts: Path) -> dict[str, Any]:
    return dict(
        init_from=str(warm), data=str(texts), topk=8, sequence_length=32, batch_size=2, accumulation=2, steps=6,
        lr=1e-3, indexer_lr=2e-3, save_every=2,
    )  # fmt: skip


@pytest.fixture
def run(base: dict[str, Any]) -> Run:
    """`run(out, **changes)`; `run.printed` is what it said."""

    def go(out: Path, *, resume: bool = False, **changes: Any) -> SparseHandle:
        console = Console(file=io.StringIO(), width=500)
        try:
            return train_sparsely(SparseRunSettings(**(base | changes)), out, resume=resume, console=console)
        finally:
            go.printed = console.file.getvalue()  # type: ignore[attr-defined]

    return go


@pytest.fixture(scope="module")
def whole(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing ended. Read only."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train_sparsely(SparseRunSettings(**base), out, console=Console(file=io.StringIO()))
    return out


PROMPT = torch.arange(1, 21)[None]
GENERATE: dict[str, Any] = dict(
    attention_mask=torch.ones_like(PROMPT), max_new_tokens=8, do_sample=False, pad_token_id=0
)  # fmt: skip


def generated(handle: SparseHandle) -> Tensor:
    tokens: Tensor = handle.model.eval().generate(PROMPT, **GENERATE)
    return tokens


def rows(out: Path) -> list[dict[str, Any]]:
    return [{name: x for name, x in row.items() if name != "seconds"} for row in read_metrics(out / "metrics.jsonl")]


def assert_same_bits(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    for file in sorted((one / "checkpoint").iterdir()):
        assert file.read_bytes() == (other / "checkpoint" / file.name).read_bytes(), file.name


def parameters(handle: SparseHandle) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in handle.model.named_parameters()}


def test_model_and_indexers_train_and_are_found_again(tmp_path: Path, run: Run, checkpoint: Path) -> None:
    handle = run(tmp_path / "run", steps=24, lr=5e-3)
    before, _ = load_model(checkpoint, dtype=torch.float32)
    changed = {name for name, x in before.named_parameters() if not torch.equal(x, parameters(handle)[name])}
    assert changed == set(parameters(handle))
    log = rows(tmp_path / "run")
    assert [row["step"] for row in log] == [*range(1, 25)]
    first, last = (sum(row["loss"] for row in part) / 4 for part in (log[:4], log[-4:]))
    assert last < first - 0.3
    assert all(row["norm"] > 0 and row["indexer_norm"] > 0 and len(row["kl"]) == 3 for row in log)
    assert (log[0]["lr"], log[0]["indexer_lr"]) == (5e-3, 2e-3)
    found, _, settings = load_trained(tmp_path / "run", None, Console(file=io.StringIO()))
    for name, x in found.model.named_parameters():
        assert torch.equal(x, parameters(handle)[name]), name
    for key, value in found.state_dict().items():
        assert torch.equal(value, handle.state_dict()[key]), key
    assert settings["topk"] == 8 and read_any_run(tmp_path / "run", "evaluate")["lr"] == 5e-3
    assert sparse_command(settings, "x").startswith("flash-indexer sparse --out x --init-from ")


def test_the_loss_is_the_mean_over_labels_within_documents() -> None:
    ids, positions = torch.tensor([[3, 4, 5, 6, 7, 8]]), torch.tensor([[0, 1, 2, 0, 1, 0]])
    assert labels(ids, positions).tolist() == [[4, 5, -100, 7, -100]]


def test_the_loss_in_pieces_is_transformers_own(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_model(checkpoint, dtype=torch.float64)
    model.requires_grad_(True)
    ids = torch.randint(0, 61, (2, 19), generator=torch.Generator().manual_seed(0))
    targets = labels(ids, torch.arange(19).expand(2, -1))
    monkeypatch.setattr("flash_indexer.recipe.language_loss.ROWS", 7)
    loss = language_loss(model, model.model(ids, use_cache=False).last_hidden_state, targets) / 36
    loss.backward()
    got = [x.grad for x in model.parameters()]
    model.zero_grad()
    want = model(ids, labels=ids, use_cache=False).loss
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)  # nats are summed in float32
    for mine, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-7)


def test_micro_batches_make_the_same_update(tmp_path: Path, run: Run) -> None:
    """4 sequences at once, in 2 x 2 and in 4 pieces, whose documents and labels are not equally many."""
    made = {}
    for size in (4, 2, 1):
        out = tmp_path / str(size)
        run(out, batch_size=size, accumulation=4 // size, steps=2, lr=0.1, clip=None)
        made[size] = rows(out), load_file(out / "checkpoint" / "optimizer.safetensors")
    for size in (2, 1):
        for one, other in zip(made[4][0], made[size][0], strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        for name, moment in made[4][1].items():
            difference = (moment.double() - made[size][1][name].double()).norm()
            assert difference <= 2e-3 * moment.double().norm() + 1e-12, name


def test_each_group_has_its_own_clip(tmp_path: Path, run: Run) -> None:
    run(tmp_path / "one", steps=1, clip=None, save_every=1)
    run(tmp_path / "other", steps=1, clip=1e-3, save_every=1)
    one, other = (load_file(tmp_path / name / "checkpoint" / "optimizer.safetensors") for name in ("one", "other"))
    (row,) = rows(tmp_path / "one")
    indexers = 3 * 5
    for name, moment in one.items():
        index, kind = name.split(".")
        if kind == "exp_avg":
            factor = 1.0 if int(index) < indexers else 1e-3 / row["norm"]
            torch.testing.assert_close(other[name], moment * factor, rtol=1e-3, atol=1e-12)


def test_the_indexers_alone_train_beside_a_frozen_model(tmp_path: Path, run: Run, checkpoint: Path) -> None:
    handle = run(tmp_path / "run", indexers_alone=True)
    before, _ = load_model(checkpoint, dtype=torch.float32)
    for name, x in before.named_parameters():
        assert torch.equal(x, parameters(handle)[name]), name
    assert load_file(tmp_path / "run" / "checkpoint" / "trained.safetensors") == {}
    assert all(row["norm"] is None and row["lr"] is None and row["indexer_norm"] > 0 for row in rows(tmp_path / "run"))


def test_adapters_train_in_place_of_the_parameters(tmp_path: Path, run: Run, checkpoint: Path) -> None:
    pytest.importorskip("peft")
    handle = run(tmp_path / "run", lora=4, steps=3)
    trained = load_file(tmp_path / "run" / "checkpoint" / "trained.safetensors")
    assert trained and all("lora_" in name for name in trained)
    assert read_sparse_config(tmp_path / "run" / "checkpoint") == (8, 4)
    found, _, _ = load_trained(tmp_path / "run", None, Console(file=io.StringIO()))
    before, _ = load_model(checkpoint, dtype=torch.float32)
    own = dict(found.model.named_parameters())
    assert own.keys() == dict(before.named_parameters()).keys()
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b = (trained[name.replace("weight", f"lora_{x}.default.weight")] for x in "AB")
    torch.testing.assert_close(own[name].detach(), dict(before.named_parameters())[name] + 2 * b @ a)
    found.remove()
    handle.remove()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(found.model(ids).logits, handle.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [dict(indexers_alone=True), dict(lora=4)], ids=["indexers alone", "adapters"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda weight: weight.data[0].add_(1.0), "sparse: frozen parameters of the model changed during training"),
        (
            lambda weight: setattr(weight, "grad", weight + 1),
            r"sparse: frozen parameters got gradients: \['model.layers",
        ),
    ],
    ids=["changed", "with a gradient"],
)
def test_what_is_frozen_is_audited(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, frozen: Any, fault: Any, message: str
) -> None:
    pytest.importorskip("peft")
    function = SparseLoop._set_rates

    def faulty(self: SparseLoop, *arguments: Any) -> list[float]:
        fault(self.handle.model.get_parameter("model.layers.1.mlp.up_proj.weight"))
        return function(self, *arguments)

    monkeypatch.setattr(SparseLoop, "_set_rates", faulty)
    with pytest.raises(RuntimeError, match=message):
        run(tmp_path / "run", steps=1, **frozen)


@pytest.mark.parametrize(
    ("changes", "later"),
    [
        ({}, {}),
        (dict(activation_checkpointing=True, dtype="bfloat16"), {}),
        (dict(layers=(1,)), dict(activation_checkpointing=True)),
    ],
)
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, run: Run, changes: Any, later: Any) -> None:
    """With layers that are computed again too, where memory is shorter than it was."""
    run(tmp_path / "whole", **changes)
    function, left = SparseLoop._clip, [4]

    def interrupted(self: SparseLoop, step: int) -> list[float]:
        left[0] -= 1
        if not left[0]:
            raise OSError("the machine went away")
        return function(self, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="went away"):
        patch.setattr(SparseLoop, "_clip", interrupted)
        run(tmp_path / "cut", **changes)
    assert len(rows(tmp_path / "cut")) == 3
    handle = run(tmp_path / "cut", resume=True, **(changes | later))
    again = any(getattr(module, "gradient_checkpointing", False) for module in handle.model.modules())
    assert again == (changes | later).get("activation_checkpointing", False)
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    "where",
    [
        dict(module="recipe.sparse_loop", owner="SparseLoop", name="_set_rates", call=4),
        dict(module="files", owner="trained", name="write_tensors", call=4),
        dict(module="files", owner="atomic", name="_sync_tree", call=2),
    ],
    ids=["in a step", "while saving", "before the old checkpoint is replaced"],
)
def test_after_a_kill_the_run_goes_on_with_the_same_bits(
    tmp_path: Path, runs: Any, base: dict[str, Any], whole: Path, where: dict[str, Any]
) -> None:
    runs.finish([runs.start(KILL.format(**where) + RUN, None, tmp_path / "cut", chosen=base)], exitcode=-9)
    assert len(rows(tmp_path / "cut")) in (3, 4)
    runs.finish([runs.start(RUN, None, tmp_path / "cut", chosen=base)])
    assert_same_bits(whole, tmp_path / "cut")


def test_layers_that_are_not_warmed_up_are_named(tmp_path: Path, run: Run) -> None:
    handle = run(tmp_path / "run", steps=1)
    assert "the indexers of layers 0 (" in run.printed and "are not warmed up" in run.printed  # type: ignore[attr-defined]
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())["warnings"]) == 1
    run(tmp_path / "wide", steps=1, topk=32)
    assert "topk = 32 covers the 32 tokens of a sequence" in run.printed  # type: ignore[attr-defined]
    assert SparseRunSettings(init_from="any").sequence_length > TOPK
    assert "of the text's tokens see more" not in run.printed  # type: ignore[attr-defined]
    (tmp_path / "short.jsonl").write_text('{"text": "w1 w2 w3 w4"}\n' * 99)
    run(tmp_path / "short", steps=1, data=str(tmp_path / "short.jsonl"))
    assert "0.0% of the text's tokens see more than topk = 8 keys" in run.printed  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flash_indexer.recipe.sparse.FEW", 2)
        run(tmp_path / "few", steps=1)
        assert re.search(r"of layers 0-2 \([\d.]+ to [\d.]+\) are not", run.printed)  # type: ignore[attr-defined]
        patch.setattr("flash_indexer.recipe.sparse.WARMED_UP", 1e9)
        run(tmp_path / "warm", steps=1)
    assert "warmed up" not in run.printed  # type: ignore[attr-defined]
    assert handle.topk == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(topk=0), "sparse: topk must be positive and finite, got 0"),
        (dict(topk=2.5), "sparse: topk must be a whole number, got 2.5"),
        (dict(init_from=""), "init_from must name the run or native folder of warmed-up indexers"),
        (dict(lr=float("nan")), "sparse: lr must be positive and finite"),
        (dict(lora=4, indexers_alone=True), "lora must be left out with indexers_alone"),
        (dict(decay="linear"), "decay must be one of cosine, none, got 'linear'"),
        (dict(seed=-1), "seed must be from 0"),
        (dict(sequence_length=1), "sequence_length must be at least 2"),
        (dict(warmup_steps=-1), "warmup_steps must not be negative"),
    ],
)
def test_settings_that_no_run_can_use_are_refused(base: dict[str, Any], changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseRunSettings(**(base | changes))


def test_what_does_not_fit_is_refused_before_anything_trains(
    tmp_path: Path, run: Run, warm: Path, checkpoint: Path, mla_checkpoint: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(
        FileNotFoundError, match="sparse: --init-from must name a warm-up's run, a native indexer or a model"
    ):
        run(out, init_from=str(tmp_path / "nowhere"))
    with pytest.raises(
        ValueError, match="must hold indexers of the model .*: .*another base model: model_type 'llama'"
    ):
        run(out, model=str(mla_checkpoint))
    model, tokenizer = load_model(checkpoint, dtype=torch.float32)
    model.resize_token_embeddings(50, mean_resizing=False)
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"model .*small: .* vocabulary of 61 tokens \(vocab_size\), this one has 50"):
        run(out, model=str(tmp_path / "small"))
    run(tmp_path / "subset", steps=1, layers=(0, 2), indexers_alone=True)
    with pytest.raises(ValueError, match=r"--layers must be layers that have an indexer, got \[1\]"):
        run(out, init_from=str(tmp_path / "subset"), layers=(0, 1))
    run(tmp_path / "trained", steps=1)
    with pytest.raises(ValueError, match="must name indexers of an untouched model, got .*trained, a sparse run"):
        run(out, init_from=str(tmp_path / "trained"))
    save_native(attach(model, num_heads=4, head_dim=32), tmp_path / "unnamed", base_name=str(tmp_path / "small"))
    with pytest.raises(ValueError, match="ids must be below the model's vocab_size = 50, got"):
        run(out, init_from=str(tmp_path / "unnamed"))
    copied = tmp_path / "truncated"
    copied.mkdir()
    for file in ("indexer_config.json", "indexer.safetensors"):
        data = (warm / "checkpoint" / file).read_bytes()
        (copied / file).write_bytes(data[: len(data) // 2] if file.endswith("safetensors") else data)
    with pytest.raises(ValueError, match="is truncated or damaged"):
        run(out, init_from=str(copied))
    assert not out.exists()


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "run"
    run(out, steps=2)
    file = out / "checkpoint" / "trained.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="trained.safetensors is truncated or damaged"):
        run(out, resume=True, steps=2)
    with pytest.raises(ValueError, match="trained.safetensors is truncated or damaged"):
        load_trained(out, None, Console(file=io.StringIO()))
    file.write_bytes(whole)
    held = load_file(file)
    missing = sorted(held)[0]
    save_file({name: x for name, x in held.items() if name != missing}, file)
    with pytest.raises(ValueError, match=f"must hold all parameters that train, got none named {missing}; use"):
        run(out, resume=True, steps=2)
    state = out / "checkpoint" / "training_state.json"
    was = state.read_text()
    file.write_bytes(whole)
    state.write_text(json.dumps(json.loads(was) | dict(save="another")))
    with pytest.raises(ValueError, match="trained.safetensors must be of the save another, as its checkpoint, got"):
        run(out, resume=True, steps=2)
    state.write_text(was)
    with pytest.raises(ValueError, match="already holds a run; pass --resume"):
        run(out)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | dict(data_fingerprint="other")))
    with pytest.raises(ValueError, match="data_fingerprint must be other as when the run began"):
        run(out, resume=True)
    (out / "run.json").write_text(json.dumps(record | dict(stage="warm-up")))
    with pytest.raises(ValueError, match="is no sparse run's record"):
        run(out, resume=True)


@pytest.mark.parametrize("name", ["flash_indexer.recipe.sparse.pack", "flash_indexer.recipe.sparse.SparseLoop.load"])
def test_before_the_first_step_nothing_is_there(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(name, lambda *args, **options: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match=f"sparse: interrupted before a step was computed: {tmp_path}/cut is"):
        run(tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize(("name", "step"), [("_clip", 3), ("_save", 6)], ids=["in a step", "in the last save"])
def test_a_run_that_is_asked_to_end_saves_and_goes_on(
    tmp_path: Path, run: Run, whole: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: int
) -> None:
    """After the step under way, or the next where this one was nearly over; after the last one too."""
    function = getattr(SparseLoop, name)

    def asked(self: SparseLoop, *arguments: Any) -> Any:
        if arguments[-1] == step:
            signal.raise_signal(signal.SIGTERM)
        return function(self, *arguments)

    with (
        monkeypatch.context() as patch,
        pytest.raises(Interrupted, match=f"ended by SIGTERM after step {min(6, step + 1)}"),
    ):
        patch.setattr(SparseLoop, name, asked)
        run(tmp_path / "cut")
    assert len(rows(tmp_path / "cut")) == min(6, step + 1)
    run(tmp_path / "cut", resume=True)
    assert_same_bits(whole, tmp_path / "cut")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, run: Run) -> None:
    with pytest.raises(FloatingPointError, match="sparse: the .* at step [23]; no checkpoint was written"):
        run(tmp_path / "run", lr=1e30, clip=None, save_every=50)


def test_what_trained_loads_back_and_generates_sparsely(tmp_path: Path, run: Run) -> None:
    handle = run(tmp_path / "run")
    found, _, settings = load_trained(tmp_path / "run", None, Console(file=io.StringIO()))
    found.remove()
    sparse = load_native(found.model, tmp_path / "run" / "checkpoint", topk=settings["topk"])
    assert torch.equal(generated(sparse), generated(handle))


@pytest.mark.usefixtures("blank_plots")
def test_evaluate_and_export_take_the_model_that_trained(tmp_path: Path, run: Run, texts: Path) -> None:
    out = tmp_path / "run"
    run(out, steps=6, lr=5e-3)
    words = ["evaluate", "--run", str(out), "--data", str(texts), "--sequences", "3"]
    words += ["--sequence-length", "64", "--needles", "1"]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    page = (out / "report" / "comparison.md").read_text()
    assert "| sparse after | all |" in page
    for line in ("sparse before: ", "sparse after: ", "dense after: ", "queries whose selection changed: "):
        assert line in said.output
    numbers = json.loads((out / "report" / "comparison.json").read_text())
    assert "needles found, sparse after: " in said.output and "| sparse before | 0.5 | 1 |" in page
    assert {name: len(x) for name, x in numbers["needles"].items()} == {
        "dense": 3, "sparse before": 3, "sparse after": 3, "dense after": 3,
    }  # fmt: skip
    loss = {x["variant"]: x["nats"] for x in numbers["losses"] if x["end"] is None}
    assert loss["dense after"] < loss["dense"] and len(numbers["layers"]) == 3
    handle, _, _ = load_trained(out, None, Console(file=io.StringIO()))
    handle.remove()
    exported = str(tmp_path / "exported")
    said = CliRunner().invoke(app, ["export", "--run", str(out), exported, "--format", "native"])
    assert said.exit_code == 0, said.output
    assert f"writing  {exported}\n" in said.output and "shards" not in said.output, "its bar is Transformers' own"
    sparse, tokenizer = load_sparse(exported)
    assert sparse.topk == 8 and not sparse.indexers.training and len(tokenizer) == 61
    want = load_native(handle.model, out / "checkpoint", topk=8)
    assert torch.equal(generated(sparse), generated(want))
    found, _, _ = load_trained(Path(exported), None, Console(file=io.StringIO()))
    assert all(map(torch.equal, found.model.state_dict().values(), handle.model.state_dict().values()))
    run(tmp_path / "on", init_from=exported, steps=1)  # goes on with the model that trained, and new text
    assert json.loads((tmp_path / "on" / "run.json").read_text())["settings"]["model"] == f"{exported}/model"
    said = CliRunner().invoke(app, ["export", "--run", str(out), str(tmp_path / "v32")])
    assert said.exit_code == 1 and "needs a model with q_lora_rank" in said.output.replace("\n", " ")
    with pytest.raises(ValueError, match="load_sparse: .* must hold sparse_config.json and model/"):
        load_sparse(out / "checkpoint")


def test_a_deepseek_model_runs_sparse_in_transformers(
    tmp_path: Path, tiny_settings: Callable[..., Any], mla_checkpoint: Path, run: Run
) -> None:
    """Warm-up, sparse stage, export; Transformers' own deepseek_v32 gives the logits and the tokens of our model."""
    settings = tiny_settings(model=str(mla_checkpoint), rope_dim=None, lr=0.01, num_heads=16)
    warm_up(settings, tmp_path / "warm", console=Console(file=io.StringIO()))
    handle = run(tmp_path / "run", init_from=str(tmp_path / "warm"))
    said = CliRunner().invoke(app, ["export", "--run", str(tmp_path / "run"), str(tmp_path / "v32")])
    assert said.exit_code == 0, said.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "v32", dtype=torch.float32).eval()
    assert model.config.model_type == "deepseek_v32" and model.config.index_topk == 8
    ids = torch.randint(0, 60, (2, 31), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, want = model(ids, use_cache=False).logits, handle.model.eval()(ids, use_cache=False).logits
        handle.topk = 31
        dense = handle.model(ids, use_cache=False).logits
        handle.topk = 8
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert (want - dense).abs().max() > 0.1  # the selection counts
    torch.testing.assert_close(generated(handle), model.generate(PROMPT, **GENERATE))
    handle.always = (1, 1)
    with pytest.raises(ValueError, match=r"selects by scores alone, always = \(0, 0\), got \(1, 1\)"):
        export(handle, tmp_path / "other")


def test_adapters_without_their_package_are_refused(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="adapters of rank 4 need the package peft, which can't be imported"):
        run(tmp_path / "run", lora=4)
    assert not (tmp_path / "run").exists()


def test_a_run_says_whether_sums_have_one_order(tmp_path: Path, base: dict[str, Any]) -> None:
    words = ["sparse", "--out", str(tmp_path / "run"), "--any-order"]
    for name, value in (base | dict(steps=1)).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    assert CliRunner().invoke(app, words).exit_code == 0
    file = tmp_path / "run" / "run.json"
    record = json.loads(file.read_text())
    assert record["settings"].pop("deterministic") is False
    file.write_text(json.dumps(record))  # as of a run before there was a choice
    options = ["sparse", "--out", str(tmp_path / "run"), "--resume", "--deterministic"]
    assert CliRunner().invoke(app, options).exit_code == 0


def test_the_command_of_a_run_is_one_that_the_command_line_takes(tmp_path: Path, base: dict[str, Any]) -> None:
    """With every switch that a run can have; --steps 0 is refused when all else was read."""
    switches = dict(activation_checkpointing=True, deterministic=False, layers=[0, 2], clip=None, lora=2)
    words = shlex.split(sparse_command(base | switches, tmp_path / "run"))
    assert "--any-order" in words and "--activation-checkpointing" in words
    said = CliRunner().invoke(app, [*words[1:], "--steps", "0"])
    assert said.exit_code == 1 and "sparse: steps must be positive and finite, got 0" in said.output, said.output


def test_the_command_trains_resumes_and_refuses(tmp_path: Path, base: dict[str, Any]) -> None:
    out = str(tmp_path / "run")
    words = ["sparse", "--out", out]
    for name, value in (base | dict(steps=4)).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0 and f"trained  {out}/checkpoint" in said.output.replace("\n", ""), said.output
    same = ["sparse", "--out", out, "--resume", "--topk", "8", "--activation-checkpointing"]
    assert CliRunner().invoke(app, same).exit_code == 0
    for options, message in (
        (["--resume", "--topk", "9"], "sparse: --topk must be 8 as when the run began, got 9"),
        (["--resume", "--any-order"], "sparse: --deterministic must be True as when the run began, got False"),
        (["--init-from", base["init_from"]], "already holds a run; pass --resume"),
    ):
        said = CliRunner().invoke(app, ["sparse", "--out", out, *options])
        assert said.exit_code == 1 and message in said.output.replace("\n", " "), said.output
    said = CliRunner().invoke(app, [*words[:2], str(tmp_path / "new"), *words[3:], "--topk", "0"])
    assert said.exit_code == 1 and "sparse: topk must be positive and finite, got 0" in said.output
    assert not (tmp_path / "new").exists()


def test_the_oracles_keys_are_a_run_of_their_own(tmp_path: Path, run: Run) -> None:
    """Another loss than with the indexers' keys, from the first step on; dense where K covers all keys, both alike."""
    losses = {}
    for keys in ("indexer", "oracle"):
        for topk in (8, 32):
            out = tmp_path / f"{keys} {topk}"
            handle = run(out, keys=keys, topk=topk, steps=2)
            assert handle.keys == keys and read_any_run(out, "evaluate")["keys"] == keys
            losses[keys, topk] = [row["loss"] for row in rows(out)]
            assert all(kl > 0 for row in rows(out) for kl in row["kl"])
            assert all(row["indexer_norm"] > 0 for row in rows(out))
    assert losses["indexer", 8] != losses["oracle", 8]
    assert losses["indexer", 32] == pytest.approx(losses["oracle", 32], rel=1e-6)
    assert "--keys oracle" in sparse_command(read_any_run(tmp_path / "oracle 8", "evaluate"), "x")
    with pytest.raises(ValueError, match=r"keys must be one of indexer, oracle, got .*best"):
        run(tmp_path / "best", keys="best")
