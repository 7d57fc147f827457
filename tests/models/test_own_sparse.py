"""A model's own indexers that select: what Transformers computes, trained by the definition, saved natively."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from own_models import own_model, own_tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from flash_indexer import reference
from flash_indexer.files.native import load_native, save_native
from flash_indexer.models import absorbed, sparse
from flash_indexer.models.attach import attach
from flash_indexer.models.own_sparse import OwnSparseHandle
from flash_indexer.models.sparse import sparse_handle

K = 6
FAMILIES = ("deepseek_v32", "glm_moe_dsa", "axk2", "mistral_large4", "dots3_note", "hy_v4")
LENGTHS = (13, 2, 18)
DENSE = dict(mlp_layer_types=["dense"] * 4)  # experts have no float64, and a rounding chooses others of them


def model_of(family: str, **changes: Any) -> PreTrainedModel:
    """With so many index heads that no key is ranked by the place of a tie."""
    return own_model(family, index_topk=K, **(dict(index_n_heads=24) | changes))


def sparsely(model: PreTrainedModel, **options: Any) -> OwnSparseHandle:
    handle = attach(model, indexers="own", topk=K, **options)
    assert isinstance(handle, OwnSparseHandle)
    return handle


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    found: Tensor = model(ids, use_cache=False, **inputs).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_transformers_does(family: str) -> None:
    model = model_of(family)
    ids = own_tokens(2, sum(LENGTHS))
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).expand(2, -1)
    inputs: list[dict[str, Tensor]] = [{}, dict(position_ids=positions)]
    want = [logits(model, ids, **each) for each in inputs]
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    handle = sparsely(model)
    for each, wanted in zip(inputs, want, strict=True):
        torch.testing.assert_close(logits(model, ids, **each), wanted, rtol=1e-3, atol=1e-3)
    assert set(handle.losses()) == set(handle.layers)
    handle.remove()
    assert all(torch.equal(logits(model, ids, **x), y) for x, y in zip(inputs, want, strict=True))
    assert trains == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert (want[0] - logits(attach(model, indexers="own").model, ids)).abs().max() > 0.1  # dense


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "dots3_note", "hy_v4"])
def test_it_generates_what_transformers_does(family: str) -> None:
    model, ids = model_of(family), own_tokens(2, 19)
    options: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(ids)
    untyped: Any = model
    want = untyped.generate(ids, attention_mask=mask, **options)
    handle = sparsely(model)
    assert torch.equal(untyped.generate(ids, attention_mask=mask, **options), want)
    assert torch.equal(untyped.generate(ids, attention_mask=mask, use_cache=False, **options), want)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [untyped(part, past_key_values=cache, use_cache=True).logits for part in ids.split((12, 7), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, ids), rtol=1e-4, atol=1e-4)
    handle.remove()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_gets_the_gradients_that_transformers_gives_it(family: str) -> None:
    """Every parameter but the indexers', which get none there: projections, sinks, layers of a window."""
    changes = {} if family == "mistral_large4" else DENSE
    model, ids = model_of(family, **changes), own_tokens(2, 23)
    untyped: Any = model

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        untyped(ids, labels=ids, use_cache=False).loss.backward()
        found = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
        return {name: x for name, x in found.items() if ".indexer." not in name}

    want = gradients()
    handle = sparsely(model)
    got = gradients()
    assert got.keys() == want.keys() and len(got) > 30
    for name, gradient in got.items():
        scale = float(want[name].abs().max())
        torch.testing.assert_close(
            gradient, want[name], rtol=2e-3, atol=2e-3 * scale, msg=lambda x, n=name: f"{n}: {x}"
        )
    learned = {name: x.grad for name, x in handle.indexers.named_parameters()}
    assert all(x is not None and bool(x.isfinite().all()) for x in learned.values())


