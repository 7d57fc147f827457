"""A tiny configuration of every causal language model of Transformers, with every kind of layer that the type has."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
SMALL: dict[str, int] = dict(
    vocab_size=61, hidden_size=48, d_model=48, n_embd=48, dim=48, embedding_size=48, intermediate_size=64, ffn_dim=64,
    n_inner=64, decoder_ffn_dim=64, encoder_ffn_dim=64, num_hidden_layers=4, num_layers=4, n_layer=4, n_layers=4,
    decoder_layers=4, encoder_layers=2, num_attention_heads=4, num_heads=4, n_head=4, n_heads=4, depth=2,
    decoder_attention_heads=4, encoder_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=256, n_positions=256, n_ctx=256, moe_intermediate_size=32,
    shared_expert_intermediate_size=32, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    n_shared_experts=1, n_group=1, topk_group=1, q_lora_rank=32, kv_lora_rank=24, qk_rope_head_dim=8,
    qk_nope_head_dim=16, v_head_dim=12, sliding_window=7, sliding_window_size=7, attention_chunk_size=7, dff=64,
    dim_ff=64, mamba_n_heads=4, mamba_d_state=8, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=12, linear_value_head_dim=12, linear_head_dim=12, linear_num_heads=4, index_n_heads=4,
    index_head_dim=16, index_topk=64, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16, d_rel=8,
    rel_extent=16, vocab_size_per_layer_input=61, hidden_size_per_layer_input=8, out_hidden_size=48,
    num_position_embeddings=64, ffn_hidden_size=64, expert_ffn_hidden_size=32, zero_expert_num=2, moe_topk=2,
    conf_num_hidden_layers=2, n_mamba_heads=4, num_global_layers=2, num_hash_layers=1, text_hidden_size=48,
)  # fmt: skip
"""Sizes, by every name that configurations give them."""
ROPES: dict[str, Any] = {kind: dict(rope_type="default", rope_theta=10000.0) for kind in (FULL, SLIDING)}
MLA = dict(num_key_value_heads=4)
SHARED_KEYS = dict(layer_types=[SLIDING, FULL, SLIDING, FULL], num_kv_shared_layers=2)

MORE: dict[str, dict[str, Any]] = {
    "bailing_hybrid": dict(
        n_group=1, num_local_experts=4, num_experts=4, num_experts_per_tok=2, topk_group=1, layer_group_size=4, **MLA
    ),
    "bamba": dict(attn_layer_indices=[1, 3], mamba_n_heads=4),
    "bigbird_pegasus": dict(attention_type="original_full"),
    "codegen": dict(rotary_dim=8),
    "cohere_compass_text": dict(layer_types=[SLIDING, SLIDING, SLIDING, FULL], rope_parameters=ROPES),
    "cpmant": dict(dim_head=12),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
        ffn_config=dict(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2),
    ),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "dots1": dict(n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2),
    "dots3_note_text": MLA,
    "falcon_h1": dict(mamba_n_heads=4, mamba_d_ssm=48),
    "gemma2": dict(attn_logit_softcapping=2.0),
    "gemma3_text": dict(layer_types=[SLIDING, SLIDING, SLIDING, FULL]),
    "gemma3n_text": dict(
        intermediate_size=[64] * 4, activation_sparsity_pattern=[0.0] * 4, laurel_rank=8, **SHARED_KEYS
    ),
    "gemma4_text": dict(layer_types=[SLIDING, FULL, SLIDING, FULL], global_head_dim=16),
    "glm_moe_dsa": dict(indexer_types=["full", "shared", "shared", "full"]),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]], window_size=7),
    "gptj": dict(rotary_dim=8),
    "granitemoehybrid": dict(layer_types=[LINEAR, FULL, LINEAR, FULL], mamba_n_heads=4, shared_intermediate_size=32),
    "hunyuan_v1_dense": dict(head_dim=12),
    "hunyuan_v1_moe": dict(head_dim=12),
    "helium": dict(head_dim=12),
    "inkling_text": dict(layer_types=[SLIDING, SLIDING, FULL, FULL]),
    "inkling2_text": dict(layer_types=[SLIDING, SLIDING, FULL, FULL]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4),
    "kimi_linear": dict(layer_types=[LINEAR, LINEAR, LINEAR, FULL], n_group=1, topk_group=1, num_experts_per_tok=2),
    "kolibri1": dict(layer_types=[SLIDING, SLIDING, SLIDING, FULL]),
    "lfm2": dict(layer_types=["conv", FULL, "conv", FULL]),
    "lfm2_moe": dict(layer_types=["conv", FULL, "conv", FULL]),
    "longcat_flash": dict(num_layers=2, head_dim=8),
    "mamba2": dict(n_groups=1, num_heads=6, head_dim=16),
    "ministral": dict(head_dim=12),
    "nemotron": dict(num_key_value_heads=2, head_dim=12),
    "nemotron_h": dict(n_groups=1, layer_types=[LINEAR, FULL, "moe", FULL], mamba_num_heads=4, mamba_head_dim=12),
    "qwen2": dict(use_sliding_window=True, max_window_layers=2),
    "qwen2_moe": dict(use_sliding_window=True, max_window_layers=2),
    "qwen4_exp_text": dict(
        indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=4,
        output_gate_type="sigmoid", ple_layer_ids=[], ple_embed_dim=8, ngram_vocab_size_base=64,
        layer_types=[LINEAR, FULL, LINEAR, FULL],
    ),
    "reformer": dict(is_decoder=True, attn_layers=["local", "local"], axial_pos_embds=False),
    "recurrent_gemma": dict(attention_window_size=7),
    "roc_bert": dict(shape_vocab_size=8, pronunciation_vocab_size=8),
    "stablelm": dict(head_dim=12, partial_rotary_factor=0.5),
    "vaultgemma": dict(attn_logit_softcapping=2.0),
    "xlm": dict(emb_dim=48, n_words=61),
    "xmod": dict(default_language="en_XX", languages=["en_XX"]),
    "zamba": dict(
        layers_block_type=[LINEAR, LINEAR, "hybrid", LINEAR, "hybrid"], num_hidden_layers=5, num_key_value_heads=4,
        n_mamba_heads=2, mamba_d_state=8, mamba_dt_rank=4,
    ),
    "zamba2": dict(
        layers_block_type=[LINEAR, "hybrid", LINEAR, "hybrid", LINEAR], num_hidden_layers=5, num_key_value_heads=4,
        n_mamba_heads=6, mamba_headdim=16, mamba_d_state=8,
    ),
    "zaya": dict(num_experts_per_tok=1),
}  # fmt: skip
"""What a type needs besides: sizes that others follow from, and one layer of every kind at least."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The type's default configuration with small sizes."""
    return _small(CONFIG_MAPPING[model_type], 0)


def _small(cls: type[PreTrainedConfig], level: int) -> PreTrainedConfig:
    default = cls()
    default.allow_global_per_layer_attribute_access = True
    values = default.to_dict()
    sizes: dict[str, Any] = {n: v for n, v in SMALL.items() if isinstance(values.get(n), int)}
    if "kv_lora_rank" in sizes:
        sizes |= MLA
        sizes.pop("head_dim", None)
    if "is_decoder" in values:
        sizes["is_decoder"] = True
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if name in values:
            sizes[name] = 0
    for name in values:
        if isinstance(part := getattr(default, name, None), PreTrainedConfig):
            sizes[name] = _small(type(part), level + 1)
    return cls(**(sizes | MORE.get(cls.model_type, {})))
