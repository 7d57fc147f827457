"""Tiny models of the families that have indexers of their own, with weights large enough to rank keys clearly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AXK2Config,
    DeepseekV32Config,
    Dots3NoteTextConfig,
    GlmMoeDsaConfig,
    HYV4Config,
    MistralLarge4Config,
    MistralLarge4TextConfig,
    PreTrainedModel,
)

VOCABULARY = 61
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12, moe_intermediate_size=32,
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1, index_n_heads=5,
    index_head_dim=32, index_topk=64,
)  # fmt: skip
MLA = SIZES | dict(q_lora_rank=32)
WINDOWED: dict[str, Any] = dict(
    swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=16, swa_kv_lora_rank=16, swa_head_dim=24,
    swa_qk_nope_head_dim=16, swa_v_head_dim=12,
)  # fmt: skip
VISION = dict(
    model_type="pixtral", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    image_size=28, patch_size=14,
)  # fmt: skip
SHARED = ["full", "shared", "shared", "full"]


def _mistral(**changes: Any) -> MistralLarge4Config:
    shared = dict(indexer_types=["full", "shared", "full", "full"], kv_source_layers=[0, 1, 0, 3])
    text = MistralLarge4TextConfig(**(SIZES | dict(first_k_dense_replace=2) | shared | changes))
    return MistralLarge4Config(text_config=text.to_dict(), vision_config=VISION)


CONFIGS: dict[str, Callable[..., Any]] = {
    "deepseek_v32": lambda **changes: DeepseekV32Config(**(MLA | dict(first_k_dense_replace=2) | changes)),
    "glm_moe_dsa": lambda **changes: GlmMoeDsaConfig(
        **(MLA | dict(first_k_dense_replace=2, indexer_types=SHARED) | changes)
    ),
    "axk2": lambda **changes: AXK2Config(**(MLA | dict(gated_norm_rank=4) | changes)),
    "dots3_note": lambda **changes: Dots3NoteTextConfig(
        **(MLA | WINDOWED | dict(layer_types=["indexed_attention", "sliding_attention"] * 2, sliding_window=8,
           head_dim=24, shared_experts_intermediate_size=32) | changes)
    ),
    "mistral_large4": _mistral,
    "hy_v4": lambda **changes: HYV4Config(**(MLA | dict(hc_mult=2) | changes)),
}  # fmt: skip


def own_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model in eval mode, the same one for the same arguments."""
    torch.manual_seed(0)
    auto: Any = AutoModelForImageTextToText if family == "mistral_large4" else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(CONFIGS[family](**changes), dtype=dtype).eval()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.25 + ("norm" in name))
    return model


def own_tokens(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
