"""Sinks in the sparse stage on the GPU, in dense tiles and over gathered keys, against float64 by the ruler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flash_indexer import dsa_attention, sparse_attention
from flash_indexer.testing import Shape, assert_close, make_inputs
from flash_indexer.testing.sparse import eager_dsa, make_values, reference_dsa, selection_mask

pytestmark = pytest.mark.gpu
LEAVES = ("q", "k", "v", "index_q", "index_k", "index_weights", "sinks")
HEADS: dict[str, dict[str, int]] = {
    "grouped": dict(H=8, G=2, D=64), "latent": dict(H=32, G=1, D=64), "absorbed": dict(H=32, G=1, D=576),
    "absorbed, 128 heads": dict(H=128, G=1, D=576), "absorbed, any order": dict(H=32, G=1, D=576),
}  # fmt: skip
LONG = Shape(((1, 1), (300, 300), (3, 0), (150, 211)), H=1, G=1, D=1, I=4, E=32)
D_LOSS = -1.7


@pytest.mark.parametrize("kl", ["forward", "backward"])
@pytest.mark.parametrize("heads", HEADS)
def test_against_float64(heads: str, kl: str) -> None:
    """With sinks below and above the keys' logsumexps."""
    x = make_inputs(replace(LONG, **HEADS[heads]), seed=0, dtype=torch.bfloat16, device="cuda")
    H, D = x.q.shape[1:]
    V = None if heads == "grouped" else {64: 32, 576: 512}[D]
    v = make_values(x, 48, seed=1) if V is None else None
    d_out = torch.randn(len(x.q), H, V or 48, generator=torch.Generator().manual_seed(2)).bfloat16().cuda()
    sinks = torch.linspace(-2.0, 6.0, H, device="cuda")
    given = (x.q, x.k, v, x.index_q, x.index_k, x.index_weights, sinks)
    tensors = [None if y is None else y.clone().requires_grad_() for y in given]
    options: dict[str, Any] = dict(
        topk=40, kl=kl, deterministic="any order" not in heads, workspace_bytes=2**22, value_dim=V
    )
    if kl == "backward":
        scale = torch.tensor(D_LOSS, device="cuda")
        options |= dict(kl_scale=scale, kl_out=torch.zeros(len(x.q), device="cuda"))
    result = dsa_attention(
        *tensors[:6], sinks=tensors[6], softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end,
        token_weight=x.token_weight, **options,
    )  # fmt: skip
    result.out.backward(d_out)
    if result.loss is not None:
        (D_LOSS * result.loss).backward()
    selected = selection_mask(result.selection, len(x.k))
    shared = dict(d_out=d_out, value_dim=V, token_weight=x.token_weight, d_loss=D_LOSS, sinks=sinks)
    truth, eager = reference_dsa(x, v, selected, **shared), eager_dsa(x, v, selected, **shared)
    got = dict(out=result.out, lse=result.lse, kl=result.kl)
    got |= {
        f"d{'_' if len(name) > 1 else ''}{name}": y.grad
        for name, y in zip(LEAVES, tensors, strict=True)
        if y is not None
    }
    for name, value in got.items():
        three = value, getattr(truth, name), getattr(eager, name)
        assert_close(name, *(y.flatten() if value.dtype == torch.float32 else y for y in three))


def test_a_sink_that_takes_nothing_changes_no_bit() -> None:
    x = make_inputs(replace(LONG, **HEADS["grouped"]), seed=0, dtype=torch.bfloat16, device="cuda")
    v = make_values(x, 48, seed=1)
    chosen = dsa_attention(
        x.q, x.k, v, x.index_q, x.index_k, x.index_weights, softmax_scale=x.softmax_scale, key_start=x.key_start,
        key_end=x.key_end, topk=40,
    ).selection  # fmt: skip
    plain, sunk = (
        sparse_attention(x.q, x.k, v, chosen, softmax_scale=x.softmax_scale, sinks=sinks)
        for sinks in (None, torch.full((8,), -1e4, device="cuda", dtype=torch.bfloat16))
    )
    assert torch.equal(plain.out, sunk.out)
