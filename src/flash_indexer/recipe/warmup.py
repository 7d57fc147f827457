"""The dense warm-up recipe: a frozen model, its indexers, AdamW, and checkpoints that survive a kill.

The data's order is a function of seed and step, and nothing else is random after the indexers' initialisation, so a
resumed run repeats an uninterrupted one bit for bit on the same machine, and under another number of processes to
the rounding of sums: an optimizer step's sequences stay the same ones.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn
from zlib import crc32

import torch
from rich.console import Console
from torch import Tensor

from flash_indexer.files.checkpoint import load_checkpoint, save_checkpoint, write_json
from flash_indexer.judge.metrics import MetricSums, layer_sums
from flash_indexer.models.attach import IndexerHandle, LayerCapture, attach
from flash_indexer.models.load import load_model, model_fingerprint
from flash_indexer.models.sharding import shard_model
from flash_indexer.parallel.context import gather_tokens
from flash_indexer.parallel.gradients import sum_gradients, unusable_gradient
from flash_indexer.recipe.data import (
    PackedDataset,
    describe,
    embedding_rows,
    length_warning,
    longest_context,
    pack,
    training_documents,
)
from flash_indexer.recipe.processes import ParallelSettings, Processes, saved_state
from flash_indexer.recipe.progress import StepProgress
from flash_indexer.recipe.run_record import (
    CHECKPOINT,
    METRICS_FILE,
    RUN_FILE,
    WarmupSettings,
    check_new,
    keep_rows,
    read_record,
    settings_from,
)

MASS_K = 64
MASS_ROWS = 128
ADAM_EPS = 1e-12
"""Well below torch's 1e-8, which is as large as a fresh indexer's gradients where hidden states are small."""


def warm_up(
    settings: WarmupSettings,
    out: str | Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    parallel: ParallelSettings | None = None,
) -> IndexerHandle:
    """Trains the indexers of a model with loss = mean over tokens and layers' sum of KL(teacher || indexer).

    Writes into `out`: run.json (settings), metrics.jsonl (a row a step), checkpoint/ (a native indexer directory with
    the optimizer's state). With `resume`, a run found there goes on from its checkpoint, with its own settings.

    Args:
        parallel: how the run is shared out over the processes that torchrun or accelerate launch started. It may
            change at a resumption, and with it the number of processes: batch_size * accumulation * data-parallel
            processes, the sequences of an optimizer step, stays as it was, in micro-batches of batch_size at most.

    Returns:
        The handle with the trained indexers attached.

    Raises:
        ValueError, FileNotFoundError: for unusable settings, data or checkpoints, and where `out` is not one folder
            that all processes see.
        FloatingPointError: a loss is not finite, or a gradient is not or is above 1e12; names layer and step. No step
            is taken, the last checkpoint stays.
        ConnectionError: another process died or did not answer in time. The last checkpoint stays. A process that is
            stuck waiting for its GPU can't raise it: it prints the message and ends with exit code 1.
        RuntimeError: the frozen model changed or got gradients.

    Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1: lr 1e-3, main model frozen, dense attention.
    """
    out, parallel = Path(out), parallel or ParallelSettings()
    record = read_record(out, resume)
    if record is None:
        check_new(out)
    else:
        settings = settings_from(record["settings"])
    processes = Processes(parallel)
    if settings.dtype == "auto":
        settings = replace(settings, dtype=str(default_dtype()).removeprefix("torch."))
    console = (console or Console()) if processes.is_main else Console(quiet=True)
    with processes.telling(out / CHECKPOINT):
        processes.agree(out, -1 if record is None else crc32(json.dumps(record, sort_keys=True).encode()))
        processes.check_length(settings.sequence_length)
        return _warm_up(settings, out, record, console, processes)


def _warm_up(
    settings: WarmupSettings, out: Path, record: dict[str, Any] | None, console: Console, processes: Processes
) -> IndexerHandle:
    per_step = settings.batch_size * settings.accumulation * processes.parallel.dp
    if record is not None:
        per_step = int(record["sequences_per_step"])
    micro_batches(settings, per_step, processes.parallel.dp)
    with console.status(f"loading {settings.model}"):
        model, tokenizer = load_model(settings.model, dtype=getattr(torch, settings.dtype))
        before = held = model_fingerprint(model)
        vocab_size = embedding_rows(model)
        fsdp = processes.settings.fsdp and processes.count > 1
        if not fsdp or processes.parallel.tp > 1:
            torch.nn.Module.to(model, processes.device)
        if fsdp or processes.parallel.tp > 1:
            shard_model(model, processes.parallel, fsdp=fsdp)
            held = model_fingerprint(model)
    torch.manual_seed(settings.seed)
    handle = attach(
        model, num_heads=settings.num_heads, head_dim=settings.head_dim, rope_dim=settings.rope_dim,
        target=settings.target, layers=settings.layers, parallel=processes.parallel,
    )  # fmt: skip
    documents, warnings = training_documents(settings.data, settings.column)
    if (warning := length_warning(settings.sequence_length, longest_context(model.config))) is not None:
        warnings.append(warning)
    for warning in warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False)
    packing: dict[str, Any] = dict(sequence_length=settings.sequence_length, seed=settings.seed, vocab_size=vocab_size)
    if record is not None:
        steps = int(record["steps"])
    elif settings.steps is not None:
        steps = settings.steps
    else:
        with console.status("measuring the time of a step"):
            steps = _steps_in(
                handle, pack(documents, tokenizer, **packing, max_sequences=per_step), settings, processes
            )
    data = pack(documents, tokenizer, **packing, max_sequences=steps * per_step, progress=processes.is_main)
    summary = data.summary(steps * per_step)
    console.print(describe(summary), highlight=False)
    found = dict(base_fingerprint=before, data_fingerprint=data.fingerprint)
    if record is None:
        out.mkdir(parents=True, exist_ok=True)
        if processes.is_main:
            facts = dict(steps=steps, sequences_per_step=per_step, torch=torch.__version__, **found)
            facts |= dict(text=asdict(summary), warnings=warnings)
            write_json(out / RUN_FILE, dict(settings=asdict(settings), **facts))
    else:
        _check_same(record, found)
    run = _Run(settings, steps, per_step, out, handle, data, processes, before, console)
    run.train()
    _audit(handle, held)
    return handle


@dataclass
class _Run:
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

    def train(self) -> None:
        settings, handle = self.settings, self.handle
        parameters = list(handle.indexers.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0, eps=ADAM_EPS)
        done = 0
        if (self.out / CHECKPOINT).exists() or (self.out / f".{CHECKPOINT}.old").exists():
            done = load_checkpoint(self.out / CHECKPOINT, handle, optimizer, base_fingerprint=self.base_fingerprint)
        self.processes.agree(self.out, done)
        main = self.processes.is_main
        before = keep_rows(self.out / METRICS_FILE, done) if main else 0.0
        started, watch = time.perf_counter() - before, _MassWatch(handle, self.processes)
        with StepProgress(self.console, self.steps, done, quiet=not main) as progress:
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
                    step=step, loss=float(kl.mean()), kl_over_uniform=_ratio(kl, uniform),
                    mass=watch.take(), lr=lr, seconds=round(time.perf_counter() - started, 3),
                    tokens=step * self.per_step * settings.sequence_length,
                    kl=kl.tolist(), uniform_kl=uniform.tolist(),
                )  # fmt: skip
                if main:
                    with (self.out / METRICS_FILE).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    if step % settings.save_every == 0 or step == self.steps:
                        save_checkpoint(
                            self.out / CHECKPOINT, handle, optimizer, step,
                            base_name=settings.model, base_fingerprint=self.base_fingerprint,
                        )  # fmt: skip
                progress.step(row)
        self.processes.wait()
        watch.close()

    def _gradients(self, step: int) -> tuple[Tensor, Tensor]:
        """Forwards (and backwards, inside them) of one optimizer step; gradients and means summed over all ranks.

        Returns:
            mean KL and mean uniform KL per layer, [layers] each.
        """
        handle, processes = self.handle, self.processes
        total = self.per_step * self.settings.sequence_length
        handle.token_weight = 1 / total
        means = torch.zeros(2, len(handle.layers), device=processes.device)
        for batch in self._batches(step):
            own = processes.part(batch)
            forward(handle, own)
            share = own["input_ids"].numel() / total
            for column, (_, loss) in enumerate(sorted(handle.losses().items())):
                means[0, column] += share * loss.kl
                means[1, column] += share * loss.uniform_kl
        sum_gradients(handle.indexers.parameters(), replicas=processes.parallel.tp, timeout=processes.settings.timeout)
        means = processes.sum(means)
        kl, uniform = means.cpu()
        for layer, value in zip(sorted(handle.layers), kl.tolist(), strict=True):
            if not math.isfinite(value):
                self._stop(f"the loss of layer {layer} is {value}", step)
        if (found := unusable_gradient(handle.indexers)) is not None:
            self._stop("the gradient of layer {} reaches {:.3g}".format(*found), step)
        return kl, uniform

    def _stop(self, found: str, step: int) -> NoReturn:
        """Before the step. A resumed run keeps its settings, so a smaller lr means another run."""
        raise FloatingPointError(
            f"warmup: {found} at step {step}; {saved_state(self.out / CHECKPOINT)}: start a new run in another --out "
            "with a smaller --lr or with --clip, and check the model's weights and activations for NaN"
        )

    def _batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        """This rank's micro-batches of a step; the data is gone through again, in another order, when it ends.

        Ranks of one dp_rank get the same ones.
        """
        parallel = self.processes.parallel
        size, count = micro_batches(self.settings, self.per_step, parallel.dp)
        first = (step - 1) * self.per_step
        for micro in range(count):
            begin = first + (micro * parallel.dp + parallel.dp_rank) * size
            items = [self.data[self._index(begin + i)] for i in range(size)]
            yield {
                name: torch.stack([item[name] for item in items]).to(self.processes.device)
                for name in ("input_ids", "position_ids")
            }

    def _index(self, drawn: int) -> int:
        epoch, position = divmod(drawn, len(self.data))
        if epoch == 0:
            return position
        generator = torch.Generator().manual_seed(self.settings.seed + epoch)
        return int(torch.randperm(len(self.data), generator=generator)[position])


class _MassWatch:
    """Attention mass in the indexer's top 64 of each layer's last query rows, on the steps where it is on.

    The last 128 tokens of each micro-batch, whichever context-parallel processes hold them. With tensor parallelism
    the mean over processes is the mean over all heads.
    """

    def __init__(self, handle: IndexerHandle, processes: Processes) -> None:
        self.handle, self.processes, self.on = handle, processes, False
        self.sums = MetricSums()
        handle.observer = self._look

    def _look(self, capture: LayerCapture) -> None:
        if not self.on:
            return
        parallel = self.processes.parallel
        rows = capture.key_end > len(capture.q) * parallel.cp - MASS_ROWS  # key_end is a token's position + 1
        names = ("q", "lse", "index_q", "index_weights", "key_start", "key_end")
        part = replace(capture, **{name: getattr(capture, name)[rows].detach() for name in names})
        if (group := parallel.group("cp")) is not None:
            k, index_k = (gather_tokens(x, group, layout=parallel.layout) for x in (part.k, part.index_k))
            part = replace(part, k=k, index_k=index_k)
        if len(part.q):
            self.sums = self.sums + layer_sums(part, ks=(MASS_K,))

    def take(self) -> float | None:
        """Mean mass since the last call, over all processes where it was on; None where no query saw enough keys."""
        sums, self.sums = self.sums, MetricSums()
        if not self.on:
            return None
        mass = sums.at_k.get(MASS_K)
        found = [0.0, 0.0] if mass is None else [float(mass.indexer), float(mass.queries)]
        held, queries = self.processes.sum(torch.tensor(found, device=self.processes.device)).tolist()
        return held / queries if queries else None

    def close(self) -> None:
        self.handle.observer = None


def micro_batches(settings: WarmupSettings, per_step: int, dp: int) -> tuple[int, int]:
    """Sequences of a micro-batch, batch_size at most, and micro-batches of a step, of each of dp processes.

    Raises:
        ValueError: the sequences of a step can't be shared out evenly.
    """
    if per_step % dp:
        raise ValueError(
            f"warmup: the number of data-parallel processes must divide the {per_step} sequences of an optimizer step "
            f"(--batch-size x --accumulation x processes when the run began), got {dp}; start another number of them"
        )
    each = per_step // dp
    size = max(n for n in range(1, min(each, settings.batch_size) + 1) if each % n == 0)
    return size, each // size


def default_dtype() -> torch.dtype:
    """The dtype that the operators take of a model: bfloat16 on CUDA, float32 elsewhere."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def forward(handle: IndexerHandle, batch: dict[str, Tensor]) -> None:
    """One forward of the frozen decoder, without logits; gradients of the indexers are added inside it."""
    with torch.no_grad():
        handle.decoder(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)


def _steps_in(handle: IndexerHandle, data: PackedDataset, settings: WarmupSettings, processes: Processes) -> int:
    """Steps that fit the time budget, from the faster of two trial steps; their gradients are thrown away."""
    seconds = []
    batch = processes.part({name: value[None].to(processes.device) for name, value in data[0].items()})
    for _ in range(2):
        started = time.perf_counter()
        forward(handle, batch)
        seconds.append((time.perf_counter() - started) * settings.batch_size * settings.accumulation)
        handle.indexers.zero_grad(set_to_none=True)
    budget = torch.tensor(settings.minutes * 60 / min(seconds), device=processes.device)
    mean = processes.sum(budget) / (processes.count / processes.parallel.tp)
    return max(1, int(mean))


def _ratio(kl: Tensor, uniform: Tensor) -> float | None:
    """Mean over mean; None where every query sees one key, and the uniform prediction is exact."""
    return float(kl.mean() / uniform.mean()) if float(uniform.mean()) > 0 else None


def _lr_factor(settings: WarmupSettings, step: int, steps: int) -> float:
    """Linear from 1/warmup_steps to 1, then constant or half a cosine to zero after the last step."""
    if step < settings.warmup_steps:
        return step / settings.warmup_steps
    if settings.decay == "none":
        return 1.0
    remaining = max(1, steps + 1 - settings.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * (step - settings.warmup_steps) / remaining))


def _check_same(record: dict[str, Any], found: dict[str, Any]) -> None:
    """A resumed run must see the model and the data it began with."""
    for name, value in found.items():
        if record[name] != value:
            raise ValueError(
                f"warmup: {name} must be {record[name]} as when the run began, got {value}; "
                "resume with the same model and data, or start a new run in another --out"
            )


def _audit(handle: IndexerHandle, before: str) -> None:
    """Frozen means frozen: no parameter of the model has a gradient, none has changed."""
    with_gradient = [name for name, parameter in handle.model.named_parameters() if parameter.grad is not None]
    if with_gradient:
        raise RuntimeError(f"warmup: frozen parameters got gradients: {with_gradient[:3]}")
    if model_fingerprint(handle.model) != before:
        raise RuntimeError("warmup: the frozen model's parameters changed during training")
