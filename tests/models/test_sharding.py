"""A sharded base: what lies where, that nothing of it changes, and what can't be sharded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own_models import own_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from flash_indexer.models.attach import attach
from flash_indexer.models.sharding import shard_model
from flash_indexer.parallel.mesh import Parallel

SHARD = """
import json, os
os.environ.update(environment)
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from flash_indexer.parallel.mesh import make_parallel
from flash_indexer.models.load import model_fingerprint
from flash_indexer.models.sharding import shard_model
dist.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(path).requires_grad_(False)
before = {name: x.clone() for name, x in model.named_parameters()}
ids = torch.arange(24).view(2, 12)
with torch.no_grad():
    want = model.model(input_ids=ids, use_cache=False).last_hidden_state
    shard_model(model, make_parallel("cpu", **sizes), fsdp=fsdp)
    held = model_fingerprint(model)
    error = float((model.model(input_ids=ids, use_cache=False).last_hidden_state - want).abs().max())
    same = held == model_fingerprint(model)
    whole = {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in model.named_parameters()}
    local = {n: x.to_local().numel() if isinstance(x, DTensor) else x.numel() for n, x in model.named_parameters()}
    equal = whole.keys() == before.keys() and all(torch.equal(whole[n], before[n]) for n in whole)
    model.model.norm.weight.mul_(1.5)
