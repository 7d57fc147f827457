"""The loop of the sparse stage: the model on its own loss, the indexers on their KL, each with a rate and a clip.

An optimizer step's sequences are a function of seed and step, however many processes share them out, and its gradient
is that of one loss over all of them: processes add their parts up, and average nothing.
"""

from __future__ import annotations

import json
import math
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from flash_indexer.files.atomic import named_errors, readable_directory
from flash_indexer.files.tensors import Shard, whole
from flash_indexer.files.trained import Sharing, load_trained_checkpoint, save_trained, trainable
from flash_indexer.models.sparse import SparseHandle
from flash_indexer.parallel.gradients import complete_gradients, sum_gradients, unusable_gradient
from flash_indexer.recipe.data import PackedDataset
from flash_indexer.recipe.language_loss import LanguageLoss, labels, padded_labels
from flash_indexer.recipe.loop import ADAM_EPS, learning_rate, micro_batches, sequence_drawn
from flash_indexer.recipe.processes import Processes, saved_state
from flash_indexer.recipe.progress import StepProgress
from flash_indexer.recipe.run_record import CHECKPOINT, METRICS_FILE, keep_rows
from flash_indexer.recipe.sparse_record import SparseRunSettings
from flash_indexer.recipe.stopping import NAMES, Interrupted, StopSignals, signal_of

MODEL_EPS = 1e-8
"""Adam's, of the model's parameters; the indexers' is ADAM_EPS, as in the warm-up."""


class StepLosses(NamedTuple):
    """Means of an optimizer step: nats a label token, KL a token of each layer; the signal that asks to end, or 0."""

    language: float
    kl: list[float]
    ended_by: int


