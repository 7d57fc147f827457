"""A forward whose loss is taken of some queries: the definition's with weight on these alone; others cost nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flash_indexer import LightningIndexer, reference
from flash_indexer.models import handle as handle_module
from flash_indexer.models.attach import IndexerHandle, LayerCapture, attach

Tiny = Callable[..., PreTrainedModel]
POSITIONS = torch.cat([torch.arange(6), torch.arange(9)])[None].expand(2, -1)
T = 30


def attached(model: PreTrainedModel, **sizes: Any) -> IndexerHandle:
    handle = attach(model, **(dict(num_heads=3, head_dim=32) | sizes))
    generator = torch.Generator().manual_seed(5)
    for parameter in handle.indexers.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return handle


@torch.no_grad()
def forward(handle: IndexerHandle, seed: int = 2) -> None:
    ids = torch.randint(0, 61, (2, 15), generator=torch.Generator().manual_seed(seed))
    handle.decoder(input_ids=ids, position_ids=POSITIONS, use_cache=False)


def gradients(handle: IndexerHandle, queries: Tensor | None, weight: float) -> dict[str, Tensor]:
    handle.queries, handle.token_weight = queries, weight
    handle.indexers.zero_grad()
    forward(handle)
    return {name: p.grad.clone() for name, p in handle.indexers.named_parameters() if p.grad is not None}


def definition(handle: IndexerHandle, weight: Tensor) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """Gradients by autograd of the definition in float64 with these weights [T], and every row's KL, by layer."""
    heard: dict[int, tuple[Any, ...]] = {}
    listeners = [
        module.register_forward_pre_hook(lambda module, args, name=name: heard.update({int(name): args}))
        for name, module in handle.indexers.items()
    ]
    found: dict[int, LayerCapture] = {}
    with handle.using(lambda capture: found.update({capture.layer: capture})):
        forward(handle)
    for listener in listeners:
        listener.remove()
    wanted, rows = {}, {}
    for layer, capture in found.items():
        indexer = handle.indexers[str(layer)]
        parameters = {name: p.detach().double().requires_grad_() for name, p in indexer.named_parameters()}
        args = tuple(None if x is None else x.double() for x in heard[layer])
        index = torch.func.functional_call(indexer, parameters, args)
        loss, kl = reference.indexer_kl(
            capture.q.double(), capture.k.double(), *index, softmax_scale=capture.softmax_scale,
            key_start=capture.key_start, key_end=capture.key_end, target=handle.target, token_weight=weight.double(),
        )  # fmt: skip
        loss.backward()
        wanted |= {f"{layer}.{name}": parameter.grad for name, parameter in parameters.items()}
        rows[layer] = kl
    return wanted, rows


@pytest.mark.parametrize("target", ["mean", "per_head", "sum_logits"])
def test_gradients_and_losses_are_the_definitions_of_the_drawn_rows(tiny: Tiny, family: str, target: str) -> None:
    model = tiny(family)
    heads = model.config.num_attention_heads if target == "per_head" else 3
    handle = attached(model, num_heads=heads, target=target)
    queries = torch.tensor([0, 3, 4, 5, 14, 15, 22, 28, 29])
    weight = torch.zeros(T)
    weight[queries] = 0.04
    want, kl = definition(handle, weight)
    got = gradients(handle, queries, 0.04)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert (got[name].double() - gradient).norm() < 2e-4 * gradient.norm(), name
    for layer, rows in kl.items():
        assert float(handle.losses()[layer].kl) == pytest.approx(float(rows[queries].mean()), rel=1e-4)


