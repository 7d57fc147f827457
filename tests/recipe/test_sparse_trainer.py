"""SparseTrainer trains what a plain loop does, and resumes; what it cannot do it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_
from transformers import TrainingArguments

from flash_indexer.files.trained import trainable
from flash_indexer.models.attach import attach
from flash_indexer.models.load import load_model
from flash_indexer.models.sparse import SparseHandle, sparse_handle
from flash_indexer.recipe.data import PackedDataset, load_documents, pack
from flash_indexer.recipe.language_loss import labels, language_loss
from flash_indexer.recipe.sparse_trainer import SparseTrainer

OPTIONS: dict[str, Any] = dict(
    max_steps=4, learning_rate=1e-3, max_grad_norm=0.5, lr_scheduler_type="constant", logging_steps=1, save_steps=2,
    train_sampling_strategy="sequential", report_to="none", use_cpu=True, disable_tqdm=True, seed=3,
    per_device_train_batch_size=2, gradient_accumulation_steps=2, weight_decay=0.0,
)  # fmt: skip


@pytest.fixture
def data(checkpoint: Path, texts: Path) -> PackedDataset:
    _, tokenizer = load_model(checkpoint, dtype=torch.float32)
    return pack(load_documents(texts), tokenizer, sequence_length=32, seed=0)


def handle_of(checkpoint: Path) -> SparseHandle:
    model, _ = load_model(checkpoint, dtype=torch.float32)
    model.requires_grad_(True)
    torch.manual_seed(0)
    return sparse_handle(attach(model, num_heads=4, head_dim=32), 8)


def state(handle: SparseHandle) -> dict[str, torch.Tensor]:
    return dict(handle.model.state_dict()) | handle.state_dict()


def test_it_trains_what_a_plain_loop_trains(tmp_path: Path, checkpoint: Path, data: PackedDataset) -> None:
    handle = handle_of(checkpoint)
    trainer = SparseTrainer(
        handle, indexer_lr=3e-3, args=TrainingArguments(str(tmp_path), **OPTIONS), train_dataset=data
    )
    trainer.train()
    plain = handle_of(checkpoint)
    plain.model.train()
    groups = [
        dict(params=plain.model.parameters(), lr=1e-3),
        dict(params=plain.indexers.parameters(), lr=3e-3, eps=1e-12),
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    logged = []
    for step in range(4):
        items = [data[4 * step + n] for n in range(4)]
        ids, positions = (torch.stack([item[name] for item in items]) for name in ("input_ids", "position_ids"))
        targets = labels(ids, positions)
        plain.token_weight = 1 / ids.numel()
        hidden = plain.decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        loss = language_loss(plain.model, hidden, targets) / (targets != -100).sum()
        loss.backward()
        clip_grad_norm_(plain.model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        logged.append(loss.item())
    got = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert got == pytest.approx(logged, rel=1e-3) and all("kl" in x for x in trainer.state.log_history if "loss" in x)
    for name, tensor in state(plain).items():
        assert (state(handle)[name] - tensor).norm() <= 2e-3 * tensor.norm() + 1e-6, name


def test_a_models_own_indexers_have_a_group_of_their_own(
    tmp_path: Path, own_checkpoint: Path, data: PackedDataset
) -> None:
    """Its rate, and no part in the norm that is clipped; resumed with the same bits."""

    def fresh() -> SparseHandle:
        model, _ = load_model(own_checkpoint, dtype=torch.float32, indexers="own")
        return attach(model.requires_grad_(True), indexers="own", topk=8)

    options = OPTIONS | dict(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    arguments = TrainingArguments(str(tmp_path), **options)
    trainer = SparseTrainer(fresh(), indexer_lr=3e-3, args=arguments, train_dataset=data)
    trainer.train()
    plain = fresh()
    plain.model.train()
    own = list(trainable(plain.model, plain.indexers).values())
    indexers = list(plain.indexers.parameters())
    assert len(own) + len(indexers) == len(list(plain.model.parameters()))
    groups = [dict(params=own, lr=1e-3), dict(params=indexers, lr=3e-3, eps=1e-12)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(4):
        items = [data[4 * step + n] for n in range(4)]
        ids, positions = (torch.stack([item[name] for item in items]) for name in ("input_ids", "position_ids"))
        targets = labels(ids, positions)
        plain.token_weight = 1 / ids.numel()
        hidden = plain.decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        (language_loss(plain.model, hidden, targets) / (targets != -100).sum()).backward()
        clip_grad_norm_(own, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(trainer.handle.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    again = SparseTrainer(fresh(), indexer_lr=3e-3, args=arguments, train_dataset=data)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in trainer.handle.model.state_dict().items():
        assert torch.equal(again.handle.model.state_dict()[name], tensor), name


def test_it_resumes_with_the_same_bits_and_evaluates(tmp_path: Path, checkpoint: Path, data: PackedDataset) -> None:
    arguments = TrainingArguments(str(tmp_path / "run"), **OPTIONS)
    whole = SparseTrainer(handle_of(checkpoint), args=arguments, train_dataset=data)
    whole.train()
    again = SparseTrainer(handle_of(checkpoint), args=arguments, train_dataset=data, eval_dataset=data)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, tensor in state(whole.handle).items():
        assert torch.equal(state(again.handle)[name], tensor), name
    folder = tmp_path / "run" / "checkpoint-4"
    saved = load_file(folder / "indexer.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in whole.handle.state_dict().items())
    assert (folder / "model.safetensors").is_file() and (folder / "sparse_config.json").is_file()
    before = state(again.handle)
    assert 3 < again.evaluate()["eval_loss"] < 8
    assert all(torch.equal(state(again.handle)[name], tensor) for name, tensor in before.items())


def test_what_it_can_not_train_is_refused(checkpoint: Path) -> None:
    model, _ = load_model(checkpoint, dtype=torch.float32)
    dense = attach(model, num_heads=4, head_dim=32)
    with pytest.raises(TypeError, match="handle must be a SparseHandle, got IndexerHandle"):
        SparseTrainer(dense)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the model must have parameters that require gradients, got none"):
        SparseTrainer(sparse_handle(dense, 4))
    handle = handle_of(checkpoint)
    handle.model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"SparseTrainer: the model's logits .*, got final_logit_softcapping=30.0"):
        SparseTrainer(handle)
