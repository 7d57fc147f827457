"""The sparse stage: a model and its warmed-up indexers train on, each query attending to the keys that are selected.

Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1: topk 2048, lr 7.3e-6, the model on its own loss, the
indexers on the KL over the selected keys, their inputs detached.

The data's order is a function of seed and step, and nothing else is random after the adapters' initialisation, so a
resumed run repeats an uninterrupted one bit for bit on the same machine, and under another number of processes to the
rounding of sums: an optimizer step's sequences stay the same ones.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from rich.console import Console
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from flash_indexer.files.checkpoint import write_json
from flash_indexer.files.native import load_native
from flash_indexer.files.trained import trainable
from flash_indexer.models.adapters import add_adapters
from flash_indexer.models.attach import IndexerHandle
from flash_indexer.models.layers import spans
from flash_indexer.models.load import load_model, model_fingerprint
from flash_indexer.models.own_sparse import make_sparse
from flash_indexer.models.sharding import check_heads, shard_for_training, shard_model
from flash_indexer.models.sparse import SparseHandle
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
from flash_indexer.recipe.language_loss import LanguageLoss, check_logits
from flash_indexer.recipe.loop import micro_batches
from flash_indexer.recipe.processes import ParallelSettings, Processes, restart_warning
from flash_indexer.recipe.run_folder import check_folder, check_new, locked_folder
from flash_indexer.recipe.run_record import CHECKPOINT, RUN_FILE
from flash_indexer.recipe.sparse_loop import SparseLoop
from flash_indexer.recipe.sparse_record import STAGE, SparseRunSettings, read_sparse_record, sparse_settings_from
from flash_indexer.recipe.sparse_start import Start, attach_start, keys_of, load_start
from flash_indexer.recipe.warmup import default_dtype

WARMED_UP = 0.3
"""KL over the uniform prediction's, above which an indexer would learn little but its own ranking."""

FEW = 8
"""Layers that a warning names one by one."""
MANY = 0.1
"""The part of a text's tokens that see more than topk keys, below which a run is nearly one of dense attention."""


def train_sparsely(
    settings: SparseRunSettings | None,
    out: str | Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    parallel: ParallelSettings | None = None,
) -> SparseHandle:
    """Trains a model whose layers attend to `topk` selected keys, and the indexers that select them.

        model      mean over the label tokens of an optimizer step of -log p(token); no label across a document's end
        indexers   mean over tokens, sum over layers, of KL(attention over the selected keys || indexer)

    Both means are over the tokens of all processes, and so are the norms that are clipped. A model's own indexers train
    in place, at their own rate, and get the gradients of their KL alone.

    Writes into `out`: run.json (settings), metrics.jsonl (a row a step), checkpoint/ (indexers, what trained of the
    model, AdamW's state). Nothing is written before the first step was computed. With `resume`, a run found there goes
    on from its checkpoint, with its own settings; activation_checkpointing, which changes no number, may change.

    Args:
        settings: None where `out` holds a run to resume.
        parallel: how the run is shared out over the processes that torchrun or accelerate launch started: data
            parallel, cp, tp (the heads of attention), fsdp, or these together. It may change at a resumption, and with
            it the number of processes: batch_size * accumulation * data-parallel processes, the sequences of an
            optimizer step, stays as it was, in micro-batches of batch_size at most.

    Returns:
        The handle of the trained model, sparse; with fsdp its parameters are this process's shards.

    Raises:
        ValueError, FileNotFoundError: for unusable settings, data or checkpoints; where `out` is not one folder that
            all processes see, and where another run writes into it.
        FloatingPointError: a loss or a gradient is not finite. No step is taken, the last checkpoint stays.
        ConnectionError: another process died or did not answer in time. The last checkpoint stays.
        Interrupted: a KeyboardInterrupt, after Ctrl-C or SIGTERM: the step under way was finished and saved.
        RuntimeError: a frozen parameter changed or got a gradient.
    """
    out, parallel = Path(out), replace(parallel or ParallelSettings(), command="sparse")
    check_folder("sparse: --out", out)
    if parallel.cp * parallel.tp > 1 and settings is not None and settings.keys == "oracle":
        raise ValueError(
            f'sparse: keys="oracle" must run with cp=1 and tp=1, got cp={parallel.cp} and tp={parallel.tp}; leave --cp '
            "and --tp out"
        )
    processes = Processes(parallel)
    console = (console or Console()) if processes.is_main else Console(quiet=True)
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    with processes.telling(out / CHECKPOINT), ExitStack() as held:
        with processes.refusing_together():
            if processes.is_main:
                held.enter_context(locked_folder(out, say, "sparse"))
        with processes.refusing_together():
            record = read_sparse_record(out, resume)
            if record is not None:
                recorded = sparse_settings_from(record["settings"])
                again = (settings or recorded).activation_checkpointing
                settings = replace(recorded, activation_checkpointing=again)
            elif settings is None:
                raise ValueError(f"sparse: {out} holds no run to resume; give --init-from, the warmed-up indexers")
            else:
                check_new(out, "sparse")
            if settings.dtype == "auto":
                settings = replace(settings, dtype=str(default_dtype()).removeprefix("torch."))
        processes.agree(out, -1 if record is None else crc32(json.dumps(record, sort_keys=True).encode()))
        processes.check_length(settings.sequence_length)
        for note in notes(settings, processes, record is not None or resume):
            say(note)
        try:
            loop = _prepare(settings, out, record, processes, console)
            has_frozen = settings.indexers_alone or settings.lora is not None
            before = _frozen_fingerprint(loop.handle) if has_frozen else None
            optimizer, done = loop.load()
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"sparse: interrupted before a step was computed: {out} is as it was") from error
        loop.train(optimizer, done)
        _audit(loop.handle, before)
        return loop.handle


