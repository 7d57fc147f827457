"""Attaches lightning indexers to a loaded Transformers model.

The model's attention is replaced by a registered attention function that computes the same output and the logsumexp.
While it runs, each attached layer's queries, keys and index operands are handed to a consumer: by default the warm-up
loss, whose backward runs at once, inside the forward, so that one layer's scores live at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flash_indexer.indexer import LightningIndexer, check_sizes
from flash_indexer.models.capture import LayerCapture
from flash_indexer.models.families import FAMILIES, find_decoder, layer_device
from flash_indexer.models.handle import IndexerHandle
from flash_indexer.models.hooks import ATTENTION, TAP, LayerTap
from flash_indexer.models.install import install
from flash_indexer.models.layers import DecoderLayers, by_reason, decoder_layers, spans
from flash_indexer.models.options import check_arithmetic, check_target
from flash_indexer.models.own_attach import OwnOptions, attach_own
from flash_indexer.models.own_indexers import has_own_indexers
from flash_indexer.models.own_sparse import own_sparse_handle
from flash_indexer.models.rope import IndexerRotaries, check_rope, default_rope_dim, rope_parameters
from flash_indexer.models.sparse import sparse_handle
from flash_indexer.models.sparse_checks import check_topk
from flash_indexer.models.sparse_hooks import SPARSE_TAP
from flash_indexer.models.wrappers import unwrapped
from flash_indexer.parallel.mesh import Parallel

__all__ = ["IndexerHandle", "LayerCapture", "attach"]


def attach(
    model: nn.Module,
    *,
    num_heads: int = 8,
    head_dim: int = 64,
    rope_dim: int | None = None,
    target: str = "mean",
    layers: Sequence[int] | None = None,
    parallel: Parallel | None = None,
    index_dtype: str | None = None,
    teacher_dtype: str | None = None,
    indexers: str = "fresh",
    teachers: str = "shared",
    topk: int | None = None,
) -> IndexerHandle:
    """Gives layers of a dense model fresh lightning indexers, each of which learns from its layer's own attention.

    With indexers="own" those that the model itself has (DeepSeek-V3.2, GLM-MoE-DSA, A.X-K2, Hy4, Mistral Large 4, Dots
    3 Note) are trained in place: `handle.indexers` holds the model's parameters, in float32 at least while attached;
    attention runs dense, as the teacher. What `save_pretrained` writes is a model of the same family; `remove()` rounds
    the parameters to the model's dtype, so save before it, or with `export`, where that is bfloat16.

    MLA models with q-LoRA: wq_b reads the normed query residual, rope is the model's own (half-split, on
    qk_rope_head_dim dims, as in DeepSeek-V3.2). Elsewhere wq_b reads the hidden state and rope comes from the model's
    rope settings with rope_dim dims.

    Batches are packed: no padding; documents restart position_ids at 0, or are said by cu_seq_lens_q, seq_idx or a mask
    of document numbers (flash_indexer.models.documents). Windows, chunks, sinks and softcap are respected. The first
    forward compares every layer's mask and attention with the model's own (flash_indexer.models.verification). Call
    the model in eval() mode, under torch.no_grad(), in one thread at a time. Autocast may be on; torch.compile leaves
    the attention as it is.

    Args:
        model: a loaded causal language model, which may be inside a PeftModel or torch.compile. Its parameters stop
            requiring gradients until `remove()`.
        num_heads: I. head_dim: E. rope_dim: None means min(32, head_dim), for MLA qk_rope_head_dim, for
            longrope the most up to 32 that divide its dims.
        target: see `flash_indexer.indexer_kl`. layers: indices of the layers to attach; None means all whose
            attention can be a teacher and sees all keys, or where none sees all, all that can.
        parallel: how sequence and heads are shared out over processes. With cp > 1 the model is given this process's
            part of input_ids and position_ids (`context_positions` of the flattened batch); with tp > 1 it is sharded,
            but with topk, where it is whole and the layers share attention's heads out.
        index_dtype: "fp8" or "fp8_unrotated" trains the indexers in the arithmetic that they are served in, see
            `flash_indexer.indexer_kl`. teacher_dtype: "fp8" takes the teacher's probabilities from queries and keys
            that are rotated and rounded to e4m3, with the logsumexp of these; "fp8_unrotated" from rounded ones.
        indexers: "fresh" or "own"; own ones have the sizes and the rope of the model's family.
        teachers: where one layer's own indexer serves the next ones too, "shared": it learns from all of them, the loss
            being the mean of their KLs; "own": from its own layer alone.
        topk: the layers attend to so many keys, those that their indexers rank highest, and the model may train: see
            `flash_indexer.models.sparse.sparse_handle`, whose SparseHandle is returned, and for a model's own indexers
            `flash_indexer.models.own_sparse.own_sparse_handle`. None: they stay dense.

    Raises:
        TypeError: the model is another wrapper around a Transformers model.
        ValueError: no layer's attention can be a teacher, or not that of the layers asked for; sizes that don't fit.
    """
    model = unwrapped(model)
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "attach: must be called outside of torch.inference_mode(), inside which no parameter can train; use "
            "torch.no_grad()"
        )
    check_sizes("attach", num_heads=num_heads, head_dim=head_dim)
    if indexers not in ("fresh", "own"):
        raise ValueError(f'attach: indexers must be "fresh" or "own", got {indexers!r}')
    if topk is not None:
        check_topk("attach", topk)
        if index_dtype is not None or teacher_dtype is not None:
            raise ValueError(
                "attach: with topk, index_dtype and teacher_dtype must be None, since the sparse stage trains in the "
                f"model's dtype, got {index_dtype!r} and {teacher_dtype!r}; leave them out"
            )
    decoder = find_decoder(model)
    config = model.config.get_text_config()
    found = decoder_layers(decoder, config)
    if any({TAP, SPARSE_TAP} & module.__dict__.keys() for _, module in found.callers):
        raise ValueError("attach: the model has indexers attached already; call remove() on their handle first")
    if indexers == "own":
        options = OwnOptions(num_heads, head_dim, rope_dim, layers, target, teachers, index_dtype, teacher_dtype)
        own = attach_own(model, found, options, parallel or Parallel())
        return own if topk is None else own_sparse_handle(own, topk)
    if has_own_indexers(found):
        raise ValueError(
            f'attach: {type(model).__name__} has indexers of its own; train these with indexers="own", or attach to '
            "the dense model"
        )
    if teachers != "shared":
        raise ValueError(f'attach: teachers must be left out with indexers="fresh", got {teachers!r}')
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
    check_target(target, num_heads, config, parallel)
    check_arithmetic(index_dtype, teacher_dtype, head_dim)
    modules, rotaries, shared = nn.ModuleDict(), dict[int, nn.Module | None](), IndexerRotaries(config, rope_dim)
    for layer in chosen:
        device = layer_device(found.attentions[layer])
        modules[str(layer)] = LightningIndexer(
            config.hidden_size, num_heads=num_heads, head_dim=head_dim, q_lora_rank=rank,
            rope_dim=rope_dim, rope_interleaved=False,
        ).to(device)  # fmt: skip
        rotaries[layer] = None if own_rope else shared.of(ropes[layer], device)
    handle = IndexerHandle(
        model, modules, target, parallel or Parallel(), found=found, index_dtype=index_dtype,
        teacher_dtype=teacher_dtype,
    )  # fmt: skip

    def tap(layer: int, module: nn.Module) -> LayerTap:
        return LayerTap(handle.attend, layer, rotaries.get(layer), handle.ropes)

    install(handle, found, tap, ATTENTION)
    return handle if topk is None else sparse_handle(handle, topk)


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
