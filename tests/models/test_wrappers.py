"""What people put around or into a model: adapters, compilers, vision towers, quantised layers, places of weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from own_models import own_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlavaConfig,
    PreTrainedModel,
    Qwen2VLConfig,
)

from flash_indexer.models.attach import attach
from flash_indexer.models.handle import IndexerHandle

Tiny = Callable[..., PreTrainedModel]
IDS = torch.randint(0, 57, (1, 17), generator=torch.Generator().manual_seed(2))
IMAGE = 60
"""The token in whose place a vision model puts a part of an image."""

SLOW_BACKENDS = [pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor")]


def attached(model: nn.Module, **options: Any) -> IndexerHandle:
    torch.manual_seed(1)
    return attach(model, **(dict(num_heads=3, head_dim=32) | options))


def randomised(model: Any, seed: int = 1) -> Any:
    """The model in eval mode, its weights large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.25 + ("norm" in name))
    return model.eval()


@torch.no_grad()
def kls(handle: IndexerHandle, run: Any = None, **inputs: Any) -> list[float]:
    """Every layer's KL in one forward of `run`, by default the attached model."""
    run = handle.model if run is None else run
    run(**(inputs or dict(input_ids=IDS)), use_cache=False)
    return [float(loss.kl) for loss in handle.losses().values()]


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> Tensor:
    found: Tensor = model(**(inputs or dict(input_ids=IDS)), use_cache=False).logits
    return found


def adapters(kind: str, **options: Any) -> Any:
    """A PEFT config."""
    peft = pytest.importorskip("peft")
    return getattr(peft, kind)(task_type="CAUSAL_LM", **options)


