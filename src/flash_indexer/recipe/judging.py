"""Trained indexers as a command finds them: loaded from their folder, judged on held-out text, reported."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flash_indexer.files.atomic import readable_directory
from flash_indexer.files.judged import indexer_fingerprint
from flash_indexer.files.native import check_tokenizer, load_native, read_native
from flash_indexer.files.trained import MODEL_FOLDER, add_trained, read_sparse_config
from flash_indexer.judge.evaluation import evaluate
from flash_indexer.judge.report import write_report
from flash_indexer.judge.scores import Evaluation
from flash_indexer.judge.verdict import summary_lines
from flash_indexer.models.attach import IndexerHandle
from flash_indexer.models.load import load_model, model_fingerprint
from flash_indexer.recipe.data import counted
from flash_indexer.recipe.run_folder import indexer_folder
from flash_indexer.recipe.run_record import METRICS_FILE, WarmupSettings, read_metrics, warmup_command
from flash_indexer.recipe.sparse_record import read_any_run, sparse_command

KS = (64, 128, 256, 512)
"""Numbers of keys at which every report measures masses and ties."""
INDEXERS = "indexer_fingerprint"
"""What the settings in a report call the weights that it judges."""
LONGER_STEPS, LONGER_TOKENS, LONGER_RATIO = 360, 737_280, 0.055
"""Steps, tokens and last KL / uniform of the recorded run, docs/smollm2-135m/report.md."""


def load_trained(
    folder: Path, model: str | None, console: Console, command: str = "evaluate"
) -> tuple[IndexerHandle, PreTrainedTokenizerBase, dict[str, Any]]:
    """The handle and tokenizer of a run or a native indexer folder, and the settings it was trained with.

    Of a sparse run the model is the one that trained, with dense attention; `sparse_handle` makes it sparse.
    A native folder records no sequence length: the settings then hold the default one, and `console` is told.

    Args:
        model: instead of the one that the folder names; its tokenizer must be the same. command: what an error of the
            run's record begins with.
    """
    source = indexer_folder(folder)
    config = read_native(source).config
    held, run = readable_directory(source) / MODEL_FOLDER, read_any_run(folder, command)
    name = model or (str(held) if held.is_dir() else config.base_name)
    console.print(f"loading {name}", highlight=False, soft_wrap=True, markup=False)
    dtype = getattr(torch, run.get("dtype", config.base_dtype))
    base, tokenizer = load_model(name, dtype=dtype, indexers=config.indexers)
    if torch.cuda.is_available():
        torch.nn.Module.cuda(base)
    sparse = read_sparse_config(held.parent)
    if sparse is not None and not held.is_dir():
        add_trained(base, held.parent, sparse)
    fingerprint = model_fingerprint(base) if sparse is None else None
    handle = load_native(base, source, base_fingerprint=fingerprint)
    check_tokenizer(config, tokenizer, name=name, command=command)
    return handle, tokenizer, {"sequence_length": WarmupSettings.sequence_length, **run, "model": name}


def judge_and_report(
    handle: IndexerHandle,
    batches: Sequence[dict[str, Tensor]],
    folder: Path,
    report: Path,
    run: Mapping[str, Any],
    *,
    console: Console,
    command: str | None = None,
    min_visible: int = 0,
    perplexity_ks: tuple[int, ...] = (128,),
    serve: str | None = None,
) -> Evaluation:
    """Evaluates a handle on held-out text, writes the report, and prints the numbers that say most.

    Args:
        folder: of the run or the native indexer, whose metrics the report shows. report: the folder to write.
        run: settings to print. command: what was called, beside what trained.
        perplexity_ks: keys a query in the sparse passes; masses and ties are measured at them as well as at KS.
    """
    rows = sum(batch["input_ids"].shape[0] for batch in batches)
    length = batches[0]["input_ids"].shape[1] if batches else 0
    console.print(f"evaluating on {counted(rows, 'held-out sequence')} of {length:,} tokens", highlight=False)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=None)

        def advance(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total)

        judged = evaluate(
            handle, batches, ks=(*{*KS, *perplexity_ks},), min_visible=min_visible, perplexity_ks=perplexity_ks,
            serve=serve, progress=advance,
        )  # fmt: skip
    is_sparse = "topk" in run
    trained = [(sparse_command if is_sparse else warmup_command)(run, folder)] if "steps" in run else []
    run = {
        **run,
        INDEXERS: indexer_fingerprint(handle),
        "command": "\n".join([*trained, *([command] if command else [])]),
    }
    log = [] if is_sparse else read_metrics(folder / METRICS_FILE)
    path = write_report(report, evaluation=judged, metrics_log=log, run=run)
    for line in summary_lines(judged):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    print_path(console, "plots", report)
    print_path(console, "report", path)
    return judged


def print_path(console: Console, name: str, path: Path) -> None:
    """A name and where it is, on a line that stays whole."""
    console.print(f"{name:<9}{path}", highlight=False, soft_wrap=True, markup=False)


def ended_by_time(run: Mapping[str, Any], out: Path) -> str | None:
    """What to say at the end of a run whose steps --minutes chose: how good it is, and how to go on; else None."""
    rows = read_metrics(out / METRICS_FILE)
    if run.get("ended_by") != "time" or not rows or rows[-1]["kl_over_uniform"] is None:
        return None
    steps = int(run["steps"])
    tokens = int(run["sequences_per_step"]) * int(run["sequence_length"])
    more = max(2 * steps, math.ceil(LONGER_TOKENS / tokens))
    command = shlex.join(["flash-indexer", "warmup", "--out", str(out), "--resume", "--steps", str(more)])
    return (
        f"time ended it: --minutes {run['minutes']:g} allowed {counted(steps, 'step')} of {tokens:,} tokens, and "
        f"KL/uniform is {rows[-1]['kl_over_uniform']:.3f} now. A longer run gets lower: the recorded one on "
        f"SmolLM2-135M reached {LONGER_RATIO} after {LONGER_STEPS} steps, {LONGER_TOKENS:,} tokens. To go on: {command}"
    )
