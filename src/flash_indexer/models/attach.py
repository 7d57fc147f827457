"""Attaches lightning indexers to a loaded Transformers model.

The model's attention is replaced by a registered attention function that computes the same output and the logsumexp.
While it runs, each attached layer's queries, keys and index operands are handed to a consumer: by default the warm-up
loss, whose backward runs at once, inside the forward, so that one layer's scores live at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flash_indexer.indexer import LightningIndexer, check_sizes
from flash_indexer.models.capture import LayerCapture
from flash_indexer.models.families import (
    FAMILIES,
    check_rope,
    chosen_layers,
    default_rope_dim,
    find_decoder,
    is_attachable,
    layer_device,
    resized_rotary,
)
from flash_indexer.models.handle import IndexerHandle
from flash_indexer.models.hooks import ATTENTION, TAP, LayerTap, uncompiled
from flash_indexer.models.sparse import check_topk, sparse_handle
from flash_indexer.models.sparse_hooks import SPARSE_TAP
from flash_indexer.ops.quantization import check_rotation
from flash_indexer.parallel.mesh import Parallel

__all__ = ["IndexerHandle", "LayerCapture", "attach"]


def attach(
    model: PreTrainedModel,
    *,
    num_heads: int = 8,
    head_dim: int = 64,
    rope_dim: int | None = None,
    target: str = "mean",
    layers: Sequence[int] | None = None,
    parallel: Parallel | None = None,
    index_dtype: str | None = None,
    teacher_dtype: str | None = None,
    topk: int | None = None,
) -> IndexerHandle:
    """Gives every layer of a dense model a fresh lightning indexer that learns from the layer's own attention.

    MLA models with q-LoRA: wq_b reads the normed query residual, rope is the model's own (half-split, on
    qk_rope_head_dim dims, as in DeepSeek-V3.2). Elsewhere wq_b reads the hidden state and rope comes from the model's
    rope settings with rope_dim dims.

    Batches are packed: no padding; documents restart position_ids at 0, or are said by cu_seq_lens_q, seq_idx or a mask
    of document numbers (flash_indexer.models.documents). Sliding windows are respected. Call the model in eval() mode,
    under torch.no_grad(), in one thread at a time. Autocast may be on; torch.compile leaves the attention as it is.

    Args:
        model: a loaded causal language model. Its parameters stop requiring gradients until `remove()`.
        num_heads: I. head_dim: E. rope_dim: None means min(32, head_dim), for MLA qk_rope_head_dim, for
            longrope the most up to 32 that divide its dims.
        target: see `flash_indexer.indexer_kl`. layers: indices of the layers to attach; None means all.
        parallel: how sequence and heads are shared out over processes. With cp > 1 the model is given this process's
            part of input_ids and position_ids (`context_positions` of the flattened batch); with tp > 1 it is sharded.
        index_dtype: "fp8" or "fp8_unrotated" trains the indexers in the arithmetic that they are served in, see
            `flash_indexer.indexer_kl`. teacher_dtype: "fp8" takes the teacher's probabilities from e4m3 queries and
            keys, with the logsumexp of these. Not with cp or tp.
        topk: the layers attend to so many keys, those that their indexers rank highest, and the model may train: see
            `flash_indexer.models.sparse.sparse_handle`, whose SparseHandle is returned. None: they stay dense.

    Raises:
        TypeError: the model is a wrapper around a Transformers model.
        ValueError: a family or rope that can't be attached, layers that don't exist, or sizes that don't fit.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"attach: model must be a transformers.PreTrainedModel, got {type(model).__name__}; unwrap it: take "
            "merge_and_unload() of a PeftModel, .module of DistributedDataParallel"
        )
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "attach: must be called outside of torch.inference_mode(), inside which no parameter can train; use "
            "torch.no_grad()"
        )
    check_sizes("attach", num_heads=num_heads, head_dim=head_dim)
    if topk is not None:
        check_topk("attach", topk)
    decoder = find_decoder(model)
    blocks = getattr(decoder, "layers", None)
    attentions: list[Any] = [getattr(block, "self_attn", None) for block in blocks] if blocks is not None else []
    if not attentions or not all(is_attachable(module) for module in attentions) or not hasattr(decoder, "rotary_emb"):
        raise ValueError(f"attach: model must be one of the {FAMILIES}; got {type(model).__name__}")
    if any(hasattr(module, "indexer") for module in attentions):
        raise ValueError(f"attach: {type(model).__name__} has indexers of its own; attach to the dense model")
    if any({TAP, SPARSE_TAP} & module.__dict__.keys() for module in attentions):
        raise ValueError("attach: the model has indexers attached already; call remove() on their handle first")
    chosen = chosen_layers(layers, len(attentions))

    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            f"attach: attention with softcap is not supported, got {type(model).__name__} with "
            f"attn_logit_softcapping={config.attn_logit_softcapping}; attachable are {FAMILIES}"
        )
    check_rope(config, 1 if parallel is None else parallel.cp)
    mla = hasattr(attentions[0], "kv_b_proj")
    rank = getattr(config, "q_lora_rank", None) if mla else None
    if mla:
        if rope_dim not in (None, config.qk_rope_head_dim):
            raise ValueError(f"attach: rope_dim must be qk_rope_head_dim = {config.qk_rope_head_dim}, got {rope_dim}")
        rope_dim = config.qk_rope_head_dim
    rope_dim = default_rope_dim(config, head_dim) if rope_dim is None else rope_dim
    check_sizes("attach", rope_dim=rope_dim)
    if target not in ("mean", "per_head", "sum_logits"):
        raise ValueError(f'attach: target must be "mean", "per_head" or "sum_logits", got {target!r}')
    if target == "per_head" and parallel is not None and parallel.tp > 1:
        raise ValueError(f'attach: target="per_head" has no sum over heads to share out, got tp={parallel.tp}; use cp')
    if target == "per_head" and num_heads != config.num_attention_heads:
        raise ValueError(
            f'attach: target="per_head" needs num_heads = {config.num_attention_heads}, the model\'s, got {num_heads}'
        )
    _check_arithmetic(index_dtype, teacher_dtype, head_dim)
    indexers = nn.ModuleDict()
    for layer in chosen:
        indexers[str(layer)] = LightningIndexer(
            config.hidden_size, num_heads=num_heads, head_dim=head_dim, q_lora_rank=rank,
            rope_dim=rope_dim, rope_interleaved=False,
        ).to(layer_device(attentions[layer]))  # fmt: skip
    handle = IndexerHandle(
        model, indexers, target, parallel or Parallel(), index_dtype=index_dtype, teacher_dtype=teacher_dtype
    )
    rotary = None if mla else resized_rotary(decoder, config, rope_dim).to(layer_device(attentions[0]))
    _install(handle, decoder, attentions, rotary)
    return handle if topk is None else sparse_handle(handle, topk)


