"""A model's own indexers train in place, against its dense attention, and stay what Transformers loads."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from own_models import CONFIGS, SIZES, own_model, own_tokens
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from flash_indexer import reference
from flash_indexer.files.export import export
from flash_indexer.files.native import load_native
from flash_indexer.intervals import causal_intervals
from flash_indexer.models.attach import IndexerHandle, attach
from flash_indexer.models.capture import LayerCapture
from flash_indexer.models.families import find_decoder
from flash_indexer.models.load import model_fingerprint
from flash_indexer.models.own_indexers import OwnIndexer

L = 27
IDS = own_tokens(1, L)
TWO_LAYERS: dict[str, Any] = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, index_n_heads=8)
TRAINED = {"deepseek_v32": TWO_LAYERS, "glm_moe_dsa": TWO_LAYERS | dict(indexer_types=["full", "full"])}


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model(ids, use_cache=False).logits
    return found


def hooks(model: PreTrainedModel) -> int:
    return sum(
        len(module._forward_pre_hooks)
        + len(module._forward_hooks)
        + len({"_flash_indexer", "forward"} & set(vars(module)))
        for module in model.modules()
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_attention_runs_dense_while_attached_and_as_before_after_remove(family: str) -> None:
    sparse, dense = own_model(family, index_topk=4), own_model(family, index_topk=64)
    before, hooked = logits(sparse), hooks(sparse)
    assert not torch.allclose(before, logits(dense), rtol=1e-3, atol=1e-3)
    handle = attach(sparse, indexers="own")
    torch.testing.assert_close(logits(sparse), logits(dense), rtol=1e-4, atol=1e-4)
    handle.remove()
    handle.remove()
    assert torch.equal(logits(sparse), before)
    assert hooks(sparse) == hooked and all(parameter.requires_grad for parameter in sparse.parameters())
    assert all(parameter.grad is None for parameter in sparse.parameters())
    attach(sparse, indexers="own").remove()


def test_padding_masks_of_four_dimensions_are_refused() -> None:
    model = own_model("deepseek_v32")
    attach(model, indexers="own")
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, L\]"):
        model(IDS, attention_mask=torch.ones(1, 1, L, L, dtype=torch.bool), use_cache=False)


class Expected:
    """Losses and gradients in float64 by autograd, with the attention that the model itself gives as the target.

    Attributes:
        loss: KL(sum over heads of layer l's attention, normalised || softmax of the indexer's scores), for each layer;
            the mean over `queries`.
        indexer: of the source layer, in float64.
    """

    def __init__(self, model: PreTrainedModel, source: int, layers: list[int], queries: Any = slice(None)) -> None:
        model.set_attn_implementation("eager")
        own = find_decoder(model).layers[source].self_attn.indexer
        calls: list[Any] = []
        hook = own.register_forward_pre_hook(lambda module, args: calls.append(args))
        with torch.no_grad():
            attentions = model(IDS, use_cache=False, output_attentions=True).attentions
        hook.remove()
        hidden, residual, (cos, sin), *_ = calls[0]
        self.indexer = OwnIndexer(copy.deepcopy(own).double())
        made = self.indexer.forward(*(x[0].double() for x in (hidden, residual, cos, sin)))
        seen = reference.visible_keys(*causal_intervals(torch.tensor([0, L])), L)
        log_prediction = reference.indexer_scores(*made, *causal_intervals(torch.tensor([0, L]))).log_softmax(-1)
        self.loss = {}
        for layer in layers:
            p = attentions[layer][0].double().sum(0)
            p = p / p.sum(-1, keepdim=True)
            kl = (torch.xlogy(p, p) - p * log_prediction.masked_fill(~seen, 0)).sum(-1)
            self.loss[layer] = kl[queries].mean()

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        names, parameters = zip(*self.indexer.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))


def check_gradients(handle: IndexerHandle, layer: int, expected: dict[str, Tensor]) -> None:
    for name, parameter in handle.indexers[str(layer)].named_parameters():
        assert parameter.grad is not None
        largest = float(expected[name].abs().max())
        assert largest > 0
        torch.testing.assert_close(parameter.grad.double(), expected[name], rtol=1e-3, atol=1e-4 * largest)


def test_loss_and_gradients_are_those_of_the_models_own_attention() -> None:
    model = own_model("deepseek_v32")
    expected = {layer: Expected(model, layer, [layer]) for layer in range(4)}
    handle = attach(model, indexers="own")
    logits(model)
    for layer, found in handle.losses().items():
        assert float(found.kl) == pytest.approx(expected[layer].loss[layer].item(), rel=1e-4)
        check_gradients(handle, layer, expected[layer].gradients(expected[layer].loss[layer]))


@pytest.mark.parametrize("queries", [None, [2, 3, 11, 26]], ids=["all", "some"])
@pytest.mark.parametrize("teachers", ["shared", "own"])
def test_a_shared_indexer_learns_from_its_teachers(teachers: str, queries: list[int] | None) -> None:
    """Layers 0 to 2 use the indexer of layer 0: the mean of three losses, or the first alone; layer 3 has its own."""
    model = own_model("glm_moe_dsa")
    expected = Expected(model, 0, [0, 1, 2], slice(None) if queries is None else queries)
    handle = attach(model, indexers="own", teachers=teachers)
    handle.queries = None if queries is None else torch.tensor(queries)
    assert handle.layers == (0, 3) and handle.sources == {0: 0, 1: 0, 2: 0, 3: 3}
    logits(model)
    mean = torch.stack([expected.loss[layer] for layer in ([0, 1, 2] if teachers == "shared" else [0])]).mean()
    assert set(handle.losses()) == {0, 3}
    assert float(handle.losses()[0].kl) == pytest.approx(mean.item(), rel=1e-4)
    separate = [expected.gradients(expected.loss[layer]) for layer in (0, 1, 2)]
    assert not torch.allclose(separate[0]["wk.weight"], separate[1]["wk.weight"], rtol=0.1)
    wanted = separate if teachers == "shared" else separate[:1]
    check_gradients(handle, 0, {name: torch.stack([each[name] for each in wanted]).mean(0) for name in wanted[0]})


def test_every_layer_that_an_indexer_serves_is_captured() -> None:
    model = own_model("glm_moe_dsa")
    found: dict[int, LayerCapture] = {}
    with torch.no_grad(), attach(model, indexers="own", teachers="own").using(lambda c: found.update({c.layer: c})):
        model(IDS, use_cache=False)
    assert sorted(found) == [0, 1, 2, 3]
    assert torch.equal(found[1].index_q, found[0].index_q) and not torch.equal(found[1].q, found[0].q)
    assert not torch.equal(found[3].index_q, found[0].index_q)


def test_only_the_chosen_layers_train() -> None:
    model = own_model("deepseek_v32")
    handle = attach(model, indexers="own", layers=[1])
    logits(model)
    assert set(handle.losses()) == {1}
    with_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert with_gradient and all(name.startswith("model.layers.1.self_attn.indexer.") for name in with_gradient)
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(trains) == sorted(with_gradient)


@pytest.mark.parametrize("family", TRAINED)
def test_fifty_steps_halve_the_kl_and_the_saved_model_selects_the_same_keys(family: str, tmp_path: Path) -> None:
    model = own_model(family, index_topk=6, **TRAINED[family])
    handle = attach(model, indexers="own")
    frozen = {name: x.clone() for name, x in model.state_dict().items() if ".indexer." not in name}
    for name, parameter in handle.indexers.named_parameters():
        if "norm" not in name:
            parameter.data *= 0.3  # nearly uniform scores at first
    optimizer = torch.optim.AdamW(handle.indexers.parameters(), lr=3e-2, weight_decay=0.0)
    for step in range(50):
        for group in optimizer.param_groups:
            group["lr"] = 3e-2 * min(1, (step + 1) / 5) * (1 - step / 60)
        logits(model, own_tokens(4, 48, seed=100 + step))
        optimizer.step()
        optimizer.zero_grad()
    handle.indexers.eval()
    logits(model, own_tokens(4, 48, seed=3))
    for layer, loss in handle.losses().items():
        assert float(loss.kl / loss.uniform_kl) < 0.5, layer
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in frozen.items())
    handle.remove()
    model.save_pretrained(tmp_path)
    auto: Any = AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is type(model)
    selected, again = (selections(each.train(False)) for each in (model, loaded))
    assert len(selected) == 2 and all(torch.equal(a, b) for a, b in zip(selected, again, strict=True))
    assert torch.equal(logits(loaded), logits(model))
    fresh = own_model(family, index_topk=6, **TRAINED[family])
    assert not all(torch.equal(a, b) for a, b in zip(selected, selections(fresh), strict=True))


def selections(model: PreTrainedModel) -> list[Tensor]:
    """What each of the model's own indexers selects, [1, L, topk]."""
    found: list[Tensor] = []
    indexers = [layer.self_attn.indexer for layer in find_decoder(model).layers]
    undo = [indexer.register_forward_hook(lambda module, args, output: found.append(output)) for indexer in indexers]
    logits(model)
    for hook in undo:
        hook.remove()
    return found


