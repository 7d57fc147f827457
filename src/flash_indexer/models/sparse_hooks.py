"""What Transformers calls in a model that attends sparsely: the attention and mask functions, and a layer's tap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from flash_indexer.indexer import no_autocast
from flash_indexer.models.capture import AttentionForm
from flash_indexer.models.families import FAMILIES, given_cache
from flash_indexer.models.hooks import uncompiled
from flash_indexer.models.index_cache import prepare_layer
from flash_indexer.models.shared_indexers import Operands
from flash_indexer.models.sparse_forward import SparseForward

SPARSE_ATTENTION = "lightning_indexer_sparse"
"""The name of the registered functions."""

SPARSE_TAP = "_flash_indexer_sparse"
"""Where an attention module of a sparse decoder holds its SparseTap."""

FORWARD = "flash_indexer_forward"
"""The argument with which a SparseForward travels through the decoder's layers to the attention function."""

Attend = Callable[["SparseTap", SparseForward, Tensor, Tensor, Tensor, AttentionForm], Tensor]


class SparseTap:
    """One layer's place in a sparse decoder, and what its hooks have read in the forward under way.

    Args:
        attend: called with this tap, the forward, query [B, H, L, D], key, value and what else the attention is, in the
            place of the layer's attention; returns [B * L, H, V].
        layer: the layer's index. module: its attention. is_attached: whether it has an indexer.
        rotary: the indexer's own rotary embedding; None where it takes the cos and sin that the layer is given.
    """

    def __init__(
        self, attend: Attend, layer: int, module: nn.Module, *, is_attached: bool, rotary: nn.Module | None
    ) -> None:
        self.attend, self.layer, self.module, self.is_attached = attend, layer, module, is_attached
        self.rotary = rotary
        self.hidden: Tensor | None = None
        self.q_residual: Tensor | None = None
        self.rope: tuple[Tensor, Tensor] | None = None
        self.cache: Any = None

    def install(self) -> list[Callable[[], object]]:
        """Adds the hooks of an attached layer to its self-attention; what takes each off again."""
        reads = self.module.register_forward_pre_hook(uncompiled(self.read_inputs), with_kwargs=True)
        undo: list[Callable[[], object]] = [reads.remove]
        if isinstance(norm := getattr(self.module, "q_a_layernorm", None), nn.Module):
            undo.append(norm.register_forward_hook(uncompiled(self.read_residual)).remove)
        return undo

    def operands(self, indexer: nn.Module, wide: Callable[[Tensor], Tensor]) -> Operands:
        """The indexer's operands, of what was read in this forward."""
        made: Operands = indexer(*self.take(wide))
        return made

    def read_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the layer's self-attention, and so before it writes to its cache: hidden states, and cos and sin."""
        self.hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.cache = given_cache(kwargs)
        if self.cache is not None:
            prepare_layer(self.cache, self.layer)
        if self.rotary is None:
            self.rope = kwargs["position_embeddings"]
            if not isinstance(self.rope, tuple) or len(self.rope) != 2:
                raise ValueError(f"attach: rope must come as (cos, sin), got {type(self.rope).__name__}; {FAMILIES}")
            return
        positions, forward = kwargs.get("position_ids"), kwargs.get(FORWARD)
        if positions is not None and isinstance(forward, SparseForward):
            self.rope = forward.ropes.of(self.rotary, self.hidden, positions)
            return
        if positions is None:
            past = 0 if self.cache is None else int(self.cache.get_seq_length(self.layer))
            positions = torch.arange(past, past + self.hidden.shape[1], device=self.hidden.device)[None]
        self.rope = self.rotary(self.hidden, positions)

    def read_residual(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """After MLA's norm of the low-rank query residual."""
        self.q_residual = output

    def take(self, wide: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """hidden, q_residual, cos and sin of the B * L tokens, as the indexer takes them, cast by `wide`; not kept."""
        if self.hidden is None or self.rope is None:
            raise ValueError(
                f"attach: layer {self.layer} must call its attention function once in a forward, got a second call"
            )
        hidden, residual = wide(self.hidden.flatten(0, -2)), self.q_residual
        residual = None if residual is None else wide(residual.flatten(0, -2))
        cos, sin = (x.expand(*self.hidden.shape[:-1], -1).flatten(0, -2) for x in self.rope)
        self.hidden = self.q_residual = self.rope = None
        return hidden, residual, cos, sin


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
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: query [B, H, L, D], key [B, G, S, D], value [B, G, S, V], or latents."""
    tap: SparseTap | None = module.__dict__.get(SPARSE_TAP)
    forward = kwargs.get(FORWARD)
    if tap is None or not isinstance(forward, SparseForward):
        raise ValueError(f"attach: {type(module).__name__} is not of the attached decoder; attachable are {FAMILIES}")
    for name in ("softcap", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attach: sparse attention with {name} is not supported; leave topk out")
    if kwargs.get("is_causal") is False:
        raise ValueError(f"attach: attention must be causal, got is_causal=False; attachable are {FAMILIES}")
    if attention_mask is not None:
        raise ValueError(f"attach: attention_mask must be [B, L], got {list(attention_mask.shape)}")
    if dropout:
        raise ValueError(
            f"attach: attention dropout must be 0, got {dropout}; set attention_dropout to 0 or call eval()"
        )
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"attach: query, key and value must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}; load "
            "the model in one dtype, or call it under torch.autocast"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    with no_autocast(device):
        out = tap.attend(tap, forward, query, key, value, AttentionForm(scale, sliding_window, sinks=s_aux))
    return torch.unflatten(out, 0, (query.shape[0], query.shape[2])), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The registered mask function: SparseForward has read the mask."""


AttentionInterface.register(SPARSE_ATTENTION, uncompiled(attention))
AttentionMaskInterface.register(SPARSE_ATTENTION, _no_mask)
