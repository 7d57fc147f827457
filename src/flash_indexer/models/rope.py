"""The rope of the indexers, from the rope settings of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

ROPE_THETA = 10000.0
"""The base of the indexer's rope in a model that has no rope: Transformers' default."""
_OF_THE_MODEL_ALONE = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")


def rope_parameters(config: Any, layer_type: str | None = None) -> dict[str, Any]:
    """The rope settings of a layer: the model's, its type's where types have their own, or the default ones.

    A type of layers without rope gets the settings of another type.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    each = {name: value for name, value in parameters.items() if isinstance(value, Mapping)}
    if each or (parameters and all(value is None for value in parameters.values())):
        parameters = parameters.get(layer_type) or next(iter(each.values()), {})
    kept = {name: value for name, value in parameters.items() if name not in _OF_THE_MODEL_ALONE}
    if kept.get("rope_type") == "proportional":  # which turns a part of the dims: the indexer's rope_dim are that
        kept = dict(rope_type="default", rope_theta=kept["rope_theta"])
    return dict(rope_type="default", rope_theta=ROPE_THETA) | kept


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


def default_rope_dim(parameters: Mapping[str, Any], head_dim: int) -> int:
    """min(32, head_dim); for longrope the most dims up to that which `indexer_rotary` can give."""
    most = min(32, head_dim)
    return max((dim for dim in _longrope_dims(parameters) or [most] if dim <= most), default=most)


def _longrope_dims(parameters: Mapping[str, Any]) -> list[int]:
    """The rope_dim whose frequencies are some of a longrope model's own, ascending; [] for other ropes."""
    if parameters.get("rope_type") != "longrope":
        return []
    count = len(parameters["short_factor"])
    return [2 * n for n in range(1, count + 1) if count % n == 0]


def indexer_rotary(config: Any, parameters: Mapping[str, Any], rope_dim: int) -> nn.Module:
    """A rotary embedding of rope_dim dims with a model's rope settings; cos and sin are cat(angles, angles).

    Pair n of N turns with the model's base frequency of pair n·M/N of M. Longrope has a factor for each of its M pairs;
    where N divides M, the resized rope takes those of the pairs that it has.
    """
    possible = _longrope_dims(parameters)
    if possible and rope_dim not in possible:
        raise ValueError(
            f"attach: rope_dim must be one whose pairs the model's longrope has factors for, got {rope_dim}; possible "
            f"here: {possible}"
        )
    resized = dict(parameters)
    if possible:
        for name in ("short_factor", "long_factor"):
            resized[name] = resized[name][:: 2 * len(resized[name]) // rope_dim]
    longest = getattr(config, "max_position_embeddings", None) or LlamaConfig.max_position_embeddings
    sizes: dict[str, Any] = dict(hidden_size=rope_dim, num_attention_heads=1, head_dim=rope_dim)
    return LlamaRotaryEmbedding(LlamaConfig(max_position_embeddings=longest, rope_parameters=resized, **sizes))


class Ropes:
    """cos and sin of rotary embeddings in one forward, made once for the layers that share embedding and positions."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], tuple[Tensor, tuple[Tensor, Tensor]]] = {}

    def of(self, rotary: nn.Module, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """At positions [B, L], in hidden's dtype and on its device."""
        key = rotary, id(positions), hidden.dtype, hidden.device
        if key not in self._made:  # the positions are kept too: an id is another's when they go
            self._made[key] = positions, rotary(hidden, positions.to(hidden.device))
        return self._made[key][1]

    def forget(self) -> None:
        """At a forward's end."""
        self._made.clear()


class IndexerRotaries:
    """`indexer_rotary` of a model's layers: the same one for all of the same settings on a device.

    A forward then asks it once (`Ropes`), not once a layer.
    """

    def __init__(self, config: Any, rope_dim: int) -> None:
        self.config, self.rope_dim = config, rope_dim
        self.made: list[tuple[Mapping[str, Any], torch.device, nn.Module]] = []

    def of(self, parameters: Mapping[str, Any], device: torch.device) -> nn.Module:
        """Of a layer with these rope settings."""
        for settings, place, rotary in self.made:
            if (settings, place) == (parameters, device):
                return rotary
        made = indexer_rotary(self.config, parameters, self.rope_dim).to(device)
        self.made.append((parameters, device, made))
        return made
