"""The teacher that is looked at while the model runs: what is wrong is refused, what is unlike the model is said."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GptOssConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    masking_utils,
)

from flash_indexer.models import layer_mask, replay, verification
from flash_indexer.models.attach import IndexerHandle, LayerCapture, attach

Tiny = Callable[..., PreTrainedModel]
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)  # fmt: skip
IDS = torch.randint(0, 61, (1, 24), generator=torch.Generator().manual_seed(2))
PACKED = torch.cat([torch.arange(n) for n in (9, 15)])[None]
SIZES: dict[str, Any] = dict(
    vocab_size=61, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip


def attached(model: PreTrainedModel, **options: Any) -> IndexerHandle:
    return attach(model, num_heads=2, head_dim=32, **options)


def run(handle: IndexerHandle, ids: Tensor = IDS, **inputs: Any) -> None:
    with torch.no_grad():
        handle.model(ids, use_cache=False, **inputs)


def windows_in_masks() -> PreTrainedModel:
    """Qwen2-MoE: the window of its second layer is in the mask and not in the call of the attention function."""
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    config = Qwen2MoeConfig(
        **sizes, use_sliding_window=True, sliding_window=7, max_window_layers=1, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_window_that_only_the_mask_has_is_the_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = attached(windows_in_masks(), layers=[0, 1])
    found: dict[int, LayerCapture] = {}
    with handle.using(lambda capture: found.update({capture.layer: capture})):
        run(handle)
    counts = {layer: int((capture.key_end - capture.key_start)[-1]) for layer, capture in found.items()}
    assert counts == {0: 24, 1: 7}
    monkeypatch.setattr(
        layer_mask.LayerMask, "window", property(lambda self: None, lambda self, value: None), raising=False
    )
    handle.remove()
    with pytest.raises(
        ValueError, match=r"layer 1: query 7 sees 7 keys by the layer's own mask and 8 by the teacher's"
    ):
        run(attached(handle.model, layers=[0, 1]))


def test_keys_after_the_query_are_refused() -> None:
    """Gemma 3 shows the tokens of an image one another."""
    config = Gemma3Config(
        text_config=SIZES | dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8),
        vision_config=VISION,
    )  # fmt: skip
    handle = attached(Gemma3ForConditionalGeneration(config).eval())
    run(handle, token_type_ids=torch.zeros_like(IDS))
    image = torch.zeros_like(IDS)
    image[:, 8:12] = 1
    message = r"layer \d: query 8 sees \d+ keys by .* at key 9: the mask shows keys after the query \(bidirectional"
    with pytest.raises(ValueError, match=message):  # in a batch like one that was right, but for the image
        run(handle, token_type_ids=image)
    run(handle, token_type_ids=torch.zeros_like(IDS))
    with pytest.raises(ValueError, match=message):
        run(handle, token_type_ids=image)
    handle.remove()
    with pytest.raises(ValueError, match=message):
        run(attached(handle.model), token_type_ids=image)


def test_a_short_image_between_the_compared_queries_is_found_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "QUERIES", 3)
    config = Gemma3Config(text_config=SIZES | dict(layer_types=["full_attention"] * 2), vision_config=VISION)
    handle = attached(Gemma3ForConditionalGeneration(config).eval())
    image = torch.zeros_like(IDS)
    image[:, 5:7] = 1
    with pytest.raises(ValueError, match="query 5 sees 7 keys"):
        for _ in range(12):
            run(handle, token_type_ids=image)


@pytest.mark.parametrize("topk", [None, 5])
def test_layers_that_run_several_times_are_refused(tiny: Tiny, topk: int | None) -> None:
    model = tiny("llama")
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda hidden, *args, **kwargs: forward(forward(hidden, *args, **kwargs), *args, **kwargs)
    with pytest.raises(ValueError, match="layer 1 must run once in a forward, got a second run"):
        run(attached(model, topk=topk))


def test_masks_that_batches_change_are_told_from_those_that_are_causal() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    causal = [
        masking_utils.causal_mask_function,
        masking_utils.sliding_window_causal_mask_function(4),
        masking_utils.and_masks(
            masking_utils.packed_sequence_mask_function(positions),
            masking_utils.remap_positions_for_packed_sequence(
                masking_utils.chunked_causal_mask_function(4, torch.zeros(1)), positions
            ),
        ),
    ]
    block = masking_utils.blockwise_overlay(positions)
    varying = [
        block,
        masking_utils.or_masks(masking_utils.causal_mask_function, block),
        masking_utils.bidirectional_mask_function,
        lambda batch, head, q, k: k <= q,
    ]
    masks = [layer_mask.layer_mask(1, 6, 6, f, allow_is_causal_skip=False) for f in (*causal, *varying)]
    assert [mask is not None and mask.varies for mask in masks] == [False] * 3 + [True] * 4


def test_a_layer_that_is_not_causal_is_refused(tiny: Tiny) -> None:
    handle = attached(tiny("llama"))
    handle.model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(ValueError, match="attention must be causal, got is_causal=False of LlamaAttention"):
        run(handle)


class _Otherwise(nn.Module):
    """A projection that is another one under eager attention."""

    def __init__(self, inner: nn.Module, config: Any, factor: float) -> None:
        super().__init__()
        self.inner, self.config, self.factor = inner, config, factor

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.inner(hidden)
        return out * (self.factor if self.config._attn_implementation == "eager" else 1.0)


@pytest.mark.parametrize(("name", "what"), [("q_proj", "output|mean attention"), ("o_proj", "output")])
def test_a_layer_that_computes_otherwise_by_itself_is_refused(tiny: Tiny, name: str, what: str) -> None:
    for factor, wrong in ((1.0, False), (1.2, True)):
        model = tiny("llama")
        attention = model.model.layers[2].self_attn
        setattr(attention, name, _Otherwise(getattr(attention, name), model.config, factor))
        handle = attached(model)
        if not wrong:
            run(handle)
            continue
        with pytest.raises(
            ValueError, match=rf"layer 2: the ({what}) of LlamaAttention differs from that of eager .* by"
        ):
            run(handle)


def test_a_wrong_logsumexp_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, right = attached(tiny("llama")), verification.causal_attention

    def wrong(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = right(*args, **options)
        return out, lse + 0.01

    monkeypatch.setattr(verification, "causal_attention", wrong)
    with pytest.raises(ValueError, match="layer 0: the mean attention of LlamaAttention differs"):
        run(handle)


def test_what_was_found_right_is_not_looked_at_again(tiny: Tiny, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, replays = attached(tiny(family)), []
    right = verification.attention_function
    monkeypatch.setattr(verification, "attention_function", lambda *args: replays.append(args) or right(*args))
    long = torch.cat([IDS, IDS, IDS], 1)
    seen = []
    for ids, inputs in (
        (IDS, {}),
        (IDS, {}),
        (IDS, dict(position_ids=PACKED)),
        (IDS, dict(position_ids=PACKED)),
        (long, {}),
    ):
        run(handle, ids, **inputs)
        seen.append(len(replays) // len(handle.layers))
    assert seen == [1, 1, 2, 2, 3]


def test_the_first_tokens_stand_for_long_sequences(tiny: Tiny, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "QUERIES", 11)
    model, used = tiny(family), []
    right = replay.difference
    monkeypatch.setattr(verification, "difference", lambda got, wanted: used.append(got.shape) or right(got, wanted))
    handle = attached(model)
    run(handle, torch.cat([IDS, IDS]), position_ids=PACKED)
    assert used and all(shape[-2] == 11 for shape in used)
    assert all(parameter.grad is not None for parameter in handle.indexers.parameters())


def test_masks_that_know_no_documents_are_said_once() -> None:
    config = GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=7)
    handle = attached(AutoModelForCausalLM.from_config(config).eval())
    with pytest.warns(
        UserWarning, match=r"the mask that the model forms itself \(layer 0's\) knows no documents: without"
    ):
        run(handle, position_ids=PACKED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(handle, position_ids=PACKED)


def test_documents_that_the_model_would_not_read_are_said(tiny: Tiny) -> None:
    boundaries = torch.tensor([0, 9, 24], dtype=torch.int32)
    with pytest.warns(UserWarning, match="eager and sdpa attention read documents from position_ids only: without"):
        run(attached(tiny("llama")), cu_seq_lens_q=boundaries)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(attached(tiny("llama")), cu_seq_lens_q=boundaries, position_ids=PACKED)


def test_a_mask_beside_positions_does_not_hide_documents(tiny: Tiny) -> None:
    model = tiny("llama")
    with torch.no_grad():
        want = model(IDS, position_ids=PACKED, use_cache=False).logits
        attached(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = model(IDS, position_ids=PACKED, attention_mask=torch.ones_like(IDS), use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_what_reads_its_mask_is_refused(tiny: Tiny) -> None:
    handle = attached(tiny("llama"))
    handle.model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: kwargs["attention_mask"].dtype, with_kwargs=True
    )
    with pytest.raises(ValueError, match="must hand its mask on to the attention function as it is, got .* its dtype"):
        run(handle, position_ids=PACKED)


def test_logits_of_16_bits_are_not_rounded_before_they_are_compared() -> None:
    q, k, v = (torch.randn(1, 2, 9, 64).bfloat16() for _ in range(3))
    with replay.Float32Logits():
        logits = q @ k.transpose(2, 3)
        out = torch.matmul(logits.softmax(-1), v)
        weight = torch.matmul(q[0, 0], k[0, 0].T)
    assert torch.equal(logits, q.float() @ k.float().transpose(2, 3)) and not torch.equal(logits, logits.bfloat16())
    assert out.dtype == weight.dtype == torch.bfloat16