def test_parameters_are_float32_while_they_train_and_the_models_dtype_after() -> None:
    model = own_model("deepseek_v32", torch.bfloat16)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    handle = attach(model, indexers="own")
    assert all(parameter.dtype == torch.float32 for parameter in handle.indexers.parameters())
    assert all(name in model.state_dict() for name in handle.state_dict())
    logits(model)
    parameter = handle.indexers["0"].get_parameter("wk.weight")
    assert parameter.grad is not None and parameter.grad.dtype == torch.float32
    with torch.no_grad():
        parameter.add_(1e-5)  # below half a step of bfloat16 where |wk| is above 0.005
    handle.remove()
    assert {name: x.dtype for name, x in model.state_dict().items()} == {name: x.dtype for name, x in before.items()}
    large = before["model.layers.0.self_attn.indexer.wk.weight"].abs() > 0.02
    now = model.state_dict()["model.layers.0.self_attn.indexer.wk.weight"]
    assert torch.equal(now[large], before["model.layers.0.self_attn.indexer.wk.weight"][large])
    logits(model)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_written_loaded_and_exported(family: str, tmp_path: Path) -> None:
    """Per-head targets among them; the config of Dots 3 Note refuses to be asked for what its layers differ in."""
    model = own_model(family, index_n_heads=4)
    fingerprint = model_fingerprint(model)
    handle = attach(model, indexers="own", target="per_head")
    with torch.no_grad():
        for parameter in handle.indexers.parameters():
            parameter.add_(0.25)
    assert model_fingerprint(model) != fingerprint
    export(handle, tmp_path / "native", format="native", base_fingerprint=fingerprint)
    again = load_native(own_model(family, index_n_heads=4), tmp_path / "native", base_fingerprint=fingerprint)
    assert again.target == "per_head" and again.layers == handle.layers
    assert all(torch.equal(again.state_dict()[name], value) for name, value in handle.state_dict().items())
    export(handle, tmp_path / "whole", format="own")
    auto: Any = AutoModelForImageTextToText if family == "mistral_large4" else AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