def with_adapters(model: PreTrainedModel, config: Any) -> Any:
    """A PeftModel in eval mode whose adapters do something."""
    wrapped = pytest.importorskip("peft").get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return wrapped.eval()


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoraConfig": dict(r=2, target_modules="all-linear"),
    "IA3Config": dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHaConfig": dict(r=2, target_modules=["q_proj", "k_proj"]),
    "VeraConfig": dict(r=2, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_a_part_of_the_teacher(tiny: Tiny, kind: str) -> None:
    wrapped = with_adapters(tiny("llama"), adapters(kind, **ADAPTERS[kind]))
    before = logits(wrapped)
    handle = attached(wrapped)
    assert handle.model is wrapped.get_base_model() and not any(p.requires_grad for p in handle.model.parameters())
    got = kls(handle, wrapped)
    torch.testing.assert_close(logits(wrapped), before, rtol=1e-4, atol=1e-4)
    handle.remove()
    trains = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trains and all(".layers." in name for name in trains) and torch.equal(logits(wrapped), before)
    merged = kls(attached(wrapped.merge_and_unload()))
    assert got == pytest.approx(merged, rel=1e-3) and got != pytest.approx(kls(attached(tiny("llama"))), rel=1e-3)


def test_low_rank_adapters_train_in_a_sparse_model(tiny: Tiny) -> None:
    wrapped = with_adapters(tiny("deepseek_v3"), adapters("LoraConfig", r=2, target_modules="all-linear"))
    handle = attached(wrapped, topk=6)
    wrapped(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert any("kv_b_proj.lora_B" in name for name in trained) and all("lora_" in name for name in trained)
    assert all(parameter.grad is not None for parameter in handle.indexers.parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_adapters_of_absorbed_projections_count(tiny: Tiny, bias: bool) -> None:
    """Nothing is selected away, so that logits and gradients are those of dense attention."""
    config = adapters("LoraConfig", r=2, target_modules=["kv_b_proj"], lora_bias=bias)
    wrapped = with_adapters(tiny("deepseek_v3"), config)

    def outcome() -> tuple[Tensor, dict[str, Tensor]]:
        wrapped.zero_grad()
        found = wrapped(input_ids=IDS, labels=IDS, use_cache=False)
        found.loss.backward()
        gradients = {name: x.grad.clone() for name, x in wrapped.named_parameters() if x.grad is not None}
        return found.logits.detach(), gradients

    dense, truth = outcome()
    attached(wrapped, topk=IDS.shape[1])
    sparse, found = outcome()
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)
    assert any("lora_B" in name and name.endswith("bias") for name in truth) == bias
    for name, gradient in truth.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)


def test_tokens_that_adapters_put_before_a_sequence_are_tokens_of_it(tiny: Tiny) -> None:
    wrapped = with_adapters(tiny("llama"), adapters("PromptTuningConfig", num_virtual_tokens=3))
    handle = attached(wrapped)
    embedded = torch.cat((wrapped.get_prompt(1), handle.model.get_input_embeddings()(IDS)), 1).detach()
    assert kls(handle, wrapped) == pytest.approx(kls(handle, inputs_embeds=embedded), rel=1e-5)


def test_keys_of_adapters_are_refused(tiny: Tiny) -> None:
    wrapped = with_adapters(tiny("llama"), adapters("PrefixTuningConfig", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="got 'default' of type PREFIX_TUNING, whose learned keys no indexer could"):
        attached(wrapped)


@pytest.mark.parametrize("topk", [None, 6])
def test_adapters_on_a_models_own_indexers_are_refused(topk: int | None) -> None:
    """New ones change nothing, so ranks don't show them; they would not train, and no checkpoint could be saved."""
    options: dict[str, Any] = dict(r=2, target_modules="all-linear")
    wrapped = with_adapters(own_model("deepseek_v32"), adapters("LoraConfig", **options))
    with pytest.raises(ValueError, match=r"without adapters, .* got one on wq_b of layer 0; merge it, or leave"):
        attach(wrapped, indexers="own", topk=topk)
    beside = adapters("LoraConfig", **options, exclude_modules=r".*\.indexer\..*")
    attach(with_adapters(own_model("deepseek_v32"), beside), indexers="own", topk=topk).remove()


def test_dropout_of_adapters_is_refused_in_training_mode(tiny: Tiny) -> None:
    config = adapters("LoraConfig", r=2, target_modules=["up_proj"], lora_dropout=0.1)
    wrapped = with_adapters(tiny("llama"), config)
    handle = attached(wrapped)
    kls(handle, wrapped)
    with pytest.raises(ValueError, match="dropout must be off in the frozen model, got .*lora_dropout.default.p = 0.1"):
        kls(handle, wrapped.train())


def test_other_wrappers_are_refused(tiny: Tiny) -> None:
    with pytest.raises(TypeError, match=r"must be a transformers.PreTrainedModel, .*got Sequential; unwrap it: take"):
        attached(nn.Sequential(tiny("llama")))


@pytest.mark.slow
@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_models_are_attached(tiny: Tiny, backend: str, ran_before: bool) -> None:
    torch.compiler.reset()
    want = kls(attached(tiny("llama", num_hidden_layers=1)))
    compiled: Any = torch.compile(tiny("llama", num_hidden_layers=1), backend=backend)
    before = logits(compiled) if ran_before else None
    handle = attached(compiled)
    assert kls(handle, compiled) == pytest.approx(want, rel=1e-4)
    if before is not None:
        handle.remove()
        torch.testing.assert_close(logits(compiled), before, rtol=1e-4, atol=1e-4)
        assert len(handle.losses()) == 1  # of the forward before: this one had no indexers
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["eager", *SLOW_BACKENDS])
def test_compiled_models_train_sparsely(tiny: Tiny, backend: str) -> None:
    torch.compiler.reset()
    model = tiny("llama", num_hidden_layers=1)
    handle = attached(model, topk=5)
    parameters = [*model.parameters(), *handle.indexers.parameters()]
    compiled: Any = torch.compile(model, backend=backend)
    gradients: list[list[Tensor]] = []
    for run in (model, compiled):
        run(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in parameters])
        for parameter in parameters:
            parameter.grad = None
    for want, got in zip(*gradients, strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm()
    torch.compiler.reset()


def llava(tiny: Tiny) -> tuple[Any, dict[str, Tensor]]:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = tiny("llama").config
    config = LlavaConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_index=IMAGE)
    ids = torch.cat((IDS[:, :2], torch.full((1, 4), IMAGE), IDS), 1)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(4))
    return AutoModelForImageTextToText.from_config(config), dict(input_ids=ids, pixel_values=pixels)


def qwen2_vl(tiny: Tiny) -> tuple[Any, dict[str, Tensor]]:
    text = tiny("qwen2, windows").config.to_dict() | dict(
        use_sliding_window=False, pad_token_id=None, layer_types=None,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2]),
    )  # fmt: skip
    vision = dict(depth=1, embed_dim=16, hidden_size=48, num_heads=2, patch_size=14)
    marks = dict(image_token_id=IMAGE, video_token_id=59, vision_start_token_id=58, vision_end_token_id=57)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **marks)
    ids = torch.cat((IDS[:, :2], torch.tensor([[58, *[IMAGE] * 4, 57]]), IDS), 1)
    pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(4))  # 4 x 4 patches, merged by 4
    image = dict(pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 4]]))
    return AutoModelForImageTextToText.from_config(config), dict(
        input_ids=ids, mm_token_type_ids=(ids == IMAGE).long(), **image
    )


