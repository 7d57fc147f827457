"""Which models can be attached, and what is read off their structure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

FAMILIES = "decoders with causal softmax attention that Transformers looks up by name: see docs/models.md"


def find_decoder(model: PreTrainedModel) -> Any:
    """The model that runs the decoder's layers on tokens; None where there is none."""
    untyped: Any = model
    named = untyped.get_decoder() if hasattr(model, "get_decoder") else None
    if isinstance(named, PreTrainedModel) and any(isinstance(child, nn.ModuleList) for child in named.children()):
        return named
    config = model.config.get_text_config()
    inner = [x for x in model.modules() if isinstance(x, PreTrainedModel) and x.config is config]
    return inner[-1] if inner else None


def config_value(config: Any, name: str) -> Any:
    """A value of a config, None where it has none; of one with a value for each layer, the list of them."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # Transformers' refusal to read one value of several
        layers = config.per_layer_config
        return [getattr(layers[n], name, None) for n in range(config.num_hidden_layers)]


CACHES = ("cache", "past_key_values", "past_key_value", "layer_past", "cache_params")
"""The arguments that may hold a cache: `cache` since Transformers 5.24, `past_key_values` before."""


def given_cache(inputs: Mapping[str, Any]) -> Any:
    """The cache of keys and values among the arguments of a decoder or a layer; None without one."""
    return next((inputs[name] for name in CACHES[:2] if inputs.get(name) is not None), None)


def has_head_projections(module: object) -> bool:
    """Whether a layer's self-attention has projections whose outputs are heads, by the names of GQA/MHA or MLA."""
    return isinstance(module, nn.Module) and (
        all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj", "scaling"))
        or all(hasattr(module, name) for name in ("kv_b_proj", "scaling"))
    )


def parameter_names(module: nn.Module) -> list[str]:
    """The names of the parameters of a module's forward."""
    return _parameter_names(type(module).forward)


@cache
def _parameter_names(forward: Callable[..., Any]) -> list[str]:
    """Looked up once for a function, as every layer of every step asks; without self."""
    return list(inspect.signature(forward).parameters)[1:]


def call_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module, by name, however they were passed."""
    return dict(zip(parameter_names(module), args, strict=False)) | dict(kwargs)


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
    if any(module.training and not isinstance(module, nn.modules.dropout._DropoutNd) for module in decoder.modules()):
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
