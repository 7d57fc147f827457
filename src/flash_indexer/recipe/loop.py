"""The loop over optimizer steps: batches, gradients of all processes, AdamW, a row of metrics, checkpoints.

An optimizer step's sequences, and which of their queries have a loss, are a function of seed and step, however many
processes share them out.
"""

from __future__ import annotations

import json
import math
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from rich.console import Console
from torch import Tensor

from flash_indexer.files.atomic import named_errors, readable_directory
from flash_indexer.files.checkpoint import load_checkpoint, save_checkpoint
from flash_indexer.models.attach import IndexerHandle
from flash_indexer.parallel.gradients import sum_gradients, unusable_gradient
from flash_indexer.recipe.data import PackedDataset
from flash_indexer.recipe.mass_watch import MassWatch
from flash_indexer.recipe.processes import Processes, saved_state
from flash_indexer.recipe.progress import StepProgress
from flash_indexer.recipe.queries import draw_queries
from flash_indexer.recipe.run_record import CHECKPOINT, METRICS_FILE, WarmupSettings, keep_rows
from flash_indexer.recipe.stopping import NAMES, Interrupted, StopSignals, signal_of

ADAM_EPS = 1e-12
"""Well below torch's 1e-8, which is as large as a fresh indexer's gradients where hidden states are small."""


