"""The loop of the sparse stage: the model on its own loss, the indexers on their KL, each with a rate and a clip."""

from __future__ import annotations

import json
import math
import shlex
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from flash_indexer.files.atomic import readable_directory
from flash_indexer.files.trained import load_trained_checkpoint, save_trained, trainable
from flash_indexer.models.sparse import SparseHandle
from flash_indexer.parallel.gradients import unusable_gradient
from flash_indexer.recipe.data import PackedDataset
from flash_indexer.recipe.language_loss import labels, language_loss
from flash_indexer.recipe.loop import ADAM_EPS, learning_rate, sequence_drawn
from flash_indexer.recipe.processes import saved_state
from flash_indexer.recipe.progress import StepProgress
from flash_indexer.recipe.run_record import CHECKPOINT, METRICS_FILE, keep_rows
from flash_indexer.recipe.sparse_record import SparseRunSettings
from flash_indexer.recipe.stopping import NAMES, Interrupted, StopSignals

MODEL_EPS = 1e-8
"""Adam's, of the model's parameters; the indexers' is ADAM_EPS, as in the warm-up."""


class StepLosses(NamedTuple):
    """Means of an optimizer step: nats a label token, and KL a token of each layer."""

    language: float
    kl: list[float]


@dataclass
class SparseLoop:
    """One run's parts, and the loop over its steps."""

    settings: SparseRunSettings
    out: Path
    handle: SparseHandle
    data: PackedDataset
    device: torch.device
    base: tuple[str, str]
    """The model's name and fingerprint."""
    console: Console
    record: Callable[[], None]
    """Writes run.json; called when the first step has been computed."""

    @property
    def per_step(self) -> int:
        """Sequences of an optimizer step."""
        return self.settings.batch_size * self.settings.accumulation

    def load(self) -> tuple[torch.optim.AdamW, int]:
        """The optimizer, with the state of the run's checkpoint where there is one, and the steps done."""
        groups: list[dict[str, Any]] = [
            dict(params=list(self.handle.indexers.parameters()), lr=self.settings.indexer_lr, eps=ADAM_EPS)
        ]
        if own := list(trainable(self.handle.model).values()):
            groups.append(dict(params=own, lr=self.settings.lr, eps=MODEL_EPS))
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        done = 0
        if readable_directory(self.out / CHECKPOINT).exists():
            done = load_trained_checkpoint(self.out / CHECKPOINT, self.handle, optimizer)
        return optimizer, done

    def train(self, optimizer: torch.optim.AdamW, done: int) -> None:
        """Steps done + 1 to the last.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the step under way was finished and saved.
            FloatingPointError: a loss or a gradient is not finite; no step is taken.
        """
        steps = self.settings.steps
        started = time.perf_counter() - (keep_rows(self.out / METRICS_FILE, done) if done else 0.0)
        with (
            StopSignals() as stop,
            StepProgress(self.console, steps, done, name="sparse", describe=described) as progress,
        ):
            for step in range(done + 1, steps + 1):
                losses = self._gradients(step)
                norms, rates = self._clip(step), self._set_rates(optimizer, step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                row = dict(
                    step=step, loss=losses.language, kl_mean=sum(losses.kl) / len(losses.kl), indexer_lr=rates[0],
                    indexer_norm=norms[0], lr=rates[1] if len(rates) > 1 else None,
                    norm=norms[1] if len(norms) > 1 else None,
                    seconds=round(time.perf_counter() - started, 3),
                    tokens=step * self.per_step * self.settings.sequence_length, kl=losses.kl,
                )  # fmt: skip
                if step == 1:
                    self.record()
                stopping = bool(stop.number)
                self._write(row, optimizer, save=stopping or step % self.settings.save_every == 0)
                progress.step(row)
                if stopping:
                    raise self._interrupted(step, stop)

    def _gradients(self, step: int) -> StepLosses:
        """Gradients of an optimizer step: the model's of nats a label token, the indexers' of KL a token."""
        batches = [self._batch(step, micro) for micro in range(self.settings.accumulation)]
        targets = [labels(batch["input_ids"], batch["position_ids"]) for batch in batches]
        count = max(1, sum(int((target != -100).sum()) for target in targets))
        tokens = self.per_step * self.settings.sequence_length
        self.handle.token_weight = 1 / tokens
        language, kl = 0.0, dict.fromkeys(self.handle.layers, 0.0)
        for batch, target in zip(batches, targets, strict=True):
            loss = self._loss(batch, target) / count
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            language += float(loss.detach())
            for layer, found in self.handle.losses().items():
                kl[layer] += float(found.kl) * batch["input_ids"].numel() / tokens
        for name, value in {"the model": language, **{f"the indexer of layer {n}": x for n, x in kl.items()}}.items():
            if not math.isfinite(value):
                self._stop(f"the loss of {name} is {value}", step)
        return StepLosses(language, list(kl.values()))

    def _loss(self, batch: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """The model's loss, summed over the targets; where the model is frozen, the indexers learn meanwhile."""
        learns = not self.settings.indexers_alone
        narrow = self.settings.dtype == "bfloat16"
        with torch.set_grad_enabled(learns), torch.autocast(self.device.type, torch.bfloat16, enabled=narrow):
            hidden = self.handle.decoder(**batch, use_cache=False).last_hidden_state
            return language_loss(self.handle.model, hidden, targets)

    def _batch(self, step: int, micro: int) -> dict[str, Tensor]:
        """A micro-batch; the data is gone through again, in another order, when it ends."""
        first = (step - 1) * self.per_step + micro * self.settings.batch_size
        indices = [
            sequence_drawn(first + n, len(self.data), self.settings.seed) for n in range(self.settings.batch_size)
        ]
        items = [self.data[index] for index in indices]
        return {name: torch.stack([item[name] for item in items]).to(self.device) for name in items[0]}

    def _clip(self, step: int) -> list[float]:
        """The norms of the indexers' gradient and of the model's before they were clipped, apart."""
        if (unusable := unusable_gradient(self.handle.indexers)) is not None:
            self._stop("the gradient of layer {}'s indexer reaches {:.3g}".format(*unusable), step)
        norms = []
        own = list(trainable(self.handle.model).values())
        indexers: list[Tensor] = list(self.handle.indexers.parameters())
        groups = [(indexers, self.settings.indexer_clip), (own, self.settings.clip)]
        for parameters, limit in groups if own else groups[:1]:
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = float(get_total_norm(gradients))
            if not math.isfinite(norm):
                self._stop(f"the norm of the model's gradient is {norm}", step)
            if limit is not None:
                clip_grad_norm_(parameters, limit)
            norms.append(norm)
        return norms

    def _set_rates(self, optimizer: torch.optim.AdamW, step: int) -> list[float]:
        """The rates of this step, of the indexers and of the model."""
        rates = []
        for group, lr in zip(optimizer.param_groups, (self.settings.indexer_lr, self.settings.lr), strict=False):
            group["lr"] = learning_rate(replace(self.settings, lr=lr), step, self.settings.steps)
            rates.append(group["lr"])
        return rates

    def _write(self, row: dict[str, Any], optimizer: torch.optim.AdamW, *, save: bool) -> None:
        with (self.out / METRICS_FILE).open("a" if row["step"] > 1 else "w", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if save or row["step"] == self.settings.steps:
            save_trained(
                self.out / CHECKPOINT, self.handle, optimizer, row["step"], lora=self.settings.lora,
                base_name=self.base[0], base_fingerprint=self.base[1],
            )  # fmt: skip

    def _interrupted(self, step: int, stop: StopSignals) -> Interrupted:
        command = shlex.join(["flash-indexer", "sparse", "--out", str(self.out), "--resume"])
        message = (
            f"sparse: ended by {NAMES[signal.Signals(stop.number)]} after step {step} of {self.settings.steps}, which "
            f"is saved in {self.out / CHECKPOINT}; to go on: {command}"
        )
        return Interrupted(message, stop.number)

    def _stop(self, fault: str, step: int) -> NoReturn:
        raise FloatingPointError(
            f"sparse: {fault} at step {step}; {saved_state(self.out / CHECKPOINT)}: start a new run in another --out "
            "with a smaller --lr and --indexer-lr, and check the model's weights for NaN"
        )


def described(row: Mapping[str, Any]) -> str:
    """What a person sees of a metrics row."""
    return f"loss {row['loss']:.3f}  KL {row['kl_mean']:.4f}"
