"""The rope of the indexers, for every kind of rope of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from flash_indexer.models.attach import attach
from flash_indexer.models.hooks import TAP
from flash_indexer.models.rope import Ropes, default_rope_dim, indexer_rotary, rope_parameters

Tiny = Callable[..., PreTrainedModel]
FACTORS = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5]
LONG = dict(
    rope_type="longrope", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=32, short_factor=FACTORS,
    long_factor=[2 * x for x in FACTORS],
)  # fmt: skip


@pytest.mark.parametrize("rope_dim", [8, 12, 24])
def test_longrope_takes_frequencies_of_the_models_own(tiny: Tiny, rope_dim: int) -> None:
    model = tiny("llama", head_dim=24, rope_parameters=LONG)
    resized = indexer_rotary(model.config, rope_parameters(model.config), rope_dim)
    own = model.model.rotary_emb.original_inv_freq
    torch.testing.assert_close(resized.original_inv_freq, own[:: 24 // rope_dim])


def test_longrope_has_a_default_that_fits(tiny: Tiny) -> None:
    model = tiny("llama", head_dim=24, rope_parameters=LONG)
    assert [default_rope_dim(rope_parameters(model.config), head_dim) for head_dim in (64, 32, 16, 9)] == [
        24,
        24,
        12,
        8,
    ]
    assert default_rope_dim(rope_parameters(tiny("llama").config), 64) == 32
    for ids in (torch.arange(20), torch.arange(50)):  # short factors, long factors
        handle = attach(model, num_heads=2, head_dim=64)
        assert handle.indexers["0"].rope_dim == 24
        with torch.no_grad():
            model(ids[None], use_cache=False)
        assert all(bool(torch.isfinite(loss.kl)) for loss in handle.losses().values())
        handle.remove()


@pytest.mark.parametrize("rope_dim", [10, 32])
def test_longrope_of_other_dims_is_refused(tiny: Tiny, rope_dim: int) -> None:
    options: dict[str, Any] = dict(num_heads=2, head_dim=64, rope_dim=rope_dim)
    with pytest.raises(ValueError, match=rf"factors for, got {rope_dim}; possible here: \[2, 4, 6, 8, 12, 24\]"):
        attach(tiny("llama", head_dim=24, rope_parameters=LONG), **options)


def test_layers_that_share_a_rope_ask_it_once_in_a_forward(tiny: Tiny) -> None:
    handle = attach(tiny("llama"), num_heads=2, head_dim=32, rope_dim=8)
    assert len(handle.layers) > 1
    asked: list[int] = []
    rotaries = {handle.attentions[layer].__dict__[TAP].rotary for layer in handle.layers}
    for rotary in rotaries:
        rotary.register_forward_hook(lambda *_: asked.append(1))
    tokens = torch.arange(12)[None]
    for positions in (tokens, torch.cat([torch.arange(5), torch.arange(7)])[None]):
        with torch.no_grad():
            handle.model(tokens, position_ids=positions, use_cache=False)
        assert len(asked) == len(rotaries) == 1
        asked.clear()


def test_a_forwards_ropes_are_those_of_embedding_and_positions(tiny: Tiny) -> None:
    config = tiny("llama").config
    rotaries = [indexer_rotary(config, rope_parameters(config), dim) for dim in (4, 8)]
    ropes, hidden = Ropes(), torch.zeros(1, 3, 2)
    places = torch.arange(3)[None], torch.arange(4, 7)[None]
    for rotary in rotaries:
        for positions in places:
            for got, want in zip(ropes.of(rotary, hidden, positions), rotary(hidden, positions), strict=True):
                assert torch.equal(got, want)
    assert ropes.of(rotaries[0], hidden, places[0]) is ropes.of(rotaries[0], hidden, places[0])
    ropes.forget()
    places[0].add_(1)
    assert torch.equal(ropes.of(rotaries[0], hidden, places[0])[0], rotaries[0](hidden, places[0])[0])
