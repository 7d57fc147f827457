"""A hybrid of linear and full attention, and one with sinks and softcap, from the warm-up to the native export."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DiffLlamaConfig,
    Gemma2Config,
    GptOssConfig,
    Qwen3NextConfig,
)
from typer.testing import CliRunner

from flash_indexer.cli import app
from flash_indexer.files.export import export
from flash_indexer.files.native import load_native, read_native
from flash_indexer.judge.evaluation import evaluate
from flash_indexer.recipe.checking import check_teacher
from flash_indexer.recipe.held_out import held_out_batches
from flash_indexer.recipe.judging import load_trained
from flash_indexer.recipe.run_record import read_run
from flash_indexer.recipe.warmup import warm_up

SIZES: dict[str, Any] = dict(
    vocab_size=61, hidden_size=48, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
    bos_token_id=None, eos_token_id=60, pad_token_id=None,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2)
CONFIGS: dict[str, Callable[[], Any]] = {
    "hybrid": lambda: Qwen3NextConfig(
        **SIZES, **EXPERTS, num_hidden_layers=4, moe_intermediate_size=32, shared_expert_intermediate_size=32,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=12, linear_value_head_dim=12,
    ),
    "sinks": lambda: GptOssConfig(**SIZES, **EXPERTS, num_hidden_layers=2, sliding_window=9),
    "softcap": lambda: Gemma2Config(**SIZES, num_hidden_layers=2, sliding_window=9, attn_logit_softcapping=2.0),
}  # fmt: skip
LAYERS = {"hybrid": (3,), "sinks": (1,), "softcap": (1,)}


def write_model(config: Any, tokenizer: Path, path: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 0.05) + ("norm" in name))
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(x) for x in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.filterwarnings("ignore:attach. the mask that the model forms itself")
def test_from_warmup_to_export(
    kind: str, tmp_path: Path, checkpoint: Path, tiny_settings: Callable[..., Any], texts: Path
) -> None:
    write_model(CONFIGS[kind](), checkpoint, tmp_path / "model")
    console = Console(file=io.StringIO(), width=500)
    settings = tiny_settings(model=str(tmp_path / "model"), steps=4, head_dim=32, rope_dim=None)
    assert warm_up(settings, tmp_path / "run", console=console).layers == LAYERS[kind]
    handle, _, _ = load_trained(tmp_path / "run", None, console)
    batches = held_out_batches(read_run(tmp_path / "run"), str(texts), 2)
    check_teacher(handle, batches[0], console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count(f"indexers on 1 of {LAYERS[kind][0] + 1} layers: {LAYERS[kind][0]} (none on 0") == 2
    judged = evaluate(handle, batches, ks=(4, 8), perplexity_ks=(8,))
    assert [layer.layer for layer in judged.layers] == list(LAYERS[kind])
    export(handle, tmp_path / "native", format="native", base_name=str(tmp_path / "model"))
    handle.remove()
    assert read_native(tmp_path / "native").config.layers == LAYERS[kind]
    again = load_native(handle.model, tmp_path / "native")
    for name, value in handle.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


@pytest.mark.usefixtures("blank_plots")
def test_the_commands_take_a_hybrid_and_after_a_refusal_the_same_command_does(
    tmp_path: Path, checkpoint: Path, texts: Path
) -> None:
    """warmup, refused and then right, check, evaluate and export."""
    refused = write_model(DiffLlamaConfig(**SIZES, num_hidden_layers=2), checkpoint, tmp_path / "refused")
    hybrid = write_model(CONFIGS["hybrid"](), checkpoint, tmp_path / "model")
    out = tmp_path / "run"
    command = ["warmup", "--out", out, "--data", texts, "--steps", 3, "--sequence-length", 48, "--num-heads", 2]
    command += ["--head-dim", 32, "--evaluate-sequences", 0, "--model"]
    done = run(*command, refused)
    said = " ".join(done.output.split())
    assert done.exit_code != 0 and "DiffLlamaAttention subtracts one softmax from another" in said, done.output
    assert not out.exists() and sorted(x.name for x in tmp_path.iterdir() if x.name[0] != ".") == ["model", "refused"]
    for arguments in (
        (*command, hybrid),
        ("check", "--run", out, "--data", texts),
        ("evaluate", "--run", out, "--data", texts, "--sequences", 2, "--report", tmp_path / "report"),
        ("export", "--run", out, tmp_path / "native", "--format", "native"),
    ):
        done = run(*arguments)
        assert done.exit_code == 0, done.output
    assert read_native(tmp_path / "native").config.layers == LAYERS["hybrid"]
    (judged,) = (tmp_path / "report").rglob("report.json")
    layers = json.loads(judged.read_text())["evaluation"]["layers"]
    assert [layer["layer"] for layer in layers] == list(LAYERS["hybrid"])
