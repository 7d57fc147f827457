"""The sparse stage as a `transformers.Trainer`: a model on its own loss, its indexers on their KL beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from flash_indexer.files.native import load_native, write_native
from flash_indexer.files.trained import SparseConfig, write_sparse_config
from flash_indexer.models.documents import DOCUMENT_INPUTS, document_positions
from flash_indexer.models.load import without_bars
from flash_indexer.models.shards import stored_names
from flash_indexer.models.sparse import SparseHandle
from flash_indexer.recipe.data import PackedDataset, check_token_ids, embedding_rows
from flash_indexer.recipe.language_loss import check_logits, labels, language_loss
from flash_indexer.recipe.loop import ADAM_EPS

__all__ = ["SparseTrainer"]


class SparseTrainer(Trainer):
    """Trains a sparse model with its indexers: `flash-indexer sparse` with the Trainer's arguments and checkpoints.

        handle = load_native(model, "runs/warm/checkpoint", topk=2048)
        SparseTrainer(handle, args=TrainingArguments(...), train_dataset=packed).train()

    The model's loss is the mean over the label tokens of an optimizer step; labels are the input_ids, none across a
    document's end. The indexers' is the mean KL over its tokens. max_grad_norm clips the model's gradient alone. Items
    of the data sets are those of `IndexerTrainer`. Checkpoints hold the model by save_pretrained and, beside it, the
    indexers in the native format (docs/format.md).

    Args:
        handle: of a model that has parameters to train, in float32, or under bf16=True.
        indexer_lr: of the indexers; None: the arguments' learning_rate. options: those of `transformers.Trainer` but
            for model and model_init.

    Raises:
        TypeError: the handle is not sparse. ValueError: more than one process, nothing to train, or token ids that the
            model does not know.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, handle: SparseHandle, *, indexer_lr: float | None = None, **options: Any) -> None:
        if not isinstance(handle, SparseHandle):
            raise TypeError(
                f"SparseTrainer: handle must be a SparseHandle, got {type(handle).__name__}; give attach or "
                "load_native topk=..., or use IndexerTrainer for the warm-up"
            )
        if not any(parameter.requires_grad for parameter in handle.model.parameters()):
            raise ValueError(
                "SparseTrainer: the model must have parameters that require gradients, got none; call "
                "model.requires_grad_(True), or train the indexers alone by `flash-indexer sparse --indexers-alone`"
            )
        for data in (options.get("train_dataset"), options.get("eval_dataset")):
            if isinstance(data, PackedDataset):
                check_token_ids(data.largest_token_id, embedding_rows(handle.model))
        check_logits(handle.model.config.get_text_config(), "SparseTrainer")
        self.handle, self.indexer_lr = handle, indexer_lr
        self._label_count = 1
        super().__init__(model=handle.model, **options)
        self.loss_is_scaled_for_ga = True
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise ValueError(
                f"SparseTrainer: a model that trains must be whole in one process, got {self.args.world_size} "
                f"processes with {self.args.n_gpu} GPUs; start one, and show it one GPU"
            )
        handle.indexers.to(self.args.device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments ask for, with a group more: the indexers, without weight decay."""
        if self.optimizer is None:
            lr = self.args.learning_rate if self.indexer_lr is None else self.indexer_lr
            indexers = list(self.handle.indexers.parameters())
            try:
                for (
                    parameter
                ) in indexers:  # a model's own are among its parameters, of which those that train are taken
                    parameter.requires_grad_(False)
                optimizer = super().create_optimizer(model)
            finally:
                for parameter in indexers:
                    parameter.requires_grad_(True)
            optimizer.add_param_group(dict(params=indexers, lr=lr, eps=ADAM_EPS, weight_decay=0.0))
        assert self.optimizer is not None
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        with self._without_indexers():
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        with self._without_indexers():
            return super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]

    @contextmanager
    def _without_indexers(self) -> Iterator[None]:
        """The gradients of a model's own indexers out of sight of the norm of the model's."""
        gradients = [(parameter, parameter.grad) for parameter in self.handle.indexers.parameters()]
        for parameter, _ in gradients:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """An optimizer step's micro-batches, and the number of their label tokens; the indexers' gradients are zero."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.handle.indexers.zero_grad(set_to_none=True)
        self.handle.indexers.train()
        self.handle.token_weight = 1 / max(1, sum(batch["input_ids"].numel() for batch in batches))
        count = sum(int((self._targets(batch) != -100).sum()) for batch in batches)
        return batches, torch.tensor(max(1, count), device=device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's part of the step's loss; the indexers' gradients come with its backward."""
        known = {name: inputs[name] for name in ("input_ids", *DOCUMENT_INPUTS) if name in inputs}
        targets = self._targets(inputs)
        with self.accelerator.autocast():
            hidden = self.handle.decoder(**known, use_cache=False).last_hidden_state
            total = language_loss(self.handle.model, hidden, targets)
        count = max(1, int((targets != -100).sum())) if num_items_in_batch is None else num_items_in_batch
        return (total / count, {}) if return_outputs else total / count

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of an evaluation batch, without gradients."""
        self.handle.indexers.train(False)
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the mean KL of the last micro-batch, over layers."""
        if "loss" in logs and (losses := self.handle.losses()):
            logs = logs | {"kl": sum(float(loss.kl) for loss in losses.values()) / len(losses)}
        super().log(logs, start_time)

    def _targets(self, inputs: dict[str, Any]) -> Tensor:
        ids: Tensor = inputs["input_ids"]
        return labels(ids, document_positions(inputs, ids))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
            config = self.handle.model.config
            write_native(self.handle, folder, base_name=getattr(config, "_name_or_path", "") or config.model_type)
            write_sparse_config(folder, SparseConfig(self.handle.topk))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Also what save_pretrained writes under other names, as experts one by one, which the Trainer passes over."""
        own, folder = self.handle.model, Path(resume_from_checkpoint)
        if stored_names(folder) <= own.state_dict().keys():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            with without_bars():
                stored = type(own).from_pretrained(folder, dtype=own.dtype, local_files_only=True)
            own.load_state_dict(stored.state_dict())
        load_native(self.handle, resume_from_checkpoint)
