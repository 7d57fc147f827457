"""What Transformers calls in an attached model: the attention and mask functions, and the hooks of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from flash_indexer.indexer import no_autocast
from flash_indexer.models.capture import AttentionForm
from flash_indexer.models.documents import PACKED
from flash_indexer.models.families import FAMILIES, call_arguments
from flash_indexer.models.layer_mask import LayerMask, layer_mask
from flash_indexer.models.rope import Ropes
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


Attend = Callable[["LayerTap", Tensor, Tensor, Tensor, AttentionForm, "LayerMask | None"], Tensor]
"""What runs in the place of a layer's attention; LayerTap says with what."""


class LayerTap:
    """What the hooks of one layer have read in the forward under way.

    Args:
        attend: called with this tap, q [T, H, D], k [T, G, D], v [T, G, V], the attention's form and the layer's own
            mask in the place of the layer's attention; returns [T, H, V].
        layer: the layer's index.
        rotary: the indexer's own rotary embedding; None where it takes the cos and sin that the layer is given.
        ropes: what the layers' embeddings have made in the forward under way.
    """

    always = False
    """Whether it is installed in layers without an attached indexer too."""

    def __init__(self, attend: Attend, layer: int, rotary: nn.Module | None, ropes: Ropes) -> None:
        self.attend, self.layer, self.rotary, self.ropes = attend, layer, rotary, ropes
        self.hidden: Tensor | None = None
        self.q_residual: Tensor | None = None
        self.rope: tuple[Tensor, Tensor] | None = None

    def install(self, module: Any) -> list[Callable[[], object]]:
        """Adds the hooks of an attached layer to its self-attention; what takes each off again."""
        undo = [module.register_forward_pre_hook(uncompiled(self.read_inputs), with_kwargs=True).remove]
        if isinstance(norm := getattr(module, "q_a_layernorm", None), nn.Module):
            undo.append(norm.register_forward_hook(uncompiled(self.read_residual)).remove)
        return undo

    def operands(
        self, indexer: nn.Module, wide: Callable[[Tensor], Tensor], positions: Tensor, queries: Tensor | None
    ) -> Operands:
        """The indexer's operands, of what was read in this forward, which is let go; `wide` casts it."""
        made: Operands = indexer(*self.take_inputs(wide, positions), queries)
        return made

    def take_inputs(
        self, wide: Callable[[Tensor], Tensor], positions: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """hidden, q_residual, cos and sin, of T tokens each, at positions [B, L]; they are not kept."""
        if self.hidden is None:
            raise ValueError(
                f"attach: layer {self.layer} must call its attention function once in a forward, got a second call; "
                "leave the layer out"
            )
        lead = self.hidden.shape[:-1]
        hidden = wide(self.hidden.flatten(0, -2))
        residual = None if self.q_residual is None else wide(self.q_residual.flatten(0, -2))
        cos, sin = (x.expand(*lead, -1).flatten(0, -2) for x in self.angles(positions))
        self.forget()
        return hidden, residual, cos, sin

    def replay_arguments(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments with which the layer's attention module is run once more, to compare it with the teacher."""
        return inputs

    def read_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the layer's self-attention: its hidden states, and where they are the layer's own, cos and sin."""
        given = call_arguments(module, args, kwargs)
        self.hidden = given["hidden_states"] if "hidden_states" in given else next(iter(given.values()))
        if self.rotary is None:
            self.rope = _cos_and_sin(given.get("position_embeddings"))

    def read_residual(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """After MLA's norm of the low-rank query residual."""
        self.q_residual = output

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for the indexer: the layer's own, or those of positions [B, L]."""
        if self.rotary is None:
            assert self.rope is not None
            return self.rope
        assert self.hidden is not None
        return self.ropes.of(self.rotary, self.hidden, positions)

    def forget(self) -> None:
        """Lets go of what was read."""
        self.hidden = self.q_residual = self.rope = None


def _cos_and_sin(rope: Any) -> tuple[Tensor, Tensor]:
    """cos and sin [..., rope_dim] as cat(angles, angles): of a layer, or of its complex turns [..., rope_dim/2]."""
    if isinstance(rope, Tensor) and rope.is_complex():
        return torch.cat((rope.real, rope.real), -1), torch.cat((rope.imag, rope.imag), -1)
    if not isinstance(rope, tuple) or len(rope) != 2:
        raise ValueError(
            f"attach: rope must come as (cos, sin) or complex turns, got {type(rope).__name__}; attachable are "
            f"{FAMILIES}"
        )
    return rope


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | LayerMask | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: query [B, H, L, D], key [B, G, L, D], value [B, G, L, V]."""
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"attach: attention with position_bias is not supported; attachable are {FAMILIES}")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if causal is False and attention_mask is None:
        raise ValueError(
            f"attach: attention must be causal, got is_causal=False of {type(module).__name__}; attachable are "
            f"{FAMILIES}"
        )
    if isinstance(attention_mask, Tensor):  # which no mask function made
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
    tap: LayerTap | None = module.__dict__.get(TAP)
    if tap is None:
        raise ValueError(f"attach: {type(module).__name__} is not of the attached decoder; attachable are {FAMILIES}")
    window, chunk = sliding_window, None
    if window is None and attention_mask is not None:  # a layer may leave its window to its mask
        window, chunk = attention_mask.window, attention_mask.chunk
    form = AttentionForm(
        q.shape[-1] ** -0.5 if scaling is None else float(scaling), window, chunk,
        None if s_aux is None else s_aux.detach(), softcap,
    )  # fmt: skip
    with no_autocast(device):
        out = tap.attend(tap, q, k, v, form, attention_mask)
    return torch.unflatten(out, 0, (B, L)), None


AttentionInterface.register(ATTENTION, uncompiled(attention))
AttentionMaskInterface.register(ATTENTION, layer_mask)
