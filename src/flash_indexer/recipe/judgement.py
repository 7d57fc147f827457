"""What a run's report says of its indexers, for an export to record: how good they are, and in which arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from flash_indexer.files.judged import indexer_fingerprint, record_judgement
from flash_indexer.files.native import read_native
from flash_indexer.judge.comparison_report import NUMBERS
from flash_indexer.judge.scores import Evaluation
from flash_indexer.judge.verdict import arithmetic_name
from flash_indexer.models.attach import IndexerHandle
from flash_indexer.recipe.judging import INDEXERS
from flash_indexer.recipe.run_folder import indexer_folder


def note_judgement(folder: Path, handle: IndexerHandle, exported: Path, console: Console) -> None:
    """Records `judgement` in the exported folder where there is one; says so, or why not and how to get one."""
    why = f"no report in {folder}"
    try:
        judged = judgement(folder, handle)
    except ValueError as error:
        judged, why = None, str(error)
    if judged is None:
        said = (
            f"not recorded how the indexers were judged: {why}; `flash-indexer evaluate` makes one, with --serve fp8 "
            "in the arithmetic of servers"
        )
    else:
        record_judgement(exported, judged)
        said = f"recorded: judged with index scores in {arithmetic_name(judged['arithmetic'])}"
    console.print(said, highlight=False, soft_wrap=True, markup=False)


def judgement(folder: Path, handle: IndexerHandle) -> dict[str, Any] | None:
    """What the report in `folder`/report says of the handle's indexers, for an export to record.

    Without a report, what a native folder itself records; None where it records nothing.

    Raises:
        ValueError: the report is damaged, or of other weights.
    """
    file = folder / "report" / "report.json"
    if not file.exists():
        return read_native(indexer_folder(folder)).config.judged
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        weights, judged = report["run"].get(INDEXERS), Evaluation.from_dict(report["evaluation"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no report of ours ({error!r})") from error
    if weights is None:
        raise ValueError(f"{file} doesn't say which indexers it judges, as reports of older versions")
    if weights != indexer_fingerprint(handle):
        raise ValueError(f"{file} judges other weights than the indexers have now")
    dense = judged.perplexities[0].perplexity
    overlaps = {at.k: at.overlap for at in judged.unserved.overlaps if at.layer is None} if judged.unserved else {}
    return {
        "arithmetic": judged.arithmetic,
        "tokens": judged.tokens,
        "kl_over_uniform": judged.mean.kl_over_uniform,
        "mass_at_k": [
            {"k": at.k, "queries": at.queries, "indexer": at.indexer, "oracle": at.oracle}
            | ({"overlap": overlaps[at.k]} if at.k in overlaps else {})
            for at in judged.mean.at_k
        ],
        "perplexity": {"dense": dense}
        | {str(p.k): p.perplexity for p in judged.perplexities if p.selection == "indexer"},
    }


def tied_rows(folder: Path) -> float | None:
    """The part of the queries that a comparison in `folder`/report found tied at rank K; None where there is none."""
    file = folder / "report" / NUMBERS
    try:
        tied = json.loads(file.read_text(encoding="utf-8"))["mean"]["tied"]
        return None if tied is None else float(tied)
    except (OSError, ValueError, KeyError, TypeError):
        return None
