"""A small model with indexers, batches of packed documents to judge it on, and tensors of one layer alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from flash_indexer import reference
from flash_indexer.intervals import causal_intervals
from flash_indexer.models.attach import IndexerHandle, attach


@pytest.fixture
def lengths() -> tuple[list[int], ...]:
    """Of the documents of each row of 40 tokens."""
    return [1, 30, 9], [40], [17, 1, 1, 21]


@pytest.fixture
def make_model() -> Callable[[], LlamaForCausalLM]:
    """The same weights at each call: H=6, G=2, D=8, three layers."""
    return _model


@pytest.fixture
def handle() -> IndexerHandle:
    return attach(_model(), num_heads=4, head_dim=16)


@pytest.fixture
def batches(lengths: tuple[list[int], ...]) -> list[dict[str, Tensor]]:
    """Two rows, then one row, of 40 tokens each."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        (torch.randint(50, (40,), generator=generator), torch.cat([torch.arange(n) for n in row])) for row in lengths
    ]
    ids, positions = (torch.stack(column) for column in zip(*rows, strict=True))
    return [{"input_ids": ids[part], "position_ids": positions[part]} for part in (slice(0, 2), slice(2, 3))]


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            torch.nn.init.normal_(parameter, std=0.5)  # attention far from uniform
    return model


@dataclass(frozen=True)
class Capture:
    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    index_q: Tensor
    index_k: Tensor
    index_weights: Tensor
    softmax_scale: float
    key_start: Tensor
    key_end: Tensor


@pytest.fixture
def make_capture() -> Callable[..., Capture]:
    """make_capture(lengths of documents in queries, in keys): random float64; H=6 over G=2, D=8, V=5, I=3, E=4."""
    return _capture


def _capture(lengths_q: list[int], lengths_k: list[int] | None = None, *, seed: int = 0) -> Capture:
    """Random float64 tensors; H=6 over G=2, D=8, V=5, I=3, E=4."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]) for lengths in (lengths_q, lengths_k or lengths_q)
    )
    key_start, key_end = causal_intervals(cu_q, cu_k)
    T, S, scale = int(cu_q[-1]), int(cu_k[-1]), 0.4
    q, k = 2 * normal(T, 6, 8), normal(S, 2, 8)
    lse = reference.teacher_lse(q, k, scale, key_start, key_end)
    index_q, index_k, weights = normal(T, 3, 4), normal(S, 4), normal(T, 3)
    return Capture(q, k, normal(S, 2, 5), lse, index_q, index_k, weights, scale, key_start, key_end)
