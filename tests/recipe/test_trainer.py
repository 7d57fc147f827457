"""IndexerTrainer trains what a plain loop does, on one process and two, and resumes; what it cannot do it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DataCollatorWithFlattening, TrainerCallback, TrainerState, TrainingArguments

from flash_indexer.files.native import read_native
from flash_indexer.models.attach import IndexerHandle, attach
from flash_indexer.models.load import load_model, tokenizer_fingerprint
from flash_indexer.parallel.mesh import Parallel
from flash_indexer.recipe import trainer as trainer_module
from flash_indexer.recipe.data import PackedDataset, load_documents, pack
from flash_indexer.recipe.trainer import IndexerTrainer

OPTIONS: dict[str, Any] = dict(
    max_steps=6, learning_rate=1e-3, adam_epsilon=1e-12, max_grad_norm=0.05, lr_scheduler_type="constant",
    train_sampling_strategy="sequential", logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, seed=3,
)  # fmt: skip
TRAIN = """
import os
os.environ.update(environment)
import torch
from transformers import TrainingArguments
from flash_indexer.recipe.data import load_documents, pack
from flash_indexer.models.load import load_model, tokenizer_fingerprint
from flash_indexer.recipe.trainer import IndexerTrainer
from flash_indexer.models.attach import attach
model, tokenizer = load_model(checkpoint, dtype=torch.float32)
torch.manual_seed(int(environment.get("RANK", 0)))
packed = pack(load_documents(texts), tokenizer, sequence_length=32, seed=0)
trainer = IndexerTrainer(attach(model, num_heads=2, head_dim=32), args=TrainingArguments(**arguments),
                         train_dataset=packed)
