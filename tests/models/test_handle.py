"""How an attached model may be called: what works gives the plain call's result, the rest says what to do instead."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig, PreTrainedModel

from flash_indexer.models.attach import IndexerHandle, attach

Tiny = Callable[..., PreTrainedModel]
SIZES = dict(num_heads=3, head_dim=32)
IDS = torch.randint(0, 61, (1, 17), generator=torch.Generator().manual_seed(2))


def attached(model: PreTrainedModel, **sizes: Any) -> IndexerHandle:
    torch.manual_seed(1)
    return attach(model, **(SIZES | sizes))


@torch.no_grad()
def forward(handle: IndexerHandle, **inputs: Any) -> Tensor:
    return handle.model(IDS, use_cache=False, **inputs).logits


def result(handle: IndexerHandle, run: Callable[[], object]) -> tuple[list[float], list[Tensor]]:
    """Losses and gradients of one call."""
    handle.indexers.zero_grad()
    run()
    gradients = [parameter.grad for parameter in handle.indexers.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [float(loss.kl) for loss in handle.losses().values()], [gradient.clone() for gradient in gradients]


def assert_same(
    got: tuple[list[float], list[Tensor]], want: tuple[list[float], list[Tensor]], rel: float, gradients: float = 0.0
) -> None:
    assert got[0] == pytest.approx(want[0], rel=rel)
    for mine, theirs in zip(got[1], want[1], strict=True):
        assert (mine - theirs).norm() <= max(rel, gradients) * theirs.norm()


def test_inference_mode_is_refused_while_training_and_gives_losses_in_eval_mode(tiny: Tiny) -> None:
    handle = attached(tiny("llama"))
    want = result(handle, lambda: forward(handle))[0]
    with (
        torch.inference_mode(),
        pytest.raises(
            ValueError, match=r"outside of torch.inference_mode\(\).*use torch.no_grad\(\) around the model, or"
        ),
    ):
        handle.model(IDS, use_cache=False)
    handle.indexers.eval()
    with torch.inference_mode():
        handle.model(IDS, use_cache=False)
    assert [float(loss.kl) for loss in handle.losses().values()] == pytest.approx(want)
    handle.indexers.train()
    with torch.inference_mode(), handle.using(lambda capture: None):
        handle.model(IDS, use_cache=False)
    handle.remove()
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match="attach: must be called outside of torch.inference_mode"),
    ):
        attach(handle.model, **SIZES)


@pytest.mark.parametrize("family_name", ["llama", "deepseek_v3"])
def test_autocast_is_followed_as_torchs_attention_does(tiny: Tiny, family_name: str) -> None:
    model = tiny(family_name)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        before = model(IDS, use_cache=False).logits
    handle = attached(model)
    want = result(handle, lambda: forward(handle))
    with torch.autocast("cpu", torch.bfloat16):
        after = []
        got = result(handle, lambda: after.append(forward(handle)))
    assert after[0].dtype == before.dtype and (after[0] - before).norm() < 0.05 * before.norm()
    assert_same(got, want, 0.02, gradients=0.3)  # the model's own rounding; nothing of it is the indexer's
    assert {gradient.dtype for gradient in got[1]} == {torch.float32}


def test_torch_compile_leaves_the_attention_as_it_is(tiny: Tiny) -> None:
    handle = attached(tiny("llama", num_hidden_layers=1))
    want = result(handle, lambda: forward(handle))
    compiled = torch.compile(handle.model, backend="eager")
    with torch.no_grad():
        assert_same(result(handle, lambda: compiled(IDS, use_cache=False)), want, 1e-5)
    torch.compiler.reset()


def test_copies_are_refused_and_the_original_goes_on(tiny: Tiny) -> None:
    handle = attached(tiny("llama"))
    for copied in (handle, handle.model):
        with pytest.raises(
            TypeError, match=r"can't be copied or pickled: .*call remove\(\) first, copy the model, attach"
        ):
            copy.deepcopy(copied)
    with pytest.raises(TypeError, match="can't be copied or pickled"):
        pickle.dumps(handle)
    forward(handle)
    handle.remove()
    again = attached(copy.deepcopy(handle.model))
    again.load_state_dict(handle.state_dict())


def test_a_second_thread_is_refused_while_one_runs_and_taken_afterwards(tiny: Tiny) -> None:
    handle, entered, leave = attached(tiny("llama")), threading.Event(), threading.Event()
    handle.observer = lambda capture: (entered.set(), leave.wait(60))
    first = threading.Thread(target=forward, args=(handle,), name="first")
    first.start()
    try:
        assert entered.wait(60)
        with pytest.raises(
            RuntimeError, match=r"second in thread 'MainThread' while 'first' is in its own; let it wait"
        ):
            forward(handle)
    finally:
        leave.set()
        first.join()
    assert len(handle.losses()) == 3, "the refusal did not disturb the first"
    handle.observer = None
    want = result(handle, lambda: forward(handle))

    def fail() -> None:
        with pytest.raises(ValueError, match="output_attentions"):
            forward(handle, output_attentions=True)

    another = threading.Thread(target=fail)
    another.start()
    another.join()
    assert_same(result(handle, lambda: forward(handle)), want, 1e-6)


def test_a_graph_of_the_frozen_model_is_refused(tiny: Tiny) -> None:
    handle = attached(tiny("llama"))
    want = result(handle, lambda: forward(handle))
    assert_same(result(handle, lambda: handle.model(IDS, use_cache=False)), want, 1e-6)  # grad mode alone is no graph
    handle.model.gradient_checkpointing_enable()
    handle.model.train()
    with pytest.raises(
        ValueError, match=r"LlamaAttention must not require grad, .*call the model under torch.no_grad\(\)"
    ):
        handle.model(IDS, use_cache=False)
    assert_same(result(handle, lambda: forward(handle)), want, 1e-6)


def test_attention_weights_are_refused(tiny: Tiny) -> None:
    handle = attached(tiny("llama"))
    with pytest.raises(
        ValueError, match=r"output_attentions must be False .* got True: .*remove\(\) the indexers first"
    ):
        forward(handle, output_attentions=True)
    forward(handle, output_attentions=False)
    model = tiny("llama")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions must be False while indexers are attached, got True"):
        forward(attached(model))


def test_dropout_modules_are_refused_in_training_mode(tiny: Tiny) -> None:
    sizes = dict(vocab_size=61, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=6)
    model = AutoModelForCausalLM.from_config(PhiConfig(**sizes, resid_pdrop=0.2, bos_token_id=None, eos_token_id=None))
    handle = attached(model.eval())
    forward(handle)
    model.train()
    with pytest.raises(ValueError, match=r"got layers.0.resid_dropout.p = 0.2; call model.eval\(\)"):
        forward(handle)
    lora = attached(tiny("llama"))
    block = lora.model.model.layers[1]
    block.mlp.up_proj = nn.Sequential(nn.Dropout(0.1), block.mlp.up_proj).eval()
    forward(lora)
    block.mlp.up_proj.train()
    with pytest.raises(
        ValueError, match=r"dropout must be off in the frozen model, got layers.1.mlp.up_proj.0.p = 0.1"
    ):
        forward(lora)


def test_dropout_that_the_config_alone_names_is_refused_in_training_mode(tiny: Tiny) -> None:
    handle = attached(tiny("llama", hidden_dropout=0.3))
    forward(handle)
    handle.model.train()
    with pytest.raises(ValueError, match="got hidden_dropout = 0.3; call model.eval"):
        forward(handle)
    handle.model.eval().model.layers[1].train()
    with pytest.raises(ValueError, match="got hidden_dropout = 0.3; call model.eval"):
        forward(handle)
    handle.model.config.hidden_dropout = 0.0
    forward(handle)


def test_offloaded_weights_train_indexers_where_they_compute(tiny: Tiny) -> None:
    plain = attached(tiny("llama"))
    want = result(plain, lambda: forward(plain))
    model = tiny("llama")
    cpu_offload(model, execution_device=torch.device("cpu"))
    handle = attached(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.device.type for p in handle.indexers.parameters()} == {"cpu"}
    assert_same(result(handle, lambda: forward(handle)), want, 1e-6)
    handle.remove()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4)
        )
    with pytest.raises(ValueError, match="weights must have values, got parameters on the meta device; load them with"):
        attach(model, **SIZES)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(head_dim="64"), ValueError, "attach: head_dim must be a positive integer, got '64'; pass a number"),
        (dict(num_heads=2.0), ValueError, "attach: num_heads must be a positive integer, got 2.0"),
        (dict(rope_dim="16"), ValueError, "attach: rope_dim must be a positive integer, got '16'"),
        (dict(rope_dim=0), ValueError, "attach: rope_dim must be a positive integer, got 0"),
    ],
)
def test_sizes_are_checked_before_anything_is_done(
    tiny: Tiny, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attach(tiny("llama"), **(SIZES | options))


def test_inputs_of_several_dtypes_are_refused_without_autocast(tiny: Tiny) -> None:
    handle = attached(tiny("llama"))
    values = handle.model.model.layers[0].self_attn.v_proj
    values.register_forward_hook(lambda module, args, output: output.bfloat16())
    with pytest.raises(
        ValueError, match="must have one dtype, got torch.float32, torch.float32 and torch.bfloat16; load"
    ):
        forward(handle)


def test_indexers_are_float32_whatever_the_default_dtype(tiny: Tiny) -> None:
    handle = attached(tiny("llama"))
    want, model = result(handle, lambda: forward(handle)), tiny("llama")
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = attached(model)
        other.load_state_dict(handle.state_dict())
        got = result(other, lambda: forward(other))
        optimizer = torch.optim.AdamW(other.indexers.parameters(), lr=1e-3)
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in other.indexers.parameters()} == {torch.float32}
    assert_same(got, want, 1e-6)
    assert all(bool((indexer.k_norm.weight != 1).all()) for indexer in other.indexers.values())


def test_a_token_that_is_not_finite_shows_in_the_loss(tiny: Tiny) -> None:
    handle = attached(tiny("llama"))
    embeds = handle.model.get_input_embeddings()(IDS).detach().clone()
    embeds[0, 5, 3] = torch.nan
    with torch.no_grad():
        handle.decoder(inputs_embeds=embeds, use_cache=False)
    assert all(not bool(torch.isfinite(loss.kl)) for loss in handle.losses().values())
