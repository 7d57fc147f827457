"""A hybrid of linear and full attention, and one with sinks and softcap, from the warm-up to the native export."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GptOssConfig, Qwen3NextConfig

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


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.filterwarnings("ignore:attach. the mask that the model forms itself")
def test_from_warmup_to_export(
    kind: str, tmp_path: Path, checkpoint: Path, tiny_settings: Callable[..., Any], texts: Path
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 0.05) + ("norm" in name))
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
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
