"""The native checkpoint: round trip, every damaged or foreign directory refused, no earlier one lost."""

from __future__ import annotations

import errno
import json
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, PreTrainedModel

from flash_indexer.files import native
from flash_indexer.files.native import load_native, read_native, save_native
from flash_indexer.models.attach import IndexerHandle, attach
from flash_indexer.ops import indexer_scores

LLAMA = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2)
MLA = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    q_lora_rank=48, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=24, v_head_dim=20, first_k_dense_replace=2,
)  # fmt: skip


def tiny_model(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = LLAMA | dict(vocab_size=61, max_position_embeddings=128) | changes
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).eval()


def random_handle(model: PreTrainedModel, seed: int = 1, **sizes: Any) -> IndexerHandle:
    """Attached indexers whose every parameter is random, norms and biases too."""
    handle = attach(model, **(dict(num_heads=4, head_dim=32) | sizes))
    generator = torch.Generator().manual_seed(seed)
    for parameter in handle.indexers.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return handle


def scores(handle: IndexerHandle) -> dict[int, torch.Tensor]:
    found = {}

    def consumer(capture: Any) -> None:
        index = capture.index_q, capture.index_k, capture.index_weights
        found[capture.layer] = indexer_scores(*index, capture.key_start, capture.key_end)

    with handle.using(consumer), torch.no_grad():
        handle.model(torch.arange(40)[None] * 7 % 61, use_cache=False)
    return found


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[tuple[IndexerHandle, Path]]:
    handle = random_handle(tiny_model(), rope_dim=16, layers=[0, 2])
    path = save_native(handle, tmp_path / "indexer", base_name="tiny", base_fingerprint="f00d")
    yield handle, path
    handle.remove()


def edit(path: Path, **changes: Any) -> None:
    """Change fields of the config; a value of ... removes the field."""
    file = path / "indexer_config.json"
    record = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in record.items() if value is not ...}))


def test_files_and_fields(saved: tuple[IndexerHandle, Path]) -> None:
    _, path = saved
    assert sorted(p.name for p in path.iterdir()) == ["indexer.safetensors", "indexer_config.json"]
    assert json.loads((path / "indexer_config.json").read_text()) == dict(
        format="flash-indexer/native", version=1, base_name="tiny", base_model_type="llama", base_hidden_size=48,
        base_num_layers=3, base_fingerprint="f00d", layers=[0, 2], num_heads=4, head_dim=32, rope_dim=16,
        rope_interleaved=False, q_lora_rank=None, target="mean", base_dtype="float32",
        judged=None, index_dtype=None, teacher_dtype=None, indexers="fresh", teachers="shared",
            base_vocab_size=61, base_tokenizer_fingerprint=None,
    )  # fmt: skip


def test_a_model_gets_indexers_of_the_recorded_sizes_and_the_same_scores(saved: tuple[IndexerHandle, Path]) -> None:
    handle, path = saved
    fresh = load_native(tiny_model(), path, base_fingerprint="f00d")
    assert (fresh.layers, fresh.target) == ((0, 2), "mean")
    wanted, got = scores(handle), scores(fresh)
    assert wanted.keys() == got.keys() == {0, 2}
    for layer in wanted:
        assert torch.equal(wanted[layer], got[layer])


def test_a_handle_is_loaded_in_place(saved: tuple[IndexerHandle, Path]) -> None:
    handle, path = saved
    other = random_handle(tiny_model(), seed=2, rope_dim=16, layers=[0, 2])
    assert load_native(other, path) is other
    for key, tensor in handle.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor)


@pytest.mark.parametrize("arithmetic", [("fp8", "fp8"), ("fp8_unrotated", "fp8_unrotated"), (None, "fp8_unrotated")])
def test_the_arithmetic_of_the_training_is_kept(arithmetic: tuple[str | None, str], tmp_path: Path) -> None:
    handle = random_handle(tiny_model(), index_dtype=arithmetic[0], teacher_dtype=arithmetic[1])
    path = save_native(handle, tmp_path / "indexer", base_name="tiny")
    handle.remove()
    fresh = load_native(tiny_model(), path)
    assert (fresh.index_dtype, fresh.teacher_dtype) == arithmetic
    edit(path, teacher_dtype="int8")
    with pytest.raises(ValueError, match="teacher_dtype must be None or one of 'fp8', 'fp8_unrotated', got 'int8'"):
        load_native(tiny_model(), path)