def test_the_mean_over_all_draws_is_the_whole_gradient(tiny: Tiny) -> None:
    """Two of the five runs of six tokens, each pair as often as any other: each token with probability 2 / 5."""
    handle = attached(tiny("llama"))
    whole = gradients(handle, None, 1 / T)
    draws = list(itertools.combinations(range(5), 2))
    mean = {name: torch.zeros_like(x) for name, x in whole.items()}
    for pair in draws:
        queries = torch.cat([torch.arange(6 * block, 6 * block + 6) for block in pair])
        for name, gradient in gradients(handle, queries, 1 / (T * 0.4)).items():
            mean[name] += gradient / len(draws)
    for name, gradient in whole.items():
        assert (mean[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_what_is_not_drawn_is_not_formed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = attached(tiny("llama"))
    seen, weights = [], []
    layer_kl = handle_module.layer_kl

    def watched(capture: LayerCapture, **options: Any) -> Any:
        rows = (capture.q, capture.lse, capture.index_q, capture.index_weights, capture.key_start, capture.key_end)
        seen.append((capture.key_start, {len(x) for x in rows}, len(capture.k), len(capture.index_k)))
        weights.append(options["token_weight"])
        return layer_kl(capture, **options)

    monkeypatch.setattr(handle_module, "layer_kl", watched)
    gradients(handle, torch.tensor([2, 9, 21]), 0.1)
    assert [x[1:] for x in seen] == [({3}, T, T)] * 3
    assert len({id(x[0]) for x in seen}) == len({id(x) for x in weights}) == 1, "plans and weights are kept per forward"


def test_no_query_at_all(tiny: Tiny) -> None:
    """As on a process whose part of a short sequence has none."""
    handle = attached(tiny("llama"))
    got = gradients(handle, torch.empty(0, dtype=torch.int64), 0.1)
    assert all((x == 0).all() for x in got.values())
    assert all(float(x) == 0 for loss in handle.losses().values() for x in loss)


def test_weights_are_a_mean_over_the_drawn_where_none_are_given(tiny: Tiny) -> None:
    handle = attached(tiny("llama"))
    queries = torch.arange(4, 20)
    want = gradients(handle, queries, 1 / 16)
    handle.token_weight = None
    handle.indexers.zero_grad()
    forward(handle)
    for name, parameter in handle.indexers.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name])


def test_consumers_get_all_tokens(tiny: Tiny) -> None:
    handle = attached(tiny("llama"))
    handle.queries = torch.tensor([1, 2])
    found: list[LayerCapture] = []
    with handle.using(found.append):
        forward(handle)
    assert {len(x.q) for x in found} == {len(x.index_q) for x in found} == {T}


@pytest.mark.parametrize(
    ("queries", "said"),
    [
        (
            torch.tensor([1, 2], dtype=torch.int32),
            r"must be int64 \[R\] on the CPU, got torch.int32 \[2\] on cpu; make it",
        ),
        (torch.tensor([[1, 2]]), r"must be int64 \[R\] on the CPU, got torch.int64 \[1, 2\]"),
        (torch.tensor([2, 1]), r"must ascend from 0 to at most 29, the last of the batch's tokens, got \[2, 1\] to 1"),
        (torch.tensor([1, 1]), "must ascend"),
        (torch.tensor([-1, 1]), "must ascend"),
        (torch.tensor([1, 30]), r"must ascend .* got \[1, 30\] to 30; make it anew for each batch, or set it to None"),
    ],
)
def test_queries_that_the_batch_does_not_have_are_refused(tiny: Tiny, queries: Tensor, said: str) -> None:
    handle = attached(tiny("llama"))
    handle.queries = queries
    with pytest.raises(ValueError, match=said):
        forward(handle)


def test_the_indexer_forms_queries_of_some_tokens_and_keys_of_all() -> None:
    torch.manual_seed(0)
    indexer = LightningIndexer(24, num_heads=3, head_dim=16, q_lora_rank=20, rope_dim=8, rope_interleaved=False)
    hidden, residual = torch.randn(11, 24), torch.randn(11, 20)
    queries = torch.tensor([0, 4, 10])
    for cos, sin in (torch.randn(2, 11, 8), torch.randn(2, 1, 8), torch.randn(2, 8)):
        index_q, index_k, weights = indexer(hidden, residual, cos, sin)
        some = indexer(hidden, residual, cos, sin, queries)
        for got, want in zip(some, (index_q[queries], index_k, weights[queries]), strict=True):
            torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match=r"queries must be int64 \[R\], got torch.bool \[11\]; .*nonzero"):
        indexer(hidden, residual, cos, sin, torch.ones(11, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"queries need hidden of \[T, hidden_size\], got \[1, 11, 24\]; flatten"):
        indexer(hidden[None], residual[None], cos, sin, queries)
