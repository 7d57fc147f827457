"""One forward of a sparse model: which keys its queries may select from, its cache, and what its layers learnt.

With context parallelism the rows laid end to end are one sequence, and each process has its part of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flash_indexer.models.documents import document_begins, document_positions
from flash_indexer.models.families import given_cache
from flash_indexer.models.packing import Packing, packing
from flash_indexer.models.rope import Ropes
from flash_indexer.parallel.context import gather_with_gradient
from flash_indexer.parallel.mesh import Parallel

LEFT_PADDING = "pad generations on the left, and pack the documents of a training batch"


class SparseForward:
    """Rows of the decoder's batch against the keys of their cache. It travels through the layers as an argument.

    So a layer that is recomputed, in the backward of activation checkpointing, finds the forward it belongs to.

    Args:
        inputs: what the decoder is called with, by name.
        tokens: input_ids [B, L] or inputs_embeds [B, L, width].
        parallel: with cp > 1, [B, L] are this process's part of the tokens.

    Attributes:
        has_gradients: whether the decoder was called with gradients enabled.
        past: keys of each row that the cache holds already. length: past + L.
        kl: [T] of each layer that learns, written when its backward runs. uniform_kl: where it is known.
        seen: layers that have run. has_ended: whether the decoder has, so that a layer that runs is run again.
    """

    def __init__(self, inputs: Mapping[str, Any], tokens: Tensor, parallel: Parallel) -> None:
        cache, mask = given_cache(inputs), inputs.get("attention_mask")
        self.rows, queries = tokens.shape[:2]
        self.past = 0 if cache is None else int(cache.get_seq_length())
        self.length = self.past + queries
        self.positions: Tensor | None = None
        self.has_gradients, self.has_ended = torch.is_grad_enabled(), False
        self.kl: dict[int, Tensor] = {}
        self.uniform_kl: dict[int, Tensor] = {}
        self.seen: set[int] = set()
        self.ropes = Ropes()
        self.parallel = parallel
        self.packing: Packing | None = None
        if parallel.cp > 1:
            self._check_whole(mask)
            self.positions = document_positions(inputs, tokens, parallel)
            self.packing = packing(self.positions, parallel)
            return
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attach: attention_mask must be [B, L], got {found}; {LEFT_PADDING}")
        steps = torch.arange(queries, device=tokens.device).expand(self.rows, -1)
        if self.past or (isinstance(mask, Tensor) and not bool(mask.all())):
            first = self._first_tokens(mask, tokens.device)
            self._check_one_document(inputs.get("position_ids"), first)
            self._first = first[:, None].expand(-1, queries)
        else:
            self.positions = document_positions(inputs, tokens)
            begins = document_begins(self.positions)
            self._first = torch.where(begins, steps, 0).cummax(1).values
        self._end = steps + self.past + 1
        self._visible: dict[tuple[int, int | None], tuple[Tensor, Tensor]] = {}

    @property
    def is_packed(self) -> bool:
        """Whether a row holds several documents, or parts of one, which only position_ids can tell the layers."""
        return self.positions is not None and bool((self.positions.diff(dim=1) != 1).any())

    def visible(self, keys: int, window: int | None) -> tuple[Tensor, Tensor]:
        """key_start and key_end, int32 [B * L], over the last `keys` keys of each row, laid end to end.

        The queries of padding see none. window: a query sees at most this many keys, itself included; None all. With
        context parallelism over the keys of all processes.
        """
        if self.packing is not None:
            return self.packing.visible(window)
        if (keys, window) not in self._visible:
            offset = self.length - keys  # those that a sliding window's cache has dropped
            start = self._first if window is None else torch.maximum(self._first, self._end - window)
            start = (start - offset).clamp_min(0)
            end = torch.maximum(self._end - offset, start)
            row = torch.arange(self.rows, device=start.device)[:, None] * keys
            self._visible[keys, window] = (start + row).flatten().int(), (end + row).flatten().int()
        return self._visible[keys, window]

    def mask(self, keys: int, window: int | None) -> Tensor:
        """The same as a mask [B, 1, L, keys], for layers without an indexer; padding sees all, and nobody reads it.

        With context parallelism [1, 1, B * L, keys], keys being those of all processes.
        """
        if self.packing is not None:
            start, end = (x.view(-1, 1) for x in self.visible(keys, window))
            key = torch.arange(keys, device=start.device)
            return ((key >= start) & (key < end))[None, None]
        start, end = (x.view(self.rows, 1, -1, 1) for x in self.visible(keys, window))
        key = torch.arange(self.rows * keys, device=start.device).view(self.rows, 1, 1, keys)
        return ((key >= start) & (key < end)) | (start == end)

    def all_keys(self, x: Tensor) -> Tensor:
        """Keys or values [B, G, S, D] of all processes, as [1, G, S * cp, D] where several share the sequence."""
        group = self.parallel.group("cp")
        if group is None:
            return x
        rows = gather_with_gradient(x.transpose(1, 2).flatten(0, 1), group, layout=self.parallel.layout)
        return rows.transpose(0, 1)[None]

    def _check_whole(self, mask: object) -> None:
        """A process that holds a part of the sequence can't generate."""
        if self.past or (isinstance(mask, Tensor) and not bool(mask.all())):
            raise ValueError(
                f"attach: with cp={self.parallel.cp} there must be neither padding nor a cache that holds keys, got "
                f"{f'{self.past} keys' if self.past else 'padding'}; generate in one process, with cp=1"
            )

    def _first_tokens(self, mask: Tensor | None, device: torch.device) -> Tensor:
        """The first token of each row that is no padding, [B]."""
        if not isinstance(mask, Tensor):
            return torch.zeros(self.rows, dtype=torch.int64, device=device)
        if mask.shape != (self.rows, self.length):
            raise ValueError(
                f"attach: attention_mask must be [B, tokens in the cache and new ones] = {[self.rows, self.length]}, "
                f"got {list(mask.shape)}; {LEFT_PADDING}"
            )
        kept = mask != 0
        first = kept.int().argmax(1)
        if not bool((kept == (torch.arange(self.length, device=mask.device) >= first[:, None])).all()):
            raise ValueError(
                f"attach: attention_mask must be zeros, then ones, in each row, got zeros behind ones; {LEFT_PADDING}"
            )
        return first

    def _check_one_document(self, position_ids: Tensor | None, first: Tensor) -> None:
        """Beside a cache or padding each row is one document; the positions of padding are nobody's."""
        if position_ids is None or position_ids.shape[-1] != self.length - self.past or position_ids.ndim != 2:
            return
        steps = position_ids.diff(dim=1) if position_ids.shape[1] > 1 else position_ids[:, :0]
        kept = torch.arange(self.past + 1, self.length, device=first.device) > first[:, None]
        if bool(((steps != 1) & kept).any()):
            raise ValueError(
                "attach: position_ids must go on by one in each row beside a cache or padding, got a row of several "
                "documents; pass use_cache=False and no padding to train on packed documents"
            )
