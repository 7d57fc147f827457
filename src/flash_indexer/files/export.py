"""Trained indexers out of a handle: as a DeepSeek-V3.2 model for Transformers, or in the native format."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32RotaryEmbedding

from flash_indexer.files.atomic import atomic_directory
from flash_indexer.files.export_own import export_own
from flash_indexer.files.native import apart, check_replaceable, check_tensors, describe, save_native
from flash_indexer.files.native_config import NativeConfig, write_config
from flash_indexer.models.attach import IndexerHandle
from flash_indexer.models.load import without_bars
from flash_indexer.models.sparse import SparseHandle

EXPORT_FORMAT = "flash-indexer/deepseek_v32"
"""The format that indexer_config.json names in an exported model's folder."""

_SOURCES = ("deepseek_v3", "glm4_moe_lite", "youtu")
"""Model types whose layers are DeepSeek-V3.2's apart from the indexer; the tests compare their logits."""

_ROUTER_KEYS = ("moe_layer_freq", "scoring_func", "topk_method")
"""Keys of DeepSeek's own config.json that Transformers ignores and other inference engines read."""

_INDEXER = ".self_attn.indexer."

_MANY_TIES = 0.01
"""The share of queries with ties at the last rank from which the export warns."""


def export(
    handle: IndexerHandle,
    path: str | os.PathLike[str],
    *,
    format: Literal["deepseek_v32", "native", "own"] = "deepseek_v32",
    index_topk: int | None = None,
    base_name: str | None = None,
    base_fingerprint: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    tied_rows: float | None = None,
) -> Path:
    """Write what was trained to a directory, atomically, and return its path.

    "deepseek_v32": the whole model, which `AutoModelForCausalLM.from_pretrained(path)` loads as a
    DeepseekV32ForCausalLM: the base's weights in their dtype, the trained ones in theirs (float32) under
    `model.layers.N.self_attn.indexer.*`, and a config.json with the index sizes. With index_topk >= S its
    logits are the base's. The base must be an MLA model shaped like DeepSeek-V3, with q-LoRA, whole in this
    process, with an indexer on every layer.
    "native": the indexers alone, for any model (docs/format.md); `load_native` reads it.
    "own": the whole model of attach(indexers="own"), in its family's own form, the indexers in float32.

    Args:
        handle: what `attach` returned.
        path: the directory to write; see `atomic_directory`.
        format: as above.
        index_topk: keys that each query of a deepseek_v32 model attends to; None: the topk of a sparse handle, else
            2048. The others keep the model's, or have none.
        base_name: the base model's name, recorded; by default the one that it was loaded by.
        base_fingerprint: what `model_fingerprint` gave for the base, recorded.
        tokenizer: saved beside the exported model; not with "native".
        overwrite: replace an earlier checkpoint of ours at `path`. Other content is never replaced.
        max_shard_size: the largest weight file of an exported model, as in "5GB".
        tied_rows: the share of queries, from 0 to 1, whose score at rank index_topk equals the next one's, as
            `flash-indexer evaluate` counts them; above 0.01 the export warns. None: not counted, and one or two index
            heads warn, whose exact zeros tie most (docs/format.md).

    Raises:
        ValueError: the model or its indexers don't fit the format (the message says why, and what does), tied_rows
            is no share, a tensor holds NaN or infinity, or `path` may not be replaced.
        OSError: the disk is full; see `atomic_directory`.

    Source of the format: DeepSeek-V3.2, section 2.1, and its released checkpoints' names.
    """
    config = handle.model.config
    name = base_name or getattr(config, "_name_or_path", "") or config.model_type
    if format == "native":
        if tokenizer is not None:
            raise ValueError("export: tokenizer must be None for format 'native', which holds indexers alone")
        return save_native(handle, path, base_name=name, base_fingerprint=base_fingerprint, overwrite=overwrite)
    if format == "own":
        if index_topk is not None:
            raise ValueError(
                f"export: index_topk must be left out with format 'own', got {index_topk}; the model's config has it"
            )
        return export_own(
            handle, path, base_name=name, base_fingerprint=base_fingerprint, tokenizer=tokenizer, overwrite=overwrite,
            max_shard_size=max_shard_size,
        )  # fmt: skip
    if format != "deepseek_v32":
        raise ValueError(f"export: format must be 'deepseek_v32', 'native' or 'own', got {format!r}")

    if isinstance(handle, SparseHandle) and handle.always != (0, 0):
        raise ValueError(
            f"export: format 'deepseek_v32' selects by scores alone, always = (0, 0), got {handle.always}; use "
            "format='native'"
        )
    if index_topk is None:
        index_topk = handle.topk if isinstance(handle, SparseHandle) else 2048
    described = describe(handle, base_name=name, base_fingerprint=base_fingerprint)
    converted = deepseek_v32_config(handle, index_topk=index_topk)
    _warn_of_ties(described, index_topk, tied_rows)
    check_replaceable(path, overwrite=overwrite)
    model = _build(handle, converted, described)
    with atomic_directory(path) as folder, without_bars():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_config(folder, EXPORT_FORMAT, {**asdict(described), "index_topk": index_topk})
    return Path(path)