found = dict(
    error=error, same=same, changed=held != model_fingerprint(model), local=local,
    equal=equal,
    tied=model.lm_head.weight is model.model.embed_tokens.weight,
)
open(f"{out}.{dist.get_rank()}", "w").write(json.dumps(found))
dist.destroy_process_group()
"""
SIZES: dict[str, Any] = dict(
    vocab_size=61, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6
)
Tiny = Callable[..., PreTrainedModel]


@pytest.mark.parametrize(
    ("sizes", "fsdp", "tied", "key_heads"),
    [(dict(), True, True, 2), (dict(), True, False, 2), (dict(tp=2), False, True, 2), (dict(tp=2), False, False, 1)],
    ids=["fsdp, tied head", "fsdp", "tp", "tp, one key head"],
)
def test_a_sharded_model_computes_the_same_and_stays_as_it_is(
    tmp_path: Path, runs: Any, sizes: dict[str, int], fsdp: bool, tied: bool, key_heads: int
) -> None:
    config = LlamaConfig(**SIZES, num_key_value_heads=key_heads, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    names = dict(path=str(tmp_path / "model"), sizes=sizes, fsdp=fsdp)
    runs.finish(runs.ranks(2, None, tmp_path / "rank", codes=[SHARD] * 2, **names))
    found = [json.loads((tmp_path / f"rank.{rank}").read_text()) for rank in (0, 1)]
    for rank in found:
        assert rank["error"] < 1e-5 and rank["same"] and rank["changed"] and rank["equal"]
        assert rank["tied"] == tied
    for name, parameter in model.named_parameters():
        held = [rank["local"][name] for rank in found]
        heads = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj") + ("k_proj", "v_proj") * (key_heads > 1)
        if fsdp:
            assert sum(held) == parameter.numel() and max(held) <= parameter.numel() / 2 + parameter[0].numel(), name
        else:
            share = 2 if any(part in name for part in heads) else 1
            assert held == [parameter.numel() / share] * 2, name


def test_heads_that_tp_does_not_divide_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=r"tp must divide num_attention_heads = 6, got tp=4; possible here: \[1, 2\]"):
        shard_model(tiny("llama"), Parallel(tp=4), fsdp=False)
    with pytest.raises(ValueError, match=r"tp must divide num_key_value_heads = 2, got tp=3; possible here: \[1, 2\]"):
        shard_model(tiny("llama"), Parallel(tp=3), fsdp=False)
    with pytest.raises(ValueError, match=r"num_attention_heads = 4, got tp=3; possible here: \[1, 2, 4\]"):
        shard_model(tiny("deepseek_v3"), Parallel(tp=3), fsdp=False)


@pytest.mark.parametrize(
    ("family", "part"), [("axk2", "q_gate_proj"), ("dots3_note", "g_proj"), ("hy_v4", "gate_proj")]
)
def test_heads_with_parts_that_are_not_shared_out_are_refused(family: str, part: str) -> None:
    with pytest.raises(ValueError, match=f"tp must be 1 for .*Attention, got tp=2: {part} of layer 0 has a part"):
        shard_model(own_model(family), Parallel(tp=2), fsdp=False)


def test_fsdp_with_nothing_left_to_share_out_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=r"fsdp shares parameters out over dp \* cp processes, got 1 with tp=2; start"):
        shard_model(tiny("llama"), Parallel(tp=2), fsdp=True)


def test_fsdp_beside_tp_shares_out_over_the_processes_of_a_sequence(tmp_path: Path, runs: Any) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))
    model.save_pretrained(tmp_path / "model")
    names = dict(path=str(tmp_path / "model"), sizes=dict(cp=2, tp=2), fsdp=True)
    runs.finish(runs.ranks(4, None, tmp_path / "rank", codes=[SHARD] * 4, **names))
    found = [json.loads((tmp_path / f"rank.{rank}").read_text()) for rank in range(4)]
    assert all(rank["error"] < 1e-5 and rank["same"] and rank["changed"] and rank["equal"] for rank in found)
    for name, parameter in model.named_parameters():
        copies = 1 if any(part in name for part in ("q_proj", "k_proj", "v_proj", "o_proj", "mlp")) else 2
        assert sum(rank["local"][name] for rank in found) == copies * parameter.numel(), name


def test_captures_and_targets_that_are_not_whole_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match='target="per_head" has no sum over heads to share out, got tp=2; use cp'):
        attach(tiny("llama"), num_heads=6, target="per_head", parallel=Parallel(tp=2))
    handle = attach(tiny("llama"), num_heads=2, head_dim=32, parallel=Parallel(cp=2))
    with (
        pytest.raises(ValueError, match="using: captures must be whole, got a model attached with context or tensor"),
        handle.using(lambda capture: None),
    ):
        pass


def test_a_part_of_a_sequence_needs_its_positions(tiny: Tiny) -> None:
    handle = attach(tiny("llama"), num_heads=2, head_dim=32, parallel=Parallel(cp=2))
    with pytest.raises(ValueError, match="with cp=2 the forward needs position_ids and no other form, got None"):
        handle.decoder(input_ids=torch.arange(8)[None], use_cache=False)


@pytest.mark.parametrize(
    "rope",
    [dict(rope_type="dynamic", factor=2.0), dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4)],
    ids=["dynamic", "longrope"],
)
def test_rope_that_depends_on_the_longest_position_is_refused_over_parts(tiny: Tiny, rope: dict[str, Any]) -> None:
    parameters = dict(rope_theta=10000.0, original_max_position_embeddings=32, **rope)
    model = tiny("llama", rope_parameters=parameters)
    with pytest.raises(ValueError, match=f'same for all positions with cp=2, got "{rope["rope_type"]}"'):
        attach(model, num_heads=2, head_dim=16, rope_dim=8, parallel=Parallel(cp=2))
    attach(model, num_heads=2, head_dim=16, rope_dim=8).remove()


def test_a_model_of_another_family_is_refused() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="shard_model: model must be one of the decoders .* got BloomForCausalLM"):
        shard_model(model, Parallel(dp=2), fsdp=True)


def test_heads_of_layers_that_are_called_otherwise_are_not_shared_out() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="tp must be 1 unless every layer has a self_attn .* tp=2 for GPT2LMHeadModel"):
        shard_model(model, Parallel(tp=2), fsdp=False)


def test_layers_that_mix_tokens_otherwise_need_the_whole_sequence() -> None:
    sizes: dict[str, Any] = dict(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts=2,
        num_experts_per_tok=1, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8,
    )  # fmt: skip
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**sizes))
    with pytest.raises(ValueError, match="cp must be 1 for Qwen3NextForCausalLM, whose layers 0-2 mix .* cp=2"):
        attach(model, num_heads=2, head_dim=16, parallel=Parallel(cp=2))
    attach(model, num_heads=2, head_dim=16).remove()