def test_mla_with_q_lora_and_another_target(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DeepseekV3Config(vocab_size=61, **MLA)).eval()
    handle = random_handle(model, target="per_head")
    path = save_native(handle, tmp_path / "indexer", base_name="mla")
    wanted = scores(handle)
    handle.remove()
    config, state_dict = read_native(path)
    assert (config.q_lora_rank, config.rope_dim, config.target) == (48, 16, "per_head")
    assert config.base_fingerprint is None
    assert state_dict["model.layers.1.self_attn.indexer.wq_b.weight"].shape == (4 * 32, 48)
    fresh = load_native(model, path, base_fingerprint="not recorded, so not compared")
    assert fresh.target == "per_head"
    got = scores(fresh)
    assert all(torch.equal(wanted[layer], got[layer]) for layer in (0, 1))


def test_saving_twice_gives_the_same_bytes(saved: tuple[IndexerHandle, Path], tmp_path: Path) -> None:
    handle, path = saved
    again = save_native(handle, tmp_path / "again", base_name="tiny", base_fingerprint="f00d")
    for name in ("indexer.safetensors", "indexer_config.json"):
        assert (again / name).read_bytes() == (path / name).read_bytes()


def test_a_checkpoint_left_between_two_renames_is_read(saved: tuple[IndexerHandle, Path]) -> None:
    handle, path = saved
    path.rename(path.parent / ".indexer.old")
    assert read_native(path).config.base_name == "tiny"
    with pytest.raises(ValueError, match="holds an earlier checkpoint"):
        save_native(handle, path, base_name="tiny")
    save_native(handle, path, base_name="second", overwrite=True)
    assert read_native(path).config.base_name == "second"
    assert sorted(p.name for p in path.parent.iterdir()) == ["indexer"]


def test_missing_and_foreign_directories(tmp_path: Path, saved: tuple[IndexerHandle, Path]) -> None:
    _, path = saved
    with pytest.raises(FileNotFoundError, match=r"no directory .*nowhere; train or export"):
        read_native(tmp_path / "nowhere")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"foreign is not a flash-indexer checkpoint: it has no indexer_config.json"):
        read_native(foreign)
    shutil.copytree(path, tmp_path / "run" / "checkpoint")
    with pytest.raises(ValueError, match="run is not a flash-indexer checkpoint: .*; give .*run/checkpoint$"):
        read_native(tmp_path / "run")
    (foreign / "indexer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must name a format that begins with 'flash-indexer/'"):
        read_native(foreign)
    edit(path, format="someone/else")
    with pytest.raises(ValueError, match="must name a format that begins with 'flash-indexer/'"):
        read_native(path)
    edit(path, format="flash-indexer/deepseek_v32")
    with pytest.raises(ValueError, match=r"load an exported model with AutoModelForCausalLM"):
        read_native(path)


def test_a_damaged_config(saved: tuple[IndexerHandle, Path]) -> None:
    _, path = saved
    edit(path, version=2)
    with pytest.raises(ValueError, match=r"has version 2 .* reads up to 1; upgrade flash-indexer"):
        read_native(path)
    edit(path, version="1")
    with pytest.raises(ValueError, match=r"version in .* must be a positive integer, got '1'"):
        read_native(path)
    edit(path, version=1, num_heads=...)
    with pytest.raises(ValueError, match=r"lacks 'num_heads'"):
        read_native(path)
    (path / "indexer_config.json").write_text('{"format": "flash-ind')
    with pytest.raises(ValueError, match=r"is no valid JSON \(.*\); use an earlier checkpoint"):
        read_native(path)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("num_heads", 0, "int"),
        ("head_dim", True, "int"),
        ("rope_interleaved", 1, "bool"),
        ("layers", [], r"tuple\[int, ...\]"),
        ("layers", [0, "2"], r"tuple\[int, ...\]"),
        ("q_lora_rank", "48", r"int \| None"),
        ("base_name", None, "str"),
        ("base_fingerprint", 7, r"str \| None"),
    ],
)
def test_wrong_types_in_the_config(saved: tuple[IndexerHandle, Path], field: str, value: object, expected: str) -> None:
    edit(saved[1], **{field: value})
    with pytest.raises(ValueError, match=rf"{field} in .* must be {expected}, got {re.escape(repr(value))}"):
        read_native(saved[1])


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(saved: tuple[IndexerHandle, Path], keep: int) -> None:
    file = saved[1] / "indexer.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"indexer.safetensors is truncated or damaged"):
        read_native(saved[1])


