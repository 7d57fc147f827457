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
from flash_indexer.models.families import FAMILIES, config_value, find_decoder, layer_device
from flash_indexer.models.handle import IndexerHandle
from flash_indexer.models.hooks import ATTENTION, TAP, LayerTap, uncompiled
from flash_indexer.models.layers import DecoderLayers, by_reason, decoder_layers, spans
from flash_indexer.models.rope import check_rope, default_rope_dim, indexer_rotary, rope_parameters
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
) -> IndexerHandle:
    """Gives layers of a dense model fresh lightning indexers, each of which learns from its layer's own attention.

    MLA models with q-LoRA: wq_b reads the normed query residual, rope is the model's own (half-split, on
    qk_rope_head_dim dims, as in DeepSeek-V3.2). Elsewhere wq_b reads the hidden state and rope comes from the model's
    rope settings with rope_dim dims.

    Batches are packed: no padding; documents restart position_ids at 0, or are said by cu_seq_lens_q, seq_idx or a mask
    of document numbers (flash_indexer.models.documents). Windows, chunks, sinks and softcap are respected. The first
    forward compares every layer's mask and attention with the model's own (flash_indexer.models.verification). Call
    the model in eval() mode, under torch.no_grad(), in one thread at a time. Autocast may be on; torch.compile leaves
    the attention as it is.

    Args:
        model: a loaded causal language model. Its parameters stop requiring gradients until `remove()`.
        num_heads: I. head_dim: E. rope_dim: None means min(32, head_dim), for MLA qk_rope_head_dim, for
            longrope the most up to 32 that divide its dims.
        target: see `flash_indexer.indexer_kl`. layers: indices of the layers to attach; None means all whose
            attention can be a teacher and sees all keys, or where none sees all, all that can.
        parallel: how sequence and heads are shared out over processes. With cp > 1 the model is given this process's
            part of input_ids and position_ids (`context_positions` of the flattened batch); with tp > 1 it is sharded.
        index_dtype: "fp8" or "fp8_unrotated" trains the indexers in the arithmetic that they are served in, see
            `flash_indexer.indexer_kl`. teacher_dtype: "fp8" takes the teacher's probabilities from e4m3 queries and
            keys, with the logsumexp of these. Not with cp or tp.

    Raises:
        TypeError: the model is a wrapper around a Transformers model.
        ValueError: no layer's attention can be a teacher, or not that of the layers asked for; sizes that don't fit.
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
    decoder = find_decoder(model)
    config = model.config.get_text_config()
    found = decoder_layers(decoder, config)
    if any(TAP in module.__dict__ for _, module in found.callers):
        raise ValueError("attach: the model has indexers attached already; call remove() on their handle first")
    if any(hasattr(module, "indexer") for _, module in found.callers):
        raise ValueError(f"attach: {type(model).__name__} has indexers of its own; attach to the dense model")
    if not found.attentions:
        raise ValueError(
            f"attach: model must be one of the {FAMILIES}; got {type(model).__name__}, of whose layers none can be a "
            f"teacher ({by_reason(found.refused) or 'it has no list of layers with attention'})"
        )
    chosen = found.chosen(layers)
    check_rope(config, 1 if parallel is None else parallel.cp)
    _check_softcap(config, parallel or Parallel(), target)
    _check_whole_sequences(model, decoder, found, parallel or Parallel())
    kinds = getattr(config, "layer_types", None) or []
    ropes = {n: rope_parameters(config, kinds[n] if len(kinds) == found.number else None) for n in chosen}
    mla = {n for n in chosen if hasattr(found.attentions[n], "kv_b_proj")}
    if mla and len(mla) < len(chosen):
        raise ValueError(
            f"attach: layers must all have MLA or none of them, got MLA in {sorted(mla)} of {chosen} alone; attach to "
            "one kind with layers="
        )
    own_rope = bool(mla) and bool(getattr(config, "rope_parameters", None))
    rank = getattr(config, "q_lora_rank", None) if mla else None
    if mla:
        if rope_dim not in (None, config.qk_rope_head_dim):
            raise ValueError(f"attach: rope_dim must be qk_rope_head_dim = {config.qk_rope_head_dim}, got {rope_dim}")
        rope_dim = config.qk_rope_head_dim
    rope_dim = default_rope_dim(ropes[chosen[0]], head_dim) if rope_dim is None else rope_dim
    check_sizes("attach", rope_dim=rope_dim)
    if target not in ("mean", "per_head", "sum_logits"):
        raise ValueError(f'attach: target must be "mean", "per_head" or "sum_logits", got {target!r}')
    if target == "per_head" and parallel is not None and parallel.tp > 1:
        raise ValueError(f'attach: target="per_head" has no sum over heads to share out, got tp={parallel.tp}; use cp')
    if target == "per_head" and num_heads != (heads := config_value(config, "num_attention_heads")):
        raise ValueError(f'attach: target="per_head" needs num_heads = {heads}, the model\'s, got {num_heads}')
    _check_arithmetic(index_dtype, teacher_dtype, head_dim)
    indexers, taps = nn.ModuleDict(), dict[int, nn.Module | None]()
    for layer in chosen:
        device = layer_device(found.attentions[layer])
        indexers[str(layer)] = LightningIndexer(
            config.hidden_size, num_heads=num_heads, head_dim=head_dim, q_lora_rank=rank,
            rope_dim=rope_dim, rope_interleaved=False,
        ).to(device)  # fmt: skip
        taps[layer] = None if own_rope else indexer_rotary(config, ropes[layer], rope_dim).to(device)
    handle = IndexerHandle(
        model, indexers, target, parallel or Parallel(), found=found, index_dtype=index_dtype,
        teacher_dtype=teacher_dtype,
    )  # fmt: skip
    _install(handle, decoder, found, taps)
    return handle


def _check_whole_sequences(
    model: PreTrainedModel, decoder: nn.Module, found: DecoderLayers, parallel: Parallel
) -> None:
    """Context parallelism hands keys round in attention alone: a state or convolution would begin anew in each part."""
    convolves = any(isinstance(module, nn.Conv1d) for module in decoder.modules())
    if parallel.cp > 1 and (found.refused or convolves):
        mixed = f"layers {spans(list(found.refused))}" if found.refused else "convolutions"
        raise ValueError(
            f"attach: cp must be 1 for {type(model).__name__}, whose {mixed} mix tokens outside of attention, got "
            f"cp={parallel.cp}; share the model out by FSDP alone"
        )


def _check_softcap(config: Any, parallel: Parallel, target: str) -> None:
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is not None and parallel.cp * parallel.tp > 1:
        raise ValueError(
            f"attach: cp and tp must be 1 for attention with softcap, got cp={parallel.cp} and tp={parallel.tp} with "
            f"attn_logit_softcapping={softcap}; share the model out by FSDP alone"
        )
    if softcap is not None and target == "sum_logits":
        raise ValueError(
            f'attach: target must be "mean" or "per_head" for attention with softcap, got "sum_logits" with '
            f"attn_logit_softcapping={softcap}"
        )


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


def _install(handle: IndexerHandle, decoder: Any, found: DecoderLayers, rotaries: dict[int, nn.Module | None]) -> None:
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
    for layer, module in found.callers:
        attached = handle.attentions.get(layer) is module
        tap = LayerTap(handle.attend, layer, rotaries[layer] if attached else None)
        module.__dict__[TAP] = tap
        handle.undo_with(partial(module.__dict__.pop, TAP, None))
        if not attached:
            continue
        handle.undo_with(module.register_forward_pre_hook(uncompiled(tap.read_inputs), with_kwargs=True).remove)
        verify = uncompiled(partial(handle.verify, layer))
        handle.undo_with(module.register_forward_hook(verify, with_kwargs=True).remove)
        if isinstance(norm := getattr(module, "q_a_layernorm", None), nn.Module):
            handle.undo_with(norm.register_forward_hook(uncompiled(tap.read_residual)).remove)


def _thaw(module: nn.Module, name: str) -> None:
    """By name: offloading puts other parameter objects in the place of those that were frozen."""
    module.get_parameter(name).requires_grad_(True)
