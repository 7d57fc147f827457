"""A sparse model: it computes what the definition says, trains as it says, generates from its cache, and is undone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    StaticCache,
)
from transformers.cache_utils import DynamicIndexedLayer

from flash_indexer import reference
from flash_indexer.models import absorbed, sparse
from flash_indexer.models.attach import attach
from flash_indexer.models.sharding import check_heads, shard_model
from flash_indexer.models.sparse import SparseHandle
from flash_indexer.models.sparse_hooks import SPARSE_TAP
from flash_indexer.parallel.mesh import Parallel, make_parallel
from flash_indexer.testing import assert_close
from flash_indexer.testing.sparse import selection_mask

Tiny = Callable[..., PreTrainedModel]
K = 5
LENGTHS = (12, 7, 11)  # a row of packed documents
DEFINITION = "definition_of_sparse_attention"
MASKS: dict[int, Tensor] = {}


def tokens(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(seed))


def sparsely(model: PreTrainedModel, topk: int = K, **options: Any) -> SparseHandle:
    """Every parameter of the indexers random."""
    every = list(range(model.config.num_hidden_layers))  # those with a window as well
    handle = attach(model, **(dict(num_heads=3, head_dim=32, layers=every) | options), topk=topk)
    generator = torch.Generator().manual_seed(5)
    for parameter in handle.indexers.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    assert isinstance(handle, SparseHandle)
    return handle


def without_experts(tiny: Tiny, family: str) -> PreTrainedModel:
    """Experts have no float64, and a rounding chooses others of them."""
    return tiny(family, **(dict(first_k_dense_replace=3) if family.startswith("deepseek") else {}))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    return model(ids, use_cache=False, **inputs).logits


def packed(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    return dict(position_ids=torch.cat([torch.arange(n) for n in lengths])[None])


def defined_attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scaling: float, **kwargs: Any) -> Any:
    """The reference on the selection in MASKS."""
    rows = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    return reference.sparse_attention(*rows, MASKS[module.layer_idx], scaling)[0][None], None


AttentionInterface.register(DEFINITION, defined_attention)
AttentionMaskInterface.register(DEFINITION, lambda *args, **kwargs: None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the layers gave to `dsa_attention` and got, in order; the index tensors keep their gradients."""
    made: list[dict[str, Any]] = []
    real = sparse.dsa_attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        for leaf in args[3:6]:
            if leaf.requires_grad:
                leaf.retain_grad()
        result = real(*args, **kwargs)
        made.append(dict(zip(("q", "k", "v", "index_q", "index_k", "weights"), args, strict=True)) | kwargs)
        made[-1]["selected"] = selection_mask(result.selection, len(args[1]))
        return result

    monkeypatch.setattr(sparse, "dsa_attention", spy)
    return made