def deepseek_v32_config(handle: IndexerHandle, *, index_topk: int = 2048) -> DeepseekV32Config:
    """The config of the handle's model as DeepSeek-V3.2, with the index sizes of its indexers.

    Raises:
        ValueError: the model or its indexers can't be DeepSeek-V3.2's; the message says why.
    """
    base = handle.model.config
    _check_base(base, handle)
    indexers = describe(handle, base_name="")
    _check_indexers(indexers, base)
    if isinstance(index_topk, bool) or not isinstance(index_topk, int) or index_topk < 1:
        raise ValueError(f"export: index_topk must be a positive integer, got {index_topk!r}")

    kinds = ["sparse" if hasattr(layer.mlp, "experts") else "dense" for layer in handle.model.model.layers]
    dense = kinds.index("sparse") if "sparse" in kinds else len(kinds)
    names = {*_ROUTER_KEYS, *inspect.get_annotations(DeepseekV32Config)} - {"layer_types", "head_dim"}
    values: dict[str, Any] = {name: value for name, value in base.to_dict().items() if name in names}
    values |= {
        "index_topk": index_topk,
        "index_n_heads": indexers.num_heads,
        "index_head_dim": indexers.head_dim,
        "mlp_layer_types": kinds,
        "first_k_dense_replace": dense,
    }
    return DeepseekV32Config(**values)


def _warn_of_ties(described: NativeConfig, index_topk: int, tied_rows: float | None) -> None:
    """Where scores tie at the last rank, our evaluation keeps the earlier key, Transformers whichever topk takes."""
    if tied_rows is not None and not 0 <= tied_rows <= 1:
        raise ValueError(
            f"export: tied_rows must be a share of the queries from 0 to 1, got {tied_rows!r}; divide by them"
        )
    if tied_rows is None and described.num_heads <= 2:
        share = f"the ties of {described.num_heads} index head{'s' * (described.num_heads == 2)} were not counted"
    elif tied_rows is not None and tied_rows > _MANY_TIES:
        share = f"{tied_rows:.1%} of the queries have equal scores at rank {index_topk} and behind it"
    else:
        return
    warnings.warn(
        f"export: {share}: of keys with equal scores Transformers' indexer attends to whichever torch.topk takes, "
        "which depends on the row's length, so that the exported model can select other keys than evaluate did, and "
        "change earlier logits when tokens are appended; train with 8 index heads or more (docs/format.md)",
        stacklevel=3,
    )


