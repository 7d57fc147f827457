"""Whether indexers trained in FP8 select in FP8 what they select unrounded, more than indexers trained without.

    python benchmarks/overlap.py --commit $(git rev-parse HEAD)

The embedded model's indexers are trained with each of --seeds, once as the model is and once with index and teacher in
FP8. On a held-out sequence the keys that a server selects, of rotated e4m3 rows, are compared with those of the
indexer rounded to bfloat16: the mean part that is the same, over layers and over QUERIES queries that see 2 K keys.
Appends a line for each training to benchmarks/results/overlap.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from flash_indexer.judge.batches import batch_tensors
from flash_indexer.judge.serving import served
from flash_indexer.models.attach import IndexerHandle
from flash_indexer.models.capture import LayerCapture
from flash_indexer.ops import select_keys
from flash_indexer.recipe import judging
from flash_indexer.recipe.held_out import held_out_batches
from flash_indexer.recipe.run_record import WarmupSettings
from flash_indexer.recipe.warmup import warm_up
from report import RESULTS, Record, table

SELECTIONS = ((128, 2048), (2048, 8192))  # keys, tokens of the sequence
QUERIES = 256
TRAININGS: dict[str, dict[str, Any]] = {"plain": {}, "fp8": {"index_dtype": "fp8", "teacher_dtype": "fp8"}}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=WarmupSettings.model)
    parser.add_argument("--data", help="training text; default: the standard library's")
    parser.add_argument("--held-out", help="text that is selected from; default: its other half")
    parser.add_argument("--steps", type=int, default=47)
    parser.add_argument("--sequence-length", type=int, default=1024, help="in training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(words)
    arguments.out.mkdir(parents=True, exist_ok=True)
    records = []
    for seed in arguments.seeds:
        for training in TRAININGS:
            records.append(measure(arguments, seed, training))
            with (arguments.out / "overlap.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(records[-1]) + "\n")
            print(records[-1], flush=True)
    print("\n".join(summary(records)))


def measure(arguments: argparse.Namespace, seed: int, training: str) -> Record:
    """One training, and the part of the selected keys that is the same served in FP8."""
    settings = WarmupSettings(
        model=arguments.model, data=arguments.data, sequence_length=arguments.sequence_length, steps=arguments.steps,
        save_every=arguments.steps, seed=seed, **TRAININGS[training],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        warm_up(settings, Path(folder) / "run", console=Console())
        handle, _, run = judging.load_trained(Path(folder) / "run", None, Console(), "overlap")
        same = {
            f"top-{k} of {length}": overlap(
                handle, held_out_batches({**run, "sequence_length": length}, arguments.held_out, 1)[0], k
            )
            for k, length in SELECTIONS
        }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "commit": arguments.commit, "device": device, "torch": torch.__version__, "model": Path(arguments.model).name,
        "steps": arguments.steps,
        "sequence_length": arguments.sequence_length, "seed": seed, "training": training, "same": same,
    }  # fmt: skip


def overlap(handle: IndexerHandle, batch: dict[str, Tensor], k: int) -> float:
    """The mean over layers and queries."""
    found: list[float] = []

    def compare(capture: LayerCapture) -> None:
        rows = torch.nonzero(capture.key_end - capture.key_start >= 2 * k).flatten()
        rows = rows[:: max(len(rows) // QUERIES, 1)]
        unrounded, rounded = (members(served(capture, arithmetic), rows, k) for arithmetic in ("bf16", "fp8"))
        found.append(float((unrounded & rounded).sum()) / (k * len(rows)))

    input_ids, position_ids = batch_tensors(batch, next(handle.model.parameters()).device)
    with torch.no_grad(), handle.using(compare):
        handle.decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    return statistics.mean(found)


def members(capture: LayerCapture, rows: Tensor, k: int) -> Tensor:
    """bool [rows, S]: whether the query selects the key."""
    chosen = select_keys(
        capture.index_q[rows], capture.index_k, capture.index_weights[rows],
        key_start=capture.key_start[rows], key_end=capture.key_end[rows], topk=k,
    ).indices.long()  # fmt: skip
    return torch.zeros(len(rows), len(capture.index_k), dtype=torch.bool, device=rows.device).scatter_(1, chosen, True)


def summary(records: Sequence[Record]) -> list[str]:
    """The mean over seeds of both trainings, and of the differences with their standard error."""
    rows = []
    for name in records[0]["same"]:
        plain, fp8 = ([r["same"][name] for r in records if r["training"] == training] for training in TRAININGS)
        differences = [b - a for a, b in zip(plain, fp8, strict=True)]
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
        means = [f"{statistics.mean(values):.2%}" for values in (plain, fp8)]
        rows.append([name, *means, f"{100 * statistics.mean(differences):+.3f} ± {100 * error:.3f} points"])
    return table("selection | trained as the model is | trained in FP8 | difference", rows)


if __name__ == "__main__":
    main()
