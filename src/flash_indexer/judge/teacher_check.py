"""Whether the teacher is the model's own attention: every head's probabilities must sum to 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_indexer.judge.batches import batch_tensors
from flash_indexer.judge.capture import WORKSPACE, chunk_teacher, chunks
from flash_indexer.models.capture import LayerCapture

if TYPE_CHECKING:
    from flash_indexer.models.attach import IndexerHandle, LayerCapture


def teacher_errors(handle: IndexerHandle, batch: Mapping[str, Tensor]) -> dict[int, float]:
    """max over t, h of |sum_s exp(x[t,h,s] - lse[t,h]) - 1| with the teacher's logits x, for each attached layer.

    x = scale * q[t,h]·k[s,g(h)]; a sink counts as one more key.

    An error means that the logsumexp, the scale or the visible keys are not those of the model's own attention. The
    target's normalisation would hide it, and leave a wrong weighting of the heads.
    """
    errors: dict[int, float] = {}

    def measure(capture: LayerCapture) -> None:
        found = head_errors(capture)
        errors[capture.layer] = max(found, key=lambda error: float("inf") if error != error else error)

    input_ids, position_ids = batch_tensors(batch, next(handle.model.parameters()).device)
    with torch.no_grad(), handle.using(measure):
        handle.decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    return errors


def head_errors(capture: LayerCapture) -> list[float]:
    """For each head h, max over t of |sum_s exp(scale * q[t,h]·k[s,g(h)] - lse[t,h]) - 1|; NaN where a sum is."""
    per_group = capture.q.shape[1] // capture.k.shape[1]
    errors = []
    for h in range(capture.q.shape[1]):
        one, g = slice(h, h + 1), slice(h // per_group, h // per_group + 1)
        sinks = None if capture.sinks is None else capture.sinks[one]
        head = replace(capture, q=capture.q[:, one], k=capture.k[:, g], lse=capture.lse[:, one], sinks=sinks)
        worst = torch.zeros((), device=capture.q.device)
        for sums in teacher_row_sums(head):
            worst = torch.maximum(worst, (sums - 1).abs().max())  # unlike max, keeps NaN
        errors.append(float(worst))
    return errors


def teacher_row_sums(capture: LayerCapture, *, workspace_bytes: int = WORKSPACE) -> Iterator[Tensor]:
    """sum_h sum_s exp(x[t,h,s] - lse[t,h]), sinks included, chunk by chunk, of the queries that see a key."""
    for rows, keys, start, end in chunks(capture, workspace_bytes):
        sums = chunk_teacher(capture, rows, keys, start, end).sum(-1)
        if capture.sinks is not None:
            sums = sums + (capture.sinks - capture.lse[rows]).exp().sum(-1)
        yield sums[end > start]