@pytest.mark.parametrize("build", [llava, qwen2_vl])
def test_text_models_inside_of_vision_models_learn_from_images_too(tiny: Tiny, build: Callable[..., Any]) -> None:
    model, inputs = build(tiny)
    model = randomised(model)
    visions = [x for x in model.modules() if isinstance(x, PreTrainedModel) and "ision" in type(x).__name__]
    visions[0].set_attn_implementation("eager")
    configs = {id(x.config): x.config for x in model.modules() if isinstance(x, PreTrainedModel)}
    implementations = {name: config._attn_implementation for name, config in configs.items()}
    assert len(set(implementations.values())) == 2
    before = logits(model, **inputs)
    handle = attached(model)
    assert visions[0].config._attn_implementation == "eager" and handle.layers == (0, 1, 2)
    torch.testing.assert_close(logits(model, **inputs), before, rtol=1e-5, atol=1e-5)
    want = kls(handle, **inputs)
    seen: list[dict[str, Any]] = []
    hook = handle.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True, prepend=True
    )
    kls(handle, **inputs)
    hook.remove()
    embedded = {name: seen[0][name] for name in ("inputs_embeds", "position_ids")}
    assert kls(handle, handle.decoder, **embedded) == pytest.approx(want)
    assert want != pytest.approx(kls(handle, input_ids=inputs["input_ids"]), rel=1e-3)  # without the image
    handle.remove()
    assert {name: config._attn_implementation for name, config in configs.items()} == implementations
    assert torch.equal(logits(model, **inputs), before)


@pytest.mark.parametrize("build", [llava, qwen2_vl])
def test_text_models_inside_of_vision_models_are_made_sparse(tiny: Tiny, build: Callable[..., Any]) -> None:
    model, inputs = build(tiny)
    model = randomised(model)
    before = logits(model, **inputs)
    handle = attached(model, topk=200)
    torch.testing.assert_close(logits(model, **inputs), before, rtol=1e-3, atol=1e-3)  # of 25 tokens all are selected
    handle.remove()
    attached(model, topk=5)
    assert (logits(model, **inputs) - before).abs().max() > 0.1
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, suppress_tokens=[57, 58, 59, IMAGE])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    made = [model.generate(**inputs, **options, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*made)


class RoundedLinear(nn.Linear):
    """Products of inputs and weights that are rounded to eight bits, as quantised layers form them."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale.detach())

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return F.linear((x / step).round() * step, self.weight * self.scale, self.bias)


def rounded(tiny: Tiny, path: Path) -> PreTrainedModel:
    model = tiny("llama")
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, RoundedLinear(linear))
    return model


def torchao(kind: str) -> Callable[[Tiny, Path], PreTrainedModel]:
    def build(tiny: Tiny, path: Path) -> PreTrainedModel:
        quantization = pytest.importorskip("torchao.quantization")
        model = tiny("llama")
        quantization.quantize_(model, getattr(quantization, kind)())
        return model

    return build


def bitsandbytes(**options: Any) -> Callable[[Tiny, Path], PreTrainedModel]:
    def build(tiny: Tiny, path: Path) -> PreTrainedModel:
        pytest.importorskip("bitsandbytes")
        tiny("llama", hidden_size=64, num_attention_heads=4).save_pretrained(path)
        auto: Any = AutoModelForCausalLM
        return auto.from_pretrained(path, quantization_config=BitsAndBytesConfig(**options), device_map="cpu").eval()

    return build


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(rounded, id="a layer of its own"),
        pytest.param(torchao("Int8WeightOnlyConfig"), id="torchao, weights"),
        pytest.param(torchao("Int8DynamicActivationInt8WeightConfig"), id="torchao, weights and inputs"),
        pytest.param(bitsandbytes(load_in_8bit=True), id="bitsandbytes, 8 bits"),
        pytest.param(bitsandbytes(load_in_4bit=True), id="bitsandbytes, 4 bits"),
    ],
)
def test_quantised_layers_are_the_teacher_as_they_are(
    tiny: Tiny, tmp_path: Path, build: Callable[[Tiny, Path], PreTrainedModel]
) -> None:
    model = build(tiny, tmp_path)
    before = logits(model)
    handle = attached(model)
    found = kls(handle)
    assert len(found) == 3 and all(0.01 < kl < 5 for kl in found)
    after = logits(model)
    assert (after - before).norm() < 0.05 * before.norm()
    gradients = [parameter.grad for parameter in handle.indexers.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_on_a_disk_train_indexers_in_memory(tiny: Tiny, tmp_path: Path) -> None:
    want = kls(attached(tiny("llama")))
    tiny("llama").save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded").eval()
    assert {p.device.type for p in model.model.layers[1].parameters()} == {"meta"}
    handle = attached(model)
    assert kls(handle) == pytest.approx(want, rel=1e-6)
    assert {p.device.type for p in handle.indexers.parameters()} == {"cpu"}


def test_each_indexer_is_where_its_layer_computes(tiny: Tiny) -> None:
    model = tiny("llama")
    cpu_offload(model.model.layers[1], execution_device=torch.device("meta"))
    handle = attached(model)
    devices = {layer: next(handle.indexers[str(layer)].parameters()).device.type for layer in handle.layers}
    assert devices == {0: "cpu", 1: "meta", 2: "cpu"}
