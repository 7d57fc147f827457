"""Which models can be attached, and what is read off their structure."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

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


def resized_rotary(decoder: Any, config: Any, rope_dim: int) -> nn.Module:
    """The model's rotary embedding with rope_dim dims."""
    resized = copy.deepcopy(config)
    resized.head_dim = rope_dim
    parameters = resized.rope_parameters
    if "rope_type" not in parameters:
        raise ValueError(f"attach: one rope for all layers is needed, got rope_parameters={parameters}")
    parameters.pop("partial_rotary_factor", None)
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
