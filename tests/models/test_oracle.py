"""The oracle's keys are those of largest attention, and a model that attends to them trains as it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flash_indexer import reference
from flash_indexer.intervals import causal_intervals
from flash_indexer.models import oracle
from flash_indexer.models.attach import attach
from flash_indexer.models.oracle import oracle_keys
from flash_indexer.models.sparse import SparseHandle
from flash_indexer.ops import SparseSettings, sparse_indexer_kl
from flash_indexer.parallel.mesh import Parallel
from flash_indexer.testing.sparse import selection_mask

Tiny = Callable[..., PreTrainedModel]
K = 5
LENGTHS = (1, 12, 7, 11)


def tokens(count: int) -> Tensor:
    return torch.randint(1, 61, (1, count), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("workspace_bytes", [1, 2**20])
def test_they_are_the_keys_of_largest_attention(workspace_bytes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    start, end = causal_intervals(torch.tensor([0, *LENGTHS]).cumsum(0))
    q = torch.randn(len(start), 6, 16, generator=generator, dtype=torch.float64)
    k = torch.randn(len(start), 2, 16, generator=generator, dtype=torch.float64)
    found = oracle_keys(q, k, start, end, K, softmax_scale=0.7, workspace_bytes=workspace_bytes)
    p = reference.target_distribution(q, k, 0.7, start, end)
    seen = reference.visible_keys(start, end, len(k))
    wanted = reference.selected_keys(p.masked_fill(~seen, -torch.inf), start, end, K)
    assert torch.equal(selection_mask(found, len(k)), wanted)
    assert bool((wanted.sum(-1) == K).any()) and bool((seen & ~wanted).any())


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_layers_attend_to_them_and_the_indexers_learn_on_them(
    tiny: Tiny, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The indexers' gradients are those of the KL on these keys, once, under activation checkpointing as well."""
    made: list[tuple[SparseSettings, Tensor, Tensor, tuple[Tensor, ...]]] = []
    real = oracle.recomputed_attention

    def spy(settings: SparseSettings, q: Tensor, k: Tensor, v: Any, sinks: Any, leaves: Any) -> Any:
        made.append((settings, q.detach(), k.detach(), tuple(x.detach() for x in leaves)))
        return real(settings, q, k, v, sinks, leaves)

    monkeypatch.setattr(oracle, "recomputed_attention", spy)
    gradients: list[list[Tensor]] = []
    for again in (False, True):
        model = tiny(name).requires_grad_(True)
        torch.manual_seed(0)
        handle = attach(model, num_heads=3, head_dim=32, topk=K)
        assert isinstance(handle, SparseHandle)
        handle.keys = "oracle"
        if again:
            model.train()
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(tokens(30), use_cache=False).logits.square().mean().backward()
        every = (*model.parameters(), *handle.indexers.parameters())
        gradients.append([x.grad for x in every if x.grad is not None])
        assert len(handle.losses()) == 3 and all(float(loss.kl) > 0 for loss in handle.losses().values())
    assert len(made) == 9  # of the second model's layers twice each
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other) and bool(one.isfinite().all())
    start, end = causal_intervals(torch.tensor([0, 30]))
    for settings, q, k, leaves in made:
        scale, selection = settings.softmax_scale, settings.selection
        assert selection is not None
        p = reference.target_distribution(q.double(), k.double(), scale, start, end)
        chosen = selection_mask(selection, len(k))
        best = p.topk(K).values.sum(-1)
        torch.testing.assert_close((p * chosen).sum(-1), best, rtol=1e-6, atol=0.0)
        if settings.kl_out is not None:
            expected = sparse_indexer_kl(q, k, *leaves, selection, softmax_scale=scale).kl
            torch.testing.assert_close(settings.kl_out, expected, rtol=1e-4, atol=1e-6)
    assert sum(settings.kl_out is not None for settings, *_ in made) == 6


def test_sharing_a_sequence_is_refused(tiny: Tiny) -> None:
    handle = attach(tiny("llama"), num_heads=3, head_dim=32, topk=K)
    assert isinstance(handle, SparseHandle)
    handle.keys = "oracle"
    handle.parallel = Parallel(cp=2)
    with pytest.raises(ValueError, match=r'keys="oracle" must run in one process, without sinks, .* got cp=2'):
        handle.model(tokens(30), position_ids=torch.arange(30)[None], use_cache=False)
