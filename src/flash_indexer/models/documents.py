"""Where the documents of a batch begin, from every form in which Transformers' collators and models say it.

All forms come out as one: position_ids that restart where a document begins.

    position_ids                    [B, L] or [1, L]: a document begins where they do not go on by one; [4, B, L], of
                                    models that read images: text, time, height, width, of which the first is read;
                                    [3, B, L], without the text's, say nothing
    attention_mask                  [B, L]: the number of each token's document (1, 1, 2, 2); all ones say nothing
    seq_idx                         [B, L]: likewise, and 0 is a document too
    cu_seq_lens_q, cu_seq_lens_k    [documents + 1]: boundaries in the batch's rows laid end to end

Every row begins a document. Of several forms in one batch, all must say the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flash_indexer.parallel.mesh import Parallel

DOCUMENT_INPUTS = (
    "position_ids", "attention_mask", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
)  # fmt: skip
"""The inputs of a model that `document_positions` reads, or that go with those (the lengths)."""

PACKED = "batches are packed, not padded or masked; concatenate documents and restart position_ids at 0 for each"
_OTHER_FORMS = re.compile(r"cu_?seq_?lens|(document|doc|segment|sequence)_ids?$")
_ALONE = Parallel()


def document_positions(inputs: Mapping[str, Any], tokens: Tensor, parallel: Parallel = _ALONE) -> Tensor:
    """position_ids [B, L] of a batch, restarting where a document begins.

    Args:
        inputs: what the decoder is called with, by name.
        tokens: input_ids [B, L] or inputs_embeds [B, L, width].
        parallel: with context parallelism only position_ids are read, of this process's tokens.

    Raises:
        ValueError: a padded batch, a misshapen input, a form of boundaries that is not read, or two that disagree.
    """
    shape = tokens.shape[:2]
    position_ids = _of_text(inputs.get("position_ids"), shape)
    if not tokens.numel() or (position_ids is not None and position_ids.shape not in (shape, (1, shape[1]))):
        raise ValueError(
            "attach: input_ids must be [B, L] with a token at least and position_ids [B, L] or [1, L], got "
            f"{list(shape)} and {None if position_ids is None else list(position_ids.shape)}"
        )
    for name, value in inputs.items():
        if value is not None and name not in DOCUMENT_INPUTS and _OTHER_FORMS.search(name):
            raise ValueError(
                f"attach: {name} is no form of document boundaries that is read, got {type(value).__name__}; pass "
                "position_ids that restart at 0 for each document, or cu_seq_lens_q"
            )
    begins = _sources(inputs, shape, tokens.device)
    if parallel.cp > 1:
        if begins or position_ids is None:
            raise ValueError(
                f"attach: with cp={parallel.cp} the forward needs position_ids and no other form, got "
                f"{[*begins] or None}; pass this process's part of the batch's position_ids, at "
                "context_positions(tokens, cp, cp_rank, layout=...)"
            )
        return position_ids.expand(shape)
    if position_ids is not None:
        position_ids = position_ids.expand(shape)
        begins = {"position_ids": document_begins(position_ids)} | begins
    names = list(begins)
    for name in names[1:]:
        if bool((differ := begins[name] != begins[names[0]]).any()):
            row, token = differ.nonzero()[0].tolist()
            raise ValueError(
                f"attach: {names[0]} and {name} must begin documents at the same tokens, but differ at token "
                f"{token} of row {row}; leave one of them out, or restart position_ids at 0 for each document"
            )
    if position_ids is not None:
        return position_ids
    steps = torch.arange(shape[1], device=tokens.device).expand(shape)
    if not names:
        return steps
    return steps - torch.where(begins[names[0]], steps, 0).cummax(1).values


def _of_text(position_ids: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The places of a batch's tokens in its text, where there are any."""
    if position_ids is None or position_ids.ndim != 3 or position_ids.shape[1:] != shape:
        return position_ids
    return {3: None, 4: position_ids[0]}.get(position_ids.shape[0], position_ids)


def document_begins(values: Tensor, step: int = 1) -> Tensor:
    """[B, L] bool: each row's first token, and every token whose value is not its predecessor's plus `step`."""
    begins = torch.ones_like(values, dtype=torch.bool)
    begins[:, 1:] = values[:, 1:] != values[:, :-1] + step
    return begins


def _sources(inputs: Mapping[str, Any], shape: torch.Size, device: torch.device) -> dict[str, Tensor]:
    """Where documents begin, [B, L] bool, by each input but position_ids that says it."""
    begins = {}
    mask, seq_idx = inputs.get("attention_mask"), inputs.get("seq_idx")
    if isinstance(mask, Tensor):
        _check_shape("attention_mask", mask, shape, PACKED)
        if not bool(mask.all()):
            raise ValueError(f"attach: attention_mask must be all ones, document numbers from 1, or absent: {PACKED}")
        if bool((mask != mask[0, 0]).any()):
            begins["attention_mask"] = document_begins(mask, 0)
    if seq_idx is not None:
        _check_shape("seq_idx", seq_idx, shape, "one document number for each token")
        begins["seq_idx"] = document_begins(seq_idx, 0)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if (boundaries := inputs.get(name)) is not None:
            begins[name] = _from_boundaries(name, boundaries, shape, device)
    return {name: x.to(device) for name, x in begins.items()}


def _check_shape(name: str, x: Tensor, shape: torch.Size, remedy: str) -> None:
    if x.shape != shape:
        raise ValueError(f"attach: {name} must be [B, L] = {list(shape)}, got {list(x.shape)}; {remedy}")


def _from_boundaries(name: str, boundaries: Any, shape: torch.Size, device: torch.device) -> Tensor:
    """cu_seq_lens as [B, L] bool. Two equal boundaries are an empty document, which has no token to begin."""
    count = shape[0] * shape[1]
    values = boundaries.flatten().tolist() if isinstance(boundaries, Tensor) else boundaries
    rows = set(range(0, count, shape[1]))
    if not isinstance(values, list) or values[:1] != [0] or values[-1] != count or sorted(values) != values:
        raise ValueError(
            f"attach: {name} must rise from 0 to the batch's B * L = {count} tokens, got {str(values)[:60]}; pass the "
            "documents' boundaries in the rows laid end to end, int32 [documents + 1]"
        )
    if missing := sorted(rows - set(values)):
        raise ValueError(
            f"attach: {name} must have a boundary at each of the {shape[0]} rows' first tokens, got none at "
            f"{missing[:3]}; a document can't go on in the next row: pass one row"
        )
    begins = torch.zeros(count, dtype=torch.bool, device=device)
    begins[torch.tensor([value for value in values if value < count], device=device)] = True
    return begins.view(shape)