def _check_base(base: Any, handle: IndexerHandle) -> None:
    use_native = "use format='native'"
    if handle.trains_own:
        raise ValueError(
            "export: format 'deepseek_v32' is made of a dense model and fresh indexers, got a model whose own indexers "
            "were trained; use format='own'"
        )
    if getattr(base, "q_lora_rank", None) is None:
        raise ValueError(
            "export: format 'deepseek_v32' needs a model with q_lora_rank, because DeepSeek-V3.2's indexer "
            "reads the low-rank query residual of MLA; got a model of type "
            f"{base.model_type!r} without one; {use_native}"
        )
    if base.model_type not in _SOURCES or not hasattr(handle.model, "lm_head"):
        raise ValueError(
            f"export: format 'deepseek_v32' needs a causal language model of type {', '.join(_SOURCES)}, "
            f"whose layers compute what DeepSeek-V3.2's do; got {type(handle.model).__name__} of type "
            f"{base.model_type!r}; {use_native}"
        )
    if not base.rope_interleave:
        raise ValueError(
            "export: format 'deepseek_v32' needs rope_interleave=True, the rope layout of DeepSeek-V3.2's "
            f"main attention, got {base.rope_interleave!r}; {use_native}"
        )
    every = range(base.num_hidden_layers)
    if missing := [n for n in every if n not in handle.layers]:
        raise ValueError(
            f"export: format 'deepseek_v32' needs an indexer on each of the {len(every)} layers, missing on "
            f"{missing}; attach and train with layers=None, or {use_native}"
        )


def _check_indexers(indexers: NativeConfig, base: Any) -> None:
    wanted = {
        "rope_interleaved": (False, "its indexer turns the dims half-split"),
        "rope_dim": (base.qk_rope_head_dim, "its indexer shares the main attention's cos and sin"),
        "q_lora_rank": (base.q_lora_rank, "its wq_b reads the low-rank query residual"),
    }
    for name, (value, why) in wanted.items():
        if getattr(indexers, name) != value:
            raise ValueError(
                f"export: format 'deepseek_v32' needs indexers with {name} = {value!r} ({why}), "
                f"got {getattr(indexers, name)!r}; use format='native'"
            )


def _build(handle: IndexerHandle, config: DeepseekV32Config, described: NativeConfig) -> DeepseekV32ForCausalLM:
    """A DeepseekV32ForCausalLM that shares the base's and the indexers' tensors: nothing is copied."""
    source = handle.model
    trained = {key: tensor.detach() for key, tensor in handle.state_dict().items()}
    check_tensors(trained, described, where="export: the handle")
    state_dict = {key: tensor for key, tensor in source.state_dict().items() if _INDEXER not in key}
    for key, tensor in state_dict.items():
        _check_tensor(key, tensor)
    state_dict.update(apart(trained))

    with torch.device("meta"):
        model = DeepseekV32ForCausalLM(config)
    _check_same_attention(source, model)
    expected = model.state_dict()
    differing = sorted(
        key
        for key in expected.keys() | state_dict.keys()
        if key not in expected or key not in state_dict or expected[key].shape != state_dict[key].shape
    )
    if differing:
        raise ValueError(
            f"export: {len(differing)} tensors are not in the model and DeepSeek-V3.2 with one shape, "
            f"first {differing[0]}; use format='native'"
        )
    model.load_state_dict(state_dict, assign=True)
    model.generation_config = copy.deepcopy(source.generation_config)
    return model


def _check_tensor(key: str, tensor: Tensor) -> None:
    if tensor.is_meta or isinstance(tensor, DTensor):
        raise ValueError(f"export: {key} is offloaded or sharded; load the base model whole, as with device_map='cpu'")
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"export: {key} must be bfloat16, float16 or float32, got {tensor.dtype}; load it dequantized")


def _check_same_attention(source: PreTrainedModel, model: DeepseekV32ForCausalLM) -> None:
    """Rope frequencies and softmax scale follow from the config: the converted one must give the base's."""
    ours, theirs = source.model.rotary_emb, DeepseekV32RotaryEmbedding(model.config)
    same_rope = (
        torch.equal(ours.original_inv_freq.cpu(), theirs.original_inv_freq)
        and ours.attention_scaling == theirs.attention_scaling
    )
    scales = zip(source.model.layers, model.model.layers, strict=True)
    if not same_rope or any(a.self_attn.scaling != b.self_attn.scaling for a, b in scales):
        raise ValueError(
            "export: the model's rope frequencies or softmax scale differ from what its config gives "
            f"DeepSeek-V3.2 (rope_parameters {source.config.rope_parameters}); use format='native'"
        )
