"""`flash-indexer sparse` on a model with indexers of its own: trained in place, resumed, judged, exported natively."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from flash_indexer.cli import app
from flash_indexer.files.native import load_native, read_native
from flash_indexer.files.trained import load_sparse
from flash_indexer.models.load import load_model
from flash_indexer.models.own_sparse import OwnSparseHandle
from flash_indexer.recipe.judging import load_trained
from flash_indexer.recipe.processes import ParallelSettings
from flash_indexer.recipe.run_record import read_metrics
from flash_indexer.recipe.sparse import train_sparsely
from flash_indexer.recipe.sparse_loop import SparseLoop
from flash_indexer.recipe.sparse_record import SparseRunSettings
from flash_indexer.recipe.warmup import warm_up

Run = Callable[..., OwnSparseHandle]
OWN = ".indexer."


@pytest.fixture(scope="session")
def own_checkpoint(own_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny GLM-MoE-DSA with so many index heads that no key is ranked by the place of a tie. Read only."""
    folder = tmp_path_factory.mktemp("tiny") / "own"
    shutil.copytree(own_checkpoint, folder)
    config = AutoConfig.from_pretrained(own_checkpoint, index_n_heads=24)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    old = AutoModelForCausalLM.from_pretrained(own_checkpoint).state_dict()
    model.load_state_dict({name: x for name, x in old.items() if OWN not in name}, strict=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if OWN in name and parameter.ndim == 2:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def warm_own(tmp_path_factory: pytest.TempPathFactory, own_checkpoint: Path, tiny_settings: Callable[..., Any]) -> Path:
    """The own indexers of the tiny GLM-MoE-DSA after twelve steps. Read only."""
    out = tmp_path_factory.mktemp("warm_own") / "run"
    settings = tiny_settings(
        model=str(own_checkpoint), indexers="own", num_heads=8, head_dim=64, rope_dim=None, lr=0.01
    )
    warm_up(settings, out, console=Console(file=io.StringIO()))
    return out


@pytest.fixture
def base(warm_own: Path, texts: Path) -> dict[str, Any]:
    return dict(
        init_from=str(warm_own), data=str(texts), sequence_length=32, batch_size=2, accumulation=2, steps=4, lr=1e-3,
        indexer_lr=2e-3, save_every=2,
    )  # fmt: skip


@pytest.fixture
def run(base: dict[str, Any]) -> Run:
    """`run(out, **changes)`; `run.printed` is what it said."""

    def go(out: Path, *, resume: bool = False, parallel: Any = None, **changes: Any) -> OwnSparseHandle:
        console = Console(file=io.StringIO(), width=500)
        settings = SparseRunSettings(**(base | changes))
        try:
            handle = train_sparsely(settings, out, resume=resume, console=console, parallel=parallel)
        finally:
            go.printed = console.file.getvalue()  # type: ignore[attr-defined]
        assert isinstance(handle, OwnSparseHandle)
        return handle

    return go


def rows(out: Path) -> list[dict[str, Any]]:
    return [{name: x for name, x in row.items() if name != "seconds"} for row in read_metrics(out / "metrics.jsonl")]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(torch.arange(30)[None] * 7 % 60, use_cache=False).logits
    return found


def cli(*words: object) -> str:
    done = CliRunner().invoke(app, [str(x) for x in words], env={"COLUMNS": "300", "TERM": "dumb"})
    assert done.exit_code == 0, done.output
    return done.output


def test_model_and_own_indexers_train_at_rates_of_their_own(
    tmp_path: Path, run: Run, own_checkpoint: Path, warm_own: Path
) -> None:
    handle = run(tmp_path / "run", steps=12, lr=5e-3)
    assert handle.topk == 8 and handle.layers == (0, 2), "as many keys as the model's config says"
    before = load_model(own_checkpoint, dtype=torch.float32)[0].state_dict()
    warmed = read_native(warm_own / "checkpoint").state_dict
    for name, value in handle.model.state_dict().items():
        changed = not torch.equal(value, warmed[name] if OWN in name else before[name])
        assert changed == ("e_score_correction_bias" not in name), name
    log = rows(tmp_path / "run")
    assert sum(row["loss"] for row in log[-4:]) < sum(row["loss"] for row in log[:4]) - 0.4
    assert all(len(row["kl"]) == 2 and row["norm"] > 0 and row["indexer_norm"] > 0 for row in log)
    checkpoint = tmp_path / "run" / "checkpoint"
    config, indexers = read_native(checkpoint)
    assert config.indexers == "own" and set(indexers) == set(warmed)
    trained = load_file(checkpoint / "trained.safetensors")
    assert trained and not any(OWN in name for name in trained)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"]["topk"] == 8 and record["settings"]["model"] == str(own_checkpoint)
    want = logits(handle.model)
    found, _, _ = load_trained(tmp_path / "run", None, Console(file=io.StringIO()))
    assert found.trains_own
    found.remove()
    assert torch.equal(logits(load_native(found.model, checkpoint, topk=8).model), want)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(dict(dtype="bfloat16", activation_checkpointing=True), marks=pytest.mark.slow),
        pytest.param(dict(lora=4), marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, run: Run, changes: dict[str, Any]) -> None:
    if "lora" in changes:
        pytest.importorskip("peft")
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
    run(tmp_path / "cut", resume=True, **changes)
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    for file in sorted((tmp_path / "whole" / "checkpoint").iterdir()):
        assert file.read_bytes() == (tmp_path / "cut" / "checkpoint" / file.name).read_bytes(), file.name


def test_the_indexers_alone_train_in_place(tmp_path: Path, run: Run, own_checkpoint: Path, warm_own: Path) -> None:
    handle = run(tmp_path / "run", indexers_alone=True)
    before = load_model(own_checkpoint, dtype=torch.float32)[0].state_dict()
    warmed = read_native(warm_own / "checkpoint").state_dict
    for name, value in handle.model.state_dict().items():
        assert torch.equal(value, before[name]) == (OWN not in name), name
        assert OWN not in name or not torch.equal(value, warmed[name]), name
    assert load_file(tmp_path / "run" / "checkpoint" / "trained.safetensors") == {}
    assert all(row["norm"] is None and row["indexer_norm"] > 0 for row in rows(tmp_path / "run"))


def test_adapters_leave_the_indexers_out(tmp_path: Path, run: Run, own_checkpoint: Path) -> None:
    pytest.importorskip("peft")
    handle = run(tmp_path / "run", lora=4, steps=3, lr=1e-2)
    names = [name for name, _ in handle.model.named_parameters()]
    assert not any(OWN in name and "lora_" in name for name in names) and any("lora_" in name for name in names)
    assert all("lora_" in name for name in load_file(tmp_path / "run" / "checkpoint" / "trained.safetensors"))
    want = logits(handle.model)
    found, _, _ = load_trained(tmp_path / "run", None, Console(file=io.StringIO()))
    found.remove()
    merged = load_native(found.model, tmp_path / "run" / "checkpoint", topk=8)
    torch.testing.assert_close(logits(merged.model), want, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("blank_plots")
def test_the_commands_judge_and_export_a_model_of_its_family(
    tmp_path: Path, own_checkpoint: Path, warm_own: Path, texts: Path
) -> None:
    out = tmp_path / "run"
    said = cli(
        "sparse", "--out", out, "--init-from", warm_own, "--data", texts, "--topk", 6, "--sequence-length", 32,
        "--steps", 6, "--lr", 5e-3, "--indexer-lr", 2e-3,
    )  # fmt: skip
    assert "trained  " in said
    said = cli("evaluate", "--run", out, "--data", texts, "--sequences", 2, "--sequence-length", 64)
    assert "sparse after: " in said and "queries whose selection changed: " in said
    numbers = json.loads((out / "report" / "comparison.json").read_text())
    assert [x["layer"] for x in numbers["layers"]] == [0, 2]
    loss = {x["variant"]: x["nats"] for x in numbers["losses"] if x["end"] is None}
    assert loss["sparse after"] < loss["sparse before"]
    cli("export", "--run", out, tmp_path / "own")
    cli("export", "--run", out, tmp_path / "native", "--format", "native")
    trained, _, _ = load_trained(out, None, Console(file=io.StringIO()))
    trained.remove()
    want = logits(load_native(trained.model, out / "checkpoint", topk=6).model)
    auto: Any = AutoModelForCausalLM
    exported, info = auto.from_pretrained(tmp_path / "own", output_loading_info=True)
    assert not any(info.values()), info
    assert exported.config.index_topk == 6, "Transformers selects as many keys as the training did"
    torch.testing.assert_close(logits(exported), want, rtol=1e-3, atol=1e-3)
    sparse, _ = load_sparse(tmp_path / "native")
    assert isinstance(sparse, OwnSparseHandle) and torch.equal(logits(sparse.model), want)

    said = cli(  # what was exported is trained on as it is: its own indexers, its own number of keys
        "sparse", "--out", tmp_path / "more", "--init-from", tmp_path / "own", "--data", texts, "--sequence-length", 32,
        "--steps", 2,
    )  # fmt: skip
    record = json.loads((tmp_path / "more" / "run.json").read_text())
    assert record["settings"]["topk"] == 6 and record["settings"]["model"] == str(tmp_path / "own")
    cli("sparse", "--out", tmp_path / "more", "--resume")
    said = cli("evaluate", "--run", tmp_path / "more", "--data", texts, "--sequences", 2, "--sequence-length", 64)
    assert f"comparing with {tmp_path / 'own'}, 6 keys a query" in said


def test_a_model_is_taken_with_the_indexers_that_it_has(tmp_path: Path, run: Run, own_checkpoint: Path) -> None:
    """And one whose indexers are not warmed up is warned of."""
    handle = run(tmp_path / "run", init_from=str(own_checkpoint), steps=1, indexer_lr=1e-9, lr=1e-9)
    before = load_model(own_checkpoint, dtype=torch.float32)[0]
    torch.testing.assert_close(logits(handle.model), logits(before), rtol=1e-3, atol=1e-3)
    assert "the indexers of layers 0 (" in run.printed and "not warmed up" in run.printed  # type: ignore[attr-defined]


def test_indexers_keep_their_bits_beside_a_model_in_bfloat16(tmp_path: Path, run: Run, warm_own: Path) -> None:
    handle = run(tmp_path / "run", dtype="bfloat16", indexers_alone=True, steps=1, indexer_lr=1e-12, save_every=1)
    assert handle.model.dtype == torch.bfloat16
    saved, warmed = (read_native(out / "checkpoint").state_dict for out in (tmp_path / "run", warm_own))
    for name, value in warmed.items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (dict(cp=2), "must be left out where a model's own indexers train, got cp=2, tp=1, fsdp=False"),
        (dict(tp=2), "must be left out where a model's own indexers train, got cp=1, tp=2, fsdp=False"),
        (dict(fsdp=True), "must be left out where a model's own indexers train, got cp=1, tp=1, fsdp=True"),
    ],
)
def test_a_model_that_is_shared_out_is_refused(
    warm_own: Path, own_checkpoint: Path, base: dict[str, Any], parallel: dict[str, Any], message: str
) -> None:
    from flash_indexer.recipe.sparse_start import load_start

    for source in (warm_own, own_checkpoint):
        settings = SparseRunSettings(**(base | dict(init_from=str(source), dtype="float32")))
        with pytest.raises(ValueError, match=message):
            load_start(settings, ParallelSettings(**parallel), lambda text: None)


def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, run: Run, own_checkpoint: Path, checkpoint: Path, warm_own: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r"init-from must name indexers, or a model with .*LlamaForCausalLM without"):
        run(out, init_from=str(checkpoint))
    with pytest.raises(ValueError, match="--model must be left out where --init-from names a model with indexers"):
        run(out, init_from=str(own_checkpoint), model=str(checkpoint))
    with pytest.raises(ValueError, match=r"every layer that an indexer serves must be chosen, .* for layers \[2\]"):
        run(out, layers=(0,))
    with pytest.raises(ValueError, match=r"--layers must be layers that have an indexer, got \[1\]"):
        run(out, layers=(1,))
    assert not out.exists()
    run(out, steps=1)
    with pytest.raises(ValueError, match="a sparse run whose model trained .* export it with --format own and name"):
        run(tmp_path / "other", init_from=str(out))
