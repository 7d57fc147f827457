"""What an attached layer's attention and indexer hand on: the one type between models and their judges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class AttentionForm(NamedTuple):
    """What a layer's attention is besides its queries, keys and values.

    Attributes:
        softmax_scale: the factor of q·k. softcap: c in c * tanh(scale * q·k / c), which logits then are; None for none.
        window: a query sees at most this many keys, itself included. chunk: it sees those since the last multiple of
            this many tokens of its document. None for neither.
        sinks: [H], a logit of each head that takes part in the softmax and has no value; None for none.
    """

    softmax_scale: float
    window: int | None = None
    chunk: int | None = None
    sinks: Tensor | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class LayerCapture:
    """One attached layer's attention in one forward, batch rows flattened into T tokens (S = T).

    Shapes by the legend of docs/math.md. Context parallelism: q, k, v and the index tensors are this process's tokens,
    key_start and key_end count all keys. Tensor parallelism: q, k, v, lse and out are this process's heads. Where the
    loss is computed of some queries alone, T counts these, but for out, which is all tokens'.
    """

    layer: int
    q: Tensor  # [T, H, D]
    k: Tensor  # [S, G, D]
    v: Tensor  # [S, G, V]
    lse: Tensor  # [T, H], nats; with sinks they are counted
    out: Tensor  # [T, H, V]
    index_q: Tensor  # [T, I, E]
    index_k: Tensor  # [S, E]
    index_weights: Tensor  # [T, I]
    softmax_scale: float
    key_start: Tensor  # int32 [T]
    key_end: Tensor  # int32 [T]
    sinks: Tensor | None = None  # [H]
    softcap: float | None = None