def test_training_is_the_definitions(tiny: Tiny, family: str, calls: list[dict[str, Any]]) -> None:
    """Selection, logits, the gradients of every parameter of the model, and of the index tensors, in float64."""
    model, ids = without_experts(tiny, family).double(), tokens(1, sum(LENGTHS))
    handle = sparsely(model)
    handle.indexers.double()
    handle.token_weight, handle.kl_scale = 0.01, torch.tensor(3.0, dtype=torch.float64)
    upstream = torch.randn(1, len(ids[0]), 61, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    got = model(ids, use_cache=False, **packed()).logits
    (got * upstream).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for layer, call in enumerate(calls):
        start, end = call["key_start"], call["key_end"]
        index = [call[name].detach().requires_grad_() for name in ("index_q", "index_k", "weights")]
        scores = reference.indexer_scores(*index, start, end)
        assert torch.equal(call["selected"], reference.selected_keys(scores, start, end, K))
        MASKS[layer] = call["selected"]
        weight = torch.full((len(start),), 0.03, dtype=torch.float64)
        q, k, scale = call["q"].detach(), call["k"].detach(), call["softmax_scale"]
        loss, kl = reference.sparse_indexer_kl(
            q, k, *index, MASKS[layer], softmax_scale=scale, token_weight=weight
        )  # fmt: skip
        loss.backward()
        for name, leaf in zip(("index_q", "index_k", "weights"), index, strict=True):
            torch.testing.assert_close(call[name].grad, leaf.grad, rtol=1e-9, atol=1e-13)
        assert float(handle.losses()[layer].kl) == pytest.approx(float(kl.mean()), rel=1e-9)
    assert len(calls) == 3 and any(bool((mask.sum(-1) == K).any()) for mask in MASKS.values())
    handle.remove()
    model.zero_grad()
    model.set_attn_implementation(DEFINITION)
    want = model(ids, use_cache=False, **packed()).logits
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    (want * upstream).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_it_is_dense_where_k_covers_all_keys_and_undone_to_the_bit(tiny: Tiny, family: str) -> None:
    model, ids = tiny(family), tokens(2, 29)
    model.get_input_embeddings().weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before, names = logits(model, ids), list(model.state_dict())
    wide = tiny(family).double()
    wide.set_experts_implementation("eager")  # torch's grouped products know no float64
    handle = sparsely(model, 29)
    assert_close("logits", *(x.flatten(0, 1) for x in (logits(model, ids), logits(wide, ids), before)))
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    handle.topk = K
    assert not torch.allclose(logits(model, ids), before, rtol=1e-2, atol=1e-2)
    handle.remove()
    handle.remove()
    assert torch.equal(logits(model, ids), before) and list(model.state_dict()) == names
    assert not any(SPARSE_TAP in m.__dict__ or "expand_kv" in m.__dict__ or m._forward_hooks for m in model.modules())
    attach(model, num_heads=3, head_dim=32).remove()


def test_layers_without_an_indexer_stay_dense(tiny: Tiny, family: str) -> None:
    model, ids = tiny(family), tokens(1, sum(LENGTHS))
    documents = [logits(model, part) for part in ids.split(LENGTHS, 1)]
    handle = sparsely(model, 40, layers=[1])
    torch.testing.assert_close(logits(model, ids, **packed()), torch.cat(documents, 1), rtol=1e-4, atol=1e-4)
    handle.topk = K
    with torch.no_grad():
        got = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        want = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=False
        )  # fmt: skip
    assert torch.equal(got, want) and list(handle.losses()) == [1]


def generated(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0) | options
    out: Tensor = model.generate(ids, attention_mask=mask, **options)
    return out[:, ids.shape[1] :]


def test_cached_generation_is_the_uncached(tiny: Tiny, family: str) -> None:
    """Greedy, by beams (the cache is reordered), and in a batch that is padded on the left."""
    model, ids = tiny(family), tokens(2, 17)
    sparsely(model)
    assert torch.equal(generated(model, ids), generated(model, ids, use_cache=False))
    beams = [generated(model, ids, num_beams=2, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :6] = mask[0, :6] = 0
    got = generated(model, padded, mask)
    assert torch.equal(got[:1], generated(model, ids[:1, 6:])) and torch.equal(got[1:], generated(model, ids[1:]))


@torch.no_grad()
def test_index_keys_are_cropped_with_the_cache(tiny: Tiny, family: str) -> None:
    model, ids, other = tiny(family), tokens(2, 19), tokens(2, 6, seed=9)
    sparsely(model)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True)
    assert all(isinstance(layer, DynamicIndexedLayer) for layer in cache.layers)
    cache.crop(-7)
    got = model(other, past_key_values=cache, use_cache=True).logits
    want = logits(model, torch.cat([ids[:, :12], other], 1))[:, 12:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def gradients_of(handle: SparseHandle, ids: Tensor) -> list[Tensor]:
    model = handle.model
    model.zero_grad()
    handle.indexers.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    found = [*model.parameters(), *handle.indexers.parameters()]
    return [parameter.grad.clone() for parameter in found if parameter.grad is not None]


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_activation_checkpointing_changes_no_bit(tiny: Tiny, name: str) -> None:
    model, ids = tiny(name).train(), tokens(2, 21)
    handle = sparsely(model)
    want, kl = gradients_of(handle, ids), handle.losses()
    model.activation_checkpointing_enable({"use_reentrant": False})
    got = gradients_of(handle, ids)
    assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for layer, loss in handle.losses().items():
        assert torch.equal(loss.kl, kl[layer].kl) and float(loss.kl) > 0 and loss.uniform_kl.isnan()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="activation checkpointing must be without reentrance"):
        gradients_of(handle, ids)


