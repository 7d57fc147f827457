"""A DeepSeek-V3 with trained indexers, exported, is the DeepSeek-V3.2 that Transformers loads."""

from __future__ import annotations

import json
import logging
import resource
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3Model,
    Glm4MoeLiteConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    YoutuConfig,
)

from flash_indexer.files import export as export_module
from flash_indexer.files.export import deepseek_v32_config, export
from flash_indexer.files.native import read_native
from flash_indexer.models.attach import IndexerHandle, LayerCapture, attach
from flash_indexer.ops import indexer_scores

MLA = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=48, qk_rope_head_dim=16, qk_nope_head_dim=24, v_head_dim=20,
    max_position_embeddings=512, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=[3, 5],
)  # fmt: skip
MOE = dict(moe_intermediate_size=40, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=2, n_group=2,
           topk_group=1, routed_scaling_factor=1.7, norm_topk_prob=False)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=5000.0, factor=4.0, original_max_position_embeddings=128, mscale=1.0,
            mscale_all_dim=0.8, beta_fast=32, beta_slow=1)  # fmt: skip


def v3(**changes: Any) -> DeepseekV3Config:
    return DeepseekV3Config(**(MLA | MOE | dict(first_k_dense_replace=2) | changes))


BASES: dict[str, Callable[[], Any]] = {
    "deepseek_v3": v3,
    "yarn, tied, biased": lambda: v3(
        rope_parameters=YARN, tie_word_embeddings=True, attention_bias=True, first_k_dense_replace=0
    ),
    "dense": lambda: v3(first_k_dense_replace=3),
    "glm4_moe_lite": lambda: Glm4MoeLiteConfig(
        **(MLA | MOE | dict(n_group=1, mlp_layer_types=["sparse", "dense", "sparse"]))
    ),
    "youtu": lambda: YoutuConfig(**MLA),
}


def random_model(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Every weight random, norms and router biases too, so that a lost tensor changes the logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for key, tensor in model.state_dict().items():
        tensor.copy_(torch.randn(tensor.shape) * 0.1 + ("norm" in key))
    return model


def random_handle(model: PreTrainedModel, **sizes: Any) -> IndexerHandle:
    handle = attach(model, **(dict(num_heads=16, head_dim=32) | sizes))
    generator = torch.Generator().manual_seed(1)
    for parameter in handle.indexers.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return handle


@contextmanager
def no_warnings() -> Iterator[None]:
    """Transformers reports newly initialised and unexpected weights as warnings."""
    seen: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert seen == []


def load(path: Path, **options: Any) -> Any:
    with no_warnings():
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), info
    assert model.config.model_type == "deepseek_v32"
    return model.eval()


