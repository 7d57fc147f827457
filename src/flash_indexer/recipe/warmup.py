"""The dense warm-up recipe: a frozen model, its indexers, AdamW, and checkpoints that survive a kill.

The data's order is a function of seed and step, and nothing else is random after the indexers' initialisation, so a
resumed run repeats an uninterrupted one bit for bit on the same machine, and under another number of processes to
the rounding of sums: an optimizer step's sequences stay the same ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from rich.console import Console
from torch import Tensor

from flash_indexer.files.checkpoint import write_json
from flash_indexer.models.attach import IndexerHandle, attach
from flash_indexer.models.load import load_model, load_tokenizer, model_fingerprint
from flash_indexer.models.sharding import shard_model
from flash_indexer.recipe.data import PackedDataset, load_documents, pack, standard_library_documents
from flash_indexer.recipe.loop import TrainingLoop, forward, micro_batches
from flash_indexer.recipe.processes import ParallelSettings, Processes
from flash_indexer.recipe.run_record import (
    CHECKPOINT,
    RUN_FILE,
    WarmupSettings,
    check_new,
    read_record,
    settings_from,
)


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
    documents = standard_library_documents("train") if settings.data is None else _documents(settings)
    packing: dict[str, Any] = dict(sequence_length=settings.sequence_length, seed=settings.seed)
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
    found = dict(base_fingerprint=before, data_fingerprint=data.fingerprint)
    if record is None:
        out.mkdir(parents=True, exist_ok=True)
        if processes.is_main:
            facts = dict(steps=steps, sequences_per_step=per_step, torch=torch.__version__, **found)
            write_json(out / RUN_FILE, dict(settings=asdict(settings), **facts))
    else:
        _check_same(record, found)
    run = TrainingLoop(settings, steps, per_step, out, handle, data, processes, before, console)
    run.train()
    _audit(handle, held)
    return handle


def default_dtype() -> torch.dtype:
    """The dtype that the operators take of a model: bfloat16 on CUDA, float32 elsewhere."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


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
