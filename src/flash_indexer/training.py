"""The dense warm-up recipe: a frozen model, its indexers, AdamW, and checkpoints that survive a kill.

The data's order is a function of seed and step, and nothing else is random after the indexers' initialisation, so a
resumed run repeats an uninterrupted one bit for bit on the same machine.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from rich.console import Console
from torch import Tensor

from flash_indexer.checkpoint import load_checkpoint, save_checkpoint, write_json
from flash_indexer.data import PackedDataset, load_documents, pack, standard_library_documents
from flash_indexer.integration.models import load_model, load_tokenizer, model_fingerprint
from flash_indexer.integration.transformers import IndexerHandle, LayerCapture, attach
from flash_indexer.metrics import MetricSums, layer_sums
from flash_indexer.progress import StepProgress
from flash_indexer.run_record import METRICS_FILE, RUN_FILE, WarmupSettings, keep_rows, read_record, settings_from

MASS_K = 64
MASS_ROWS = 128
ADAM_EPS = 1e-12
"""Well below torch's 1e-8, which is as large as a fresh indexer's gradients where hidden states are small."""
CHECKPOINT = "checkpoint"


def warm_up(
    settings: WarmupSettings, out: str | Path, *, resume: bool = False, console: Console | None = None
) -> IndexerHandle:
    """Trains the indexers of a model with loss = mean over tokens and layers' sum of KL(teacher || indexer).

    Writes into `out`: run.json (settings), metrics.jsonl (a row a step), checkpoint/ (a native indexer directory with
    the optimizer's state). With `resume`, a run found there goes on from its checkpoint, with its own settings.

    Returns:
        The handle with the trained indexers attached.

    Raises:
        ValueError, FileNotFoundError: for unusable settings, data or checkpoints.
        FloatingPointError: a loss is not finite; names layer and step. The last checkpoint stays.
        RuntimeError: the frozen model changed or got gradients.

    Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1: lr 1e-3, main model frozen, dense attention.
    """
    console = console or Console()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    out = Path(out)
    record = read_record(out, resume)
    if record is not None:
        settings = settings_from(record["settings"])
    if settings.dtype == "auto":
        settings = replace(settings, dtype="bfloat16" if accelerator.device.type == "cuda" else "float32")
    with console.status(f"loading {settings.model}"):
        model, tokenizer = load_model(settings.model, dtype=getattr(torch, settings.dtype))
        model.to(accelerator.device).eval()
        before = model_fingerprint(model)
    torch.manual_seed(settings.seed)
    handle = attach(
        model, num_heads=settings.num_heads, head_dim=settings.head_dim, rope_dim=settings.rope_dim,
        target=settings.target, layers=settings.layers,
    )  # fmt: skip
    per_step = settings.batch_size * settings.accumulation * accelerator.num_processes
    documents = standard_library_documents("train") if settings.data is None else _documents(settings)
    packing: dict[str, Any] = dict(sequence_length=settings.sequence_length, seed=settings.seed)
    if record is not None:
        steps = int(record["steps"])
    elif settings.steps is not None:
        steps = settings.steps
    else:
        with console.status("measuring the time of a step"):
            steps = _steps_in(
                handle, pack(documents, tokenizer, **packing, max_sequences=per_step), settings, accelerator
            )
    data = pack(documents, tokenizer, **packing, max_sequences=steps * per_step, progress=accelerator.is_main_process)
    found = dict(base_fingerprint=before, data_fingerprint=data.fingerprint, processes=accelerator.num_processes)
    if record is None:
        accelerator.wait_for_everyone()  # until every rank has seen that no run was here
        out.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            write_json(out / RUN_FILE, dict(settings=asdict(settings), steps=steps, torch=torch.__version__, **found))
    else:
        _check_same(record, found)
    run = _Run(settings, steps, out, handle, data, accelerator, before, console)
    run.train()
    _audit(handle, before)
    return handle


@dataclass
class _Run:
    """One run's parts, and the loop over its steps."""

    settings: WarmupSettings
    steps: int
    out: Path
    handle: IndexerHandle
    data: PackedDataset
    accelerator: Accelerator
    base_fingerprint: str
    console: Console

    def train(self) -> None:
        settings, handle = self.settings, self.handle
        parameters = list(handle.indexers.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0, eps=ADAM_EPS)
        done = 0
        if (self.out / CHECKPOINT).exists() or (self.out / f".{CHECKPOINT}.old").exists():
            done = load_checkpoint(self.out / CHECKPOINT, handle, optimizer, base_fingerprint=self.base_fingerprint)
        if self.accelerator.is_main_process:
            keep_rows(self.out / METRICS_FILE, done)
        started, watch = time.perf_counter(), _MassWatch(handle)
        with StepProgress(self.console, self.steps, done, quiet=not self.accelerator.is_main_process) as progress:
            for step in range(done + 1, self.steps + 1):
                watch.on = step % 10 == 0 or step in (1, self.steps)
                kl, uniform = self._gradients(step)
                if settings.clip is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
                lr = settings.lr * _lr_factor(settings, step, self.steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                row = dict(
                    step=step, loss=float(kl.mean()), kl_over_uniform=float(kl.mean() / uniform.mean()),
                    mass=watch.take(), lr=lr, seconds=round(time.perf_counter() - started, 3),
                    tokens=step * settings.batch_size * settings.accumulation * settings.sequence_length
                    * self.accelerator.num_processes,
                    kl=kl.tolist(), uniform_kl=uniform.tolist(),
                )  # fmt: skip
                if self.accelerator.is_main_process:
                    with (self.out / METRICS_FILE).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    if step % settings.save_every == 0 or step == self.steps:
                        save_checkpoint(
                            self.out / CHECKPOINT, handle, optimizer, step,
                            base_name=settings.model, base_fingerprint=self.base_fingerprint,
                        )  # fmt: skip
                progress.step(row)
        self.accelerator.wait_for_everyone()
        watch.close()

    def _gradients(self, step: int) -> tuple[Tensor, Tensor]:
        """Forwards (and backwards, inside them) of one optimizer step; gradients and means summed over all ranks.

        Returns:
            mean KL and mean uniform KL per layer, [layers] each.
        """
        handle, accelerator = self.handle, self.accelerator
        batches = list(self._batches(step))
        tokens = torch.tensor(float(sum(batch["input_ids"].numel() for batch in batches)), device=accelerator.device)
        total = float(_reduced(accelerator, tokens))
        handle.token_weight = 1 / total
        means = torch.zeros(2, len(handle.layers), device=accelerator.device)
        for batch in batches:
            forward(handle, batch)
            share = batch["input_ids"].numel() / total
            for column, (_, loss) in enumerate(sorted(handle.losses().items())):
                means[0, column] += share * loss.kl
                means[1, column] += share * loss.uniform_kl
        if accelerator.num_processes > 1:
            gradients = [p.grad for p in handle.indexers.parameters() if p.grad is not None]
            flat = _reduced(accelerator, torch.cat([g.flatten().float() for g in gradients]))
            for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
            means = _reduced(accelerator, means)
        kl, uniform = means.cpu()
        for layer, value in zip(sorted(handle.layers), kl.tolist(), strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"warmup: the loss of layer {layer} is {value} at step {step}; the checkpoint in "
                    f"{self.out / CHECKPOINT} is of an earlier step: resume from it with a smaller lr or with "
                    "clipping, and check the model's weights for NaN"
                )
        return kl, uniform

    def _batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        """This rank's micro-batches of a step; the data is gone through again, in another order, when it ends."""
        settings, accelerator = self.settings, self.accelerator
        size, world = settings.batch_size, accelerator.num_processes
        first = (step - 1) * settings.accumulation * size * world
        for micro in range(settings.accumulation):
            begin = first + (micro * world + accelerator.process_index) * size
            items = [self.data[self._index(begin + i)] for i in range(size)]
            yield {
                name: torch.stack([item[name] for item in items]).to(accelerator.device)
                for name in ("input_ids", "position_ids")
            }

    def _index(self, drawn: int) -> int:
        epoch, position = divmod(drawn, len(self.data))
        if epoch == 0:
            return position
        generator = torch.Generator().manual_seed(self.settings.seed + epoch)
        return int(torch.randperm(len(self.data), generator=generator)[position])


class _MassWatch:
    """Attention mass in the indexer's top 64 of each layer's last query rows, on the steps where it is on."""

    def __init__(self, handle: IndexerHandle) -> None:
        self.handle, self.on = handle, False
        self.sums = MetricSums()
        handle.observer = self._look

    def _look(self, capture: LayerCapture) -> None:
        if not self.on:
            return
        rows = slice(-MASS_ROWS, None)
        names = ("q", "lse", "index_q", "index_weights", "key_start", "key_end")
        part = replace(capture, **{name: getattr(capture, name)[rows].detach() for name in names})
        self.sums = self.sums + layer_sums(part, ks=(MASS_K,))

    def take(self) -> float | None:
        """Mean mass since the last call; None where no query saw enough keys."""
        sums, self.sums = self.sums, MetricSums()
        mass = sums.at_k.get(MASS_K)
        return mass.indexer / mass.queries if mass is not None and mass.queries else None

    def close(self) -> None:
        self.handle.observer = None


def forward(handle: IndexerHandle, batch: dict[str, Tensor]) -> None:
    """One forward of the frozen decoder, without logits; gradients of the indexers are added inside it."""
    with torch.no_grad():
        handle.decoder(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)


def is_main_process() -> bool:
    """True in the one process of a run that writes and reports."""
    return bool(PartialState().is_main_process)


def held_out_batches(run: Mapping[str, Any], data: str | None, sequences: int) -> list[dict[str, Tensor]]:
    """Sequences of held-out text, each from one document where the documents are long enough."""
    settings = settings_from(dict(run))
    tokenizer = load_tokenizer(settings.model)
    documents = load_documents(data, column=settings.column) if data else standard_library_documents("heldout")
    packed = pack(
        documents, tokenizer, sequence_length=settings.sequence_length, seed=settings.seed, max_sequences=sequences,
        one_document=data is None,
    )  # fmt: skip
    return [{name: value[None] for name, value in packed[index].items()} for index in range(len(packed))]


def _documents(settings: WarmupSettings) -> Any:
    assert settings.data is not None
    return load_documents(settings.data, column=settings.column)


def _steps_in(handle: IndexerHandle, data: PackedDataset, settings: WarmupSettings, accelerator: Accelerator) -> int:
    """Steps that fit the time budget, from the faster of two trial steps; their gradients are thrown away."""
    seconds = []
    batch = {name: value[None].to(accelerator.device) for name, value in data[0].items()}
    for _ in range(2):
        started = time.perf_counter()
        forward(handle, batch)
        seconds.append((time.perf_counter() - started) * settings.batch_size * settings.accumulation)
        handle.indexers.zero_grad(set_to_none=True)
    budget = torch.tensor(settings.minutes * 60 / min(seconds), device=accelerator.device)
    mean = _reduced(accelerator, budget) / accelerator.num_processes
    return max(1, int(mean))


def _reduced(accelerator: Accelerator, x: Tensor) -> Tensor:
    """Sum over all ranks."""
    total: Tensor = accelerator.reduce(x, reduction="sum") if accelerator.num_processes > 1 else x
    return total


def _lr_factor(settings: WarmupSettings, step: int, steps: int) -> float:
    """Linear from 1/warmup_steps to 1, then constant or half a cosine to zero after the last step."""
    if step < settings.warmup_steps:
        return step / settings.warmup_steps
    if settings.decay == "none":
        return 1.0
    remaining = max(1, steps + 1 - settings.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * (step - settings.warmup_steps) / remaining))


def _check_same(record: dict[str, Any], found: dict[str, Any]) -> None:
    """A resumed run must see the model, the data and the number of processes it began with."""
    for name, value in found.items():
        if record[name] != value:
            raise ValueError(
                f"warmup: {name} must be {record[name]} as when the run began, got {value}; "
                "resume with the same model, data and processes, or start a new run in another --out"
            )


def _audit(handle: IndexerHandle, before: str) -> None:
    """Frozen means frozen: no parameter of the model has a gradient, none has changed."""
    with_gradient = [name for name, parameter in handle.model.named_parameters() if parameter.grad is not None]
    if with_gradient:
        raise RuntimeError(f"warmup: frozen parameters got gradients: {with_gradient[:3]}")
    if model_fingerprint(handle.model) != before:
        raise RuntimeError("warmup: the frozen model's parameters changed during training")
