"""Tiny models of the attachable families, with weights large enough that attention is far from uniform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

SIZES: dict[str, Any] = dict(
    vocab_size=61, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
MLA = SIZES | dict(
    num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=24, qk_rope_head_dim=8,
    qk_nope_head_dim=16, v_head_dim=12, first_k_dense_replace=2, moe_intermediate_size=32, n_routed_experts=4,
    n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=32, mscale=1.0,
    mscale_all_dim=1.0, beta_fast=32, beta_slow=1,
)  # fmt: skip
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **changes: LlamaConfig(**(SIZES | changes)),
    "qwen2, windows": lambda **changes: Qwen2Config(
        **(SIZES | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1) | changes)
    ),
    "qwen3": lambda **changes: Qwen3Config(**(SIZES | dict(head_dim=16) | changes)),
    "mistral, window": lambda **changes: MistralConfig(**(SIZES | dict(sliding_window=7) | changes)),
    "deepseek_v3": lambda **changes: DeepseekV3Config(**(MLA | changes)),
    "deepseek_v3, no q-LoRA": lambda **changes: DeepseekV3Config(**(MLA | dict(q_lora_rank=None) | changes)),
    "deepseek_v3, yarn": lambda **changes: DeepseekV3Config(**(MLA | dict(rope_parameters=YARN) | changes)),
}


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    """Every attachable family in turn."""
    return str(request.param)


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """`tiny(family, **config changes)`: a float32 model in eval mode, the same one for the same arguments."""

    def build(family: str, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family](**changes), dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(1)
        for name, tensor in sorted(model.state_dict().items()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.25 + ("norm" in name))
        return model

    return build
