"""The teacher is the model's own attention: judged by a naive softmax and by the models' eager weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flash_indexer.models import packing as packing_module
from flash_indexer.models.attach import IndexerHandle, LayerCapture, attach
from flash_indexer.models.capture import AttentionForm
from flash_indexer.models.packing import causal_attention, packing
from flash_indexer.ops import teacher_scores

Tiny = Callable[..., PreTrainedModel]
VOCABULARY = 61


def naive(
    q: Tensor, k: Tensor, v: Tensor, boundaries: tuple[int, ...], scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Token by token in float64."""
    q, k, v = q.double(), k.double(), v.double()
    per_group = q.shape[1] // k.shape[1]
    out = torch.empty(*q.shape[:2], v.shape[-1], dtype=torch.float64)
    lse = torch.empty(q.shape[:2], dtype=torch.float64)
    for begin, end in itertools.pairwise(boundaries):
        for t in range(begin, end):
            first = begin if window is None else max(begin, t + 1 - window)
            for h in range(q.shape[1]):
                logits = scale * (k[first : t + 1, h // per_group] @ q[t, h])
                lse[t, h] = logits.logsumexp(0)
                out[t, h] = logits.softmax(0) @ v[first : t + 1, h // per_group]
    return out, lse


@pytest.mark.parametrize("window", [None, 1, 4, 1000])
@pytest.mark.parametrize(("H", "G", "D", "V"), [(6, 2, 16, 16), (4, 4, 24, 12), (4, 1, 12, 20)])
@pytest.mark.parametrize("boundaries", [(0, 21), (0, 1, 9, 21)])
def test_output_and_lse_are_the_softmax_over_the_visible_keys(
    boundaries: tuple[int, ...], H: int, G: int, D: int, V: int, window: int | None
) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(21, H, D), torch.randn(21, G, D), torch.randn(21, G, V)
    positions = torch.cat([torch.arange(end - begin) for begin, end in itertools.pairwise(boundaries)])[None]
    out, lse = causal_attention(q, k, v, packing(positions), AttentionForm(0.37, window))
    want_out, want_lse = naive(q, k, v, boundaries, 0.37, window)
    assert out.shape == (21, H, V) and lse.shape == (21, H)
    torch.testing.assert_close(out.double(), want_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


def test_packing_begins_a_document_at_every_restart_and_every_row() -> None:
    found = packing(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]))
    assert found.boundaries == (0, 3, 5, 6, 10)
    assert found.document_start.dtype == torch.int32
    assert found.document_start.tolist() == [0, 0, 0, 3, 3, 5, 6, 6, 6, 6]
    # A row that begins in the middle of a document, and a jump that is no restart, begin a document too.
    assert packing(torch.tensor([[7, 8, 9, 20, 21]])).boundaries == (0, 3, 5)


def tokens(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def captures(handle: IndexerHandle, ids: Tensor, **inputs: Any) -> dict[int, LayerCapture]:
    found: dict[int, LayerCapture] = {}
    with handle.using(lambda capture: found.update({capture.layer: capture})):
        handle.model(ids, use_cache=False, **inputs)
    return found


def scores(capture: LayerCapture) -> Tensor:
    """[T, T], head-summed probabilities."""
    return teacher_scores(
        capture.q, capture.k, capture.lse, capture.key_start, capture.key_end, softmax_scale=capture.softmax_scale
    )


@torch.no_grad()
def eager_weights(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Each layer's [T, T] attention weights as the model itself computes them, summed over heads."""
    model.set_attn_implementation("eager")
    found = model(ids, use_cache=False, output_attentions=True).attentions
    assert found is not None and found[0] is not None
    return [layer[0].sum(0) for layer in found]


def test_teacher_is_the_models_eager_attention(tiny: Tiny, family: str) -> None:
    model, ids = tiny(family), tokens(1, 33)
    want = eager_weights(model, ids)
    handle = attach(model, num_heads=2, head_dim=32, layers=range(3))
    found = captures(handle, ids)
    assert sorted(found) == [0, 1, 2] and len(want) == 3
    heads = model.config.num_attention_heads
    for layer, weights in enumerate(want):
        got = scores(found[layer])
        torch.testing.assert_close(got, weights, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(got.sum(-1), torch.full((33,), float(heads)), rtol=1e-4, atol=1e-4)
        # Far from uniform, so that a wrong scale or a wrong head could not pass.
        assert weights[-1].max() > 1.5 * heads / 33


@pytest.mark.parametrize("family_name", ["qwen2, windows", "mistral, window"])
def test_windows_are_in_the_intervals(tiny: Tiny, family_name: str) -> None:
    model = tiny(family_name)
    windows = [None, 5, 5] if family_name.startswith("qwen2") else [7, 7, 7]
    found = captures(attach(model, num_heads=2, head_dim=32, layers=range(3)), tokens(1, 20))
    for layer, window in enumerate(windows):
        first = [0 if window is None else max(0, t + 1 - window) for t in range(20)]
        assert found[layer].key_start.tolist() == first
        assert found[layer].key_end.tolist() == list(range(1, 21))


def test_yarn_changes_the_scale(tiny: Tiny) -> None:
    plain = captures(attach(tiny("deepseek_v3"), num_heads=2, head_dim=32), tokens(1, 9))[0]
    yarn = captures(attach(tiny("deepseek_v3, yarn"), num_heads=2, head_dim=32), tokens(1, 9))[0]
    assert plain.softmax_scale == pytest.approx(24**-0.5)
    assert yarn.softmax_scale == pytest.approx(24**-0.5 * (0.1 * torch.tensor(8.0).log().item() + 1) ** 2)


def test_packed_documents_attend_as_if_alone(tiny: Tiny, family: str) -> None:
    model, lengths = tiny(family), (13, 1, 19)
    documents = [tokens(1, n, seed=n) for n in lengths]
    alone = [eager_weights(model, ids) for ids in documents]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    handle = attach(model, num_heads=2, head_dim=32, layers=range(3))
    found = captures(handle, torch.cat(documents, 1), position_ids=position_ids)
    for layer in range(3):
        want = torch.block_diag(*[weights[layer] for weights in alone])
        torch.testing.assert_close(scores(found[layer]), want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family_name", ["deepseek_v3", "deepseek_v3, no q-LoRA", "deepseek_v3, yarn"])
def test_absorbed_mla_has_the_same_teacher(tiny: Tiny, family_name: str) -> None:
    """scale * [W_k^T q_nope, q_rope]·[c_kv, k_rope] = scale * q·k: one key head of kv_lora_rank + rope dims."""
    model, ids = tiny(family_name), tokens(1, 27)
    latents: dict[int, Tensor] = {}
    for layer, block in enumerate(model.model.layers):
        block.self_attn.kv_a_layernorm.register_forward_hook(
            lambda module, args, output, layer=layer: latents.update({layer: output[0]})
        )
    found = captures(attach(model, num_heads=2, head_dim=32), ids)
    for layer, capture in found.items():
        attention = model.model.layers[layer].self_attn
        nope, value = attention.qk_nope_head_dim, attention.v_head_dim
        key_half = attention.kv_b_proj.weight.view(4, nope + value, -1)[:, :nope]
        absorbed_q = torch.cat(
            [torch.einsum("thd,hdr->thr", capture.q[..., :nope], key_half), capture.q[..., nope:]], -1
        )
        absorbed_k = torch.cat([latents[layer], capture.k[:, 0, nope:]], -1)[:, None]
        assert absorbed_q.shape == (27, 4, 24 + 8) and absorbed_k.shape == (27, 1, 24 + 8)
        got = teacher_scores(
            absorbed_q, absorbed_k, capture.lse, capture.key_start, capture.key_end,
            softmax_scale=capture.softmax_scale,
        )  # fmt: skip
        torch.testing.assert_close(got, scores(capture), rtol=1e-4, atol=2e-5)


def test_queries_have_intervals_of_their_own_the_same_for_all_layers() -> None:
    positions = torch.cat([torch.arange(6), torch.arange(9)])[None]
    whole = packing(positions)
    assert whole.visible(4, queries_only=True)[0] is whole.visible(4)[0], "one plan for attention and loss"
    queries = torch.tensor([2, 7, 14])
    some = packing(positions, queries=queries)
    for window in (None, 4):
        pair = some.visible(window, queries_only=True)
        assert all(x is y for x, y in zip(pair, some.visible(window, queries_only=True), strict=True))
        for got, of_all, want in zip(pair, some.visible(window), whole.visible(window), strict=True):
            assert torch.equal(of_all, want) and torch.equal(got, want[queries])


@pytest.mark.parametrize("queries", [None, torch.tensor([2, 7, 14])])
def test_what_is_seen_is_read_before_a_layer_runs(
    queries: Tensor | None, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU: of the queries with a loss too, as the same tensors that the layers get; on a CPU nothing waits."""
    done: list[Any] = []
    monkeypatch.setattr(packing_module, "read_intervals", lambda *read: done.append(read))
    found = packing(torch.arange(15)[None], queries=queries)
    pairs = [found.visible(None)] + ([] if queries is None else [found.visible(None, queries_only=True)])
    found.read_ahead()
    assert done == []
    found.rows = SimpleNamespace(device=torch.device("cuda"))
    found.read_ahead()
    assert [read[0] is pair[0] and read[1] is pair[1] for read, pair in zip(done, pairs, strict=True)] == [True] * len(
        pairs
    )
    assert all(read[2] == 15 for read in done)
    order: list[str] = []
    monkeypatch.setattr(packing_module.Packing, "read_ahead", lambda self: order.append("read"))
    handle = attach(tiny("llama"), num_heads=2, head_dim=32)
    with handle.using(lambda capture: order.append("layer")), torch.no_grad():
        handle.model(torch.arange(9)[None], use_cache=False)
    assert order[0] == "read" and order[1:] and set(order[1:]) == {"layer"}


@pytest.mark.parametrize(
    ("chunk", "softcap", "with_sinks"), [(4, None, False), (None, 0.8, False), (4, 0.8, True), (None, None, True)]
)
def test_chunks_softcap_and_sinks(chunk: int | None, softcap: float | None, with_sinks: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(21, 6, 16), torch.randn(21, 2, 16), torch.randn(21, 2, 12)
    boundaries = (0, 1, 9, 21)
    positions = torch.cat([torch.arange(end - begin) for begin, end in itertools.pairwise(boundaries)])[None]
    sinks = torch.linspace(-1.0, 2.0, 6) if with_sinks else None
    form = AttentionForm(0.37, None, chunk, sinks, softcap)
    out, lse = causal_attention(q, k, v, packing(positions), form)
    for begin, end in itertools.pairwise(boundaries):
        for t, h in itertools.product(range(begin, end), range(6)):
            first = begin if chunk is None else begin + (t - begin) // chunk * chunk
            logits = 0.37 * (k[first : t + 1, h // 3].double() @ q[t, h].double())
            logits = logits if softcap is None else softcap * (logits / softcap).tanh()
            counted = logits if sinks is None else torch.cat([logits, sinks[h : h + 1].double()])
            a = counted.softmax(0)[: len(logits)]
            torch.testing.assert_close(lse[t, h].double(), counted.logsumexp(0), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(out[t, h].double(), a @ v[first : t + 1, h // 3].double(), rtol=1e-5, atol=1e-5)
