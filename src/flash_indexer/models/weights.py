"""Reading a model's weights, all of them and nothing else.

Transformers fills what a checkpoint lacks with random numbers, drops what the model does not know, and takes numbers in
8 bits as they are where no quantiser is at work. A teacher made so is wrong without a word; here each is an error.
FP8 weights with scales are dequantised by us (flash_indexer.models.fp8_weights).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)

from flash_indexer.models.fp8_weights import dequantised_weights, is_fp8
from flash_indexer.models.shards import read_json, shards


def load_weights(directory: Path, dtype: torch.dtype, *, gguf_file: str | None = None) -> PreTrainedModel:
    """A causal language model from a folder, every weight of it as stored there, or from a GGUF file in it.

    Raises:
        ValueError: naming weights that are unreadable, missing, misshapen or left over, or a quantisation that can't be
            undone here.
    """
    quantised = read_json(directory / "config.json").get("quantization_config") if gguf_file is None else None
    try:
        if is_fp8(quantised):
            loaded = _load_fp8(directory, quantised, dtype)
        else:
            source: dict[str, Any] = (
                {"ignore_mismatched_sizes": True} if gguf_file is None else {"gguf_file": gguf_file}
            )
            loaded = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, local_files_only=True, output_loading_info=True, **source
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"load_model: the weights in {str(directory)!r} can't be read: {first_line(error)}") from error
    except Exception as error:  # of any type: the packages of quantisers have their own, and AssertionError, NameError
        if quantised is None or is_fp8(quantised):
            raise
        raise ValueError(
            f"load_model: the weights in {str(directory)!r} are quantised and can't be read here, got "
            f"quantization_config {_short(quantised)}: {type(error).__name__}: {first_line(error)}; install what it "
            "asks for, or use a checkpoint in bfloat16"
        ) from error
    model: PreTrainedModel = loaded[0]
    narrow = _narrow_weights(directory, model)
    if is_fp8(quantised):
        narrow = {name: stored for name, stored in narrow.items() if not stored.startswith("F8")}
    _check_keys(directory, model, loaded[1], narrow)
    return model


def restore_indexers(model: PreTrainedModel, directory: Path) -> None:
    """Gives a model's own indexers the values that are stored, where loading has rounded them to a narrower dtype."""
    parameters = {name: x for name, x in model.named_parameters() if ".self_attn.indexer." in name}
    for shard in shards(directory):
        with safe_open(shard, framework="pt") as file:
            for name in parameters.keys() & set(file.keys()):
                stored = file.get_tensor(name)
                if stored.dtype.itemsize > parameters[name].dtype.itemsize:
                    parameters[name].data = stored.to(parameters[name].device)


def _load_fp8(directory: Path, quantised: Any, dtype: torch.dtype) -> Any:
    """The model and what was loaded, dequantised here: Transformers' CPU code takes the blocks of a weight that they
    don't divide for smaller ones, and on a GPU the model would compute in FP8.
    """
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    del config.quantization_config
    weights = dequantised_weights(directory, quantised, dtype, _harmless_keys(config))
    if not weights:
        raise OSError(f"no model.safetensors and no index of shards in {directory}")
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    loaded = kind.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    if (directory / "generation_config.json").is_file():
        loaded[0].generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    return loaded


def _check_keys(directory: Path, model: PreTrainedModel, info: dict[str, Any], narrow: dict[str, str]) -> None:
    """Every weight of the model must come from the checkpoint, as it is stored, and none may be left over.

    narrow: names and stored dtypes of weights that were taken without their scales.
    """
    leftover = _harmless_keys(model.config)
    missing, mismatched = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
    unexpected = sorted(key for key in info["unexpected_keys"] if not leftover.search(key))
    remedy = "use the checkpoint that its config.json belongs to"
    if narrow:
        remedy = (
            f"{len(narrow)} are stored in 8 bits or fewer, first {' in '.join(next(iter(narrow.items())))}, and no "
            "quantization_config that Transformers acts on says how to scale them: put the checkpoint's own back into "
            "config.json, or save the weights dequantised to bfloat16"
        )
    if missing or mismatched or unexpected or narrow:
        raise ValueError(
            f"load_model: {str(directory)!r} must hold every weight of its config, got {len(missing)} missing, first "
            f"{missing[:3]}, {len(mismatched)} of another shape, first {mismatched[:3]}, and {len(unexpected)} "
            f"unexpected, first {unexpected[:3]}; {remedy}"
        )


def _harmless_keys(config: Any) -> re.Pattern[str]:
    """Keys beside those that Transformers knows to be harmless, which the dense model computes without.

    Indexers of DeepSeek-V3.2, where the model has none, and the layers behind the last that predict further tokens.
    """
    text = config.get_text_config()
    last, further = text.num_hidden_layers, getattr(text, "num_nextn_predict_layers", None) or 0
    layers = "|".join(str(n) for n in range(last, last + further)) or "(?!)"
    indexers = "(?!)" if hasattr(type(text), "index_n_heads") else r"\.self_attn\.indexer\."
    return re.compile(rf"{indexers}|(^|\.)layers\.({layers})\.")


def _narrow_weights(directory: Path, model: PreTrainedModel) -> dict[str, str]:
    """Names and stored dtypes of weights in 8 bits or fewer that were taken as they are: no quantiser was at work."""
    if getattr(model, "hf_quantizer", None) is not None:
        return {}
    own, narrow = {name for name, _ in model.named_parameters()}, {}
    for shard in shards(directory):
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a file of safetensors is no mapping)
                stored = file.get_slice(key).get_dtype()
                if stored.startswith(("F8", "F6", "F4")) or (stored in ("I8", "U8") and key in own):
                    narrow[key] = stored
    return narrow


def _short(value: object) -> str:
    return str(value) if len(str(value)) < 100 else f"{str(value)[:100]}..."


def first_line(error: Exception) -> str:
    """What an error says, without its traceback of causes."""
    return str(error).strip().partition("\n")[0]