def gradients_of(handle: OwnSparseHandle, ids: Tensor) -> list[Tensor]:
    untyped: Any = handle.model
    untyped.zero_grad()
    untyped(ids, labels=ids, use_cache=False).loss.backward()
    return [parameter.grad.clone() for parameter in untyped.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("teachers", ["shared", "own"])
@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "dots3_note", "hy_v4"])
def test_the_loss_is_the_mean_of_the_layers_that_an_indexer_serves(
    family: str, teachers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, by the definition on the queries and keys of each layer and the operands of the indexer."""
    model, ids = model_of(family, **DENSE).double(), own_tokens(1, 31)
    handle = sparsely(model, teachers=teachers)
    calls: list[tuple[Any, ...]] = []
    operands: dict[str, tuple[Tensor, ...]] = {}
    attended = dict(dsa_attention=sparse.dsa_attention, sparse_attention=sparse.sparse_attention)

    def learning(q: Tensor, k: Tensor, *args: Any, **options: Any) -> Any:
        calls.append((q.detach(), k.detach(), options))
        return attended["dsa_attention"](q, k, *args, **options)

    def not_learning(q: Tensor, k: Tensor, *args: Any, **options: Any) -> Any:
        calls.append((q.detach(), k.detach(), options))
        return attended["sparse_attention"](q, k, *args, **options)

    monkeypatch.setattr(sparse, "dsa_attention", learning)
    monkeypatch.setattr(sparse, "sparse_attention", not_learning)
    for name, indexer in handle.indexers.items():
        indexer.register_forward_hook(lambda _, __, output, name=name: operands.update({name: output}))
    untyped: Any = model
    loss = untyped(ids, labels=ids, use_cache=False).loss
    attending, sunk = sorted(handle.sources), family == "hy_v4"
    want: dict[str, Tensor] = {}
    kls: dict[int, float] = {}
    end, weight = torch.arange(1, 32), torch.full((31,), 1 / 31, dtype=torch.float64)
    for source in handle.layers:
        served = [n for n, other in handle.sources.items() if other == source]
        teaching = served if teachers == "shared" else [source]
        made = operands[str(source)]
        scores = reference.indexer_scores(*made, torch.zeros_like(end), end)
        selected = reference.selected_keys(scores.detach(), torch.zeros_like(end), end, K)
        found = [
            reference.sparse_indexer_kl(
                q,
                k,
                *made,
                selected,
                softmax_scale=options["softmax_scale"],
                token_weight=weight,
                sinks=options["sinks"],
            )
            for q, k, options in (calls[attending.index(n)] for n in teaching)
        ]
        kls[source] = float(torch.stack([kl.mean() for _, kl in found]).mean())
        parameters = dict(handle.indexers[str(source)].named_parameters())
        mean = torch.stack([each for each, _ in found]).mean()
        gradients = torch.autograd.grad(mean, list(parameters.values()), retain_graph=True)
        want |= {f"{source}.{name}": x for name, x in zip(parameters, gradients, strict=True)}
    loss.backward()
    assert len(calls) == len(attending) and all((options["sinks"] is not None) == sunk for _, _, options in calls)
    for name, parameter in handle.indexers.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-8, atol=1e-12, msg=name)
    for source, kl in handle.losses().items():
        assert float(kl.kl) == pytest.approx(kls[source], rel=1e-9)
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "embed" not in name)

    handle.indexers.zero_grad()  # a frozen model's indexers learn the same, inside of the forward
    logits(model, ids)
    for name, parameter in handle.indexers.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-8, atol=1e-12, msg=name)
    for source, kl in handle.losses().items():
        assert float(kl.kl) == pytest.approx(kls[source], rel=1e-9) and float(kl.uniform_kl) > 0


@pytest.mark.parametrize("family", ["glm_moe_dsa", "hy_v4"])
def test_runs_of_queries_learn_what_all_of_them_do(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an indexer that serves several layers, and with sinks; in float64."""
    model, ids = model_of(family, **DENSE).double(), own_tokens(2, 21)
    handle = sparsely(model)
    want, kls = gradients_of(handle, ids), {n: float(x.kl) for n, x in handle.losses().items()}
    monkeypatch.setattr(absorbed, "WHOLE_BYTES", 0)
    monkeypatch.setattr(absorbed, "RUN_BYTES", 5 * 8 * 4 * (2 * 24 + 8))
    got = gradients_of(handle, ids)
    for mine, whole in zip(got, want, strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-6, atol=1e-9)
    assert {n: float(x.kl) for n, x in handle.losses().items()} == pytest.approx(kls)


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "dots3_note", "hy_v4"])
def test_activation_checkpointing_changes_no_bit(family: str) -> None:
    model, ids = model_of(family).train(), own_tokens(2, 21)
    handle = sparsely(model)
    want = gradients_of(handle, ids)
    model.activation_checkpointing_enable({"use_reentrant": False})
    got = gradients_of(handle, ids)
    assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "dots3_note", "hy_v4"])