@pytest.mark.parametrize("outer", [False, True])
def test_runs_of_queries_are_absorbed_one_at_a_time_with_the_same_result(
    tiny: Tiny, outer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output, KL and every gradient in float64; a key's is a sum over runs. Also inside checkpointed layers."""
    found, runs, ids, real = [], list[int](), tokens(1, sum(LENGTHS)), absorbed.recomputed_attention

    def spy(settings: Any, q: Tensor, *others: Any) -> Any:
        runs.append(len(q))
        return real(settings, q, *others)

    monkeypatch.setattr(absorbed, "recomputed_attention", spy)
    for run_tokens in (None, 7):
        model = without_experts(tiny, "deepseek_v3").double().requires_grad_(True)
        token = 4 * (2 * 24 + 8) * 8  # heads, two latents and the rotated part, bytes
        monkeypatch.setattr(absorbed, "WHOLE_BYTES", 2**40 if run_tokens is None else 0)
        monkeypatch.setattr(absorbed, "RUN_BYTES", token * (run_tokens or 1))
        handle = sparsely(model)
        handle.indexers.double()
        handle.kl_scale = torch.tensor(3.0, dtype=torch.float64)
        if outer:
            model.train()
            model.activation_checkpointing_enable({"use_reentrant": False})
        runs.clear()
        out = model(ids, use_cache=False, **packed()).logits
        assert runs == ([] if run_tokens is None else 3 * [7, 7, 7, 7, 2])
        out.square().mean().backward()
        every = [*model.named_parameters(), *handle.indexers.named_parameters()]
        kl = torch.stack([loss.kl for loss in handle.losses().values()])
        found.append([("out", out.detach()), ("KL", kl), *((name, x.grad) for name, x in every)])
    for (name, whole), (_, in_runs) in zip(*found, strict=True):
        assert (whole is None) == (in_runs is None), name
        if whole is not None and in_runs is not None:
            assert bool(whole.abs().sum() > 0) or "bias" in name, name
            torch.testing.assert_close(in_runs, whole, rtol=1e-8, atol=1e-12, msg=name)


def test_activation_checkpointing_frees_what_runs_of_queries_selected(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(absorbed, "WHOLE_BYTES", 0)
    made, real = list[weakref.ref[Tensor]](), sparse.select_keys

    def spy(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        made.extend(weakref.ref(x) for x in (found.indices, found.scores))
        return found

    monkeypatch.setattr(sparse, "select_keys", spy)
    handle = sparsely(without_experts(tiny, "deepseek_v3").requires_grad_(True))
    handle.model.train()
    handle.model.activation_checkpointing_enable({"use_reentrant": False})
    loss = handle.model(tokens(1, 21), use_cache=False).logits.square().mean()
    assert len(made) == 6 and all(x() is None for x in made)
    loss.backward()
    assert len(made) == 12 and all(float(x.kl) > 0 for x in handle.losses().values())


def test_runs_of_queries_learn_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(absorbed, "WHOLE_BYTES", 0)
    handle = sparsely(without_experts(tiny, "deepseek_v3").requires_grad_(True))
    loss = handle.model(tokens(1, 21), use_cache=False).logits.square().mean()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, handle.model.lm_head.weight, retain_graph=True)
        torch.autograd.grad(loss, handle.model.model.embed_tokens.weight, create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="would count the KL twice"):
        loss.backward()


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_frozen_models_indexers_learn_the_same_in_the_forward(tiny: Tiny, name: str) -> None:
    handle, ids = sparsely(without_experts(tiny, name).double()), tokens(2, 21)
    handle.indexers.double()
    gradients_of(handle, ids)
    want, kl = [parameter.grad.clone() for parameter in handle.indexers.parameters()], handle.losses()
    handle.model.zero_grad()
    handle.indexers.zero_grad()
    logits(handle.model, ids)
    for parameter, gradient in zip(handle.indexers.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-13)
    assert all(parameter.grad is None for parameter in handle.model.parameters())
    for layer, loss in handle.losses().items():
        assert float(loss.kl) == pytest.approx(float(kl[layer].kl)) and float(loss.uniform_kl) > 0
    handle.indexers.zero_grad()
    handle.indexers.eval()
    logits(handle.model, ids)
    assert all(parameter.grad is None for parameter in handle.indexers.parameters()) and len(handle.losses()) == 3


@pytest.mark.parametrize("deterministic", [True, False])
def test_every_operator_is_told_whether_sums_have_one_order(
    tiny: Tiny, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, set[bool]] = {}
    names = ("dsa_attention", "sparse_attention", "sparse_indexer_kl")

    def spy(name: str, real: Any, *args: Any, **kwargs: Any) -> Any:
        told.setdefault(name, set()).add(kwargs["deterministic"])
        return real(*args, **kwargs)

    for name in names:
        monkeypatch.setattr(sparse, name, partial(spy, name, getattr(sparse, name)))
    handle, ids = sparsely(tiny("llama")), tokens(2, 21)
    handle.deterministic = deterministic
    gradients_of(handle, ids)
    with torch.no_grad():
        logits(handle.model, ids)
    assert told == {name: {deterministic} for name in names}


def test_generation_never_trains(tiny: Tiny) -> None:
    handle = sparsely(tiny("llama"))
    assert handle.indexers.training
    generated(handle.model, tokens(1, 12))
    assert all(parameter.grad is None for parameter in handle.indexers.parameters()) and handle.losses() == {}


def test_nothing_learns_inside_inference_mode(tiny: Tiny) -> None:
    handle = sparsely(tiny("llama"))
    with torch.inference_mode():
        generated(handle.model, tokens(1, 12))
        with pytest.raises(ValueError, match="must run outside of torch.inference_mode"):
            handle.model(tokens(1, 12), use_cache=False)
        handle.indexers.eval()
        handle.model(tokens(1, 12), use_cache=False)


def test_autocast_keeps_float32_weights_and_gradients(tiny: Tiny, family: str) -> None:
    handle, ids = (
        sparsely(without_experts(tiny, family), 64),
        tokens(2, 21),
    )  # all keys: a selection would differ by rounding
    want = gradients_of(handle, ids)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients_of(handle, ids)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.2 * b.norm() + 1e-3


def test_a_frozen_part_gets_no_gradient(tiny: Tiny) -> None:
    model = tiny("llama").requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    handle = sparsely(model)
    assert len(gradients_of(handle, tokens(1, 21))) == 1 + len(list(handle.indexers.parameters()))


@pytest.fixture
def two_of_heads() -> Iterator[Parallel]:
    """A process group of two that are not there: what is shared out can be asked, not computed."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield make_parallel("cpu", tp=2)
    dist.destroy_process_group()


def test_a_model_whose_heads_are_shared_out_already_is_refused(tiny: Tiny, two_of_heads: Parallel) -> None:
    """They would be shared out twice."""
    model = tiny("llama")
    shard_model(model, two_of_heads, fsdp=False)
    with pytest.raises(ValueError, match="with topk and tp=2 each process must hold all heads of the model"):
        attach(model, parallel=two_of_heads, topk=4)


def test_heads_are_those_that_a_config_names() -> None:
    """GPT-2's has no key heads of its own."""
    check_heads("attach", GPT2Config(n_head=12), 4)
    with pytest.raises(ValueError, match="attach: tp must divide num_attention_heads = 12, got tp=5"):
        check_heads("attach", GPT2Config(n_head=12), 5)
    check_heads("attach", LlamaConfig(num_attention_heads=8, num_key_value_heads=1), 4)
    with pytest.raises(ValueError, match=r"tp must divide num_key_value_heads = 2, got tp=4; possible here: \[1, 2\]"):
        check_heads("attach", LlamaConfig(num_attention_heads=8, num_key_value_heads=2), 4)


@pytest.mark.parametrize("topk", [0, -3, 2.5, True, "8"])
def test_a_k_that_is_none_is_refused(tiny: Tiny, topk: Any) -> None:
    with pytest.raises(ValueError, match=f"attach: topk must be a whole number of keys, 1 or more, got {topk!r}"):
        attach(tiny("llama"), topk=topk)


def test_what_can_not_be_sparse_is_refused_and_left_as_it_was(tiny: Tiny) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="with topk, target must be \"mean\", got 'sum_logits'"):
        attach(model, target="sum_logits", topk=4)
    with pytest.raises(ValueError, match="attach: tp must divide num_attention_heads = 6, got tp=4; possible here: "):
        attach(model, parallel=Parallel(tp=4), topk=4)
    handle = sparsely(model)
    with pytest.raises(ValueError, match="has indexers attached already"):
        attach(model)
    with pytest.raises(ValueError, match="using: captures are those of dense attention"):
        handle.using(lambda capture: None)
    handle.remove()
    with pytest.warns(UserWarning, match="topk = 256 covers the model's context of 256 tokens"):
        sparsely(model, 256).remove()


def test_a_part_of_a_sequence_generates_nothing(tiny: Tiny) -> None:
    model, ids = tiny("llama"), tokens(2, 12)
    attach(model, parallel=Parallel(cp=2), topk=4)
    with pytest.raises(ValueError, match="with cp=2 there must be neither padding nor a cache .*, got padding"):
        model(ids, attention_mask=torch.tensor([[0] * 3 + [1] * 9, [1] * 12]))
    full = DynamicCache(config=model.config)
    full.update(torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 8), 0)
    with pytest.raises(ValueError, match="neither padding nor a cache that holds keys, got 5 keys; generate in one"):
        model(ids, past_key_values=full, use_cache=True)
    with pytest.raises(ValueError, match="with cp=2 the forward needs position_ids and no other form"):
        model(ids, use_cache=False)


