"""Problems for benchmarks/precision.py: random ones of any length, and those on which rounding hurts most.

One causal sequence each. index_q and index_k are multiples of 1/64, so that their products are exact in float32 in
whatever order they are summed: [logit > 0] jumps, and where a logit is zero but for rounding, a right evaluation may
take either side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer import reference
from flash_indexer.testing import Inputs, Shape, random_inputs

USUAL = "usual"


class Size(NamedTuple):
    """Heads and widths of a problem; V: the width of the attention's values."""

    H: int
    G: int
    D: int
    I: int
    E: int
    V: int

    def shape(self, tokens: int) -> Shape:
        return Shape(((tokens, tokens),), self.H, self.G, self.D, self.I, self.E)


SIZES = {"gqa": Size(8, 2, 64, 8, 64, 64), "v32": Size(16, 1, 576, 16, 128, 512)}


def problem(size: Size, case: str, tokens: int, dtype: torch.dtype, device: str) -> tuple[Inputs, Tensor]:
    """Inputs and the attention's values [S, G, V]: of random numbers as they come, or changed as `case` says.

    Where D exceeds V, the values are the keys' first V numbers, as in MLA's absorbed form.
    """
    shape, generator = size.shape(tokens), torch.Generator(device).manual_seed(tokens)
    x = random_inputs(shape, *shape.intervals(), generator=generator, dtype=dtype if case == USUAL else torch.float64)
    x = replace(x, index_q=on_grid(x.index_q), index_k=on_grid(x.index_k))
    if case != USUAL:
        x = rounded(CASES[case].change(x, generator), dtype)
    if size.D > size.V:
        return x, x.k[..., : size.V]
    return x, torch.randn(tokens, size.G, size.V, generator=generator, device=device).to(dtype)


def on_grid(x: Tensor) -> Tensor:
    """The nearest multiples of 1/64, in x's dtype: bfloat16 holds those below 4, e4m3 has to round them."""
    return (x.double() * 64).round().div(64).to(x.dtype)


def rounded(x: Inputs, dtype: torch.dtype) -> Inputs:
    """Vectors in dtype, the rest in float32, and lse that of the rounded vectors."""
    vectors = {name: getattr(x, name).to(dtype) for name in ("q", "k", "index_q", "index_k")}
    lse = reference.teacher_lse(
        vectors["q"].double(), vectors["k"].double(), x.softmax_scale, x.key_start, x.key_end
    ).float()
    return replace(x, **vectors, index_weights=x.index_weights.float(), token_weight=x.token_weight.float(), lse=lse)


def large_logits(x: Inputs, _: torch.Generator) -> Inputs:
    return replace(x, q=16 * x.q, index_weights=16 * x.index_weights)


def one_hot(x: Inputs, _: torch.Generator) -> Inputs:
    """q[t] is the key t//2 times a factor: its logit is about 64, all others' spread is 8."""
    attended = x.k[torch.arange(len(x.q), device=x.q.device) // 2]
    return replace(x, q=64 * x.q.shape[2] ** -0.5 * attended.repeat_interleave(x.q.shape[1] // x.k.shape[1], dim=1))


def near_uniform(x: Inputs, _: torch.Generator) -> Inputs:
    return replace(x, q=x.q / 128, index_weights=x.index_weights / 128)


def sink(x: Inputs, _: torch.Generator) -> Inputs:
    """The first number of a vector is kept for the first key, which has nothing else: q's is set for a mass of 0.7."""
    k, q = x.k.clone(), x.q.clone()
    k[:, :, 0], k[0] = 0, 0
    k[0, :, 0] = 8
    others = reference.teacher_lse(q, k, x.softmax_scale, x.key_start + 1, x.key_end)
    q[:, :, 0] = (others + torch.log(torch.tensor(0.7 / 0.3))) / (8 * x.softmax_scale)
    q[0, :, 0] = 0  # sees the sink alone
    return replace(x, q=q, k=k)


def cancelling_weights(x: Inputs, generator: torch.Generator) -> Inputs:
    """Every second head is nearly the one before it, with the opposite weight."""
    index_q, w = x.index_q.clone(), 8 * x.index_weights
    noise = torch.randn(index_q[:, 1::2].shape, generator=generator, dtype=w.dtype, device=w.device)
    index_q[:, 1::2] = index_q[:, ::2] + on_grid(noise / 4)
    w[:, 1::2] = -w[:, ::2]
    return replace(x, index_q=index_q, index_weights=w)


def relu_off(x: Inputs, _: torch.Generator) -> Inputs:
    """Keys of positive numbers; every second query has negative ones alone."""
    index_q = x.index_q.clone()
    index_q[1::2] = -index_q[1::2].abs()
    return replace(x, index_q=index_q, index_k=x.index_k.abs())


def tiny_scales(x: Inputs, _: torch.Generator) -> Inputs:
    names = ("index_q", "index_k", "index_weights")
    return replace(x, **{name: getattr(x, name) * 2.0**-20 for name in names})


def large_channel(x: Inputs, _: torch.Generator) -> Inputs:
    index_q, index_k = x.index_q.clone(), x.index_k.clone()
    index_q[..., 3] *= 8
    index_k[..., 3] *= 8
    return replace(x, index_q=index_q, index_k=index_k, index_weights=x.index_weights / 8)


class Case(NamedTuple):
    """What a table calls the inputs, what they are, and what makes them of random ones."""

    name: str
    detail: str
    change: Callable[[Inputs, torch.Generator], Inputs]


CASES = {
    "large_logits": Case(
        "large logits", "the teacher's spread by 24, index scores are 16 times as large", large_logits
    ),
    "one_hot": Case("one-hot attention", "one key has all of a query's mass", one_hot),
    "near_uniform": Case("near-uniform", "attention and index scores spread by about 1/100", near_uniform),
    "sink": Case("a sink", "the first key holds 0.7 of every head's mass", sink),
    "cancelling_weights": Case(
        "weights of both signs", "pairs of heads nearly alike, which cancel", cancelling_weights
    ),
    "relu_off": Case("ReLUs off", "every one in half of the queries", relu_off),
    "tiny_scales": Case("tiny scales", "index_q, index_k and the weights times 2^-20", tiny_scales),
    "large_channel": Case("a large channel", "one of index_q and index_k is 8 times as large", large_channel),
}
