"""The model's own loss on packed documents, without [T, vocabulary] logits in memory at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from flash_indexer.models.families import find_decoder

ROWS = 1024  # rows of logits at a time
SCALED = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
"""What a config calls a change of the logits behind the output layer."""


class LanguageLoss(nn.Module):
    """A model whose forward is its loss, so that FSDP2 gathers embedding and output layer once for all of it.

    Attributes:
        model: with its output layer; its hooks run as ever.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """`language_loss` of a batch of input_ids and position_ids [B, L]."""
        hidden = find_decoder(self.model)(**batch, use_cache=False).last_hidden_state
        return language_loss(self.model, hidden, targets)


def labels(input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """[B, L - 1]: the token that each position predicts, -100 where the next one begins another document."""
    following = position_ids[:, 1:] == position_ids[:, :-1] + 1
    return input_ids[:, 1:].masked_fill(~following, -100)


def padded_labels(input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """[B, L]: `labels`, and -100 for each row's last token: of a batch that is cut into parts after it."""
    return F.pad(labels(input_ids, position_ids), (0, 1), value=-100)


def language_loss(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """sum of -log softmax(W hidden[b,t])[targets[b,t]] over the targets that are not -100, nats, float32.

    Logits are formed ROWS at a time, and again in the backward.

    Args:
        hidden: [B, L, width], the decoder's output. targets: [B, L - 1] or [B, L], as `labels` or `padded_labels`
            gives them.
    """
    rows, wanted = hidden[:, : targets.shape[1]].flatten(0, 1), targets.flatten()
    total = torch.zeros((), device=hidden.device)
    untyped: Any = model
    head = untyped.get_output_embeddings()
    for begin in range(0, len(rows), ROWS):
        part = slice(begin, begin + ROWS)
        total = total + checkpoint(_nats, head, rows[part], wanted[part], use_reentrant=False)
    return total


def check_logits(config: Any, caller: str) -> None:
    """Raises ValueError, naming the caller, for a model whose logits are not those of its output layer."""
    for name in SCALED:
        if (value := getattr(config, name, None)) not in (None, 1, 1.0):
            raise ValueError(
                f"{caller}: the model's logits must be those of its output layer, got {name}={value}; train it with a "
                "loop of your own on attach(model, topk=...)"
            )


def _nats(head: Any, rows: Tensor, wanted: Tensor) -> Tensor:
    return cross_entropy(head(rows).float(), wanted, reduction="sum", ignore_index=-100)