def tokens(length: int = 60) -> Tensor:
    return torch.randint(0, 97, (1, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def dense_run(handle: IndexerHandle, ids: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """The base's logits and our index scores [T, S] of each layer."""
    scores = {}

    def consumer(capture: LayerCapture) -> None:
        scores[capture.layer] = our_scores(capture)

    with handle.using(consumer):
        logits = handle.model(ids, use_cache=False).logits
    return logits, scores


def our_scores(capture: LayerCapture) -> Tensor:
    operands = capture.index_q, capture.index_k, capture.index_weights
    return indexer_scores(*operands, capture.key_start, capture.key_end)


class _TopkInputs(TorchFunctionMode):
    """Keeps what goes into Tensor.topk."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.topk:
            self.inputs.append(args[0].clone())
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def their_scores_and_topk(model: Any, ids: Tensor, k: int) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
    """Logits of a dense run (index_topk >= S), and of each layer's indexer the scores and, with index_topk = k, the
    choice, all on the inputs of that run."""
    scores, chosen = {}, {}

    def hook(module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        dense, module.index_topk = module.index_topk, k
        with _TopkInputs() as recorded:
            chosen[module.layer_idx] = type(module).forward(module, *args, **kwargs)[0]
        module.index_topk = dense
        (found,) = recorded.inputs
        scores[module.layer_idx] = found[0]

    for layer in model.model.layers:
        layer.self_attn.indexer.register_forward_hook(hook, with_kwargs=True)
    return model(ids, use_cache=False).logits, scores, chosen


@pytest.mark.parametrize("base", BASES)
def test_round_trip_scores_topk_and_logits(tmp_path: Path, base: str) -> None:
    handle = random_handle(random_model(BASES[base]()))
    path = export(handle, tmp_path / "v32")
    model = load(path)
    assert model.config.index_topk == 2048
    ids, k = tokens(), 7
    logits, ours = dense_run(handle, ids)
    their_logits, theirs, chosen = their_scores_and_topk(model, ids, k)
    torch.testing.assert_close(their_logits, logits, rtol=0, atol=2e-5)

    visible = torch.ones(60, 60, dtype=torch.bool).tril()
    assert ours.keys() == theirs.keys() == {0, 1, 2}
    for layer, scores in ours.items():
        assert scores[visible].std() > 0.05
        torch.testing.assert_close(theirs[layer][visible], scores[visible], rtol=1e-4, atol=1e-4)
        ranked = scores[k:].sort(dim=-1, descending=True).values
        assert (ranked[:, k - 1] - ranked[:, k]).min() > 0  # no ties: the top-k is a set
        wanted = scores[k:].topk(k, dim=-1).indices.sort(dim=-1).values
        clear = ranked[:, k - 1] - ranked[:, k] > 1e-3
        assert clear.float().mean() > 0.9
        assert torch.equal(chosen[layer][k:].long().sort(dim=-1).values[clear], wanted[clear])


def test_sparse_logits_are_the_bases_restricted_to_our_topk(tmp_path: Path) -> None:
    handle, k, ids = random_handle(random_model(v3())), 8, tokens()
    model = load(export(handle, tmp_path / "v32", index_topk=k))
    assert model.config.index_topk == k

    def topk_attention(capture: LayerCapture) -> Tensor:
        scores = our_scores(capture)
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(k).indices, True)
        logits = torch.einsum("thd,shd->hts", capture.q, capture.k) * capture.softmax_scale
        logits = logits.masked_fill(~(keep & scores.isfinite()), float("-inf"))
        return torch.einsum("hts,shv->thv", logits.softmax(-1), capture.v)

    with torch.no_grad():
        dense = handle.model(ids, use_cache=False).logits
        with handle.using(topk_attention):
            ours = handle.model(ids, use_cache=False).logits
        theirs = model(ids, use_cache=False).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)
    assert (theirs - dense).abs().max() > 1e-2


def test_the_checkpoint_on_disk(tmp_path: Path) -> None:
    model = random_model(v3(), torch.bfloat16)
    handle = random_handle(model)
    generation = dict(do_sample=True, temperature=0.6, top_p=0.95)
    model.generation_config.update(**generation)
    vocabulary = Tokenizer(WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="[UNK]")
    options = dict(tokenizer=tokenizer, max_shard_size="100KB", base_name="org/base", base_fingerprint="f00d")
    path = export(handle, tmp_path / "v32", **options)

    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 2
    tensors = {key: tensor for shard in shards for key, tensor in load_file(shard).items()}
    for key, tensor in handle.state_dict().items():
        assert tensors[key].dtype == torch.float32
        assert torch.equal(tensors[key], tensor)
    assert sum(".self_attn.indexer." in key for key in tensors) == 3 * 5
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.2.mlp.experts.7.up_proj.weight"].shape == (40, 64)

    config = AutoConfig.from_pretrained(path)
    assert (config.architectures, config.dtype) == (["DeepseekV32ForCausalLM"], torch.bfloat16)
    assert (config.index_n_heads, config.index_head_dim, config.index_topk) == (16, 32, 2048)
    assert (config.mlp_layer_types, config.first_k_dense_replace) == (["dense", "dense", "sparse"], 2)
    for name, value in (MLA | MOE).items():
        assert getattr(config, name) == value, name
    assert config.rope_parameters == model.config.rope_parameters
    assert not hasattr(config, "quantization_config")
    record = json.loads((path / "indexer_config.json").read_text())
    assert record.items() >= dict(format="flash-indexer/deepseek_v32", version=1, base_name="org/base").items()
    assert record.items() >= dict(base_fingerprint="f00d", base_model_type="deepseek_v3", index_topk=2048).items()
    assert AutoTokenizer.from_pretrained(path)("b")["input_ids"] == [1]

    loaded = load(path)
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.to_dict().items() >= generation.items()
    handle.remove()  # the same attention code on both sides, so the same bits
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    wide = load(path, dtype=torch.float32)
    assert torch.equal(wide.model.layers[1].self_attn.indexer.wk.weight, handle.indexers["1"].wk.weight)


def test_the_base_stays_as_it_was(tmp_path: Path) -> None:
    handle = random_handle(random_model(v3(tie_word_embeddings=True)))
    before = {key: tensor.clone() for key, tensor in handle.model.state_dict().items()}
    config = handle.model.config.to_dict()
    logits, _ = dense_run(handle, tokens())
    path = export(handle, tmp_path / "v32")
    assert "lm_head.weight" not in load_file(path / "model.safetensors")  # tied: one copy on disk
    assert handle.model.config.to_dict() == config
    assert all(torch.equal(before[key], tensor) for key, tensor in handle.model.state_dict().items())
    assert torch.equal(dense_run(handle, tokens())[0], logits)


def test_router_keys_of_other_engines_are_kept() -> None:
    handle = random_handle(random_model(v3(topk_method="noaux_tc", scoring_func="sigmoid", moe_layer_freq=1)))
    config = deepseek_v32_config(handle)
    assert (config.topk_method, config.scoring_func, config.moe_layer_freq) == ("noaux_tc", "sigmoid", 1)
    assert not hasattr(config, "num_nextn_predict_layers")


def test_llama_is_refused_with_the_reason_and_goes_native(tmp_path: Path) -> None:
    sizes = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6)
    model = random_model(LlamaConfig(vocab_size=97, num_key_value_heads=2, **sizes))
    handle = random_handle(model)
    reason = r"needs a model with q_lora_rank, because .* of type 'llama' without one; use format='native'"
    with pytest.raises(ValueError, match=reason):
        export(handle, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    path = export(handle, tmp_path / "out", format="native", base_name="tiny", base_fingerprint="f00d")
    config, state_dict = read_native(path)
    assert (config.base_name, config.base_fingerprint, config.layers) == ("tiny", "f00d", (0, 1))
    assert all(torch.equal(state_dict[key], tensor) for key, tensor in handle.state_dict().items())


def test_mla_without_q_lora_is_refused(tmp_path: Path) -> None:
    handle = random_handle(random_model(v3(q_lora_rank=None)))
    with pytest.raises(ValueError, match=r"needs a model with q_lora_rank, .* 'deepseek_v3' without one"):
        export(handle, tmp_path / "out")


def test_missing_layers_are_named(tmp_path: Path) -> None:
    handle = random_handle(random_model(v3()), layers=[1])
    with pytest.raises(ValueError, match=r"an indexer on each of the 3 layers, missing on \[0, 2\]"):
        export(handle, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_other_models_are_refused(tmp_path: Path) -> None:
    handle = random_handle(random_model(v3(rope_interleave=False)))
    with pytest.raises(ValueError, match=r"needs rope_interleave=True, .* got False"):
        export(handle, tmp_path / "out")
    handle = random_handle(DeepseekV3Model(v3()).eval())
    with pytest.raises(ValueError, match=r"needs a causal language model of type .* got DeepseekV3Model"):
        export(handle, tmp_path / "out")
    handle = random_handle(random_model(v3()))
    handle.model.config.model_type = "something_else"
    with pytest.raises(ValueError, match=r"type deepseek_v3, .* of type 'something_else'"):
        export(handle, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("rope_interleaved", True, "False"), ("rope_dim", 8, "16"), ("q_lora_rank", None, "48")],
)
def test_indexers_of_another_make_are_refused(tmp_path: Path, name: str, value: object, expected: str) -> None:
    handle = random_handle(random_model(v3()))
    for indexer in handle.indexers.values():
        setattr(indexer, name, value)
    with pytest.raises(ValueError, match=rf"needs indexers with {name} = {expected} \(.*\), got {value}"):
        export(handle, tmp_path / "out")


def test_tensors_that_can_not_be_exported(tmp_path: Path) -> None:
    handle = random_handle(random_model(v3()))
    attention = handle.model.model.layers[1].self_attn
    attention.scaling *= 2
    with pytest.raises(ValueError, match="rope frequencies or softmax scale differ"):
        export(handle, tmp_path / "out")
    attention.scaling /= 2
    handle.model.model.layers[0].register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match=r"1 tensors are not in .* first model.layers.0.extra"):
        export(handle, tmp_path / "out")
    handle.model.model.layers[0].extra = None
    weight = attention.o_proj.weight
    attention.o_proj.weight = torch.nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"layers.1.self_attn.o_proj.weight must be bfloat16, .* got torch.float8_e4m3fn"
    ):
        export(handle, tmp_path / "out")
    attention.o_proj.weight = torch.nn.Parameter(weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.o_proj.weight is offloaded or sharded"):
        export(handle, tmp_path / "out")
    attention.o_proj.weight = weight
    handle.indexers["1"].wk.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.indexer.wk.weight holds NaN or infinity"):
        export(handle, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("heads", "tied_rows", "message"),
    [
        (1, None, "the ties of 1 index head were not counted: of keys with equal scores Transformers' indexer attends"),
        (2, None, "the ties of 2 index heads were not counted"),
        (2, 0.36, "36.0% of the queries have equal scores at rank 16 and behind it: .*; train with 8 index heads or"),
        (8, 0.02, "2.0% of the queries have equal scores at rank 16"),
        (2, 0.0, None),
        (2, 0.01, None),
        (8, None, None),
    ],
)
def test_many_ties_are_warned_of(tmp_path: Path, heads: int, tied_rows: float | None, message: str | None) -> None:
    handle = random_handle(random_model(v3()), num_heads=heads)
    expected = warnings.catch_warnings() if message is None else pytest.warns(UserWarning, match=message)
    with expected:
        if message is None:
            warnings.simplefilter("error")
        export(handle, tmp_path / "model", index_topk=16, tied_rows=tied_rows)


def test_an_indexer_that_layers_share_is_exported_for_each(tmp_path: Path) -> None:
    handle = random_handle(random_model(v3()))
    handle.indexers["2"] = handle.indexers["0"]
    model = load(export(handle, tmp_path / "model"), dtype=torch.float32)
    for key, value in handle.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_wrong_arguments(tmp_path: Path) -> None:
    handle = random_handle(random_model(v3()))
    with pytest.raises(ValueError, match="format must be 'deepseek_v32', 'native' or 'own', got 'gguf'"):
        export(handle, tmp_path / "out", format="gguf")  # type: ignore[arg-type]
    for value in (0, True, 2.0):
        with pytest.raises(ValueError, match=f"index_topk must be a positive integer, got {value}"):
            export(handle, tmp_path / "out", index_topk=value)  # type: ignore[arg-type]
    vocabulary = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="tokenizer must be None for format 'native'"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary)
        export(handle, tmp_path / "out", format="native", tokenizer=tokenizer)


def test_only_a_checkpoint_of_ours_is_replaced(tmp_path: Path) -> None:
    handle, path = random_handle(random_model(v3())), tmp_path / "out"
    base = tmp_path / "base"
    handle.model.save_pretrained(base)
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    with pytest.raises(ValueError, match=r"base, which holds other files; nothing was written"):
        export(handle, base, overwrite=True)
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before

    export(handle, path, max_shard_size="50KB")
    with pytest.raises(ValueError, match=r"holds an earlier checkpoint; choose another path, or pass overwrite=True"):
        export(handle, path)
    export(handle, path, index_topk=9, overwrite=True)
    assert load(path).config.index_topk == 9
    assert [p.name for p in path.glob("*.safetensors")] == ["model.safetensors"]


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = random_handle(random_model(v3()))
    path = export(handle, tmp_path / "out", max_shard_size="100KB")
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"file size limit hit while writing .*out; .* untouched"):
            export(handle, path, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "write_config", full)
    with pytest.raises(OSError, match=r"no space left while writing .*out; .* untouched"):
        export(handle, path, overwrite=True)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