def test_missing_weights(saved: tuple[IndexerHandle, Path]) -> None:
    (saved[1] / "indexer.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"indexer.safetensors is missing; copy the whole directory"):
        read_native(saved[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_named(saved: tuple[IndexerHandle, Path], tmp_path: Path, value: float) -> None:
    handle, path = saved
    key = "model.layers.2.self_attn.indexer.k_norm.bias"
    file = path / "indexer.safetensors"
    before = file.read_bytes()
    tensors = load_file(file)
    tensors[key][5] = value
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"{key} holds NaN or infinity"):
        read_native(path)
    file.write_bytes(before)

    handle.indexers["2"].get_parameter("k_norm.bias").data[5] = value
    with pytest.raises(ValueError, match=rf"the handle: {key} holds NaN or infinity"):
        save_native(handle, path, base_name="tiny", overwrite=True)
    assert file.read_bytes() == before
    assert not list(tmp_path.glob(".indexer*"))


def test_tensors_that_differ_from_the_config(saved: tuple[IndexerHandle, Path]) -> None:
    _, path = saved
    tensors = load_file(path / "indexer.safetensors")
    key = "model.layers.0.self_attn.indexer.wk.weight"

    def store(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, path / "indexer.safetensors")

    store({k: v for k, v in tensors.items() if k != key})
    with pytest.raises(ValueError, match=f"lacks 1 tensors .* first {key}"):
        read_native(path)
    store(tensors | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="has 1 tensors too many, first extra"):
        read_native(path)
    store(tensors | {key: torch.zeros(32, 47)})
    with pytest.raises(ValueError, match=rf"{key} must be \[32, 48\], got \[32, 47\]"):
        read_native(path)
    store(tensors | {key: torch.zeros(32, 48, dtype=torch.int32)})
    with pytest.raises(ValueError, match=rf"{key} must be floating point, got torch.int32"):
        read_native(path)


def test_another_base_model_is_refused_and_left_alone(saved: tuple[IndexerHandle, Path]) -> None:
    _, path = saved
    model = tiny_model(hidden_size=96, num_hidden_layers=4)
    message = r"another base model: hidden_size 48, the model has 96; num_hidden_layers 3, the model has 4; load 'tiny'"
    with pytest.raises(ValueError, match=message):
        load_native(model, path)
    with pytest.raises(ValueError, match="fingerprint 'f00d', the model has 'beef'"):
        load_native(tiny_model(), path, base_fingerprint="beef")
    edit(path, base_model_type="qwen3")
    with pytest.raises(ValueError, match="model_type 'qwen3', the model has 'llama'"):
        load_native(tiny_model(), path)
    attach(model).remove()


def test_indexers_that_do_not_fit_are_refused(saved: tuple[IndexerHandle, Path]) -> None:
    _, path = saved
    other = random_handle(tiny_model(), num_heads=8, rope_dim=32)
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    message = r"layers \(0, 2\), attached are \(0, 1, 2\); num_heads 4, attached are 8; rope_dim 16, attached are 32"
    with pytest.raises(ValueError, match=message):
        load_native(other, path)
    assert all(torch.equal(before[key], tensor) for key, tensor in other.state_dict().items())

    model = tiny_model()
    edit(path, rope_interleaved=True)
    with pytest.raises(ValueError, match="rope_interleaved True, attached are False"):
        load_native(model, path)
    attach(model).remove()  # the failed call took its indexers off again


def test_what_may_be_replaced(saved: tuple[IndexerHandle, Path], tmp_path: Path) -> None:
    handle, path = saved
    with pytest.raises(ValueError, match=r"holds an earlier checkpoint; choose another path, or pass overwrite=True"):
        save_native(handle, path, base_name="second")
    assert read_native(path).config.base_name == "tiny"
    save_native(handle, path, base_name="second", overwrite=True)
    assert read_native(path).config.base_name == "second"

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    save_native(handle, foreign, base_name="into an empty folder")
    (foreign / "indexer_config.json").unlink()
    with pytest.raises(ValueError, match=r"foreign, which holds other files; nothing was written"):
        save_native(handle, foreign, base_name="tiny", overwrite=True)
    assert [p.name for p in foreign.iterdir()] == ["indexer.safetensors"]
    with pytest.raises(NotADirectoryError, match="got the file"):
        save_native(handle, foreign / "indexer.safetensors", base_name="tiny", overwrite=True)


def test_a_full_disk_half_way_loses_nothing(saved: tuple[IndexerHandle, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    handle, path = saved
    before = {p.name: p.read_bytes() for p in path.iterdir()}

    def half(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, file, metadata)
        file.write_bytes(file.read_bytes()[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(native, "save_file", half)
    with pytest.raises(OSError, match=r"no space left while writing .*indexer; .* free some space") as caught:
        save_native(handle, path, base_name="second", overwrite=True)
    assert caught.value.errno == errno.ENOSPC
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["indexer"]


def test_a_write_the_system_refuses_inside_safetensors(saved: tuple[IndexerHandle, Path]) -> None:
    handle, path = saved
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["indexer.safetensors"]) // 2, limit[1]))
    try:
        with pytest.raises(OSError, match="file size limit hit while writing"):
            save_native(handle, path, base_name="second", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["indexer"]


def test_an_indexer_that_layers_share_is_written_for_each(tmp_path: Path) -> None:
    handle = random_handle(tiny_model())
    handle.indexers["2"] = handle.indexers["0"]
    path = save_native(handle, tmp_path / "shared", base_name="tiny")
    handle.remove()
    again = load_native(tiny_model(), path)
    assert again.state_dict().keys() == handle.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in handle.state_dict().items())
    assert again.indexers["2"].wk.weight is not again.indexers["0"].wk.weight


def test_the_file_holds_float32_whatever_the_indexers_are(tmp_path: Path) -> None:
    handle = random_handle(tiny_model())
    handle.indexers.bfloat16()
    assert handle.indexers["0"].wk.weight.dtype == torch.bfloat16
    path = save_native(handle, tmp_path / "narrow", base_name="tiny")
    for key, tensor in load_file(path / "indexer.safetensors").items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, handle.state_dict()[key].float()), key


def test_the_file_holds_float32_whatever_the_default_dtype(tmp_path: Path) -> None:
    model = tiny_model()
    torch.set_default_dtype(torch.bfloat16)
    try:
        path = save_native(attach(model, num_heads=4, head_dim=32), tmp_path / "default", base_name="tiny")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in load_file(path / "indexer.safetensors").values()} == {torch.float32}


def test_what_is_neither_a_handle_nor_a_model_is_refused(saved: tuple[IndexerHandle, Path]) -> None:
    handle, path = saved

    class PeftModel(torch.nn.Module):
        base_model = handle.model

    with pytest.raises(TypeError, match=r"handle_or_model must be .*, got PeftModel; unwrap it: take merge_and_unload"):
        load_native(PeftModel(), path)


def test_indexers_of_different_sizes_are_refused(saved: tuple[IndexerHandle, Path], tmp_path: Path) -> None:
    handle, _ = saved
    handle.indexers["2"].rope_dim = 8
    with pytest.raises(ValueError, match=r"indexers must all have one \(num_heads, .*attach them with one call"):
        save_native(handle, tmp_path / "mixed", base_name="tiny")
    assert not (tmp_path / "mixed").exists()