trainer.train()
trainer.save_model()
trainer.save_state()
"""


@pytest.fixture
def data(checkpoint: Path, texts: Path) -> PackedDataset:
    _, tokenizer = load_model(checkpoint, dtype=torch.float32)
    return pack(load_documents(texts), tokenizer, sequence_length=32, seed=0)


def handle_of(checkpoint: Path) -> IndexerHandle:
    model, _ = load_model(checkpoint, dtype=torch.float32)
    torch.manual_seed(0)
    return attach(model, num_heads=2, head_dim=32)


def assert_same_weights(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name] - tensor).norm() <= tolerance * tensor.norm() + 1e-9, name


def test_it_trains_what_a_plain_loop_trains(tmp_path: Path, checkpoint: Path, data: PackedDataset) -> None:
    arguments = TrainingArguments(
        str(tmp_path), **OPTIONS, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="no"
    )
    handle = handle_of(checkpoint)
    trainer = IndexerTrainer(handle, args=arguments, train_dataset=data)
    trainer.train()

    plain, losses, norms = handle_of(checkpoint), [], []
    optimizer = torch.optim.AdamW(plain.indexers.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-12)
    for step in range(6):
        items = [data[4 * step + n] for n in range(4)]
        with torch.no_grad():
            plain.decoder(**{name: torch.stack([item[name] for item in items]) for name in items[0]}, use_cache=False)
        losses.append(float(sum(loss.kl for loss in plain.losses().values()) / 3))
        norms.append(float(torch.nn.utils.clip_grad_norm_(plain.indexers.parameters(), 0.05)))
        optimizer.step()
        optimizer.zero_grad()
    logged = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert [row["loss"] for row in logged] == pytest.approx(losses, rel=1e-4)
    assert [row["grad_norm"] for row in logged] == pytest.approx(norms, rel=1e-3)
    assert_same_weights(handle.state_dict(), plain.state_dict(), 1e-3)
    assert all(parameter.grad is None for parameter in handle.model.parameters())


def test_two_processes_train_what_one_does(tmp_path: Path, runs: Any, checkpoint: Path, texts: Path) -> None:
    """Indexers that begin differently on each process are made those of the first."""
    names = dict(checkpoint=str(checkpoint), texts=str(texts))
    for processes in (1, 2):
        arguments = dict(
            output_dir=str(tmp_path / str(processes)), **OPTIONS, per_device_train_batch_size=2 // processes,
            gradient_accumulation_steps=2, save_strategy="no",
        )  # fmt: skip
        codes = [TRAIN] * processes
        runs.finish(runs.ranks(processes, None, tmp_path, codes=codes, arguments=arguments, **names))
    one, two = (load_file(tmp_path / name / "indexer.safetensors") for name in ("1", "2"))
    assert_same_weights(two, one, 1e-3)
    logs = [json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("1", "2")]
    for mine, theirs in zip(logs[0][:6], logs[1][:6], strict=True):
        assert (mine["loss"], mine["grad_norm"]) == pytest.approx((theirs["loss"], theirs["grad_norm"]), rel=1e-3)


def test_a_checkpoint_is_native_and_resumes(tmp_path: Path, checkpoint: Path, data: PackedDataset) -> None:
    arguments = TrainingArguments(str(tmp_path), **OPTIONS, per_device_train_batch_size=1, save_steps=3)
    whole, again = handle_of(checkpoint), handle_of(checkpoint)
    IndexerTrainer(whole, args=arguments, train_dataset=data).train()
    assert read_native(tmp_path / "checkpoint-3").config.layers == (0, 1, 2)
    trainer = IndexerTrainer(again, args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in whole.state_dict().items())


def test_the_tokenizer_that_it_is_given_is_recorded(tmp_path: Path, checkpoint: Path, data: PackedDataset) -> None:
    _, tokenizer = load_model(checkpoint, dtype=torch.float32)
    for known, given in ((None, {}), (tokenizer_fingerprint(tokenizer), dict(processing_class=tokenizer))):
        arguments = TrainingArguments(str(tmp_path), **OPTIONS)
        IndexerTrainer(handle_of(checkpoint), args=arguments, train_dataset=data, **given).save_model()
        assert read_native(tmp_path).config.base_tokenizer_fingerprint == known


def test_evaluation_leaves_no_gradient(tmp_path: Path, checkpoint: Path, data: PackedDataset) -> None:
    handle = handle_of(checkpoint)
    held_out = [data[n] for n in range(3)]
    arguments = TrainingArguments(str(tmp_path), **OPTIONS, per_device_eval_batch_size=1)
    found = IndexerTrainer(handle, args=arguments, eval_dataset=held_out).evaluate()
    with torch.no_grad():
        handle.decoder(
            **{name: torch.stack([item[name] for item in held_out]) for name in held_out[0]}, use_cache=False
        )
    assert found["eval_loss"] == pytest.approx(float(sum(x.kl for x in handle.losses().values()) / 3), rel=1e-5)
    assert all(parameter.grad is None for parameter in handle.indexers.parameters())


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path, checkpoint: Path, data: PackedDataset) -> None:
    handle = handle_of(checkpoint)

    class Break(TrainerCallback):
        def on_step_end(self, args: TrainingArguments, state: TrainerState, *more: Any, **_: Any) -> None:
            if state.global_step == 2:
                handle.indexers["1"].weights_proj.weight.data.fill_(float("nan"))

    arguments = TrainingArguments(str(tmp_path), **OPTIONS, save_strategy="no")
    trainer = IndexerTrainer(handle, args=arguments, train_dataset=data, callbacks=[Break()])
    with pytest.raises(FloatingPointError, match="the loss of layer 1 is nan at step 3; resume from"):
        trainer.train()


def test_a_gradient_that_is_none_ends_the_training_before_its_step(
    tmp_path: Path, checkpoint: Path, data: PackedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, calls = handle_of(checkpoint), iter(range(1, 99))

    def sum_gradients(parameters: Any) -> None:
        if next(calls) == 3:
            handle.indexers["2"].wk.weight.grad[0, 0] = float("inf")

    monkeypatch.setattr(trainer_module, "sum_gradients", sum_gradients)
    arguments = TrainingArguments(str(tmp_path), **OPTIONS, save_steps=1)
    with pytest.raises(FloatingPointError, match="the gradient of layer 2 reaches inf at step 3; resume from"):
        IndexerTrainer(handle, args=arguments, train_dataset=data).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert all(value.isfinite().all() for value in handle.state_dict().values())


@pytest.mark.parametrize(
    "says",
    [
        dict(),
        dict(return_position_ids=False, return_flash_attn_kwargs=True),
        dict(return_position_ids=False, return_seq_idx=True),
    ],
)
def test_the_flattening_collator_keeps_documents_apart(tmp_path: Path, checkpoint: Path, says: dict[str, bool]) -> None:
    handle, lengths = handle_of(checkpoint), (5, 20, 12)
    generator = torch.Generator().manual_seed(1)
    documents = [dict(input_ids=torch.randint(0, 60, (n,), generator=generator)) for n in lengths]
    want = 0.0
    with torch.no_grad():
        for document in documents:
            handle.decoder(input_ids=document["input_ids"][None], use_cache=False)
            share = len(document["input_ids"]) / sum(lengths)
            want += float(sum(loss.kl for loss in handle.losses().values())) / 3 * share
    arguments = TrainingArguments(str(tmp_path), **OPTIONS, per_device_eval_batch_size=3)
    trainer = IndexerTrainer(
        handle, args=arguments, eval_dataset=documents, data_collator=DataCollatorWithFlattening(**says)
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-4)


def test_a_collator_that_hides_documents_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    collator = DataCollatorWithFlattening(return_position_ids=False)
    with pytest.raises(ValueError, match=r"data_collator must say where .* begin .*; use DataCollatorWithFl"):
        IndexerTrainer(handle_of(checkpoint), args=TrainingArguments(str(tmp_path), **OPTIONS), data_collator=collator)


def test_what_it_cannot_do_it_says(tmp_path: Path, checkpoint: Path, data: PackedDataset) -> None:
    arguments = TrainingArguments(str(tmp_path), **OPTIONS)
    handle = handle_of(checkpoint)
    padded = [data[0] | dict(attention_mask=torch.arange(32) < 30)]
    with pytest.raises(ValueError, match="attention_mask must be all ones, document numbers from 1, or absent"):
        IndexerTrainer(handle, args=arguments, train_dataset=padded).train()
    tokens = data.tokens.clone()
    tokens[7] = 61
    foreign = PackedDataset(tokens, data.document_starts, data.sequence_length)
    for name in ("train_dataset", "eval_dataset"):
        with pytest.raises(ValueError, match=r"ids must be below the model's vocab_size = 61, got 61"):
            IndexerTrainer(handle, args=arguments, **{"train_dataset": data, name: foreign})
    handle.parallel = Parallel(cp=2)
    with pytest.raises(ValueError, match="without context or tensor parallelism, got cp=2, tp=1; use .*warm_up"):
        IndexerTrainer(handle, args=arguments)
