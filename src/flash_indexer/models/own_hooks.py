"""A model's own indexers while they train: what Transformers calls in their place, and in its attention's.

The model's own indexer scores all pairs at once and selects keys. While it is attached, a function stands in its place
that notes what the indexer was called with and selects nothing; attention then runs dense, which is the teacher.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from flash_indexer.models.hooks import Attend, LayerTap, attention, uncompiled
from flash_indexer.models.own_indexers import own_indexer
from flash_indexer.models.shared_indexers import Operands

OWN_ATTENTION = "lightning_indexer_own_teacher"
"""The name of the registered functions for models with indexers of their own."""


class OwnTap(LayerTap):
    """What one layer's own indexer was called with in the forward under way.

    Args:
        attend, layer: as LayerTap's. trains: False for a layer whose indexer is left as it is: nothing is noted.
    """

    always = True

    def __init__(self, attend: Attend, layer: int, trains: bool) -> None:
        super().__init__(attend, layer, None)
        self.trains = trains
        self.positions: Tensor | None = None

    def install(self, module: Any) -> list[Callable[[], object]]:
        """Stands in for the layer's indexer, where it has one; what puts the indexer back."""
        own = own_indexer(module)
        if own is None:
            return []
        before = own.__dict__.get("forward")
        own.__dict__["forward"] = uncompiled(partial(self.read_call, inspect.signature(type(own).forward)))

        def put_back() -> None:
            del own.__dict__["forward"]
            if before is not None:
                own.__dict__["forward"] = before

        return [put_back]

    def read_call(self, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Tensor:
        """In the place of the indexer's forward: notes its inputs, and selects no keys, int32 [B, L, 0]."""
        inputs = signature.bind(None, *args, **kwargs).arguments
        hidden: Tensor = inputs["hidden_states"]
        if self.trains:
            self.hidden, self.rope = hidden, inputs["position_embeddings"]
            self.q_residual, self.positions = inputs.get("q_resid"), inputs.get("position_ids")
        return hidden.new_empty((*hidden.shape[:-1], 0), dtype=torch.int32)

    def operands(self, indexer: nn.Module, wide: Callable[[Tensor], Tensor], queries: Tensor | None) -> Operands:
        """The operands of the model's own scores."""
        assert self.hidden is not None
        positions = None if self.positions is None else self.positions.expand(self.hidden.shape[:-1]).flatten()
        self.positions = None
        made: Operands = indexer(*self.take_inputs(wide), queries, positions)
        return made


def own_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The registered attention function; an empty mask is the one that `empty_mask` made."""
    made_here = attention_mask is not None and attention_mask.numel() == 0
    return attention(module, query, key, value, None if made_here else attention_mask, **kwargs)


def empty_mask(*args: Any, device: torch.device | str | None = None, **kwargs: Any) -> Tensor:
    """The registered mask function: four dimensions, which these models index, and no element."""
    return torch.empty(0, 1, 0, 0, device=device)


AttentionInterface.register(OWN_ATTENTION, uncompiled(own_attention))
AttentionMaskInterface.register(OWN_ATTENTION, empty_mask)