def notes(settings: SparseRunSettings, processes: Processes, resume: bool) -> list[str]:
    """What a person should know of options that do nothing, or less than they could."""
    said, parallel = [], processes.settings
    trains_all = settings.lora is None and not settings.indexers_alone
    if parallel.fsdp and processes.count == 1:
        said.append(
            "sparse: --fsdp does nothing in one process, which holds the whole model; start several with torchrun"
        )
    elif parallel.fsdp and trains_all and not settings.activation_checkpointing and settings.dtype == "bfloat16":
        said.append(
            "sparse: --fsdp without --activation-checkpointing keeps the bfloat16 weights of all layers until the "
            "backward, whole on each process; pass --activation-checkpointing where memory is short"
        )
    if settings.activation_checkpointing and settings.indexers_alone:
        said.append("sparse: --activation-checkpointing does nothing with --indexers-alone, which has no backward")
    if parallel.layout != ParallelSettings.layout and parallel.cp == 1:
        said.append(f"sparse: --cp-layout {parallel.layout} does nothing without --cp")
    warning = restart_warning("sparse") if resume else None
    return said if warning is None else [*said, warning]


def _prepare(
    settings: SparseRunSettings, out: Path, record: dict[str, Any] | None, processes: Processes, console: Console
) -> SparseLoop:
    """The loop. Writes nothing; says what takes time."""
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    per_step = settings.batch_size * settings.accumulation * processes.parallel.dp
    if record is not None:
        per_step = int(record.get("sequences_per_step", settings.batch_size * settings.accumulation))
    micro_batches(settings, per_step, processes.parallel.dp, "sparse")
    with processes.refusing_together():
        start, model, tokenizer = load_start(settings, processes.settings, say)
        settings = replace(settings, topk=(topk := keys_of(settings, model, start)))
        layers = _chosen_layers(settings, start)
        check_logits(model.config.get_text_config(), "sparse")
        check_heads("sparse", model.config.get_text_config(), processes.parallel.tp)
        rows, longest = embedding_rows(model), longest_context(model.config)
        say("reading the text")
        documents, warnings = training_documents(settings.data, settings.column)
    if (warning := length_warning(settings.sequence_length, longest)) is not None:
        warnings.append(warning)
    if topk >= settings.sequence_length:
        warnings.append(
            f"topk = {topk} covers the {settings.sequence_length} tokens of a sequence: no key is ever left "
            "out, and the run is one of dense attention; give a smaller --topk or a longer --sequence-length"
        )
    needed = settings.steps * per_step
    say(f"packing {counted(needed, 'sequence')} of {settings.sequence_length:,} tokens")
    with processes.refusing_together():
        data = pack(
            documents, tokenizer, sequence_length=settings.sequence_length, seed=settings.seed, max_sequences=needed,
            vocab_size=rows, progress=processes.is_main,
        )  # fmt: skip
        facts = dict(
            base_fingerprint=start.fingerprint, tokenizer_fingerprint=start.tokenizer_fingerprint,
            init_fingerprint=start.init_fingerprint, data_fingerprint=data.fingerprint,
        )  # fmt: skip
        if record is not None:
            _check_same(record, facts)
    share = data.share_that_sees_more(topk)
    if topk < settings.sequence_length and share < MANY:
        warnings.append(
            f"{share:.1%} of the text's tokens see more than topk = {topk} keys, for documents do not attend "
            "to each other: the others leave no key out; give longer documents or a smaller --topk"
        )
    if record is None:
        warnings += not_warmed_up(_dense(model, start, processes), data, layers, processes)
    for warning in warnings:
        say(f"warning: {warning}")
    say(describe(summary := data.summary(needed)))
    handle, loss = _sparse(settings, model, start, layers, processes)
    del model

    def write_record() -> None:
        content = dict(
            stage=STAGE, settings=asdict(settings) | dict(model=start.name), sequences_per_step=per_step, **facts,
            torch=torch.__version__, text=asdict(summary), warnings=warnings,
        )  # fmt: skip
        write_json(out / RUN_FILE, content)

    return SparseLoop(
        settings, per_step, out, handle, loss, data, processes, (start.name, start.fingerprint), console,
        (lambda: None) if record is not None else write_record,
    )  # fmt: skip


