"""A sparse run's model and indexers beside those it began with, on held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from flash_indexer.files.native import load_native
from flash_indexer.judge.comparison import Comparison, compare, measure
from flash_indexer.judge.comparison_report import comparison_lines, write_comparison
from flash_indexer.judge.needle import Needle, needles
from flash_indexer.models.attach import IndexerHandle, attach
from flash_indexer.models.load import load_model, load_tokenizer
from flash_indexer.recipe.judging import load_trained, print_path
from flash_indexer.recipe.run_folder import indexer_folder
from flash_indexer.recipe.sparse_start import attach_start, held_indexers


def compare_and_report(
    folder: Path,
    run: Mapping[str, Any],
    batches: Sequence[Mapping[str, Tensor]],
    report: Path,
    *,
    console: Console,
    command: str | None = None,
    needle_count: int = 0,
) -> Comparison:
    """Dense, sparse before and sparse after, at the run's K; writes comparison.md into `report` and prints the numbers.

    Args:
        folder: of the sparse run. run: its settings, as `load_trained` gives them.
        needle_count: documents of the needle test at each depth, as long as the batches' sequences; 0: none.
    """
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    topk, keys = int(run["topk"]), str(run.get("keys", "indexer"))
    say(f"comparing with {run['init_from']}, {topk} keys a query")
    documents = _documents(run, batches, needle_count) if needle_count else []
    before = measure(_begun_with(run), batches, topk, documents, keys)
    after = measure(load_trained(folder, str(run["model"]), console)[0], batches, topk, documents, keys)
    found = compare(before, after)
    page = write_comparison(report, found, command)
    for line in comparison_lines(found):
        say(line)
    print_path(console, "compared", page)
    return found


def _documents(run: Mapping[str, Any], batches: Sequence[Mapping[str, Tensor]], count: int) -> list[Needle]:
    filler = torch.cat([batch["input_ids"].flatten() for batch in batches]).cpu()
    tokenizer = load_tokenizer(run["model"])
    return needles(tokenizer, filler, length=batches[0]["input_ids"].shape[1], count=count, seed=int(run["seed"]))


def _begun_with(run: Mapping[str, Any]) -> IndexerHandle:
    """The model and the indexers that the run began with, on the layers that it made sparse, in its dtype."""
    _, held = held_indexers(run["init_from"], "evaluate: init_from in the run's run.json")
    indexers = "own" if held is None else held.config.indexers
    model, _ = load_model(run["model"], dtype=getattr(torch, run["dtype"]), indexers=indexers)
    if torch.cuda.is_available():
        torch.nn.Module.cuda(model)
    if held is None:
        return attach(model, indexers="own", layers=run.get("layers"))
    if run.get("layers") is None:
        return load_native(model, indexer_folder(Path(run["init_from"])))
    return attach_start(model, held, layers=run["layers"])
