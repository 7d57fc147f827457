"""Each family's own indexer: our operands give the scores that Transformers computes, and rank all keys alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from own_models import CONFIGS, own_model, own_tokens
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from flash_indexer import reference
from flash_indexer.intervals import causal_intervals
from flash_indexer.models.attach import attach
from flash_indexer.models.capture import LayerCapture
from flash_indexer.models.families import find_decoder
from flash_indexer.models.own_indexers import OwnIndexer, indexer_sources, own_form, own_indexer
from flash_indexer.testing import assert_close

L = 29
POSITIONS = torch.cat([torch.arange(18), torch.arange(11)])[None]


class Ranked(TorchFunctionMode):
    """Notes what float tensors [B, L, L] topk is called with, and the indices that it gives: the indexers' alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[Tensor] = []
        self.indices: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "topk" and args[0].ndim == 3 and args[0].shape[1:] == (L, L):
            self.scores.append(args[0])
            self.indices.append(result.indices)
        return result


def own_scores(model: PreTrainedModel) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[int, dict[str, Any]]]:
    """Of each layer with an indexer: scores and ranks [L, L] as the model forms them, and what it forms them of."""
    attentions = dict(enumerate(layer.self_attn for layer in find_decoder(model).layers))
    layers = sorted(set(indexer_sources(attentions).values()))
    inputs: dict[int, dict[str, Any]] = {}
    hooks = []
    for layer in layers:
        indexer = own_indexer(attentions[layer])
        assert indexer is not None

        def note(module: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
            names = ["hidden", "q_residual", "rope", "mask", "positions"]
            names = names if len(args) + len(kwargs) == 6 else [name for name in names if name != "q_residual"]
            inputs[layer] = dict(zip(names, [*args, kwargs.get("position_ids")], strict=False))

        hooks.append(indexer.register_forward_pre_hook(note, with_kwargs=True))
    with torch.no_grad(), Ranked() as ranked:
        model(own_tokens(1, L), position_ids=POSITIONS, use_cache=False)
    for hook in hooks:
        hook.remove()
    found = zip(layers, ranked.scores, ranked.indices, strict=True)
    return {layer: (scores[0], indices[0]) for layer, scores, indices in found}, inputs


def operands(
    indexer: OwnIndexer, inputs: dict[str, Any], dtype: torch.dtype, queries: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one row, in `dtype`."""
    residual = inputs.get("q_residual")
    cos, sin = (x[0].to(dtype) for x in inputs["rope"])
    with torch.no_grad():
        return indexer.forward(
            inputs["hidden"][0].to(dtype), None if residual is None else residual[0].to(dtype), cos, sin,
            queries=queries, positions=POSITIONS[0],
        )  # fmt: skip


def visible() -> tuple[Tensor, Tensor]:
    return causal_intervals(torch.tensor([0, 18, L]))


def reference_scores(indexer: OwnIndexer, inputs: dict[str, Any], dtype: torch.dtype) -> Tensor:
    return reference.indexer_scores(*operands(indexer, inputs, dtype), *visible())


def check(model: PreTrainedModel, change: Callable[[OwnIndexer], None] = lambda indexer: None) -> None:
    """The model's own scores against ours in float64, by the ruler."""
    found, inputs = own_scores(model)
    assert found
    for layer, (scores, _) in found.items():
        own = own_indexer(find_decoder(model).layers[layer].self_attn)
        indexer = OwnIndexer(own)
        change(indexer)
        ours64, ours32 = (reference_scores(indexer, inputs[layer], dtype) for dtype in (torch.float64, torch.float32))
        assert_close(f"scores of layer {layer}", scores.masked_fill(ours32.isinf(), -torch.inf), ours64, ours32)


@pytest.mark.parametrize("family", CONFIGS)
def test_scores_are_the_models_own(family: str) -> None:
    check(own_model(family))


@pytest.mark.parametrize("family", CONFIGS)
def test_another_rope_is_seen(family: str) -> None:
    def change(indexer: OwnIndexer) -> None:
        indexer.rope_interleaved = not indexer.rope_interleaved

    with pytest.raises(AssertionError, match="scores of layer"):
        check(own_model(family), change)


@pytest.mark.parametrize("family", ["deepseek_v32", "hy_v4"])
def test_rope_on_the_other_dims_is_seen(family: str) -> None:
    def change(indexer: OwnIndexer) -> None:
        indexer.form = replace(indexer.form, rope_last=not indexer.form.rope_last)

    with pytest.raises(AssertionError, match="scores of layer"):
        check(own_model(family), change)


@pytest.mark.parametrize("family", CONFIGS)
def test_attached_operands_rank_all_keys_as_the_model_does(family: str) -> None:
    """In a packed batch, through the hooks, by the operator's scores: the model's order never goes up in ours."""
    model = own_model(family)
    found, _ = own_scores(model)
    captures: dict[int, LayerCapture] = {}
    handle = attach(model, indexers="own")
    with torch.no_grad(), handle.using(lambda capture: captures.update({capture.layer: capture})):
        model(own_tokens(1, L), position_ids=POSITIONS, use_cache=False)
    assert set(handle.layers) == set(found)
    for layer, (_, ranks) in found.items():
        c = captures[layer]
        scores = reference.indexer_scores(
            c.index_q.double(), c.index_k.double(), c.index_weights.double(), c.key_start, c.key_end
        )
        ordered = scores.gather(1, ranks.long())
        for t, count in enumerate((c.key_end - c.key_start).tolist()):
            assert ordered[t, :count].isfinite().all()
            assert (ordered[t, 1:count] <= ordered[t, : count - 1] + 1e-4).all()


@pytest.mark.parametrize("family", CONFIGS)
def test_some_queries_have_the_operands_that_they_have_among_all(family: str) -> None:
    model = own_model(family)
    _, inputs = own_scores(model)
    for layer, given in inputs.items():
        indexer = OwnIndexer(find_decoder(model).layers[layer].self_attn.indexer)
        every, queries = operands(indexer, given, torch.float64), torch.tensor([1, 19, 28])
        some = operands(indexer, given, torch.float64, queries)
        for wanted, got in zip((every[0][queries], every[1], every[2][queries]), some, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_parameters_and_their_names_are_the_models() -> None:
    model = own_model("mistral_large4")
    attention = find_decoder(model).layers[2].self_attn
    indexer = OwnIndexer(attention.indexer)
    assert set(indexer.state_dict()) == set(attention.indexer.state_dict())
    assert {id(p) for p in indexer.parameters()} == {id(p) for p in attention.indexer.parameters()}


def test_an_unknown_family_is_refused() -> None:
    class OtherIndexer(nn.Module):
        pass

    with pytest.raises(ValueError, match="knows the scores of DeepseekV32Indexer.*got a model with OtherIndexer"):
        own_form(OtherIndexer())