def test_what_trained_is_saved_as_a_model_of_its_family(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    handle = sparsely(model)
    own = {id(parameter) for parameter in handle.indexers.parameters()}
    groups = [
        dict(params=[p for p in model.parameters() if id(p) not in own], lr=1e-4),
        dict(params=handle.indexers.parameters(), lr=2e-2),
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    ids, kls = own_tokens(2, 40), []
    untyped: Any = model
    for _ in range(6):
        loss = untyped(ids, labels=ids, use_cache=False).loss
        loss.backward()
        kls.append(sum(float(each.kl) for each in handle.losses().values()))
        optimizer.step()
        optimizer.zero_grad()
    assert kls[-1] < 0.8 * kls[0]
    held_out = own_tokens(1, 33, seed=9)
    want = logits(model, held_out)
    handle.remove()
    model.save_pretrained(tmp_path)
    auto: Any = AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(loaded.eval(), held_out), want, rtol=1e-3, atol=1e-3)


def test_indexers_that_were_warmed_up_are_loaded_to_select(tmp_path: Path) -> None:
    model, ids = model_of("glm_moe_dsa"), own_tokens(1, 25)
    dense = attach(model, indexers="own")
    with torch.no_grad():
        for parameter in dense.indexers.parameters():
            parameter.mul_(1.5)
    save_native(dense, tmp_path, base_name="glm")
    dense.remove()
    want = logits(model, ids)
    fresh = model_of("glm_moe_dsa")
    assert isinstance(load_native(fresh, tmp_path, topk=K), OwnSparseHandle)
    torch.testing.assert_close(logits(fresh, ids), want, rtol=1e-3, atol=1e-3)


def test_parameters_are_float32_while_they_train() -> None:
    model = own_model("deepseek_v32", torch.bfloat16, index_topk=K)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    handle = sparsely(model)
    assert {parameter.dtype for parameter in handle.indexers.parameters()} == {torch.float32}
    handle.remove()
    assert all(x.dtype == before[name].dtype and torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (
            "deepseek_v32",
            dict(layers=[1]),
            r"every layer that an indexer serves must be chosen, .*, got none for layers \[0, 2, 3\]; leave",
        ),
        (
            "dots3_note",
            dict(layers=[2]),
            r"every layer that an indexer serves must be chosen, .*, got none for layers \[0\]; leave layers or topk",
        ),
        ("deepseek_v32", dict(index_dtype="fp8"), "index_dtype and teacher_dtype must be None, .*got 'fp8' and None"),
        ("deepseek_v32", dict(topk=0), "topk must be a whole number of keys, 1 or more, got 0"),
        ("deepseek_v32", dict(target="sum_logits"), "with topk, target must be \"mean\", got 'sum_logits'"),
    ],
)
def test_what_can_not_be_sparse_is_refused_and_left_as_it_was(
    family: str, options: dict[str, Any], message: str
) -> None:
    model, ids = own_model(family, index_topk=K), own_tokens(1, 12)
    before = logits(model, ids)
    with pytest.raises(ValueError, match=message):
        attach(model, indexers="own", **(dict(topk=K) | options))
    assert torch.equal(logits(model, ids), before) and all(p.requires_grad for p in model.parameters())


def test_another_number_of_keys_is_said_and_a_dense_handle_is_refused() -> None:
    model = own_model("deepseek_v32", index_topk=K)
    with pytest.warns(UserWarning, match="topk = 4 is not the model's index_topk = 6, by which Transformers and"):
        attach(model, indexers="own", topk=4).remove()
    with pytest.raises(ValueError, match="indexers must be LightningIndexers, got a model's own; pass topk to attach"):
        sparse_handle(attach(model, indexers="own"), K)