@dataclass
class SparseLoop:
    """One run's parts, and the loop over its steps."""

    settings: SparseRunSettings
    per_step: int
    """Sequences of an optimizer step, over all processes."""
    out: Path
    handle: SparseHandle
    loss: LanguageLoss
    """Of the handle's model; FSDP2's root where the model is sharded."""
    data: PackedDataset
    processes: Processes
    base: tuple[str, str]
    """The model's name and fingerprint."""
    console: Console
    record: Callable[[], None]
    """Writes run.json; called in the main process when the first step has been computed."""

    def load(self) -> tuple[torch.optim.AdamW, int]:
        """The optimizer, with the state of the run's checkpoint where there is one, and the steps done."""
        groups: list[dict[str, Any]] = [
            dict(params=list(self.handle.indexers.parameters()), lr=self.settings.indexer_lr, eps=ADAM_EPS)
        ]
        if own := list(trainable(self.handle.model, self.handle.indexers).values()):
            groups.append(dict(params=own, lr=self.settings.lr, eps=MODEL_EPS))
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        done = 0
        with self.processes.refusing_together():
            if readable_directory(self.out / CHECKPOINT).exists():
                done = load_trained_checkpoint(self.out / CHECKPOINT, self.handle, optimizer)
        self.processes.agree(self.out, done)
        return optimizer, done

    def train(self, optimizer: torch.optim.AdamW, done: int) -> None:
        """Steps done + 1 to the last.

        Raises:
            Interrupted: SIGINT or SIGTERM came to a process; the step under way was finished and saved.
            FloatingPointError: a loss or a gradient is not finite; no step is taken.
        """
        steps, main = self.settings.steps, self.processes.is_main
        started = time.perf_counter() - (keep_rows(self.out / METRICS_FILE, done) if main and done else 0.0)
        with (
            StopSignals(quiet=not main) as stop,
            StepProgress(self.console, steps, done, name="sparse", describe=described, quiet=not main) as progress,
        ):
            for step in range(done + 1, steps + 1):
                losses = self._gradients(step, stop)
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
                if step == 1 and main:
                    self.record()
                if main:
                    self._write(row)
                if losses.ended_by or step % self.settings.save_every == 0 or step == steps:
                    self._save(optimizer, step)
                progress.step(row)
                if losses.ended_by:
                    self.processes.wait()
                    raise self._interrupted(step, losses.ended_by)
            late = torch.tensor(stop.told(), device=self.processes.device)
            if ended_by := signal_of(self.processes.sum(late).tolist()):  # while the last step was saved
                raise self._interrupted(steps, ended_by)

    def _gradients(self, step: int, stop: StopSignals) -> StepLosses:
        """Gradients of an optimizer step: the model's of nats a label token, the indexers' of KL a token.

        Of processes that share heads each has the whole loss, of which its part counts.
        """
        processes, tokens = self.processes, self.per_step * self.settings.sequence_length
        part = 1 / processes.parallel.tp
        parts = list(self._parts(step))
        counted = torch.tensor(sum(float((target != -100).sum()) for _, target in parts), dtype=torch.float64)
        count = max(1, int(processes.sum(counted.to(processes.device))))
        self.handle.token_weight = part / tokens
        language, kl = 0.0, dict.fromkeys(self.handle.layers, 0.0)
        for batch, target in parts:
            loss = self._loss(batch, target) / count
            if loss.requires_grad:
                (loss * part).backward()  # type: ignore[no-untyped-call]
            language += float(loss.detach())
            found = {layer: loss.kl.to(processes.device) for layer, loss in self.handle.losses().items()}
            for layer, value in zip(found, torch.stack([*found.values()]).tolist() if found else [], strict=True):
                kl[layer] += value * batch["input_ids"].numel() / tokens
        self._sum_gradients()
        own = torch.tensor([*stop.told(), language, *kl.values()], dtype=torch.float64, device=processes.device)
        sums = processes.sum(own).tolist()
        told, (language, *kls) = sums[: len(NAMES)], sums[len(NAMES) :]
        names = ["the model", *(f"the indexer of layer {n}" for n in kl)]
        for name, value in zip(names, [language, *kls], strict=True):
            if not math.isfinite(value):
                self._stop(f"the loss of {name} is {value}", step)
        return StepLosses(language, kls, signal_of(told))

    def _sum_gradients(self) -> None:
        """Over all processes. FSDP2 has summed those of the parameters that it shares out."""
        parameters: list[Tensor] = list(self.handle.indexers.parameters())
        if not self.processes.shards:
            parameters += trainable(self.handle.model, self.handle.indexers).values()
        timeout = self.processes.settings.timeout
        complete_gradients(parameters, timeout=timeout)
        sum_gradients(parameters, timeout=timeout)

    def _loss(self, batch: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """The model's loss, summed over the targets; where the model is frozen, the indexers learn meanwhile.

        FSDP2 frees a layer's parameters when the layer has run; autocast must not keep copies of them.
        """
        learns = not self.settings.indexers_alone
        narrow = torch.autocast(
            self.processes.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16",
            cache_enabled=not self.processes.shards,
        )  # fmt: skip
        with torch.set_grad_enabled(learns), narrow:
            loss: Tensor = self.loss(batch, targets)
            return loss

    def _parts(self, step: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """This process's tokens of its micro-batches of a step, and their targets, found before a batch is cut.

        The data is gone through again, in another order, when it ends.
        """
        parallel, settings = self.processes.parallel, self.settings
        size, count = micro_batches(settings, self.per_step, parallel.dp, "sparse")
        for micro in range(count):
            first = (step - 1) * self.per_step + (micro * parallel.dp + parallel.dp_rank) * size
            items = [self.data[sequence_drawn(first + n, len(self.data), settings.seed)] for n in range(size)]
            batch = {name: torch.stack([item[name] for item in items]).to(self.processes.device) for name in items[0]}
            if parallel.cp == 1:
                yield batch, labels(batch["input_ids"], batch["position_ids"])
            else:
                targets = padded_labels(batch["input_ids"], batch["position_ids"])
                part = self.processes.part(batch | dict(targets=targets))
                targets = part.pop("targets")
                yield part, targets

    def _clip(self, step: int) -> list[float]:
        """The norms of the indexers' gradient and of the model's before they were clipped, apart, over all shards."""
        if (unusable := unusable_gradient(self.handle.indexers)) is not None:
            self._stop("the gradient of layer {}'s indexer reaches {:.3g}".format(*unusable), step)
        norms = []
        own = list(trainable(self.handle.model, self.handle.indexers).values())
        indexers: list[Tensor] = list(self.handle.indexers.parameters())
        groups = [(indexers, self.settings.indexer_clip), (own, self.settings.clip)]
        for parameters, limit in groups if own else groups[:1]:
            total = whole(get_total_norm([p.grad for p in parameters if p.grad is not None]))
            norm = float(total)
            if not math.isfinite(norm):
                self._stop(f"the norm of the model's gradient is {norm}", step)
            if limit is not None:
                clip_grads_with_norm_(parameters, limit, total)
            norms.append(norm)
        return norms

    def _set_rates(self, optimizer: torch.optim.AdamW, step: int) -> list[float]:
        """The rates of this step, of the indexers and of the model."""
        rates = []
        for group, lr in zip(optimizer.param_groups, (self.settings.indexer_lr, self.settings.lr), strict=False):
            group["lr"] = learning_rate(replace(self.settings, lr=lr), step, self.settings.steps)
            rates.append(group["lr"])
        return rates

    def _write(self, row: dict[str, Any]) -> None:
        path = self.out / METRICS_FILE
        with named_errors(path), path.open("a" if row["step"] > 1 else "w", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _save(self, optimizer: torch.optim.AdamW, step: int) -> None:
        """In the main process; of a sharded model in all, each its shards."""
        processes, sharing = self.processes, None
        if processes.shards:
            together = partial(processes.refusing_together, "save", checkpoint=self.out / CHECKPOINT)
            sharing = Sharing(Shard(processes.rank, processes.count), together)
        if processes.is_main or sharing is not None:
            save_trained(
                self.out / CHECKPOINT, self.handle, optimizer, step, lora=self.settings.lora, base=self.base,
                sharing=sharing,
            )  # fmt: skip

    def _interrupted(self, step: int, number: int) -> Interrupted:
        command = shlex.join(["flash-indexer", "sparse", "--out", str(self.out), "--resume"])
        message = (
            f"sparse: ended by {NAMES[signal.Signals(number)]} after step {step} of {self.settings.steps}, which "
            f"is saved in {self.out / CHECKPOINT}; to go on: {command}"
        )
        return Interrupted(message, number, speaks=self.processes.is_main)

    def _stop(self, fault: str, step: int) -> NoReturn:
        raise FloatingPointError(
            f"sparse: {fault} at step {step}; {saved_state(self.out / CHECKPOINT)}: start a new run in another --out "
            "with a smaller --lr and --indexer-lr, and check the model's weights for NaN"
        )


def described(row: Mapping[str, Any]) -> str:
    """What a person sees of a metrics row."""
    return f"loss {row['loss']:.3f}  KL {row['kl_mean']:.4f}"
