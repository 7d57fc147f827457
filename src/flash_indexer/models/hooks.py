"""What Transformers calls in an attached model: the attention and mask functions, and the hooks of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from flash_indexer.models.families import FAMILIES

ATTENTION = "lightning_indexer_teacher"
"""The name of the registered functions. Transformers takes any name with "flash" in it for FlashAttention."""

TAP = "_flash_indexer"
"""Where an attention module of an attached decoder holds its LayerTap."""

_PACKED = "batches are packed, not padded or masked; concatenate documents and restart position_ids at 0 for each"


class LayerTap:
    """What the hooks of one layer have read in the forward under way.

    Args:
        attend: called with this tap, q [T, H, D], k [T, G, D], v [T, G, V], softmax scale and window in the place
            of the layer's attention; returns [T, H, V].
        layer: the layer's index.
        rotary: the indexer's own rotary embedding; None where it takes the cos and sin that the layer is given.
    """

    def __init__(
        self, attend: Callable[[LayerTap, Tensor, Tensor, Tensor, float, int | None], Tensor], layer: int,
        rotary: nn.Module | None,
    ) -> None:  # fmt: skip
        self.attend, self.layer, self.rotary = attend, layer, rotary
        self.hidden: Tensor | None = None
        self.q_residual: Tensor | None = None
        self.rope: tuple[Tensor, Tensor] | None = None

    def read_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the layer's self-attention: its hidden states, and cos and sin for the indexer."""
        self.hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if self.rotary is None:
            self.rope = kwargs["position_embeddings"]
            if not isinstance(self.rope, tuple) or len(self.rope) != 2:
                raise ValueError(f"attach: rope must come as (cos, sin), got {type(self.rope).__name__}; {FAMILIES}")
        else:
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = torch.arange(self.hidden.shape[1], device=self.hidden.device)[None]
            self.rope = self.rotary(self.hidden, positions)

    def read_residual(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """After MLA's norm of the low-rank query residual."""
        self.q_residual = output


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: query [B, H, L, D], key [B, G, L, D], value [B, G, L, V]."""
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attach: attention with {name} is not supported; attachable are {FAMILIES}")
    if kwargs.get("is_causal") is False:
        raise ValueError(f"attach: attention must be causal, got is_causal=False; attachable are {FAMILIES}")
    if attention_mask is not None:  # one of four dimensions, which no mask function saw
        raise ValueError(f"attach: attention_mask must be [B, L], got {list(attention_mask.shape)}; {_PACKED}")
    if dropout:
        raise ValueError(f"attach: attention dropout must be 0, got {dropout}; call model.eval()")
    B, _, L, _ = query.shape
    if key.shape[2] != L:
        raise ValueError(
            f"attach: a forward must see whole sequences, got {L} queries on {key.shape[2]} keys; "
            "pass use_cache=False, or remove() the indexers before generating"
        )
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    tap: LayerTap | None = module.__dict__.get(TAP)
    if tap is None:
        raise ValueError(f"attach: {type(module).__name__} is not of the attached decoder; attachable are {FAMILIES}")
    out = tap.attend(tap, q, k, v, scale, sliding_window)
    return torch.unflatten(out, 0, (B, L)), None


def no_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """The registered mask function: intervals take the mask's place, so a padded batch can't be represented."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(f"attach: attention_mask must be all ones or absent: {_PACKED}")


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, no_mask)
