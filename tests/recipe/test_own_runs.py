"""The recipe and the commands on a model's own indexers: trained, resumed, judged, and exported as the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainingArguments
from typer.testing import CliRunner

from flash_indexer.cli import app
from flash_indexer.files.export import export
from flash_indexer.files.native import load_native, read_native, save_native
from flash_indexer.models.attach import attach
from flash_indexer.models.load import load_model, model_fingerprint
from flash_indexer.recipe import warmup
from flash_indexer.recipe.data import load_documents, pack
from flash_indexer.recipe.run_record import WarmupSettings
from flash_indexer.recipe.trainer import IndexerTrainer

OWN: dict[str, Any] = dict(indexers="own", num_heads=8, head_dim=64, rope_dim=None)
"""With the sizes that settings have where nothing is said."""


@pytest.fixture
def own_settings(own_checkpoint: Path, tiny_settings: Callable[..., WarmupSettings]) -> Callable[..., WarmupSettings]:
    return lambda **changes: tiny_settings(**(dict(model=str(own_checkpoint)) | OWN | changes))


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(x) for x in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def selections(model: Any) -> list[Tensor]:
    """What each own indexer selects in a sequence of 30 tokens."""
    found: list[Tensor] = []
    indexers = [layer.self_attn.indexer for layer in model.model.layers if layer.self_attn.indexer is not None]
    hooks = [indexer.register_forward_hook(lambda module, args, output: found.append(output)) for indexer in indexers]
    with torch.no_grad():
        model(torch.arange(30)[None] * 7 % 60, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def test_a_run_trains_the_models_parameters_and_a_resumed_one_repeats_its_bits(
    recipe: Any, own_settings: Callable[..., WarmupSettings], metrics: Any, same_bits: Any, tmp_path: Path
) -> None:
    recipe.build = own_settings
    handle = recipe(tmp_path / "whole")
    assert handle.layers == (0, 2) and handle.sources == {0: 0, 1: 0, 2: 2}
    rows = metrics(tmp_path / "whole")
    assert len(rows) == 12 and all(len(row["kl"]) == 2 for row in rows)
    assert rows[-1]["kl_over_uniform"] < rows[0]["kl_over_uniform"]
    for name in ("cut", "again"):
        recipe(tmp_path / name, steps=4)
        recipe(tmp_path / name, resume=True, to=6)
    same_bits(tmp_path / "cut", tmp_path / "again")
    recipe(tmp_path / "killed")
    shutil.copytree(tmp_path / "killed" / "checkpoint", tmp_path / "last")
    same_bits(tmp_path / "whole", tmp_path / "killed")
    config, state = read_native(tmp_path / "last")
    assert (config.indexers, config.teachers, config.num_heads, config.rope_interleaved) == ("own", "shared", 4, True)
    own = handle.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items())


def test_teachers_are_a_setting(recipe: Any, own_settings: Any, metrics: Any, tmp_path: Path) -> None:
    recipe.build = own_settings
    for teachers in ("shared", "own"):
        recipe(tmp_path / teachers, steps=1, teachers=teachers)
    shared, own = (metrics(tmp_path / teachers)[0]["kl"] for teachers in ("shared", "own"))
    assert shared[0] != pytest.approx(own[0], rel=1e-3) and shared[1] == pytest.approx(own[1])


@pytest.mark.usefixtures("blank_plots")
def test_from_the_command_to_a_model_that_selects_the_same_keys(
    own_checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    done = run(
        "warmup", "--out", tmp_path / "run", "--model", own_checkpoint, "--data", texts, "--sequence-length", 48,
        "--steps", 6, "--indexers", "own", "--evaluate-sequences", 2, "--held-out", texts, "--lr", "1e-2",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert [layer["layer"] for layer in report["evaluation"]["layers"]] == [0, 1, 2]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["head_dim"] == 32
    done = run("check", "--run", tmp_path / "run", "--data", texts)
    assert done.exit_code == 0 and done.output.count("max |sum_s") == 3, done.output
    done = run("export", "--run", tmp_path / "run", tmp_path / "exported")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "exported" / "indexer_config.json").read_text())["format"] == "flash-indexer/own"
    done = run(
        "warmup", "--out", tmp_path / "more", "--model", own_checkpoint, "--data", texts, "--sequence-length", 48,
        "--steps", 1, "--init-from", tmp_path / "run", "--evaluate-sequences", 0,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert read_native(tmp_path / "more" / "checkpoint").config.indexers == "own"

    auto: Any = AutoModelForCausalLM
    exported, info = auto.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(info.values()), info
    before = auto.from_pretrained(own_checkpoint)
    trained = load_native(load_model(own_checkpoint, dtype=torch.float32)[0], tmp_path / "run" / "checkpoint")
    for name, value in exported.state_dict().items():
        own = ".indexer." in name
        assert torch.equal(value, trained.state_dict()[name] if own else before.state_dict()[name])
    trained.remove()
    mine, theirs, old = (selections(model) for model in (trained.model, exported.eval(), before.eval()))
    assert len(mine) == 2 and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(mine, old, strict=True))


def test_a_trainer_trains_the_models_parameters_and_resumes(own_checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(
        learning_rate=1e-3, lr_scheduler_type="constant", report_to="none", use_cpu=True, disable_tqdm=True,
        save_steps=2, train_sampling_strategy="sequential",
    )  # fmt: skip
    states = []
    for name, steps, resume in (("whole", 4, None), ("cut", 2, None), ("cut", 4, True)):
        model, tokenizer = load_model(own_checkpoint, dtype=torch.float32)
        packed = pack(load_documents(texts), tokenizer, sequence_length=32, seed=0)
        handle = attach(model, indexers="own")
        arguments = TrainingArguments(output_dir=str(tmp_path / name), max_steps=steps, **options)
        IndexerTrainer(handle, args=arguments, train_dataset=packed).train(resume_from_checkpoint=resume)
        states.append({key: value.clone() for key, value in handle.state_dict().items()})
        assert all(torch.equal(model.state_dict()[key], value) for key, value in states[-1].items())
    whole, cut, resumed = states
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, rtol=1e-5, atol=1e-7)
    assert any(not torch.allclose(cut[key], value, rtol=1e-5, atol=1e-7) for key, value in whole.items())


def test_a_changed_frozen_parameter_is_found(recipe: Any, own_settings: Any, tmp_path: Path) -> None:
    """The audit leaves out what trains, and nothing else."""
    recipe.build = own_settings
    handle = recipe(tmp_path / "run", steps=1)
    before = model_fingerprint(handle.model, without=handle.indexers)
    with torch.no_grad():
        handle.indexers["0"].get_parameter("wk.weight").add_(1.0)
    warmup._audit(handle, before)
    with torch.no_grad():
        handle.model.get_parameter("model.layers.0.self_attn.q_a_proj.weight").add_(1.0)
    with pytest.raises(RuntimeError, match="frozen model's parameters changed"):
        warmup._audit(handle, before)


def test_indexers_stay_as_wide_as_they_are_stored(own_checkpoint: Path, tmp_path: Path) -> None:
    """In a model that is loaded in bfloat16; load_model for others rounds them."""
    folder = tmp_path / "model"
    shutil.copytree(own_checkpoint, folder)
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.indexer.wk.weight"
    stored[name] = stored[name] + 1e-4
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_model(folder, dtype=torch.bfloat16, indexers="own")
    assert model.dtype == torch.bfloat16
    handle = attach(model, indexers="own")
    assert torch.equal(handle.state_dict()[name], stored[name])
    rounded, _ = load_model(folder, dtype=torch.bfloat16)
    assert not torch.equal(rounded.state_dict()[name].float(), stored[name])
    with torch.no_grad():
        model(torch.arange(20)[None], use_cache=False)
    export(handle, tmp_path / "exported", format="own")
    again = load_file(tmp_path / "exported" / "model.safetensors")
    assert torch.equal(again[name], stored[name]) and again["model.norm.weight"].dtype == torch.bfloat16


def test_indexers_of_checkpoints_in_fp8_are_dequantised(own_checkpoint: Path, tmp_path: Path) -> None:
    """As those that are published; an unquantised one is read as it is, one that is missing is refused."""
    folder = tmp_path / "model"
    shutil.copytree(own_checkpoint, folder)
    stored = load_file(folder / "model.safetensors")
    name, weights = (
        "model.layers.2.self_attn.indexer.wq_b.weight",
        "model.layers.2.self_attn.indexer.weights_proj.weight",
    )
    scale = stored[name].abs().max() / 448
    values = (stored[name] / scale).to(torch.float8_e4m3fn)
    changed = stored | {name: values, f"{name}_scale_inv": scale.reshape(1)}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(quantization_config=dict(quant_method="fp8"))))
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_model(folder, dtype=torch.float32, indexers="own")
    assert torch.equal(model.state_dict()[name], values.float() * scale)
    assert torch.equal(model.state_dict()[weights], stored[weights])
    save_file(
        {k: v for k, v in changed.items() if k != weights}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match="got 1 missing, first .*weights_proj"):
        load_model(folder, dtype=torch.float32, indexers="own")
    narrow, _ = load_model(own_checkpoint, dtype=torch.bfloat16, indexers="own")
    assert narrow.state_dict()[name].dtype == torch.float32


def test_native_files_of_own_and_fresh_indexers_are_told_apart(
    own_checkpoint: Path, mla_checkpoint: Path, tmp_path: Path
) -> None:
    own = attach(load_model(own_checkpoint, dtype=torch.float32)[0], indexers="own")
    save_native(own, tmp_path / "own", base_name="glm")
    record = json.loads((tmp_path / "own" / "indexer_config.json").read_text())
    (tmp_path / "own" / "indexer_config.json").write_text(json.dumps(record | dict(indexers="fresh")))
    with pytest.raises(ValueError, match="indexers 'fresh', attached are 'own'"):
        load_native(own, tmp_path / "own")
    foreign = load_file(tmp_path / "own" / "indexer.safetensors") | {"model.norm.weight": torch.ones(48)}
    save_file(foreign, tmp_path / "own" / "indexer.safetensors")
    (tmp_path / "own" / "indexer_config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="1 tensors too many, first model.norm.weight"):
        read_native(tmp_path / "own")
    fresh = attach(load_model(mla_checkpoint, dtype=torch.float32)[0])
    with pytest.raises(ValueError, match=r'format \'own\' needs a handle of attach\(model, indexers="own"\)'):
        export(fresh, tmp_path / "none", format="own")
    with pytest.raises(ValueError, match="got a model whose own indexers were trained; use format='own'"):
        export(own, tmp_path / "none", format="deepseek_v32")
    with pytest.raises(ValueError, match="index_topk must be left out with format 'own', got 16"):
        export(own, tmp_path / "none", format="own", index_topk=16)
    with torch.no_grad():
        own.indexers["0"].get_parameter("wk.weight")[0, 0] = torch.nan
    with pytest.raises(ValueError, match="wk.weight holds NaN or infinity"):
        export(own, tmp_path / "none", format="own")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--indexers", "mine"], 'indexers must be "fresh" or "own", got \'mine\''),
        (["--indexers", "own", "--teachers", "all"], 'teachers must be "shared" or "own", got \'all\''),
        (["--indexers", "own", "--num-heads", "16"], 'num_heads must be left out with indexers="own", or 4'),
        (["--indexers", "own", "--layers", "1"], "got 1, which uses the indexer of layer 0"),
        ([], 'has indexers of its own; train these with indexers="own"'),
    ],
)
def test_commands_refuse_before_anything_is_written(
    options: list[str], message: str, own_checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    done = run("warmup", "--out", tmp_path / "run", "--model", own_checkpoint, "--data", texts, "--steps", 1, *options)
    assert done.exit_code != 0 and message in " ".join(done.output.split())
    assert not (tmp_path / "run").exists()
