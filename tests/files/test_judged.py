"""files.judged: the note in a folder of ours, and the fingerprint that says whose judgement it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flash_indexer.files.judged import indexer_fingerprint, record_judgement
from flash_indexer.files.native import load_native, read_native, save_native
from flash_indexer.models.attach import IndexerHandle, attach

JUDGED = dict(arithmetic="fp8", tokens=7, perplexity=dict(dense=2.5))


def tiny_handle(path: Path | None = None) -> IndexerHandle:
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    return attach(model, num_heads=2, head_dim=16) if path is None else load_native(model, path)


def test_a_note_is_read_with_all_else_as_it_was(tmp_path: Path) -> None:
    path = save_native(tiny_handle(), tmp_path / "indexer", base_name="tiny")
    file = path / "indexer_config.json"
    before = json.loads(file.read_text())
    assert read_native(path).config.judged is None
    record_judgement(path, JUDGED)
    assert json.loads(file.read_text()) == before | dict(judged=JUDGED)
    assert read_native(path).config.judged == JUDGED
    record_judgement(path, JUDGED | dict(arithmetic="bf16"))
    assert read_native(path).config.judged["arithmetic"] == "bf16"
    file.write_text(json.dumps({name: value for name, value in before.items() if name != "judged"}))
    assert read_native(path).config.judged is None, "folders of older versions lack it"
    file.write_text(json.dumps(before | dict(judged="fp8")))
    with pytest.raises(ValueError, match=r"judged in .* must be dict\[str, Any\] \| None, got 'fp8'"):
        read_native(path)


def test_notes_without_an_arithmetic_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    path = save_native(tiny_handle(), tmp_path / "indexer", base_name="tiny")
    with pytest.raises(ValueError, match="record_judgement: judged must name its arithmetic, .* got None"):
        record_judgement(path, dict(tokens=7))
    (tmp_path / "foreign").mkdir()
    with pytest.raises(ValueError, match="foreign is not a flash-indexer checkpoint"):
        record_judgement(tmp_path / "foreign", JUDGED)
    assert not list((tmp_path / "foreign").iterdir())


def test_the_fingerprint_is_that_of_the_weights(tmp_path: Path) -> None:
    handle = tiny_handle()
    before = indexer_fingerprint(handle)
    path = save_native(handle, tmp_path / "indexer", base_name="tiny")
    assert indexer_fingerprint(tiny_handle(path)) == before
    with torch.no_grad():
        weight = handle.indexers["1"].wk.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], weight.new_tensor(9.0))
    assert indexer_fingerprint(handle) != before
