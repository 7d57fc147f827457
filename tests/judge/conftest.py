"""A small model with indexers, batches of packed documents to judge it on, and tensors of one layer alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from flash_indexer import reference
from flash_indexer.intervals import causal_intervals
from flash_indexer.judge.scores import Evaluation, LayerScore, MassAtK, Perplexity, RowBlock
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
    sinks: Tensor | None = None
    softcap: float | None = None


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


@pytest.fixture(scope="session")
def make_evaluation() -> Callable[[], Evaluation]:
    """A made-up evaluation of three layers at k = 64 and 128."""
    return _evaluation


def _mass(k: int, indexer: float, oracle: float, window: float, queries: int) -> MassAtK:
    return MassAtK(k, 4 * k, queries, indexer, oracle, window, indexer / oracle, window / oracle, indexer * 0.9)


def _layer_score(layer: int | None, kl: float, at_k: tuple[MassAtK, ...]) -> LayerScore:
    return LayerScore(layer, 4000, kl, 2.5, kl / 2.5, at_k)


def _evaluation() -> Evaluation:
    scores = [
        _layer_score(n, 0.21 + 0.0137 * n, tuple(_mass(k, 0.7 + 0.013 * n, 0.8, 0.6, 10 * k) for k in (64, 128)))
        for n in (0, 1, 2)
    ]
    rows = tuple(tuple(0.001 * (row + column + 1) * (column <= 8 + row) for column in range(12)) for row in range(4))
    losses = {("dense", None): 1.9, ("indexer", 128): 1.95, ("oracle", 128): 1.91, ("window", 128): 2.3}
    return Evaluation(
        sequences=7,
        tokens=14336,
        predicted=14000,
        mean=_layer_score(None, 0.2237, (_mass(64, 0.713, 0.8, 0.6, 1920), _mass(128, 0.7791, 0.81, 0.63, 3840))),
        layers=tuple(scores),
        perplexities=tuple(Perplexity(s, k, x, math.exp(x), 0.93 if k else 0.0) for (s, k), x in losses.items()),
        row_block=RowBlock(1, 92, 96, 8, rows, rows),
    )


@pytest.fixture(scope="session")
def rounded() -> Callable[[Tensor, str], Tensor]:
    """rounded(rows, arithmetic) in float64, with every number of e4m3 written out."""
    return _rounded


def _e4m3_numbers() -> list[float]:
    """Not negative, ascending: 8 steps below 2^-6, then 8 in each power of two, up to 448."""
    return [n * 2.0**-9 for n in range(8)] + [
        (1 + n / 8) * 2.0**e for e in range(-6, 9) for n in range(8) if (1 + n / 8) * 2.0**e <= 448
    ]


def _rounded(x: Tensor, arithmetic: str) -> Tensor:
    """A row's e4m3 numbers times its scale, of the row or of Hadamard's matrix times it; in float64, one by one."""
    if arithmetic == "bf16":
        return x.bfloat16().double()
    E = x.shape[-1]
    if arithmetic == "fp8":
        signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(E)] for i in range(E)], dtype=x.dtype)
        x = x @ signs / math.sqrt(E)
    grid = torch.tensor(_e4m3_numbers(), dtype=torch.float64)
    scale = torch.exp2((x.abs().amax(-1, keepdim=True) / 448).log2().ceil())
    distance = ((x / scale).abs()[..., None] - grid).abs()
    nearest = distance.argmin(-1)
    tie = (distance == distance.amin(-1, keepdim=True)).sum(-1) == 2
    nearest = torch.where(tie & (nearest % 2 == 1), nearest + 1, nearest)
    return x.sign() * grid[nearest] * scale
