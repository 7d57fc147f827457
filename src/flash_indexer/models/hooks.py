"""What Transformers calls in an attached model: the attention and mask functions, and the hooks of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from flash_indexer.indexer import no_autocast
from flash_indexer.models.documents import PACKED
from flash_indexer.models.families import FAMILIES
from flash_indexer.models.shared_indexers import Operands

ATTENTION = "lightning_indexer_teacher"
"""The name of the registered functions. Transformers takes any name with "flash" in it for FlashAttention."""

TAP = "_flash_indexer"
"""Where an attention module of an attached decoder holds its LayerTap."""


_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(function: _Function) -> _Function:
    """`function`, at which torch.compile breaks the graph: what it reads and adds up, a graph would not see."""
    disabled: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


Attend = Callable[["LayerTap", Tensor, Tensor, Tensor, float, int | None], Tensor]
"""What runs in the place of a layer's attention; LayerTap says with what."""


class LayerTap:
    """What the hooks of one layer have read in the forward under way.

    Args:
        attend: called with this tap, q [T, H, D], k [T, G, D], v [T, G, V], softmax scale and window in the place
            of the layer's attention; returns [T, H, V].
        layer: the layer's index.
        rotary: the indexer's own rotary embedding; None where it takes the cos and sin that the layer is given.
    """

    always = False
    """Whether it is installed in layers without an attached indexer too."""

    def __init__(self, attend: Attend, layer: int, rotary: nn.Module | None) -> None:
        self.attend, self.layer, self.rotary = attend, layer, rotary
        self.hidden: Tensor | None = None
        self.q_residual: Tensor | None = None
        self.rope: tuple[Tensor, Tensor] | None = None

    def install(self, module: Any) -> list[Callable[[], object]]:
        """Adds the hooks of an attached layer to its self-attention; what takes each off again."""
        undo = [module.register_forward_pre_hook(uncompiled(self.read_inputs), with_kwargs=True).remove]
        if getattr(module, "q_a_layernorm", None) is not None:
            undo.append(module.q_a_layernorm.register_forward_hook(uncompiled(self.read_residual)).remove)
        return undo

    def operands(self, indexer: nn.Module, wide: Callable[[Tensor], Tensor], queries: Tensor | None) -> Operands:
        """The indexer's operands, of what was read in this forward, which is let go; `wide` casts it."""
        made: Operands = indexer(*self.take_inputs(wide), queries)
        return made

    def take_inputs(self, wide: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """hidden, q_residual, cos and sin, of T tokens each; they are not kept."""
        assert self.hidden is not None and self.rope is not None
        lead = self.hidden.shape[:-1]
        hidden = wide(self.hidden.flatten(0, -2))
        residual = None if self.q_residual is None else wide(self.q_residual.flatten(0, -2))
        cos, sin = (x.expand(*lead, -1).flatten(0, -2) for x in self.rope)
        self.hidden = self.q_residual = self.rope = None
        return hidden, residual, cos, sin

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
        raise ValueError(f"attach: attention_mask must be [B, L], got {list(attention_mask.shape)}; {PACKED}")
    if dropout:
        raise ValueError(f"attach: attention dropout must be 0, got {dropout}; call model.eval()")
    if query.requires_grad or key.requires_grad or value.requires_grad:
        raise ValueError(
            f"attach: query, key and value of {type(module).__name__} must not require grad, since the main model is "
            "frozen; got one that does (by gradient checkpointing or inputs that require grad): call the model under "
            "torch.no_grad()"
        )
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"attach: query, key and value must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}; load "
            "the model in one dtype, or call it under torch.autocast"
        )
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
    with no_autocast(device):
        out = tap.attend(tap, q, k, v, scale, sliding_window)
    return torch.unflatten(out, 0, (B, L)), None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The registered mask function: intervals take the mask's place; `document_positions` has read it."""


AttentionInterface.register(ATTENTION, uncompiled(attention))
AttentionMaskInterface.register(ATTENTION, no_mask)
