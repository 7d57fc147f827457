"""The warm-up as a `transformers.Trainer`, with the arguments, callbacks, logs and checkpoints that people know."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, PreTrainedTokenizerBase, Trainer

from flash_indexer.files.native import load_native, write_native
from flash_indexer.models.attach import IndexerHandle
from flash_indexer.models.documents import DOCUMENT_INPUTS
from flash_indexer.models.load import tokenizer_fingerprint
from flash_indexer.parallel.gradients import all_sum, sum_gradients, unusable_gradient
from flash_indexer.recipe.data import PackedDataset, check_token_ids, embedding_rows
from flash_indexer.recipe.queries import check_fraction, draw_queries

__all__ = ["IndexerTrainer"]


class IndexerTrainer(Trainer):
    """Trains a handle's indexers: loss = mean over tokens and layers of KL(teacher || indexer); the model is frozen.

        handle = attach(model)
        IndexerTrainer(handle, args=TrainingArguments(..., adam_epsilon=1e-12), train_dataset=packed).train()

    Items of the data sets hold input_ids and, where documents are packed, position_ids that restart at 0 (or another
    form of `flash_indexer.models.documents`); no padding. DataCollatorWithFlattening packs items that are documents.
    Labels are not used. Checkpoints and `save_model` write the indexers in the native format (docs/format.md), beside
    the Trainer's own files; `resume_from_checkpoint` reads them.

    Under torchrun or accelerate launch every process holds the model and takes its part of each batch; DDP does not
    wrap the model, since gradients are formed inside the forward: they are summed once an optimizer step. Indexers
    begin as those of the first process. `--cp` and `--tp` are the command line's.

    Args:
        handle: what `attach` returned. options: those of `transformers.Trainer` but for model and model_init.
            A processing_class that is a tokenizer is recorded with the indexers, and another one refused later.
        queries: the part of a batch's tokens that the loss is taken of, drawn anew for every batch and step from
            args.seed, an unbiased estimate of that of all tokens; as `--queries` of the command line. Evaluation takes
            all.

    Raises:
        ValueError: the handle has context or tensor parallelism, a `PackedDataset` has token ids that the model does
            not know, a batch is padded, the collator packs documents without saying where they begin, or queries is not
            above 0 and at most 1.
    """

    def __init__(self, handle: IndexerHandle, *, queries: float = 1.0, **options: Any) -> None:
        check_fraction("IndexerTrainer", queries)
        if handle.parallel.cp * handle.parallel.tp > 1:
            raise ValueError(
                "IndexerTrainer: handle must be attached without context or tensor parallelism, got "
                f"cp={handle.parallel.cp}, tp={handle.parallel.tp}; use flash_indexer.recipe.warmup.warm_up for these"
            )
        for data in (options.get("train_dataset"), options.get("eval_dataset")):
            if isinstance(data, PackedDataset):
                check_token_ids(data.largest_token_id, embedding_rows(handle.model))
        self.handle, self.queries, self._micro = handle, queries, 0
        super().__init__(model=handle.model, **options)
        if isinstance(self.processing_class, PreTrainedTokenizerBase):
            handle.tokenizer_fingerprint = tokenizer_fingerprint(self.processing_class)
        packs = self.data_collator
        if isinstance(packs, DataCollatorWithFlattening) and not (
            packs.return_position_ids or packs.return_seq_idx or packs.return_flash_attn_kwargs
        ):
            raise ValueError(
                "IndexerTrainer: data_collator must say where the documents begin that it packs, got "
                "DataCollatorWithFlattening(return_position_ids=False), whose batches are one document each; use "
                "DataCollatorWithFlattening()"
            )
        handle.indexers.to(self.args.device)
        if self.args.world_size > 1:
            for parameter in handle.indexers.parameters():
                dist.broadcast(parameter.data, src=0)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments ask for, over the indexers' parameters alone."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(self.handle.indexers)
        return optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """An optimizer step's micro-batches, and the number of their tokens over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        return batches, all_sum(torch.tensor(float(tokens), device=device))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One forward of the frozen model, which adds the indexers' gradients; nothing is left for a backward.

        Returns:
            this micro-batch's part of the step's loss, detached; the Trainer adds them and averages over processes.

        Raises:
            FloatingPointError: a layer's loss is not finite in some process, or its gradient is not or is above 1e12;
                names layer and step, in all of them.
        """
        tokens = inputs["input_ids"].numel()
        total = float(tokens * self.args.world_size if num_items_in_batch is None else num_items_in_batch)
        self.handle.token_weight = 1 / (total * self.queries)
        self.handle.indexers.train()
        queries = self._draw(tokens)
        kl = self._forward(inputs, queries)
        self._check_finite(all_sum(kl.clone()))
        self._micro += 1
        if self.accelerator.sync_gradients:
            self._micro = 0
            sum_gradients(self.handle.indexers.parameters())
            self._check_gradients()
        counted = tokens if queries is None else len(queries) / self.queries
        share: float = counted * self.args.world_size / total
        return kl.mean() * share

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of an evaluation batch, without gradients."""
        self.handle.indexers.train(False)
        return self._forward(inputs, None).mean(), None, None

    def _draw(self, tokens: int) -> Tensor | None:
        if self.queries == 1:
            return None
        draw = f"step {self.state.global_step} batch {self._micro} process {self.args.process_index}"
        return draw_queries(tokens, self.queries, seed=self.args.seed, draw=draw)

    def _check_finite(self, kl: Tensor) -> None:
        """The Trainer's own logs pass over a loss that is not finite (logging_nan_inf_filter)."""
        for layer, value in zip(sorted(self.handle.losses()), kl.tolist(), strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"IndexerTrainer: the loss of layer {layer} is {value} at step {self.state.global_step + 1}; "
                    "resume from an earlier checkpoint with a smaller learning_rate or max_grad_norm, and check the "
                    "model's weights for NaN"
                )

    def _check_gradients(self) -> None:
        if (found := unusable_gradient(self.handle.indexers)) is not None:
            layer, largest = found
            raise FloatingPointError(
                f"IndexerTrainer: the gradient of layer {layer} reaches {largest:.3g} at step "
                f"{self.state.global_step + 1}; resume from an earlier checkpoint with a smaller learning_rate, "
                "and check the model's weights and activations for NaN"
            )

    def _forward(self, inputs: dict[str, Any], queries: Tensor | None) -> Tensor:
        """Mean KL of each layer, ascending: [layers]."""
        self.handle.queries = queries
        self.handle.model.train(False)
        inputs = self._prepare_inputs(inputs)
        known = {name: inputs[name] for name in ("input_ids", *DOCUMENT_INPUTS) if name in inputs}
        with torch.no_grad():
            self.handle.decoder(**known, use_cache=False)
        self.handle.queries = None
        return torch.stack([loss.kl for _, loss in sorted(self.handle.losses().items())])

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """What the Trainer zeroes, clips and steps is the indexers; as a module of its own, nothing wraps it in DDP."""
        return self.handle.indexers

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = str(self.args.output_dir if output_dir is None else output_dir)
        if self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            config = self.handle.model.config
            write_native(self.handle, folder, base_name=getattr(config, "_name_or_path", "") or config.model_type)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_native(self.handle, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))
