"""What a model's own mask says, kept as the function that Transformers builds it from instead of [L, L] values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import causal_mask_function, sdpa_mask

CAUSAL = (
    "causal_mask_function", "and_masks", "sliding_window_overlay", "chunked_overlay", "padding_mask_function",
    "packed_sequence_mask_function", "remap_positions_for_packed_sequence", "add_offsets_to_mask_function",
)  # fmt: skip
"""The functions of transformers.masking_utils whose masks show no key after the query, whatever the batch holds."""


class LayerMask:
    """The mask of one kind of layers in one forward.

    Attributes:
        window, chunk: the size of the window, or of the chunks, that bounds the keys of a query; None for neither.
        varies: whether what it shows may depend on what a batch holds, as on where images or a prefix are.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        sizes: tuple[int, int],
        *,
        q_offset: int,
        padding: Tensor | None,
        local_size: int | None,
        chunked: bool,
        use_vmap: bool,
        device: torch.device | str,
    ) -> None:
        self._function, self._offset, self._padding, self._use_vmap = function, q_offset, padding, use_vmap
        self._batch, self._keys = sizes
        self._device = device
        self.window = None if chunked else local_size
        self.chunk = local_size if chunked else None
        self.varies = not _is_causal(function)

    def __getattr__(self, name: str) -> Any:
        raise ValueError(
            f"attach: a layer's code must hand its mask on to the attention function as it is, got a layer that reads "
            f"its {name}; this model can't be attached"
        )

    def visible(self, queries: Tensor) -> Tensor:
        """What the queries [n], counted within a row, may see: bool [B, 1 or H, n, S]."""
        places = queries.to(self._device) + self._offset
        mask: Tensor | None = sdpa_mask(
            self._batch, len(places), self._keys,
            mask_function=lambda b, h, q, s: self._function(b, h, places[q], s), attention_mask=self._padding,
            allow_is_causal_skip=False, use_vmap=self._use_vmap, device=self._device,
        )  # fmt: skip
        assert mask is not None
        return mask.bool()


def _is_causal(function: Any) -> bool:
    """Whether a mask function is made of CAUSAL ones alone."""
    if function.__module__ != masking_utils.__name__ or function.__qualname__.partition(".")[0] not in CAUSAL:
        return False
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    parts = [part for x in held for part in (x if isinstance(x, tuple) else (x,)) if callable(part)]
    return all(_is_causal(part) for part in parts)


def layer_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **others: Any,
) -> LayerMask | None:
    """The registered mask function. None, as from sdpa's own, where a causal mask is all that there is to say."""
    padding = None if attention_mask is None or bool(attention_mask.all()) else attention_mask
    whole = q_length == kv_length and (local_size is None or kv_length < local_size)
    if allow_is_causal_skip and whole and padding is None:
        return None
    kinds = getattr(others.get("config"), "layer_types", None) or []
    return LayerMask(
        mask_function, (batch_size, kv_length), q_offset=others.get("q_offset", 0), padding=padding,
        local_size=local_size, chunked="chunked_attention" in kinds, use_vmap=others.get("use_vmap", False),
        device=others.get("device", "cpu"),
    )  # fmt: skip
