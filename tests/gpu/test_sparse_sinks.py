"""Sinks in the sparse stage on the GPU, in dense tiles and over gathered keys, against float64 by the ruler."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparse_problems import judge, make, step

from flash_indexer import dsa_attention, sparse_attention
from flash_indexer.testing import Shape

pytestmark = pytest.mark.gpu
HEADS: dict[str, dict[str, int]] = {
    "grouped": dict(H=8, G=2, D=64), "latent": dict(H=32, G=1, D=64), "absorbed": dict(H=32, G=1, D=576),
    "absorbed, 128 heads": dict(H=128, G=1, D=576), "absorbed, any order": dict(H=32, G=1, D=576),
}  # fmt: skip
LONG = Shape(((1, 1), (300, 300), (3, 0), (150, 211)), H=1, G=1, D=1, I=4, E=32)


@pytest.mark.parametrize("kl", ["forward", "backward"])
@pytest.mark.parametrize("heads", HEADS)
def test_against_float64(heads: str, kl: str) -> None:
    """With sinks below and above the keys' logsumexps."""
    V = 48 if heads == "grouped" else {64: -32, 576: -512}[HEADS[heads]["D"]]
    x, v, d_out = make(replace(LONG, **HEADS[heads]), V, "cuda")
    sinks = torch.linspace(-2.0, 6.0, x.q.shape[1], device="cuda")
    options = dict(topk=40, kl=kl, deterministic="any order" not in heads, workspace_bytes=2**22)
    judge(x, v, d_out, step(x, v, d_out, sinks=sinks, **options), sinks)


def test_a_sink_that_takes_nothing_changes_no_bit() -> None:
    x, v, _ = make(replace(LONG, **HEADS["grouped"]), 48, "cuda")
    chosen = dsa_attention(
        x.q, x.k, v, x.index_q, x.index_k, x.index_weights, softmax_scale=x.softmax_scale, key_start=x.key_start,
        key_end=x.key_end, topk=40,
    ).selection  # fmt: skip
    plain, sunk = (
        sparse_attention(x.q, x.k, v, chosen, softmax_scale=x.softmax_scale, sinks=sinks)
        for sinks in (None, torch.full((8,), -1e4, device="cuda", dtype=torch.bfloat16))
    )
    assert torch.equal(plain.out, sunk.out)
