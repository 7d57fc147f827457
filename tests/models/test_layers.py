"""Which layers of a decoder can be a teacher, which get indexers, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DiffLlamaConfig,
    Gemma3TextConfig,
    PreTrainedModel,
    Qwen3NextConfig,
)

from flash_indexer.models.attach import IndexerHandle, attach
from flash_indexer.models.layers import spans

Tiny = Callable[..., PreTrainedModel]
SIZES: dict[str, Any] = dict(
    vocab_size=61, hidden_size=48, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
INDEXER: dict[str, Any] = dict(num_heads=2, head_dim=32)


def build(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def hybrid() -> PreTrainedModel:
    """Qwen3-Next: three layers of linear attention, then one of full attention, twice."""
    return build(
        Qwen3NextConfig(
            **SIZES, num_hidden_layers=8, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4,
            num_experts_per_tok=2, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=12,
            linear_value_head_dim=12,
        )
    )  # fmt: skip


def run(handle: IndexerHandle, length: int = 20) -> None:
    with torch.no_grad():
        handle.model(torch.arange(length)[None] % 61, use_cache=False)


def test_a_hybrid_learns_on_its_full_attention_layers() -> None:
    handle = attach(hybrid(), **INDEXER)
    assert handle.layers == (3, 7)
    assert handle.description == (
        "indexers on 2 of 8 layers: 3, 7 (none on 0-2, 4-6: linear_attention does not call the attention function that "
        "Transformers looks up by name)"
    )
    run(handle)
    assert list(handle.losses()) == [3, 7]
    assert all(parameter.grad is not None for parameter in handle.indexers.parameters())


def test_layers_that_see_a_window_are_left_alone_by_default(tiny: Tiny) -> None:
    handle = attach(tiny("qwen2, windows"), **INDEXER)
    assert handle.layers == (0,) and handle.description.endswith("(none on 1-2: sees a window of keys)")
    handle.remove()
    handle = attach(handle.model, layers=[1, 0], **INDEXER)
    assert handle.layers == (0, 1) and "none on 2: sees a window of keys" in handle.description
    run(handle)
    assert attach(tiny("mistral, window"), **INDEXER).layers == (0, 1, 2)  # no other layers are there
    assert attach(tiny("llama"), layers=[1], **INDEXER).description.endswith("(none on 0, 2: not asked for)")
    assert attach(tiny("llama"), **INDEXER).description == "indexers on 3 of 3 layers: 0-2"


def test_each_layer_has_the_rope_of_its_kind() -> None:
    ropes = {kind: dict(rope_type="default", rope_theta=base) for kind, base in KINDS.items()}
    config = Gemma3TextConfig(
        **SIZES, num_hidden_layers=2, layer_types=list(KINDS), sliding_window=5, rope_parameters=ropes
    )
    handle = attach(build(config), layers=[0, 1], rope_dim=8, **INDEXER)
    found: dict[int, torch.Tensor] = {}
    with torch.no_grad(), handle.using(lambda capture: found.update({capture.layer: capture.index_k})):
        handle.model(torch.full((1, 12), 7), use_cache=False)
    for layer, base in enumerate(KINDS.values()):
        near = found[layer]
        turned = torch.atan2(near[:, 4:8], near[:, :4])
        want = torch.arange(12)[:, None] * base ** (-torch.arange(4) / 4)
        drift = (turned - turned[0] - want + torch.pi) % (2 * torch.pi) - torch.pi
        assert drift.abs().max() < 1e-3, layer


KINDS = {"sliding_attention": 50.0, "full_attention": 900.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            DiffLlamaConfig(**SIZES, num_hidden_layers=2),
            "none can be a teacher .0-1: DiffLlamaAttention subtracts one softmax from another: no distribution",
        ),
        (
            BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=61),
            "none can be a teacher .0-1: BloomAttention does not call the attention function that",
        ),
    ],
    ids=["difference of softmaxes", "attention of its own"],
)
def test_what_is_in_the_way_is_named(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(build(config), **INDEXER)


def test_layers_that_cannot_be_a_teacher_are_refused_by_name() -> None:
    model = hybrid()
    message = r"got layer 4: linear_attention does not call .* by name; possible here: \[3, 7\]"
    with pytest.raises(ValueError, match=message):
        attach(model, layers=[3, 4], **INDEXER)
    with pytest.raises(ValueError, match=r"layers must be indices below 8, got \[8\]"):
        attach(model, layers=[8], **INDEXER)
    model.model.layers[3].self_attn.is_causal = False
    assert attach(model, **INDEXER).layers == (7,)


def test_neighbours_are_joined() -> None:
    assert spans([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7" and spans([]) == ""