def _dense(model: PreTrainedModel, start: Start, processes: Processes) -> IndexerHandle:
    """The model, dense, with its indexers attached, on the device or shared out over the processes, its heads whole."""
    parallel = replace(processes.parallel, tp=1)
    if processes.device.type == "cuda":
        torch.nn.Module.to(model, torch.bfloat16)
    if processes.shards:
        shard_model(model, parallel, fsdp=True)
    else:
        torch.nn.Module.to(model, processes.device)
    if start.folder is None:
        return attach_start(model, start.indexers, parallel=parallel)
    return load_native(model, start.folder, parallel=parallel)


def _chosen_layers(settings: SparseRunSettings, start: Start) -> tuple[int, ...]:
    held = tuple(start.indexers.config.layers)
    missing = sorted(set(settings.layers or ()) - set(held))
    if missing:
        raise ValueError(
            f"sparse: --layers must be layers that have an indexer, got {missing}, but {settings.init_from} has them "
            f"for {list(held)}; leave out the others, or warm them up first"
        )
    return settings.layers or held


@torch.no_grad()
def not_warmed_up(
    dense: IndexerHandle, data: PackedDataset, layers: tuple[int, ...], processes: Processes
) -> list[str]:
    """A warning that names the layers whose KL over the uniform prediction's is above WARMED_UP on one sequence.

    The handle is removed.
    """
    batch = processes.part({name: value[None].to(processes.device) for name, value in data[0].items()})
    dense.indexers.train(False)
    dense.decoder(**batch, use_cache=False)
    found = sorted(dense.losses().items())
    dense.remove()
    own = [(float(loss.kl), float(loss.uniform_kl)) for _, loss in found]
    sums = processes.sum(torch.tensor(own, dtype=torch.float64, device=processes.device)).tolist()
    ratios = {n: kl / uniform for (n, _), (kl, uniform) in zip(found, sums, strict=True) if uniform > 0}
    if not (bad := {n: ratio for n, ratio in ratios.items() if n in layers and not ratio <= WARMED_UP}):
        return []
    named = ", ".join(f"{n} ({ratio:.2f})" for n, ratio in bad.items())
    if len(bad) > FEW:
        named = f"{spans(list(bad))} ({min(bad.values()):.2f} to {max(bad.values()):.2f})"
    return [
        f"the indexers of layers {named} are not warmed up: their KL over the uniform prediction's is above "
        f"{WARMED_UP}, and the loss over selected keys would confirm their own ranking; run `flash-indexer warmup` for "
        "longer first"
    ]


def _sparse(
    settings: SparseRunSettings, model: PreTrainedModel, start: Start, layers: tuple[int, ...], processes: Processes
) -> tuple[SparseHandle, LanguageLoss]:
    """The model in the dtypes of the training, with sparse layers; what trains requires gradients."""
    trains_all = settings.lora is None and not settings.indexers_alone
    dtype = torch.float32 if trains_all else getattr(torch, settings.dtype)
    is_shared_out = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if model.dtype != dtype or is_shared_out:  # a checkpoint may hold more bits than the warm-up's dtype
        model, _ = load_model(start.name, dtype=dtype, indexers=start.indexers.config.indexers)
    if not processes.shards:
        torch.nn.Module.to(model, processes.device)
    torch.manual_seed(settings.seed)
    if settings.lora is not None:
        add_adapters(model, settings.lora)
    elif trains_all:
        model.requires_grad_(True)
    if settings.activation_checkpointing and not settings.indexers_alone:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train(not settings.indexers_alone)
    loss = LanguageLoss(model)
    if processes.shards:
        shard_for_training(loss, model, processes.parallel)
    dense = attach_start(model, start.indexers, layers=layers, parallel=processes.parallel)
    handle = make_sparse(dense, keys_of(settings, model, start))
    handle.deterministic, handle.keys = settings.deterministic, settings.keys
    handle.tokenizer_fingerprint = start.tokenizer_fingerprint
    return handle, loss


def _check_same(record: dict[str, Any], facts: dict[str, Any]) -> None:
    """A resumed run must see the model, the tokenizer, the indexers and the data it began with.

    A record of before there was one of the tokenizer says nothing of it.
    """
    for name, value in facts.items():
        if (before := record.get(name, value)) != value:
            raise ValueError(
                f"sparse: {name} must be {before} as when the run began, got {value}; resume with the same model, "
                "tokenizer, indexers and data, or start a new run in another --out"
            )


def _frozen_fingerprint(handle: SparseHandle) -> str:
    """Of what of the model doesn't train; with FSDP2 of this process's shards."""
    trained = [*handle.indexers.parameters(), *trainable(handle.model).values()]
    return model_fingerprint(handle.model, without=torch.nn.ParameterList(trained))


def _audit(handle: SparseHandle, before: str | None) -> None:
    """Frozen means frozen: no gradient, and the fingerprint of before the training where there is one."""
    model = handle.model
    if with_gradient := [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]:
        raise RuntimeError(f"sparse: frozen parameters got gradients: {with_gradient[:3]}")
    if before is not None and _frozen_fingerprint(handle) != before:
        raise RuntimeError("sparse: frozen parameters of the model changed during training")