def test_calls_that_can_not_be_sparse_are_refused(tiny: Tiny) -> None:
    model, ids = tiny("llama"), tokens(2, 12)
    full = DynamicCache(config=model.config)
    model(ids, past_key_values=full)
    sparsely(model)
    holes = torch.ones_like(ids)
    holes[0, 3] = 0
    four = torch.ones(2, 1, 12, 12)
    refused: list[tuple[str, dict[str, Any]]] = [
        ("attention_mask must be zeros, then ones", dict(attention_mask=holes)),
        ("attention_mask must be [B, L], got [2, 1, 12, 12]", dict(attention_mask=four)),
        ("attention_mask must be [B, tokens in the cache and new ones] = [2, 24]",
         dict(past_key_values=full, attention_mask=torch.ones_like(ids))),
        ("layer 0 of the cache holds keys without index keys", dict(past_key_values=full)),
        ("the cache must be a DynamicCache",
         dict(past_key_values=StaticCache(config=model.config, max_cache_len=32))),
        ("output_attentions must be False", dict(output_attentions=True)),
    ]  # fmt: skip
    for message, inputs in refused:
        with pytest.raises(ValueError, match=message.replace("[", r"\[")), torch.no_grad():
            model(ids, **inputs)
    padded = torch.ones_like(ids)
    padded[0, :2] = 0
    with pytest.raises(ValueError, match="position_ids must go on by one"), torch.no_grad():
        model(ids, attention_mask=padded, position_ids=packed((5, 7))["position_ids"].expand(2, -1))
    model.train()
    model.config.attention_dropout = 0.1
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="dropout must be 0, got 0.1"):
        model(ids, use_cache=False)


