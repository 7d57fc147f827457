"""The dense warm-up recipe: a frozen model, its indexers, AdamW, and checkpoints that survive a kill.

The data's order is a function of seed and step, and nothing else is random after the indexers' initialisation, so a
resumed run repeats an uninterrupted one bit for bit on the same machine, and under another number of processes to
the rounding of sums: an optimizer step's sequences stay the same ones.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from rich.console import Console

from flash_indexer.files.atomic import readable_directory
from flash_indexer.files.checkpoint import write_json
from flash_indexer.files.native import WEIGHTS_FILE, load_native, read_native
from flash_indexer.models.attach import IndexerHandle, attach
from flash_indexer.models.load import load_model, model_fingerprint, tokenizer_fingerprint
from flash_indexer.models.sharding import shard_model
from flash_indexer.recipe.data import (
    PackedDataset,
    counted,
    describe,
    embedding_rows,
    length_warning,
    longest_context,
    pack,
    training_documents,
)
from flash_indexer.recipe.loop import TrainingLoop, forward, learning_rate, micro_batches
from flash_indexer.recipe.processes import ParallelSettings, Processes, restart_warning
from flash_indexer.recipe.queries import draw_queries, fewer_blocks_than_pieces
from flash_indexer.recipe.run_folder import check_folder, check_new, indexer_folder, locked_folder
from flash_indexer.recipe.run_record import (
    CHECKPOINT,
    RUN_FILE,
    WarmupSettings,
    extended,
    read_record,
    settings_from,
)

SHORT = 16
"""Tokens of the sequence that is tried before text is packed."""


def warm_up(
    settings: WarmupSettings,
    out: str | Path,
    *,
    resume: bool = False,
    steps: int | None = None,
    console: Console | None = None,
    parallel: ParallelSettings | None = None,
) -> IndexerHandle:
    """Trains the indexers of a model with loss = mean over tokens and layers' sum of KL(teacher || indexer).

    Writes into `out`: run.json (settings), metrics.jsonl (a row a step), checkpoint/ (a native indexer directory with
    the optimizer's state). Nothing is written before the first step was computed, so that whatever is refused leaves
    `out` as it was. With `resume`, a run found there goes on from its checkpoint, with its own settings. One run at a
    time may write into `out`.

    Args:
        steps: in place of settings.steps; with `resume` it may be larger than the run's. From the checkpoint on, the
            learning rate is then that of a run of so many steps: with decay "cosine" it rises again where a run was
            finished.
        parallel: how the run is shared out over the processes that torchrun or accelerate launch started. It may
            change at a resumption, and with it the number of processes: batch_size * accumulation * data-parallel
            processes, the sequences of an optimizer step, stays as it was, in micro-batches of batch_size at most.

    Returns:
        The handle with the trained indexers attached.

    Raises:
        ValueError, FileNotFoundError: for unusable settings, data or checkpoints, where `out` is not one folder
            that all processes see, and where another run writes into it.
        FloatingPointError: a loss is not finite, or a gradient is not or is above 1e12; names layer and step. No step
            is taken, the last checkpoint stays.
        ConnectionError: another process died or did not answer in time. The last checkpoint stays. A process that is
            stuck waiting for its GPU can't raise it: it prints the message and ends with exit code 1.
        Interrupted: a KeyboardInterrupt, after Ctrl-C or SIGTERM during the training: the step under way was finished
            and saved.
        RuntimeError: the frozen model changed or got gradients.

    Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1: lr 1e-3, main model frozen, dense attention.
    """
    out, parallel = Path(out), parallel or ParallelSettings()
    check_folder("warmup: --out", out)
    processes = Processes(parallel)
    console = (console or Console()) if processes.is_main else Console(quiet=True)
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    with processes.telling(out / CHECKPOINT), ExitStack() as held:
        with processes.refusing_together():
            if processes.is_main:
                held.enter_context(locked_folder(out, say))
        with processes.refusing_together():
            record = read_record(out, resume)
            if record is None:
                check_new(out)
                settings = settings if steps is None else replace(settings, steps=steps)
            else:
                settings = settings_from(record["settings"])
            if settings.dtype == "auto":
                settings = replace(settings, dtype=str(default_dtype()).removeprefix("torch."))
        processes.agree(out, -1 if record is None else crc32(json.dumps(record, sort_keys=True).encode()))
        processes.check_length(settings.sequence_length)
        for note in notes(settings, parallel, processes.count, record is not None or resume):
            say(note)
        try:
            loop, weights = _prepare(settings, out, record, steps, processes, console)
            optimizer, done = loop.load()
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"warmup: interrupted before a step was computed: {out} is as it was") from error
        if record is not None and loop.steps > int(record["steps"]):
            rate = learning_rate(loop.settings, done + 1, loop.steps)
            say(f"{record['steps']} steps become {loop.steps}: from step {done + 1} on, the learning rate is that of a "
                f"run of {loop.steps} steps, {rate:.2e} at first")  # fmt: skip
        loop.train(optimizer, done)
        _audit(loop.handle, weights)
        return loop.handle


def _prepare(
    settings: WarmupSettings,
    out: Path,
    record: dict[str, Any] | None,
    more_steps: int | None,
    processes: Processes,
    console: Console,
) -> tuple[TrainingLoop, str]:
    """The loop, and the fingerprint that the model must have after it. Writes nothing; says what takes time."""
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    per_step = settings.batch_size * settings.accumulation * processes.parallel.dp
    if record is not None:
        per_step = int(record["sequences_per_step"])
        _check_more_steps(int(record["steps"]), more_steps)
    micro_batches(settings, per_step, processes.parallel.dp)
    say(f"loading {settings.model}")
    with processes.refusing_together():
        model, tokenizer = load_model(settings.model, dtype=getattr(torch, settings.dtype), indexers=settings.indexers)
        before = weights = model_fingerprint(model)
        vocab_size = embedding_rows(model)
    fsdp = processes.settings.fsdp and processes.count > 1
    if not fsdp or processes.parallel.tp > 1:
        torch.nn.Module.to(model, processes.device)
    if fsdp or processes.parallel.tp > 1:
        shard_model(model, processes.parallel, fsdp=fsdp)
        weights = model_fingerprint(model)
    torch.manual_seed(settings.seed)
    handle = attach(
        model, num_heads=settings.num_heads, head_dim=settings.head_dim, rope_dim=settings.rope_dim,
        target=settings.target, layers=settings.layers, parallel=processes.parallel,
        index_dtype=settings.index_dtype, teacher_dtype=settings.teacher_dtype, indexers=settings.indexers,
        teachers=settings.teachers,
    )  # fmt: skip
    if handle.trains_own:
        settings = replace(settings, **_sizes_of(handle))
        weights = model_fingerprint(model, without=handle.indexers)
    say(handle.description)
    facts = dict(base_fingerprint=before, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
    if settings.init_from is not None and not readable_directory(out / CHECKPOINT).exists():
        with processes.refusing_together():
            facts["init_fingerprint"] = _begin_with(handle, Path(settings.init_from), before, say)
    handle.tokenizer_fingerprint = facts["tokenizer_fingerprint"]
    say("compiling or loading the GPU kernels" if processes.device.type == "cuda" else "trying a short sequence")
    _try_short_sequence(handle, settings, processes)
    say("reading the text")
    with processes.refusing_together():
        documents, warnings = training_documents(settings.data, settings.column)
    if (warning := length_warning(settings.sequence_length, longest_context(model.config))) is not None:
        warnings.append(warning)
    packing: dict[str, Any] = dict(sequence_length=settings.sequence_length, seed=settings.seed, vocab_size=vocab_size)
    if record is not None:
        steps = max(int(record["steps"]), more_steps or 0)
    elif settings.steps is not None:
        steps = settings.steps
    else:
        say("measuring the time of a step")
        steps = _steps_in(handle, pack(documents, tokenizer, **packing, max_sequences=per_step), settings, processes)
    if steps < settings.warmup_steps:
        warnings.append(
            f"{counted(steps, 'step')} {'is' if steps == 1 else 'are'} fewer than the {settings.warmup_steps} of "
            f"--warmup-steps: the learning rate ends at {learning_rate(settings, steps, steps):.2e} and never reaches "
            f"--lr {settings.lr:g}"
        )
    for warning in warnings:
        say(f"warning: {warning}")
    say(f"packing {counted(steps * per_step, 'sequence')} of {settings.sequence_length:,} tokens")
    with processes.refusing_together():
        data = pack(documents, tokenizer, **packing, max_sequences=steps * per_step, progress=processes.is_main)
        if record is not None:
            sequences = min(len(data), int(record["steps"]) * per_step)
            _check_same(record, dict(facts, data_fingerprint=first_sequences(data, sequences).fingerprint))
    summary = data.summary(steps * per_step)
    say(describe(summary))

    def write_record(done: int) -> None:
        if record is None:
            content = dict(
                settings=asdict(settings), steps=steps, sequences_per_step=per_step, torch=torch.__version__, **facts,
                data_fingerprint=data.fingerprint, ended_by="time" if settings.steps is None else "steps",
                text=asdict(summary), warnings=warnings,
            )  # fmt: skip
            write_json(out / RUN_FILE, content)
        elif steps > int(record["steps"]):
            write_json(out / RUN_FILE, extended(record, done, steps, data.fingerprint) | dict(text=asdict(summary)))

    loop = TrainingLoop(settings, steps, per_step, out, handle, data, processes, before, console, write_record)
    return loop, weights


def _sizes_of(handle: IndexerHandle) -> dict[str, Any]:
    """The sizes of a handle's indexers, by the names of the settings."""
    first: Any = next(iter(handle.indexers.values()))
    return {name: getattr(first, name) for name in ("num_heads", "head_dim", "rope_dim")}


def default_dtype() -> torch.dtype:
    """The dtype that the operators take of a model: bfloat16 on CUDA, float32 elsewhere."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _steps_in(handle: IndexerHandle, data: PackedDataset, settings: WarmupSettings, processes: Processes) -> int:
    """Steps that fit the time budget, from the faster of two trial steps; their gradients are thrown away."""
    seconds = []
    batch = processes.part({name: value[None].to(processes.device) for name, value in data[0].items()})
    if settings.queries < 1:
        tokens = draw_queries(settings.sequence_length, settings.queries, seed=settings.seed, draw="trial")
        handle.queries = processes.own_tokens(tokens, settings.sequence_length)
    for _ in range(2):
        started = time.perf_counter()
        forward(handle, batch)
        seconds.append((time.perf_counter() - started) * settings.batch_size * settings.accumulation)
        handle.indexers.zero_grad(set_to_none=True)
    handle.queries = None
    budget = torch.tensor(settings.minutes * 60 / min(seconds), device=processes.device)
    mean = processes.sum(budget) / (processes.count / processes.parallel.tp)
    return max(1, int(mean))


def _check_same(record: dict[str, Any], facts: dict[str, Any]) -> None:
    """A resumed run must see the model, the tokenizer and the data it began with.

    A record of before there was one of the tokenizer says nothing of it.
    """
    for name, value in facts.items():
        if (before := record.get(name, value)) != value:
            raise ValueError(
                f"warmup: {name} must be {before} as when the run began, got {value}; resume with the same model, "
                "tokenizer and data, or start a new run in another --out"
            )


def notes(settings: WarmupSettings, parallel: ParallelSettings, processes: int, resume: bool) -> list[str]:
    """What a person should know of settings that do nothing, and of a launcher that can't start the run again."""
    said = []
    if parallel.fsdp and processes == 1:
        said.append(
            "warmup: --fsdp does nothing in one process, which holds the whole model; start several with torchrun"
        )
    if parallel.layout != ParallelSettings.layout and parallel.cp == 1:
        said.append(f"warmup: --cp-layout {parallel.layout} does nothing without --cp")
    pieces = parallel.cp if parallel.cp == 1 or parallel.layout == "contiguous" else 2 * parallel.cp
    if (uneven := fewer_blocks_than_pieces(settings.sequence_length, settings.queries, pieces)) is not None:
        said.append(f"warmup: {uneven}")
    if settings.steps is not None and settings.minutes != WarmupSettings.minutes:
        said.append(f"warmup: --minutes {settings.minutes:g} does nothing beside --steps {settings.steps}")
    warning = restart_warning() if resume else None
    return said if warning is None else [*said, warning]


def first_sequences(data: PackedDataset, count: int) -> PackedDataset:
    """What `pack` gives with max_sequences=count."""
    end = count * data.sequence_length
    return PackedDataset(data.tokens[:end], data.document_starts[data.document_starts < end], data.sequence_length)


def _check_more_steps(recorded: int, steps: int | None) -> None:
    if steps is not None and steps < recorded:
        raise ValueError(
            f"warmup: --steps of a resumed run must be at least the {recorded} that it has, got {steps}; leave it out, "
            "or start a new run in another --out"
        )


def _begin_with(handle: IndexerHandle, source: Path, base_fingerprint: str, say: Callable[[str], None]) -> str:
    """Loads trained indexers into a new run's handle. Returns the SHA-256 of their weights."""
    folder = readable_directory(indexer_folder(source))
    try:
        load_native(handle, folder)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"warmup: --init-from must name a run or an indexer that fits this model: {error}") from error
    if read_native(folder).config.base_fingerprint not in (None, base_fingerprint):
        say(f"warmup: the indexers of {source} were trained on a model of the same sizes with other weights")
    return sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()


def _try_short_sequence(handle: IndexerHandle, settings: WarmupSettings, processes: Processes) -> None:
    """Refuses now, before text is packed, a model or sizes that the first step would refuse; leaves no trace."""
    length = min(settings.sequence_length, math.ceil(SHORT / processes.pieces) * processes.pieces)
    positions = torch.arange(length, device=processes.device)[None]
    forward(handle, processes.part(dict(input_ids=torch.zeros_like(positions), position_ids=positions)))
    handle.indexers.zero_grad(set_to_none=True)


def _audit(handle: IndexerHandle, before: str) -> None:
    """Frozen means frozen: no parameter of the model has a gradient, none has changed."""
    with_gradient = [name for name, parameter in handle.model.named_parameters() if parameter.grad is not None]
    if with_gradient:
        raise RuntimeError(f"warmup: frozen parameters got gradients: {with_gradient[:3]}")
    if model_fingerprint(handle.model, without=handle.indexers) != before:
        raise RuntimeError("warmup: the frozen model's parameters changed during training")
