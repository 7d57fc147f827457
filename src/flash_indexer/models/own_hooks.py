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
from flash_indexer.models.layer_mask import LayerMask, layer_mask
from flash_indexer.models.own_indexers import own_indexer
from flash_indexer.models.rope import Ropes
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
        super().__init__(attend, layer, None, Ropes())
        self.trains = trains
        self.positions: Tensor | None = None

    def install(self, module: Any) -> list[Callable[[], object]]:
        """Stands in for the layer's indexer, where it has one; what puts the indexer back."""
        own = own_indexer(module)
        return [] if own is None else [stand_in(own, self.read_call)]

    def read_call(self, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Tensor:
        """In the place of the indexer's forward: notes its inputs, and selects nothing, int32 [B, L, 0].

        Where attention is run with a mask of values, to be compared with the teacher, it selects all keys.
        """
        inputs = signature.bind(None, *args, **kwargs).arguments
        hidden: Tensor = inputs["hidden_states"]
        B, L, _ = hidden.shape
        if isinstance(mask := inputs["attention_mask"], Tensor):
            return all_keys(B, L, mask.shape[-1], hidden.device)
        if self.trains:
            self.hidden, self.rope = hidden, inputs["position_embeddings"]
            self.q_residual, self.positions = inputs.get("q_resid"), inputs.get("position_ids")
        return all_keys(B, L, 0, hidden.device)

    def replay_arguments(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """With all keys selected for a layer that uses an earlier one's selection."""
        selected = inputs.get("prev_topk_indices")
        if not isinstance(selected, Tensor):
            return inputs
        B, L = selected.shape[:2]
        return inputs | {"prev_topk_indices": all_keys(B, L, L, selected.device)}

    def operands(
        self, indexer: nn.Module, wide: Callable[[Tensor], Tensor], positions: Tensor, queries: Tensor | None
    ) -> Operands:
        """The operands of the model's own scores, at the positions that the model gave its indexer."""
        if self.hidden is not None and self.positions is not None:
            positions = self.positions.expand(self.hidden.shape[:-1])
        made: Operands = indexer(*self.take_inputs(wide, positions), queries, positions.flatten())
        return made

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The cos and sin that the model gave its indexer."""
        assert self.rope is not None
        return self.rope

    def forget(self) -> None:
        """Lets go of what was read."""
        super().forget()
        self.positions = None


def stand_in(own: nn.Module, function: Callable[..., Tensor]) -> Callable[[], object]:
    """Calls `function`, with the signature of the indexer's forward first, in its place; returns what puts it back."""
    before = own.__dict__.get("forward")
    own.__dict__["forward"] = uncompiled(partial(function, inspect.signature(type(own).forward)))

    def put_back() -> None:
        del own.__dict__["forward"]
        if before is not None:
            own.__dict__["forward"] = before

    return put_back


def all_keys(rows: int, length: int, keys: int, device: torch.device) -> Tensor:
    """A selection of all `keys` for every query: int32 [rows, length, keys]."""
    return torch.arange(keys, dtype=torch.int32, device=device).expand(rows, length, keys)


class OwnMask(LayerMask):
    """A layer's own mask, of which the models take a part for their indexer, which doesn't read it here."""

    def __init__(self, mask: LayerMask) -> None:
        self.__dict__.update(mask.__dict__)

    def __getitem__(self, part: Any) -> OwnMask:
        return self


def own_mask(*args: Any, **kwargs: Any) -> OwnMask | None:
    """The registered mask function."""
    mask = layer_mask(*args, **kwargs)
    return None if mask is None else OwnMask(mask)


AttentionInterface.register(OWN_ATTENTION, uncompiled(attention))
AttentionMaskInterface.register(OWN_ATTENTION, own_mask)
