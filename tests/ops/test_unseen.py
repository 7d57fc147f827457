"""Tokens that nobody sees: found from the intervals; NaN and inf in them show in the loss, whatever the target."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flash_indexer import LightningIndexer, indexer_kl, warmup_attention
from flash_indexer.ops.unseen import unseen_tokens
from flash_indexer.testing import SHAPES, Inputs, make_inputs


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_unseen_tokens() -> None:
    queries, keys = unseen_tokens(int32(0, 2, 3, 5), int32(2, 2, 5, 6), 8) or (None, None)
    assert queries is not None and keys is not None
    assert queries.tolist() == [1] and keys.tolist() == [2, 6, 7]
    assert unseen_tokens(int32(0, 0, 1), int32(1, 2, 3), 3) is None


def padded() -> Inputs:
    """One query that sees nothing and two keys that nobody sees, in the middle of what is computed together."""
    x = make_inputs(replace(SHAPES["cached_prefix"], documents=((9, 9),), H=4, G=2, I=4), seed=0)
    start, end = x.key_start.clone(), x.key_end.clone()
    end[4] = start[4] = 5
    start[5:], end[5:] = 5, end[5:].clamp(min=5)
    start[:4], end[:4] = 0, end[:4].clamp(max=3)
    return replace(x, key_start=start, key_end=end)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["index_q", "index_k", "index_weights"])
@pytest.mark.parametrize("target", ["mean", "sum_logits", "per_head"])
def test_what_is_not_finite_in_them_shows_in_the_loss(target: str, name: str, value: float) -> None:
    x = padded()
    queries, keys = unseen_tokens(x.key_start, x.key_end, x.k.shape[0]) or (None, None)
    assert queries is not None and keys is not None and len(queries) == 1 and len(keys) == 2
    options = dict(softmax_scale=0.3, key_start=x.key_start, key_end=x.key_end, target=target)
    tensors = dict(index_q=x.index_q, index_k=x.index_k, index_weights=x.index_weights)
    clean = indexer_kl(x.q, x.k, *tensors.values(), **options)
    assert clean.loss.isfinite()
    tensors[name] = tensors[name].clone()
    tensors[name][keys[0] if name == "index_k" else queries[0]] = value
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    got = indexer_kl(x.q, x.k, *leaves, **options)
    assert got.loss.isnan() and torch.equal(got.kl, clean.kl)
    assert warmup_attention(x.q, x.k, x.k, *leaves, **options).loss.isnan()


def test_padding_of_zeros_leaves_finite_gradients_in_the_module() -> None:
    x, hidden = padded(), torch.randn(9, 16)
    queries, _ = unseen_tokens(x.key_start, x.key_end, x.k.shape[0]) or (None, None)
    indexer = LightningIndexer(16, num_heads=4, head_dim=8, rope_dim=4, rope_interleaved=False)
    cos, sin = torch.ones(9, 4), torch.zeros(9, 4)
    options = dict(softmax_scale=0.3, key_start=x.key_start, key_end=x.key_end)
    for padding, finite in ((0.0, True), (torch.nan, False)):
        hidden[queries] = padding
        indexer.zero_grad()
        loss = indexer_kl(x.q, x.k, *indexer(hidden, None, cos, sin), **options).loss
        loss.backward()
        gradients = [p.grad for p in indexer.parameters() if p.grad is not None]
        assert bool(loss.isfinite()) == finite and all(bool(x.isfinite().all()) for x in gradients) == finite
