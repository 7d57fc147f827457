"""Which models can be attached, and what is read off their structure."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

FAMILIES = "decoders whose layers have self_attn with q/k/v projections (Llama, Qwen2/3, Mistral) or MLA (DeepSeek-V3)"


def find_decoder(model: PreTrainedModel) -> Any:
    """The module that holds the decoder layers; None where the model names none."""
    untyped: Any = model
    return untyped.get_decoder() if hasattr(model, "get_decoder") else None


def is_attachable(module: object) -> bool:
    """Whether a layer's self-attention is of a family that attach knows: GQA/MHA or MLA."""
    return isinstance(module, nn.Module) and (
        all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj", "scaling"))
        or all(hasattr(module, name) for name in ("kv_b_proj", "scaling"))
    )


def check_rope(config: Any, cp: int) -> None:
    """Raises ValueError where rope's frequencies depend on the positions that a process sees, and it sees only a part.

    Source: `dynamic_rope_update` in transformers.modeling_rope_utils: "dynamic" and "longrope" read max(position_ids).
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters.get("rope_type"), *(x.get("rope_type") for x in parameters.values() if isinstance(x, dict))]
    for kind in kinds:
        if cp > 1 and kind is not None and ("dynamic" in kind or kind == "longrope"):
            raise ValueError(
                f"attach: rope_type must be one whose frequencies are the same for all positions with cp={cp}, got "
                f'"{kind}", which reads the longest position of each process\'s part; use cp=1'
            )


def call_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module, by name, however they were passed."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def check_call(decoder: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raises ValueError for a call that can't give the frozen model's outputs: dropout is on, or attentions are wanted.

    Dropout that is a function and no module shows in the config alone; attention's own the attention function sees.
    """
    if inputs.get("output_attentions", getattr(decoder.config, "output_attentions", False)):
        raise ValueError(
            "attach: output_attentions must be False while indexers are attached, got True: no attention "
            "weights are formed; remove() the indexers first, or read captures by handle.using(...)"
        )
    if not any(module.training for module in decoder.modules()):
        return
    rates = {
        f"{name}.p": module.p
        for name, module in decoder.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training
    }
    if decoder.training:
        config: Any = decoder.config
        rates |= {name: value for name, value in config.to_dict().items() if _names_noise(name)}
    for name, rate in rates.items():
        if isinstance(rate, int | float) and rate > 0:
            raise ValueError(f"attach: dropout must be off in the frozen model, got {name} = {rate}; call model.eval()")


def _names_noise(name: str) -> bool:
    """Whether a config's key is a rate of dropout in the decoder's layers."""
    words = ("dropout", "pdrop", "layerdrop", "jitter")
    return any(word in name for word in words) and not name.startswith(("attention", "classifier"))


def layer_device(module: nn.Module) -> torch.device:
    """Where a layer's weights are when it computes; of offloaded weights, where accelerate's hooks will put them.

    Raises:
        ValueError: weights on the meta device, which nothing will fill.
    """
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for single in getattr(hook, "hooks", (hook,)):
            if (place := getattr(single, "execution_device", None)) is not None:
                return torch.device(place)
    raise ValueError(
        "attach: the model's weights must have values, got parameters on the meta device; load them with "
        "from_pretrained, or give accelerate's offloading an execution_device"
    )


def default_rope_dim(config: Any, head_dim: int) -> int:
    """min(32, head_dim); for longrope the most dims up to that which `resized_rotary` can give."""
    most = min(32, head_dim)
    return max((dim for dim in _longrope_dims(config) or [most] if dim <= most), default=most)


def _longrope_dims(config: Any) -> list[int]:
    """The rope_dim whose frequencies are some of a longrope model's own, ascending; [] for other ropes."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != "longrope":
        return []
    count = len(parameters["short_factor"])
    return [2 * n for n in range(1, count + 1) if count % n == 0]


def resized_rotary(decoder: Any, config: Any, rope_dim: int) -> nn.Module:
    """The model's rotary embedding with rope_dim dims.

    Pair n of N turns with the model's base frequency of pair n·M/N of M. Longrope has a factor for each of its M pairs;
    where N divides M, the resized rope takes those of the pairs that it has.
    """
    possible = _longrope_dims(config)
    if possible and rope_dim not in possible:
        raise ValueError(
            f"attach: rope_dim must be one whose pairs the model's longrope has factors for, got {rope_dim}; possible "
            f"here: {possible}"
        )
    resized = copy.deepcopy(config)
    resized.head_dim = rope_dim
    parameters = resized.rope_parameters
    if "rope_type" not in parameters:
        raise ValueError(f"attach: one rope for all layers is needed, got rope_parameters={parameters}")
    parameters.pop("partial_rotary_factor", None)
    if possible:
        for name in ("short_factor", "long_factor"):
            parameters[name] = parameters[name][:: 2 * len(parameters[name]) // rope_dim]
    rotary: nn.Module = type(decoder.rotary_emb)(resized)
    return rotary


def chosen_layers(layers: Sequence[int] | None, count: int) -> list[int]:
    """The indices of the layers to attach, ascending; None means all `count`."""
    try:
        chosen = sorted({int(operator.index(layer)) for layer in (range(count) if layers is None else layers)})
    except TypeError:
        raise TypeError(f"attach: layers must be a sequence of layer indices, got {layers!r}") from None
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise ValueError(f"attach: layers must be indices below {count}, got {chosen}")
    return chosen