def test_state_goes_from_one_handle_to_another() -> None:
    first, second = (attach(own_model("glm_moe_dsa"), indexers="own") for _ in range(2))
    with torch.no_grad():
        for parameter in first.indexers.parameters():
            parameter.add_(0.5)
    second.load_state_dict(first.state_dict())
    assert torch.equal(logits(second.model), logits(first.model))
    own = second.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in first.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(indexers="mine"), 'indexers must be "fresh" or "own", got \'mine\''),
        (dict(indexers="fresh"), 'GlmMoeDsaForCausalLM has indexers of its own; train these with indexers="own"'),
        (dict(teachers="all"), 'teachers must be "shared" or "own", got \'all\''),
        (dict(layers=[0, 1]), r"must be among those that have one, \[0, 3\], got 1, which uses the indexer of layer 0"),
        (dict(num_heads=4), 'num_heads must be left out with indexers="own", or 5 as the model has it, got 4'),
        (dict(head_dim=128), "head_dim must be left out.*or 32"),
        (dict(rope_dim=16), "rope_dim must be left out.*or 8"),
        (dict(target="per_head"), 'target="per_head" needs num_heads = 4, the model\'s, got 5'),
        (dict(target="all"), "target must be"),
        (dict(index_dtype="int8"), "index_dtype must be None or one of"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    model = own_model("glm_moe_dsa")
    hooked = hooks(model)
    with pytest.raises(ValueError, match=message):
        attach(model, **(dict(indexers="own") | arguments))
    assert hooks(model) == hooked and all(parameter.requires_grad for parameter in model.parameters())
    attach(model, indexers="own", num_heads=5, head_dim=32, rope_dim=8)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_transformers_whose_indexer_ranks_otherwise_is_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if its rope had changed; nothing stays attached."""
    model = own_model(family)
    own = find_decoder(model).layers[2 if family == "dots3_note" else 0].self_attn.indexer
    module = sys.modules[type(own).__module__]
    rope = next(name for name in ("apply_rotary_pos_emb_interleave", "apply_rotary_pos_emb") if hasattr(module, name))
    rope = "apply_rotary_pos_emb" if type(own).__name__ in ("DeepseekV32Indexer", "AXK2Indexer") else rope
    hooked = hooks(model)
    attach(model, indexers="own").remove()
    monkeypatch.setattr(module, rope, lambda q, k, *args, **kwargs: (q, k))
    with pytest.raises(ValueError, match=f"{type(own).__name__} of layer .* ranks keys otherwise than the scores"):
        attach(model, indexers="own")
    assert hooks(model) == hooked and own.index_topk == 64


def test_layers_without_an_indexer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be among those that have one, \[0, 2\], got 1, which has none"):
        attach(own_model("dots3_note"), indexers="own", layers=[1])


def test_dense_models_have_no_indexers_of_their_own() -> None:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(num_hidden_layers=1, **{name: SIZES[name] for name in names})
    model = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="needs a model with indexers of its own, got LlamaForCausalLM without"):
        attach(model, indexers="own")
    with pytest.raises(ValueError, match="teachers must be left out with indexers=\"fresh\", got 'own'"):
        attach(model, teachers="own")


@pytest.mark.parametrize(("kind", "word"), [("meta", "offloaded"), ("float8", "in torch.float8_e4m3fn")])
def test_parameters_that_cant_train_are_refused(kind: str, word: str) -> None:
    model = own_model("deepseek_v32")
    indexer = find_decoder(model).layers[2].self_attn.indexer
    wk = indexer.wk.weight.data
    indexer.wk.weight = nn.Parameter(
        wk.to("meta") if kind == "meta" else wk.to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(ValueError, match=f"got wk.weight of layer 2 {word}"):
        attach(model, indexers="own")
