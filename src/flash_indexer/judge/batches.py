"""The model's own loss on a batch of packed documents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

_LOGIT_ROWS = 256  # rows of [B * L, vocabulary] logits in float32 at a time


def batch_tensors(batch: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """input_ids and position_ids on the device; a batch that can't be judged is refused."""
    for name in ("input_ids", "position_ids"):
        if name not in batch:
            raise KeyError(f"evaluate: a batch must hold input_ids and position_ids, got {sorted(batch)}")
        if batch[name].ndim != 2 or not batch[name].numel():
            raise ValueError(f"evaluate: {name} must be [B, L] with a token at least, got {list(batch[name].shape)}")
    if "attention_mask" in batch and not bool(batch["attention_mask"].all()):
        raise ValueError(
            "evaluate: attention_mask must be all ones, got zeros in it; pack documents by position_ids instead of "
            "padding them"
        )
    return batch["input_ids"].to(device), batch["position_ids"].to(device)


class TokenLosses(NamedTuple):
    """-log probability (nats, float64), place in its document and sequence of each predicted token: [n] each."""

    nats: Tensor
    position: Tensor
    sequence: Tensor


@torch.no_grad()
def token_losses(model: torch.nn.Module, input_ids: Tensor, position_ids: Tensor) -> TokenLosses:
    """The losses that `loss_sum` adds up, on the CPU."""
    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    counted = position_ids[:, 1:] == position_ids[:, :-1] + 1
    found = torch.zeros(counted.shape, device=logits.device)
    for row, targets, out in zip(logits, input_ids[:, 1:], found, strict=True):
        for begin in range(0, len(targets), _LOGIT_ROWS):
            part = slice(begin, min(begin + _LOGIT_ROWS, len(targets)))
            out[part] = cross_entropy(row[part].float(), targets[part], reduction="none")
    nats, counted, position_ids = found.cpu().double(), counted.cpu(), position_ids.cpu()
    sequence = torch.arange(len(input_ids))[:, None].expand(counted.shape)
    return TokenLosses(nats[counted], position_ids[:, 1:][counted], sequence[counted])


@torch.no_grad()
def loss_sum(model: torch.nn.Module, input_ids: Tensor, position_ids: Tensor) -> tuple[float, int]:
    """Sum over predicted tokens of -log probability (nats), and their number; no document's first token."""
    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    total = 0.0
    counted = position_ids[:, 1:] == position_ids[:, :-1] + 1
    for row, targets, mask in zip(logits, input_ids[:, 1:], counted, strict=True):
        for begin in range(0, len(targets), _LOGIT_ROWS):
            part = slice(begin, min(begin + _LOGIT_ROWS, len(targets)))
            nats = cross_entropy(row[part].float(), targets[part], reduction="none")
            total += float((nats * mask[part]).sum(dtype=torch.float64))
    if not math.isfinite(total):
        raise ValueError(
            f"evaluate: the model's loss is {total}; its weights or its activations are not finite: look for NaN"
        )
    return total, int(counted.sum())
