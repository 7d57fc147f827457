"""The checks that a person runs on trained indexers: the teacher's probabilities, and what FP8 changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from flash_indexer.judge.fp8_check import LARGEST_ERROR, LayerFP8, fp8_check
from flash_indexer.judge.fp8_report import JSON_FILE, fp8_summary, fp8_table, write_fp8_report
from flash_indexer.judge.teacher_check import teacher_errors
from flash_indexer.models.attach import IndexerHandle
from flash_indexer.recipe.judging import print_path


def check_teacher(handle: IndexerHandle, batch: dict[str, Tensor], console: Console) -> None:
    """Prints a line a layer: how far from 1 the teacher's probabilities of any head and query sum to.

    The forward also compares each layer's mask and attention with the teacher's (`models.verification`).

    Raises:
        ValueError: above 1e-2, or where the teacher is not the model's own attention, naming the layer.
    """
    errors = teacher_errors(handle, batch)
    console.print(
        f"{handle.description}: masks and attention are the model's own", highlight=False, soft_wrap=True, markup=False
    )
    for layer, error in errors.items():
        console.print(f"layer {layer}: max |sum_s a[t,h,s] - 1| = {error:.2e}", highlight=False, markup=False)
    worst = max(errors, key=lambda layer: _nan_as_inf(errors[layer]))
    if not errors[worst] <= LARGEST_ERROR:
        raise ValueError(
            f"check: layer {worst}'s rows sum to 1 only within {errors[worst]:.2e}, above {LARGEST_ERROR:g}"
        )


def check_fp8(
    handle: IndexerHandle, batch: dict[str, Tensor], folder: Path, run: Mapping[str, Any], console: Console
) -> None:
    """Measures what FP8 changes, prints a table, and writes plot and JSON into `folder`.

    Raises:
        ValueError: where the target reads a logsumexp, and with the model's own a row of a head's probabilities sums to
            1 only within more than 1e-2; names layer and head.
    """
    layers = fp8_check(handle, batch)
    plot = write_fp8_report(folder, layers, run={**run, "tokens": batch["input_ids"].numel()})
    console.print(fp8_table(layers))
    console.print(fp8_summary(layers), highlight=False, soft_wrap=True)
    print_path(console, "plot", plot)
    print_path(console, "JSON", folder / JSON_FILE)
    if handle.target != "sum_logits":  # which reads no logsumexp
        _refuse_wrong_sums(layers)


def _refuse_wrong_sums(layers: tuple[LayerFP8, ...]) -> None:
    worst = max(layers, key=lambda layer: _nan_as_inf(layer.row_error))
    if worst.row_error <= LARGEST_ERROR:
        return
    every = [error for layer in layers for error in layer.row_errors]
    beyond = sum(not error <= LARGEST_ERROR for error in every)
    head = max(range(len(worst.row_errors)), key=lambda h: _nan_as_inf(worst.row_errors[h]))
    raise ValueError(
        f"check: with the teacher in FP8 and the model's own logsumexp, {beyond} of {len(every)} heads have rows that "
        f"sum to 1 only within more than {LARGEST_ERROR:g}, the worst within {worst.row_error:.2e} (layer "
        f"{worst.layer}, head {head}): give indexer_kl(teacher_dtype='fp8') lse=None, which computes one of the FP8 "
        "logits; `warmup --teacher-dtype fp8` does"
    )


def _nan_as_inf(error: float) -> float:
    return math.inf if math.isnan(error) else error