class Schedule(Protocol):
    """The settings that a learning rate follows from."""

    @property
    def lr(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def decay(self) -> str: ...


@dataclass
class TrainingLoop:
    """One run's parts, and the loop over its steps."""

    settings: WarmupSettings
    steps: int
    per_step: int
    """Sequences of an optimizer step, over all processes."""
    out: Path
    handle: IndexerHandle
    data: PackedDataset
    processes: Processes
    base_fingerprint: str
    console: Console
    record: Callable[[int], None]
    """Writes run.json; called in the main process with the steps done before, when one more has been computed."""

    def load(self) -> tuple[torch.optim.AdamW, int]:
        """The optimizer, with the state of the run's checkpoint where there is one, and the steps done."""
        parameters = self.handle.indexers.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=self.settings.lr, weight_decay=0.0, eps=ADAM_EPS)
        done = 0
        if readable_directory(self.out / CHECKPOINT).exists():
            done = load_checkpoint(
                self.out / CHECKPOINT, self.handle, optimizer, base_fingerprint=self.base_fingerprint
            )
        self.processes.agree(self.out, done)
        return optimizer, done

    def train(self, optimizer: torch.optim.AdamW, done: int) -> None:
        """Steps done + 1 to `steps`.

        Raises:
            Interrupted: SIGINT or SIGTERM came to a process; the step under way was finished and saved.
        """
        main, parameters = self.processes.is_main, list(self.handle.indexers.parameters())
        before = keep_rows(self.out / METRICS_FILE, done) if main and done else 0.0
        started, watch = time.perf_counter() - before, MassWatch(self.handle, self.processes)
        with (
            StopSignals(quiet=not main) as stop,
            StepProgress(self.console, self.steps, done, quiet=not main) as progress,
        ):
            for step in range(done + 1, self.steps + 1):
                watch.on = step % 10 == 0 or step in (1, self.steps)
                kl, uniform, ended_by = self._gradients(step, stop)
                if self.settings.clip is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
                lr = learning_rate(self.settings, step, self.steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                row = dict(
                    step=step, loss=float(kl.mean()), kl_over_uniform=_ratio(kl, uniform),
                    mass=watch.take(), lr=lr, seconds=round(time.perf_counter() - started, 3),
                    tokens=step * self.per_step * self.settings.sequence_length,
                    kl=kl.tolist(), uniform_kl=uniform.tolist(),
                )  # fmt: skip
                if main:
                    if step == done + 1:
                        self.record(done)
                    self._write(row, optimizer, save=ended_by > 0 or step % self.settings.save_every == 0)
                progress.step(row)
                if ended_by:
                    self.processes.wait()
                    raise self._interrupted(step, ended_by)
            late = torch.tensor(stop.told(), device=self.processes.device)
            if ended_by := signal_of(self.processes.sum(late).tolist()):  # while the last step was saved
                raise self._interrupted(self.steps, ended_by)
        watch.close()

    def _write(self, row: dict[str, Any], optimizer: torch.optim.AdamW, *, save: bool) -> None:
        path = self.out / METRICS_FILE
        with named_errors(path), path.open("a" if row["step"] > 1 else "w", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if save or row["step"] == self.steps:
            save_checkpoint(
                self.out / CHECKPOINT, self.handle, optimizer, row["step"],
                base_name=self.settings.model, base_fingerprint=self.base_fingerprint,
            )  # fmt: skip

    def _interrupted(self, step: int, number: int) -> Interrupted:
        command = shlex.join(["flash-indexer", "warmup", "--out", str(self.out), "--resume"])
        message = (
            f"warmup: ended by {NAMES[signal.Signals(number)]} after step {step} of {self.steps}, which is saved in "
            f"{self.out / CHECKPOINT}; to go on: {command}"
        )
        return Interrupted(message, number, speaks=self.processes.is_main)

    def _gradients(self, step: int, stop: StopSignals) -> tuple[Tensor, Tensor, int]:
        """Forwards (and backwards, inside them) of one optimizer step; gradients and means summed over all ranks.

        The means are sums over the queries drawn, over the expected number of these: unbiased, as the gradients are.

        Returns:
            mean KL and mean uniform KL per layer, [layers] each; the signal that asked any process to end, or 0.
        """
        handle, processes = self.handle, self.processes
        total, layers = self.per_step * self.settings.sequence_length, len(handle.layers)
        handle.token_weight = 1 / (total * self.settings.queries)
        sums = torch.zeros(2 * layers + len(NAMES), device=processes.device)
        means = sums[: 2 * layers].view(2, layers)
        for batch, sequences in zip(self._batches(step), self._sequences(step), strict=True):
            own = processes.part(batch)
            handle.queries = self._queries(sequences)
            forward(handle, own)
            share = (own["input_ids"].numel() if handle.queries is None else len(handle.queries)) * handle.token_weight
            found = [value.to(sums.device) for _, loss in sorted(handle.losses().items()) for value in loss]
            means += share * torch.stack(found).view(layers, 2).T
        handle.queries = None
        sum_gradients(handle.indexers.parameters(), replicas=processes.parallel.tp, timeout=processes.settings.timeout)
        sums[2 * layers :] = torch.tensor(stop.told())
        values = processes.sum(sums).tolist()
        kl, uniform = torch.tensor(values[: 2 * layers]).view(2, layers)
        for layer, value in zip(sorted(handle.layers), kl.tolist(), strict=True):
            if not math.isfinite(value):
                self._stop(f"the loss of layer {layer} is {value}", step)
        if (unusable := unusable_gradient(handle.indexers)) is not None:
            self._stop("the gradient of layer {} reaches {:.3g}".format(*unusable), step)
        return kl, uniform, signal_of(values[2 * layers :])

    def _stop(self, fault: str, step: int) -> NoReturn:
        """Before the step. A resumed run keeps its settings, so a smaller lr means another run."""
        raise FloatingPointError(
            f"warmup: {fault} at step {step}; {saved_state(self.out / CHECKPOINT)}: start a new run in another --out "
            "with a smaller --lr or with --clip, and check the model's weights and activations for NaN"
        )

    def _batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        """This rank's micro-batches of a step; the data is gone through again, in another order, when it ends.

        Ranks of one dp_rank get the same ones.
        """
        for sequences in self._sequences(step):
            seed, count = self.settings.seed, len(self.data)
            items = [self.data[sequence_drawn(number, count, seed)] for number in sequences]
            yield {
                name: torch.stack([item[name] for item in items]).to(self.processes.device)
                for name in ("input_ids", "position_ids")
            }

    def _sequences(self, step: int) -> Iterator[range]:
        """The numbers, in the run, of the sequences of each of this rank's micro-batches of a step."""
        parallel = self.processes.parallel
        size, count = micro_batches(self.settings, self.per_step, parallel.dp)
        for micro in range(count):
            begin = (step - 1) * self.per_step + (micro * parallel.dp + parallel.dp_rank) * size
            yield range(begin, begin + size)

    def _queries(self, sequences: range) -> Tensor | None:
        """This process's tokens of a micro-batch whose loss is computed, counted among its own; None: all."""
        if self.settings.queries == 1:
            return None
        length = self.settings.sequence_length
        tokens = torch.cat([self._draw(number) + n * length for n, number in enumerate(sequences)])
        return self.processes.own_tokens(tokens, length * len(sequences))

    def _draw(self, number: int) -> Tensor:
        settings = self.settings
        return draw_queries(settings.sequence_length, settings.queries, seed=settings.seed, draw=str(number))


def sequence_drawn(drawn: int, count: int, seed: int) -> int:
    """Which of `count` sequences comes when `drawn` were drawn: in order at first, then in an order of each epoch."""
    epoch, position = divmod(drawn, count)
    if epoch == 0:
        return position
    generator = torch.Generator().manual_seed(seed + epoch)
    return int(torch.randperm(count, generator=generator)[position])


class Batches(Protocol):
    """The settings that the size of a micro-batch follows from."""

    @property
    def batch_size(self) -> int: ...


def micro_batches(settings: Batches, per_step: int, dp: int, command: str = "warmup") -> tuple[int, int]:
    """Sequences of a micro-batch, batch_size at most, and micro-batches of a step, of each of dp processes.

    Raises:
        ValueError: the sequences of a step can't be shared out evenly.
    """
    if per_step % dp:
        raise ValueError(
            f"{command}: the number of data-parallel processes must divide the {per_step} sequences of an optimizer "
            f"step (--batch-size x --accumulation x processes when the run began), got {dp}; start another number of "
            "them"
        )
    each = per_step // dp
    size = max(n for n in range(1, min(each, settings.batch_size) + 1) if each % n == 0)
    return size, each // size


def forward(handle: IndexerHandle, batch: dict[str, Tensor]) -> None:
    """One forward of the frozen decoder, without logits; gradients of the indexers are added inside it."""
    with torch.no_grad():
        handle.decoder(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)


def _ratio(kl: Tensor, uniform: Tensor) -> float | None:
    """Mean over mean; None where every query sees one key, and the uniform prediction is exact."""
    return float(kl.mean() / uniform.mean()) if float(uniform.mean()) > 0 else None


def learning_rate(settings: Schedule, step: int, steps: int) -> float:
    """lr · (linear from 1/warmup_steps to 1, then constant or half a cosine to zero after the last of `steps`)."""
    if step < settings.warmup_steps:
        return settings.lr * (step / settings.warmup_steps)
    if settings.decay == "none":
        return settings.lr
    remaining = max(1, steps + 1 - settings.warmup_steps)
    return settings.lr * (0.5 * (1 + math.cos(math.pi * (step - settings.warmup_steps) / remaining)))
