"""Attaching: the model computes what it did, the indexers learn what the definition says, remove() leaves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV32Config,
    LlamaConfig,
    PreTrainedModel,
)

from flash_indexer import reference
from flash_indexer.models.attach import IndexerHandle, LayerCapture, attach

Tiny = Callable[..., PreTrainedModel]
VOCABULARY = 61
SIZES = dict(num_heads=3, head_dim=32)


def tokens(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def attached(model: PreTrainedModel, **sizes: Any) -> IndexerHandle:
    """Every parameter of the indexers random."""
    handle = attach(model, **(SIZES | sizes))
    generator = torch.Generator().manual_seed(5)
    for parameter in handle.indexers.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return handle


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    return model(ids, use_cache=False, **inputs).logits


@torch.no_grad()
def captures(handle: IndexerHandle, ids: Tensor, **inputs: Any) -> dict[int, LayerCapture]:
    found: dict[int, LayerCapture] = {}
    with handle.using(lambda capture: found.update({capture.layer: capture})):
        handle.model(ids, use_cache=False, **inputs)
    return found


def hooks(model: PreTrainedModel) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) + ("_flash_indexer" in module.__dict__)
        for module in model.modules()
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_outputs_stay_while_attached_and_to_the_bit_after_remove(tiny: Tiny, family: str, implementation: str) -> None:
    model, ids = tiny(family), tokens(2, 29)
    model.set_attn_implementation(implementation)
    next(model.parameters()).requires_grad_(False)
    before, names, hooked = logits(model, ids), list(model.state_dict()), hooks(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    handle = attached(model)
    assert hooks(model) > hooked and not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == names
    handle.remove()
    handle.remove()
    assert torch.equal(logits(model, ids), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags and not flags[0] and flags[1]
    assert model.config._attn_implementation == implementation
    assert (hooks(model), list(model.state_dict())) == (hooked, names)
    attach(model, **SIZES).remove()


def test_layers_without_an_indexer_see_documents_too(tiny: Tiny, family: str) -> None:
    model, lengths = tiny(family), (12, 17)
    documents = [tokens(1, n, seed=n) for n in lengths]
    want = torch.cat([logits(model, ids) for ids in documents], 1)
    handle = attached(model, layers=[1])
    assert handle.layers == (1,) and list(handle.indexers) == ["1"]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    got = logits(model, torch.cat(documents, 1), position_ids=position_ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert list(handle.losses()) == [1]


def test_a_consumer_may_replace_the_output(tiny: Tiny) -> None:
    model, ids = tiny("llama"), tokens(1, 11)
    handle = attached(model)
    want = logits(model, ids)
    with handle.using(lambda capture: capture.out.clone()):
        assert torch.equal(logits(model, ids), want)
    with handle.using(lambda capture: torch.zeros_like(capture.out) if capture.layer == 1 else None):
        assert not torch.allclose(logits(model, ids), want)
    assert torch.equal(logits(model, ids), want)


def test_a_document_does_not_see_the_one_before(tiny: Tiny, family: str) -> None:
    handle = attached(tiny(family))
    first, other, second = tokens(1, 11, seed=1), tokens(1, 11, seed=2), tokens(1, 14, seed=3)
    position_ids = torch.cat([torch.arange(11), torch.arange(14)])[None]
    one = captures(handle, torch.cat([first, second], 1), position_ids=position_ids)
    two = captures(handle, torch.cat([other, second], 1), position_ids=position_ids)
    alone = captures(handle, second)
    for layer, capture in one.items():
        for name in ("q", "k", "v", "lse", "out", "index_q", "index_k", "index_weights"):
            kept = getattr(capture, name)[11:]
            assert torch.equal(kept, getattr(two[layer], name)[11:]), name
            torch.testing.assert_close(kept, getattr(alone[layer], name), rtol=1e-3, atol=1e-4)
        assert not torch.equal(capture.q[:11], two[layer].q[:11])


def test_rows_of_a_batch_are_independent(tiny: Tiny, family: str) -> None:
    handle = attached(tiny(family))
    ids = tokens(2, 15)
    rows, losses, gradients = [], [], []
    for batch in (ids, ids[:1], ids[1:]):
        rows.append(captures(handle, batch))
        handle.indexers.zero_grad()
        logits(handle.model, batch)
        losses.append(handle.losses())
        gradients.append([parameter.grad.clone() for parameter in handle.indexers.parameters()])
    for layer, capture in rows[0].items():
        for name in ("q", "k", "v", "lse", "out", "index_q", "index_k", "index_weights"):
            want = torch.cat([getattr(row[layer], name) for row in rows[1:]])
            torch.testing.assert_close(getattr(capture, name), want, rtol=1e-3, atol=1e-4)
        for both, first, second in zip(*(loss[layer] for loss in losses), strict=True):
            torch.testing.assert_close(both, (first + second) / 2, rtol=1e-4, atol=1e-5)
    for both, first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(both, (first + second) / 2, rtol=1e-3, atol=1e-5)


def definition(
    handle: IndexerHandle, ids: Tensor, weight: float, **inputs: Any
) -> tuple[dict[str, Tensor], dict[int, tuple[float, float]]]:
    """Gradients by autograd of the definition in float64, through a float64 copy of each indexer; (KL, uniform KL)."""
    heard: dict[int, tuple[Tensor, ...]] = {}
    listeners = [
        module.register_forward_pre_hook(lambda module, args, name=name: heard.update({int(name): args}))
        for name, module in handle.indexers.items()
    ]
    found = captures(handle, ids, **inputs)
    for listener in listeners:
        listener.remove()
    gradients, losses = {}, {}
    for layer, capture in found.items():
        indexer = handle.indexers[str(layer)]
        parameters = {name: p.detach().double().requires_grad_() for name, p in indexer.named_parameters()}
        args = [None if x is None else x.double() for x in heard[layer]]
        index = torch.func.functional_call(indexer, parameters, tuple(args))
        common = dict(
            softmax_scale=capture.softmax_scale, key_start=capture.key_start, key_end=capture.key_end,
            target=handle.target, token_weight=torch.full((capture.q.shape[0],), weight, dtype=torch.float64),
        )  # fmt: skip
        q, k = capture.q.double(), capture.k.double()
        loss, kl = reference.indexer_kl(q, k, *index, **common)
        _, uniform = reference.indexer_kl(q, k, *[torch.zeros_like(x) for x in index], **common)
        loss.backward()
        gradients |= {f"{layer}.{name}": parameter.grad for name, parameter in parameters.items()}
        losses[layer] = float(kl.mean()), float(uniform.mean())
    return gradients, losses


@pytest.mark.parametrize("target", ["mean", "per_head", "sum_logits"])
def test_gradients_and_losses_are_the_definitions(tiny: Tiny, family: str, target: str) -> None:
    model = tiny(family)
    heads = model.config.num_attention_heads if target == "per_head" else 3
    handle = attached(model, num_heads=heads, target=target)
    ids = tokens(2, 15)
    inputs = dict(position_ids=torch.cat([torch.arange(6), torch.arange(9)])[None].expand(2, -1))
    for weight in (None, 0.007):
        want, losses = definition(handle, ids, 1 / 30 if weight is None else weight, **inputs)
        handle.token_weight = weight
        handle.indexers.zero_grad()
        logits(model, ids, **inputs)
        got = dict(handle.indexers.named_parameters())
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            error = (got[name].grad.double() - gradient).norm() / gradient.norm()
            assert gradient.norm() > 0 and error < 2e-4, (name, float(error))
        for layer, (kl, uniform) in losses.items():
            assert float(handle.losses()[layer].kl) == pytest.approx(kl, rel=1e-4)
            assert float(handle.losses()[layer].uniform_kl) == pytest.approx(uniform, rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_accumulate_over_forwards_and_only_in_train_mode(tiny: Tiny) -> None:
    handle = attached(tiny("llama"))
    ids = tokens(1, 17)
    logits(handle.model, ids)
    once, losses = [p.grad.clone() for p in handle.indexers.parameters()], handle.losses()
    logits(handle.model, ids)
    for parameter, gradient in zip(handle.indexers.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    handle.indexers.zero_grad()
    handle.indexers.eval()
    logits(handle.model, ids)
    assert all(parameter.grad is None for parameter in handle.indexers.parameters())
    assert {layer: loss.kl.item() for layer, loss in handle.losses().items()} == {
        layer: loss.kl.item() for layer, loss in losses.items()
    }


def test_float64_models_give_float64_gradients(tiny: Tiny, family: str) -> None:
    dense = dict(first_k_dense_replace=3) if family.startswith("deepseek") else {}  # experts have no float64
    handle = attached(tiny(family, **dense).double(), num_heads=2)
    handle.indexers.double()
    want, losses = definition(handle, tokens(1, 15), 1 / 15)
    logits(handle.model, tokens(1, 15))
    for name, parameter in handle.indexers.named_parameters():
        assert parameter.grad.dtype == torch.float64
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-9, atol=1e-12)
    for layer, (kl, _) in losses.items():
        assert float(handle.losses()[layer].kl) == pytest.approx(kl, rel=1e-10)


def test_bfloat16_models_are_captured_in_float32(tiny: Tiny, family: str) -> None:
    model, ids = tiny(family).bfloat16(), tokens(1, 15)
    before = logits(model, ids)
    handle = attached(model)
    after = logits(model, ids)
    assert after.dtype == torch.bfloat16 and (after - before).float().norm() < 0.05 * before.float().norm()
    assert all(torch.isfinite(parameter.grad).all() for parameter in handle.indexers.parameters())
    for capture in captures(handle, ids).values():
        for name in ("q", "k", "v", "lse", "index_q", "index_k", "index_weights"):
            assert getattr(capture, name).dtype == torch.float32, name


def test_observer_sees_every_layer_and_does_not_change_gradients(tiny: Tiny) -> None:
    handle, ids, seen = attached(tiny("qwen3")), tokens(1, 9), []
    logits(handle.model, ids)
    want = [parameter.grad.clone() for parameter in handle.indexers.parameters()]
    handle.indexers.zero_grad()
    handle.observer = lambda capture: seen.append(capture.layer)
    logits(handle.model, ids)
    assert seen == [0, 1, 2]
    for parameter, gradient in zip(handle.indexers.parameters(), want, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_state_dict_names_and_round_trip(tiny: Tiny) -> None:
    handle = attached(tiny("deepseek_v3"), layers=[2, 0])
    state = {name: value.clone() for name, value in handle.state_dict().items()}
    names = ("k_norm.bias", "k_norm.weight", "weights_proj.weight", "wk.weight", "wq_b.weight")
    assert sorted(state) == [f"model.layers.{n}.self_attn.indexer.{name}" for n in (0, 2) for name in names]
    assert state["model.layers.0.self_attn.indexer.wq_b.weight"].shape == (96, 32)
    other = attach(tiny("deepseek_v3"), layers=[0, 2], **SIZES)
    other.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    with pytest.raises(ValueError, match="missing .*layers.0"):
        other.load_state_dict({name: value for name, value in state.items() if "layers.2" in name})
    with pytest.raises(ValueError, match=r"wk.weight must be \[32, 48\], got \[32, 1\]"):
        other.load_state_dict(state | {"model.layers.0.self_attn.indexer.wk.weight": torch.zeros(32, 1)})


def test_other_families_are_refused() -> None:
    config = BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=VOCABULARY)
    model = AutoModelForCausalLM.from_config(config)
    message = r"model must be one of .*docs/models.md; got BloomForCausalLM, .* \(0-1: BloomAttention does not call"
    with pytest.raises(ValueError, match=message):
        attach(model)
    assert hooks(model) == 0 and all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_with_indexers_of_its_own_is_refused() -> None:
    config = DeepseekV32Config(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12,
        first_k_dense_replace=2, mlp_layer_types=["dense", "dense"], index_n_heads=2, index_head_dim=32, index_topk=8,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="has indexers of its own"):
        attach(AutoModelForCausalLM.from_config(config))


def test_attaching_twice_is_refused_and_harms_nothing(tiny: Tiny) -> None:
    model = tiny("llama")
    before = logits(model, tokens(1, 9))
    handle = attach(model, layers=[1], **SIZES)
    with pytest.raises(ValueError, match=r"attached already; call remove\(\)"):
        attach(model, **SIZES)
    handle.remove()
    assert torch.equal(logits(model, tokens(1, 9)), before)


@pytest.mark.parametrize(
    ("family_name", "options", "message"),
    [
        ("llama", dict(layers=[0, 3]), r"layers must be indices below 3, got \[0, 3\]"),
        ("llama", dict(layers=[-1]), r"layers must be indices below 3, got \[-1\]"),
        ("llama", dict(layers=[]), r"layers must be indices below 3, got \[\]"),
        ("llama", dict(target="per_head"), "num_heads = 6, the model's, got 3"),
        ("llama", dict(target="median"), "target must be .*, got .median"),
        ("llama", dict(rope_dim=33), "rope_dim"),
        ("deepseek_v3", dict(rope_dim=16), "rope_dim must be qk_rope_head_dim = 8, got 16"),
    ],
)
def test_options_that_do_not_fit(tiny: Tiny, family_name: str, options: dict[str, Any], message: str) -> None:
    model = tiny(family_name)
    with pytest.raises(ValueError, match=message):
        attach(model, **(SIZES | options))
    assert hooks(model) == 0 and all(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_padded_batches_are_refused_and_full_masks_are_not(tiny: Tiny) -> None:
    handle, ids = attached(tiny("llama")), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    want = logits(handle.model, ids)
    assert torch.equal(logits(handle.model, ids, attention_mask=mask), want)
    mask[1, :3] = 0
    with pytest.raises(ValueError, match="attention_mask must be all ones, .* or absent: batches are packed"):
        logits(handle.model, ids, attention_mask=mask)


@pytest.mark.parametrize("family_name", ["llama", "deepseek_v3"])
def test_masks_of_four_dimensions_are_refused(tiny: Tiny, family_name: str) -> None:
    """Transformers hands them on as they are; ignored, documents would see one another."""
    handle, ids = attached(tiny(family_name)), tokens(1, 9)
    blocks = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    blocks[..., 4:, :4] = False
    for mask in (blocks, torch.zeros(1, 1, 9, 9).masked_fill(~blocks, torch.finfo(torch.float32).min)):
        with pytest.raises(
            ValueError, match=r"attention_mask must be \[B, L\] = \[1, 9\], got \[1, 1, 9, 9\]; batches"
        ):
            logits(handle.model, ids, attention_mask=mask)


def test_inputs_that_do_not_fit_are_refused(tiny: Tiny) -> None:
    handle, ids = attached(tiny("llama")), tokens(2, 9)
    for positions in (torch.arange(8)[None], torch.arange(9).expand(3, 9), torch.arange(9)):
        with pytest.raises(ValueError, match=r"position_ids \[B, L\] or \[1, L\], got \[2, 9\] and \["):
            handle.decoder(input_ids=ids, position_ids=positions, use_cache=False)
    with pytest.raises(ValueError, match=r"input_ids must be \[B, L\] with a token at least"):
        handle.decoder(input_ids=ids[:, :0], use_cache=False)
    handle.remove()
    for layers in (2, ["0"], [1.0]):
        with pytest.raises(TypeError, match="attach: layers must be a sequence of layer indices, got"):
            attach(handle.model, **SIZES, layers=layers)  # type: ignore[arg-type]


@torch.no_grad()
def test_decoding_with_a_cache_is_refused(tiny: Tiny) -> None:
    handle = attached(tiny("llama"))
    cache = handle.model(tokens(1, 9), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="got 1 queries on 10 keys; pass use_cache=False"):
        handle.model(tokens(1, 1), past_key_values=cache, use_cache=True)
    # The refusal leaves the handle usable.
    assert torch.isfinite(logits(handle.model, tokens(1, 9))).all()


def test_dropout_is_refused_in_training_mode(tiny: Tiny) -> None:
    model = tiny("llama", attention_dropout=0.1)
    handle = attached(model)
    logits(model, tokens(1, 9))
    model.train()
    with pytest.raises(ValueError, match=r"attention dropout must be 0, got 0.1; call model.eval\(\)"):
        logits(model, tokens(1, 9))
    assert handle.indexers.training


def test_the_decoder_alone_is_enough(tiny: Tiny) -> None:
    handle, ids = attached(tiny("llama")), tokens(1, 9)
    with torch.no_grad():
        hidden = handle.decoder(input_ids=ids, use_cache=False).last_hidden_state
        embeds = handle.decoder(inputs_embeds=handle.decoder.embed_tokens(ids), use_cache=False).last_hidden_state
    assert torch.equal(hidden, embeds) and sorted(handle.losses()) == [0, 1, 2]


def test_partial_rotary_and_other_rope_sizes(tiny: Tiny) -> None:
    """The indexer's rope is the model's, resized: the first rope_dim dims turn with the position, the rest do not."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=500.0),
    )  # fmt: skip
    handle = attached(AutoModelForCausalLM.from_config(config).eval(), rope_dim=8)
    near = captures(handle, torch.full((1, 40), 7))[0].index_k
    assert not torch.allclose(near[0, :8], near[39, :8], atol=1e-3)
    torch.testing.assert_close(near[0, 8:], near[39, 8:], rtol=1e-4, atol=1e-5)
    turned = torch.atan2(near[:, 4:8], near[:, :4])
    want = torch.arange(40)[:, None] * 500.0 ** (-torch.arange(4) / 4)
    drift = (turned - turned[0] - want + torch.pi) % (2 * torch.pi) - torch.pi
    assert drift.abs().max() < 1e-3
