"""Checkpoints in FP8: every weight must be its values times its scales, computed here in float64 one by one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from flash_indexer.models.fp8_weights import dequantised
from flash_indexer.models.load import load_model, model_fingerprint

E4M3 = torch.float8_e4m3fn
BLOCK = [128, 128]
KV = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"  # 576 rows
UP = "model.layers.0.mlp.up_proj.weight"
SCALE = f"{UP}_scale_inv"
Weights = dict[str, Tensor]


def blocks(rows: int, columns: int, size: list[int]) -> list[tuple[int, int, slice, slice]]:
    """Number of a block's row and column, and its rows and columns."""
    return [
        (i, j, slice(i * size[0], (i + 1) * size[0]), slice(j * size[1], (j + 1) * size[1]))
        for i in range(math.ceil(rows / size[0]))
        for j in range(math.ceil(columns / size[1]))
    ]


def quantised(weight: Tensor, size: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scales, and the float64 product of both."""
    rows, columns = weight.shape
    values, exact = torch.empty(weight.shape, dtype=E4M3), torch.empty(weight.shape, dtype=torch.float64)
    scales = torch.empty(math.ceil(rows / size[0]), math.ceil(columns / size[1]))
    for i, j, *block in blocks(rows, columns, size):
        scales[i, j] = weight[*block].abs().max() / 448
        values[*block] = (weight[*block] / scales[i, j]).to(E4M3)
        exact[*block] = values[*block].double() * scales[i, j].double()
    return values, scales, exact


def write(path: Path, weights: Weights, config: dict[str, Any], **quantisation: Any) -> None:
    """A checkpoint of the weights; quantisation: into its config, where given."""
    path.mkdir()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    more = dict(quantization_config=dict(quant_method="fp8", **quantisation)) if quantisation else {}
    (path / "config.json").write_text(json.dumps(config | more))
    words = Tokenizer(WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    Fast(tokenizer_object=words, eos_token="<eos>").save_pretrained(path)


def deepseek() -> DeepseekV3ForCausalLM:
    """Layers of 192, 576 and 72 rows, of which 128 divides none; the second layer has experts."""
    config = DeepseekV3Config(
        vocab_size=16, hidden_size=160, intermediate_size=200, moe_intermediate_size=72, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=192, kv_lora_rank=512, qk_rope_head_dim=64,
        qk_nope_head_dim=32, v_head_dim=32, first_k_dense_replace=1, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, n_group=1, topk_group=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


@pytest.fixture(scope="module")
def make_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """A model's checkpoint in FP8, and one of the float64 products in float32."""

    def make(model: Any, block: list[int] | None) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("fp8")
        model.save_pretrained(folder / "plain")
        config = json.loads((folder / "plain" / "config.json").read_text())
        fp8: Weights = {}
        exact: Weights = {}
        for name, weight in load_file(folder / "plain" / "model.safetensors").items():
            if "_proj" in name:
                size = list(weight.shape) if block is None else block
                fp8[name], scale, product = quantised(weight, size)
                fp8[f"{name}_scale_inv"] = scale.reshape(()) if block is None else scale
                exact[name] = product.float()
            else:
                fp8[name], exact[name] = weight, weight.clone()
        write(folder / "fp8", fp8, config, weight_block_size=block, activation_scheme="dynamic")
        write(folder / "exact", exact, config)
        return folder / "fp8", folder / "exact"

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model", "block"), [(deepseek, BLOCK), (llama, BLOCK), (llama, [48, 40]), (llama, None)])
def test_a_model_is_that_of_the_products(
    make_checkpoints: Callable[..., tuple[Path, Path]],
    model: Callable[[], Any],
    block: list[int] | None,
    dtype: torch.dtype,
) -> None:
    fp8, exact = make_checkpoints(model(), block)
    got, _ = load_model(fp8, dtype=dtype)
    wanted, _ = load_model(exact, dtype=dtype)
    differing = [n for n, x in wanted.state_dict().items() if not torch.equal(x, got.state_dict()[n])]
    assert not differing and model_fingerprint(got) == model_fingerprint(wanted)
    assert not hasattr(got.config, "quantization_config") and not got.training
    routers = "gate.weight"  # which Transformers 5.24 keeps in float32
    assert not any(p.requires_grad for p in got.parameters())
    assert all(p.dtype == dtype for name, p in got.named_parameters() if not name.endswith(routers))
    plain = load_file(fp8.parent / "plain" / "model.safetensors")
    off = max(float((got.state_dict()[n].float() - w).norm() / w.norm()) for n, w in plain.items() if n in (UP, KV))
    assert 0.01 < off < 0.05, "rounding to e4m3 shows, and little more than it"


def test_a_loaded_model_is_saved_as_an_ordinary_one(
    make_checkpoints: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    fp8, _ = make_checkpoints(llama(), BLOCK)
    (fp8 / "generation_config.json").write_text(json.dumps(dict(temperature=0.5, do_sample=True)))
    model, tokenizer = load_model(fp8, dtype=torch.bfloat16)
    assert model.generation_config.temperature == 0.5
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = load_model(tmp_path / "saved", dtype=torch.bfloat16)
    assert model_fingerprint(again) == model_fingerprint(model)
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


@pytest.mark.parametrize("shape", [(192, 128), (576, 160), (128, 256), (1, 129), (3, 130, 140)])
def test_blocks_that_do_not_divide_a_weight(shape: tuple[int, ...]) -> None:
    """Each number times the scale of the block that it is in."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).to(E4M3)
    grid = (*shape[:-2], math.ceil(shape[-2] / 128), math.ceil(shape[-1] / 128))
    scale = torch.rand(grid, generator=generator) + 0.5
    exact = torch.empty(shape, dtype=torch.float64)
    for lead in range(math.prod(shape[:-2])):
        one, factors, product = (x.view(-1, *x.shape[-2:])[lead] for x in (values, scale, exact))
        for i, j, *block in blocks(*shape[-2:], BLOCK):
            product[*block] = one[*block].double() * factors[i, j].double()
    got = dequantised("w", values, scale, (128, 128), torch.float32)
    assert torch.equal(got, exact.float())
    assert torch.equal(dequantised("w", values, scale, (128, 128), torch.bfloat16), exact.float().bfloat16())


@pytest.mark.parametrize("exponent", [-40, 0, 7])
def test_scales_that_are_exponents(exponent: int) -> None:
    values = torch.tensor([[1.5, -448.0]]).to(E4M3)
    scale = torch.tensor([[2.0**exponent]]).to(torch.float8_e8m0fnu)
    got = dequantised("w", values, scale, (128, 128), torch.float32)
    assert got.tolist() == [[1.5 * 2.0**exponent, -448 * 2.0**exponent]]


def edit(path: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def test_scales_of_activations_change_nothing_and_other_keys_are_not_dropped(
    make_checkpoints: Callable[..., tuple[Path, Path]],
) -> None:
    fp8, exact = make_checkpoints(llama(), BLOCK)
    edit(fp8, lambda w: w.update({UP.replace("weight", "activation_scale"): torch.tensor(3.0)}))
    got, wanted = (load_model(path, dtype=torch.float32)[0] for path in (fp8, exact))
    assert model_fingerprint(got) == model_fingerprint(wanted)
    edit(fp8, lambda w: w.update({"model.norm.input_scale": torch.tensor(3.0)}))
    with pytest.raises(ValueError, match=r"1 unexpected, first \['model.norm.input_scale'\]"):
        load_model(fp8, dtype=torch.float32)


def test_shards_are_read(make_checkpoints: Callable[..., tuple[Path, Path]]) -> None:
    """A weight in one file, its scales in another."""
    fp8, exact = make_checkpoints(llama(), BLOCK)
    weights = load_file(fp8 / "model.safetensors")
    (fp8 / "model.safetensors").unlink()
    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in weights.items():
        parts["b.safetensors" if name.endswith("scale_inv") else "a.safetensors"][name] = tensor
    for file, part in parts.items():
        save_file(part, fp8 / file, metadata={"format": "pt"})
    index = dict(metadata={}, weight_map={name: file for file, part in parts.items() for name in part})
    (fp8 / "model.safetensors.index.json").write_text(json.dumps(index))
    got, wanted = (load_model(path, dtype=torch.float32)[0] for path in (fp8, exact))
    assert model_fingerprint(got) == model_fingerprint(wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(SCALE), rf"{UP} is stored in float8_e4m3fn and needs its scales in {SCALE}"),
        (
            lambda w: w.update({SCALE: torch.ones(3, 1)}),
            rf"{SCALE} must be \[2, 1\], a scale for each block of 128 x 128",
        ),
        (lambda w: w.update({SCALE: torch.ones(2, 1).int()}), rf"{SCALE} must be float32, .* got int32"),
        (lambda w: w.update({f"{UP[:-7]}.scale": w.pop(SCALE)}), rf"{UP} is stored in float8_e4m3fn and needs"),
        (lambda w: w.pop(UP), rf"1 missing, first \['{UP}'\].* 1 unexpected, first \['{SCALE}'\]"),
        (
            lambda w: w.update({"model.norm.weight_scale_inv": torch.ones(1)}),
            "1 unexpected, first .'model.norm.weight_s",
        ),
        (lambda w: (w.pop(SCALE), w.update({UP: w[UP].float().char()})), rf"1 are stored in 8 bits .* {UP} in I8"),
        (lambda w: w.clear(), "weights in .* can't be read: no model.safetensors and no index of shards"),
    ],
    ids=["no scales", "another grid", "integers", "another name", "no weight", "left over", "8-bit integers", "empty"],
)
def test_what_is_not_of_the_format_is_refused(
    make_checkpoints: Callable[..., tuple[Path, Path]], change: Callable[[Weights], object], message: str
) -> None:
    fp8, _ = make_checkpoints(llama(), BLOCK)
    edit(fp8, change)
    with pytest.raises(ValueError, match=message):
        load_model(fp8, dtype=torch.float32)


@pytest.mark.parametrize("size", [[128], [0, 128], "128", [1.5, 2]])
def test_a_block_size_that_is_none_is_refused(make_checkpoints: Callable[..., tuple[Path, Path]], size: object) -> None:
    fp8, _ = make_checkpoints(llama(), BLOCK)
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = size
    (fp8 / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weight_block_size of quantization_config must be two positive integers"):
        load_model(fp8, dtype=torch.float32)


def test_scales_of_one_number_need_a_config_without_blocks(
    make_checkpoints: Callable[..., tuple[Path, Path]],
) -> None:
    fp8, _ = make_checkpoints(llama(), None)
    edit(fp8, lambda w: w.update({SCALE: torch.ones(2, 1)}))
    with pytest.raises(ValueError, match=rf"{SCALE} must be \[1, 1\], a scale for the whole matrix in"):
        load_model(fp8, dtype=torch.float32)
