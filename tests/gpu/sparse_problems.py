"""A step of the whole sparse stage, and its results held to float64, as several tests on the GPU want them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flash_indexer import DSAAttention, dsa_attention
from flash_indexer.ops import Selection
from flash_indexer.testing import Inputs, Shape, assert_close, random_inputs
from flash_indexer.testing.sparse import eager_dsa, reference_dsa, selection_mask

D_LOSS = -1.7
LEAVES = ("q", "k", "v", "index_q", "index_k", "index_weights", "sinks")
Made = tuple[DSAAttention, dict[str, Tensor]]
"""What `dsa_attention` gave, and gradients by their names in `flash_indexer.testing.sparse`."""


def make(shape: Shape, V: int, device: str) -> tuple[Inputs, Tensor | None, Tensor]:
    """Inputs, v and the gradient of out, made on the device. V: below 0 where k's first -V columns are the values."""
    generator = torch.Generator(device).manual_seed(0)
    x = random_inputs(shape, *shape.intervals(), generator=generator, dtype=torch.bfloat16)
    sizes = [(shape.S, shape.G, V)] * (V > 0) + [(shape.T, shape.H, abs(V))]
    *v, d_out = (torch.randn(size, generator=generator, device=device).bfloat16() for size in sizes)
    return x, v[0] if v else None, d_out


def step(x: Inputs, v: Tensor | None, d_out: Tensor, *, sinks: Tensor | None = None, **options: Any) -> Made:
    """What `dsa_attention` gives on the GPU, and the gradients under d_out and D_LOSS."""
    given = (x.q, x.k, v, x.index_q, x.index_k, x.index_weights, sinks)
    tensors = [None if y is None else y.clone().cuda().requires_grad_() for y in given]
    if options.get("kl") == "backward":
        scale = torch.tensor(D_LOSS, device="cuda")
        options |= dict(kl_scale=scale, kl_out=torch.zeros(len(x.q), device="cuda"))
    result = dsa_attention(
        *tensors[:6], sinks=tensors[6], softmax_scale=x.softmax_scale, key_start=x.key_start.cuda(),
        key_end=x.key_end.cuda(), token_weight=x.token_weight.cuda(),
        value_dim=d_out.shape[2] if v is None else None, **options,
    )  # fmt: skip
    result.out.backward(d_out.cuda())
    if result.loss is not None:
        (D_LOSS * result.loss).backward()
    return result, {
        f"d{'_' if len(name) > 1 else ''}{name}": y.grad
        for name, y in zip(LEAVES, tensors, strict=True)
        if y is not None
    }


def judge(
    x: Inputs,
    v: Tensor | None,
    d_out: Tensor,
    made: tuple[DSAAttention, dict[str, Tensor]],
    sinks: Tensor | None = None,
) -> None:
    """All that `step` returned is held to the truth of the selection that it made, computed where the inputs are."""
    result, gradients = made
    got = dict(out=result.out, lse=result.lse, kl=result.kl, **gradients)
    hold_to_float64(got, result.selection, x, v, d_out, d_loss=D_LOSS, token_weight=x.token_weight, sinks=sinks)


def hold_to_float64(
    got: Mapping[str, Tensor | None], selection: Selection, x: Inputs, v: Tensor | None, d_out: Tensor, *,
    d_loss: float, token_weight: Tensor | None, sinks: Tensor | None = None,
) -> None:  # fmt: skip
    """`got`: results by their names in `reference_dsa`; what is None must have none there. Computed where x is."""
    selected = selection_mask(selection, len(x.k)).to(x.q.device)
    options: dict[str, Any] = dict(
        d_out=d_out, value_dim=d_out.shape[2] if v is None else None, token_weight=token_weight, d_loss=d_loss,
        sinks=sinks,
    )  # fmt: skip
    truth, eager = reference_dsa(x, v, selected, **options), eager_dsa(x, v, selected, **options)
    for name, value in got.items():
        if value is None:
            assert getattr(truth, name) is None
            continue
        tensors: tuple[Tensor, ...] = value, getattr(truth, name), getattr(eager, name)
        if name == "dq" and sinks is None:  # of a query with one key: 0, and only a softmax has no rounding there
            alone = selection.count <= 1
            if alone.any():
                assert value[alone].abs().max() <= 1e-5 * value.abs().max()
            tensors = tuple(y[~alone.to(y.device)] for y in tensors)
        if value.dtype == torch.float32:  # no row has a rounding of its output that its few numbers could hide behind
            tensors = tuple(y.flatten() for y in tensors)
        assert_close(name, *tensors)