def _check_arithmetic(index_dtype: str | None, teacher_dtype: str | None, head_dim: int) -> None:
    for name, value, allowed in (
        ("index_dtype", index_dtype, ("fp8", "fp8_unrotated")),
        ("teacher_dtype", teacher_dtype, ("fp8",)),
    ):
        if value is None:
            continue
        if value not in allowed:
            raise ValueError(f"attach: {name} must be None or one of {', '.join(map(repr, allowed))}, got {value!r}")
    check_rotation('attach: index_dtype="fp8"', head_dim, index_dtype == "fp8")


def _install(handle: IndexerHandle, decoder: Any, attentions: list[Any], rotary: nn.Module | None) -> None:
    """Freezes the model, adds the hooks, switches the attention function; records how to undo each."""
    model = handle.model
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                handle.undo_with(partial(_thaw, module, name))
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    handle.undo_with(lambda: model.set_attn_implementation(before))
    handle.undo_with(decoder.register_forward_pre_hook(uncompiled(handle.begin), with_kwargs=True).remove)
    handle.undo_with(decoder.register_forward_hook(uncompiled(handle.end)).remove)
    handle.undo_with(decoder.register_forward_hook(uncompiled(handle.release), always_call=True).remove)
    for layer, module in enumerate(attentions):
        tap = LayerTap(handle.attend, layer, rotary)
        module.__dict__[TAP] = tap
        handle.undo_with(partial(module.__dict__.pop, TAP, None))
        if layer not in handle.layers:
            continue
        handle.undo_with(module.register_forward_pre_hook(uncompiled(tap.read_inputs), with_kwargs=True).remove)
        if getattr(module, "q_a_layernorm", None) is not None:
            handle.undo_with(module.q_a_layernorm.register_forward_hook(uncompiled(tap.read_residual)).remove)


def _thaw(module: nn.Module, name: str) -> None:
    """By name: offloading puts other parameter objects in the place of those that were frozen."""
    module.get_parameter(name).requires_grad_(True)
