"""Held-out sequences: from the column that is named, and of tokens that the model knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from flash_indexer.recipe.held_out import held_out_batches


def run_of(model: Path, **changes: Any) -> dict[str, Any]:
    return dict(model=str(model), sequence_length=8, seed=0, column="body") | changes


def write_rows(path: Path) -> Path:
    rows = [{"body": "w1 w2 w3 " * 9, "other": "w4 w5 w6 w7 " * 9} for _ in range(5)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("column", "words"), [(None, {1, 2, 3}), ("other", {4, 5, 6, 7})])
def test_the_column_is_the_runs_unless_one_is_named(
    tmp_path: Path, checkpoint: Path, column: str | None, words: set[int]
) -> None:
    data = str(write_rows(tmp_path / "held_out.jsonl"))
    batches = held_out_batches(run_of(checkpoint), data, 3, column=column)
    assert len(batches) == 3
    for batch in batches:
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
            "input_ids": (torch.int64, (1, 8)),
            "position_ids": (torch.int64, (1, 8)),
        }
    assert set(torch.cat([batch["input_ids"] for batch in batches]).unique().tolist()) - {60} == words


def test_of_several_splits_the_one_to_judge_on_is_read(tmp_path: Path, checkpoint: Path) -> None:
    write_rows(tmp_path / "data" / "train-00000-of-00001.jsonl")
    validation = tmp_path / "data" / "validation-00000-of-00001.jsonl"
    validation.write_text(json.dumps({"body": "w9 " * 40}) + "\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="'validation' is read"):
        batches = held_out_batches(run_of(checkpoint), str(tmp_path), 3)
    assert {int(token) for batch in batches for token in batch["input_ids"].flatten()} == {9}


def test_the_standard_library_gives_one_document_a_sequence(checkpoint: Path) -> None:
    for batch in held_out_batches(run_of(checkpoint, sequence_length=64), None, 2):
        assert torch.equal(batch["position_ids"], torch.arange(64)[None])


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    for file in checkpoint.glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    LlamaConfig(vocab_size=50, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    data = str(write_rows(tmp_path / "held_out.jsonl"))
    with pytest.raises(ValueError, match=r"ids must be below the model's vocab_size = 50, got 60"):
        held_out_batches(run_of(tmp_path), data, 1)


def test_sequences_may_be_too_short_to_train_on_a_part_of_their_queries(tmp_path: Path, checkpoint: Path) -> None:
    data = str(write_rows(tmp_path / "held_out.jsonl"))
    (batch,) = held_out_batches(run_of(checkpoint, queries=0.1), data, 1)
    assert batch["input_ids"].shape == (1, 8)
