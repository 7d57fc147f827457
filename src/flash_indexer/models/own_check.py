"""Whether a model's own indexer ranks keys as our operands do: another version of Transformers may compute others."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import __version__ as transformers_version

from flash_indexer.indexer import no_autocast
from flash_indexer.models.own_indexers import OwnIndexer

TOKENS = 48
TOLERANCE = 1e-2
"""Of a query's largest |score|: the rounding of float32, and of TF32, is below, rope on other pairs far above."""


def check_ranks(own: nn.Module, indexer: OwnIndexer, layer: int) -> None:
    """Both score random tokens, every key for every query; the model's order must never go up in our scores.

    Raises:
        ValueError: it does: the module's class is known here, but computes something else.
    """
    parameter = next(own.parameters())
    inputs = _inputs(indexer, parameter)
    hidden, residual, cos, sin, positions = inputs
    with torch.no_grad(), no_autocast(parameter.device.type):
        ranks = _ranks(own, inputs)
        index_q, index_k, index_weights = indexer(hidden, residual, cos, sin, positions=positions)
        scores = (index_weights[..., None] * torch.einsum("tie,se->tis", index_q, index_k).relu()).sum(1)
    ordered = scores.gather(1, ranks)
    rises = (ordered[:, 1:] - ordered[:, :-1]).amax(1)
    if bool((rises > TOLERANCE * scores.abs().amax(1)).any()):
        raise ValueError(
            f"attach: {type(own).__name__} of layer {layer} ranks keys otherwise than the scores that would be "
            f"trained: transformers {transformers_version} computes another form of it than 5.23; use that"
        )


def _inputs(indexer: OwnIndexer, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """hidden, q_residual, cos, sin and positions of TOKENS tokens, drawn without touching torch's own generators."""
    generator = torch.Generator().manual_seed(0)

    def draw(width: int) -> Tensor:
        return torch.randn(TOKENS, width, generator=generator).to(like)

    hidden = draw(indexer.hidden_size)
    residual = None if indexer.q_lora_rank is None else draw(indexer.q_lora_rank)
    angles = draw(indexer.rope_dim // 2).repeat(1, 2)
    return hidden, residual, angles.cos(), angles.sin(), torch.arange(TOKENS, device=like.device)


def _ranks(own: Any, inputs: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]) -> Tensor:
    """All keys in the order in which the model's module ranks them, [TOKENS, TOKENS]."""
    hidden, residual, cos, sin, positions = inputs
    known = {
        "hidden_states": hidden[None], "q_resid": None if residual is None else residual[None],
        "position_embeddings": (cos[None], sin[None]), "position_ids": positions[None],
        "attention_mask": torch.ones(1, TOKENS, TOKENS, dtype=torch.bool, device=hidden.device),
    }  # fmt: skip
    forward = type(own).forward
    named = inspect.signature(forward).parameters
    before, own.index_topk = own.index_topk, TOKENS
    try:
        found: Tensor = forward(own, **{name: value for name, value in known.items() if name in named})
    finally:
        own.index_topk = before
    return found[0].long()