SIZES: dict[str, Any] = dict(
    vocab_size=61, hidden_size=48, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=12, linear_value_head_dim=12)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Qwen3NextConfig(
                **SIZES, **LINEAR, **EXPERTS, num_hidden_layers=4, num_experts=4, shared_expert_intermediate_size=32
            ),
            "with topk, every layer must have softmax attention",
        ),
        (Gemma2Config(**SIZES, num_hidden_layers=2, attn_logit_softcapping=50.0), "got attn_logit_softcapping=50.0"),
    ],
    ids=["hybrid", "softcap"],
)
def test_attention_that_would_be_another_is_refused_and_undone(config: Any, message: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = logits(model, tokens(1, 9))
    with pytest.raises(ValueError, match=message):
        attach(model, num_heads=2, head_dim=32, topk=4)
    assert torch.equal(logits(model, tokens(1, 9)), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("layers", [None, [0, 1]], ids=["the sliding layer stays as it is", "every layer"])
def test_sinks_are_the_models(layers: list[int] | None) -> None:
    """Where no key is left out, eager attention's logits, gradients and tokens, in layers with and without indexer."""
    torch.manual_seed(0)
    sizes = SIZES | dict(num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=4, sliding_window=6)
    model = AutoModelForCausalLM.from_config(GptOssConfig(**sizes), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (2.0 if "sinks" in name else 0.2) + ("norm" in name))
    ids, untyped = tokens(1, sum(LENGTHS)), model

    def step(*calls: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        made = torch.cat([untyped(row, use_cache=False, **inputs).logits for row, inputs in calls], 1)
        (made * torch.linspace(-1, 1, 61)).sum().backward()
        return made.detach(), {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}

    options: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, attention_mask=torch.ones(1, 12))
    want, gradients = step(*((document, {}) for document in ids.split(LENGTHS, 1)))  # its eager masks know none
    continued = untyped.generate(ids[:, :12], **options)
    handle = attach(model, num_heads=3, head_dim=32, layers=layers, topk=40)
    assert handle.layers == ((1,) if layers is None else (0, 1))
    got, own = step((ids, packed()))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert own.keys() == gradients.keys() and any("sinks" in name for name in own)
    for name, gradient in own.items():
        scale = float(gradients[name].abs().max())
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-4 * scale, msg=name)
    assert all(parameter.grad is not None for parameter in handle.indexers.parameters())
    assert torch.equal(untyped.generate(ids[:, :12], **options), continued)
    handle.remove()
    with pytest.raises(ValueError, match="must be 1 for attention with sinks, got cp=2 and tp=1; share parameters out"):
        attach(model, layers=layers, topk=4, parallel=Parallel(cp=2))
