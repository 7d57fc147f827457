"""What a run's report says of its indexers, for an export to record: how good they are, and in which arithmetic."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from flash_indexer.files.judged import indexer_fingerprint, record_judgement
from flash_indexer.files.native import read_native
from flash_indexer.judge.scores import Evaluation, TiesAtK
from flash_indexer.judge.verdict import arithmetic_name, percent
from flash_indexer.models.attach import IndexerHandle
from flash_indexer.recipe.judging import INDEXERS
from flash_indexer.recipe.run_folder import indexer_folder

MOST = 3
"""Layers that are named, those with most ties."""


class Ties(NamedTuple):
    """The share of queries whose scores tie at the last rank, and what to say of it. share None: not counted."""

    share: float | None
    said: str


def note_judgement(
    folder: Path, handle: IndexerHandle, exported: Path, console: Console, ties: Ties | None = None
) -> None:
    """Records `judgement` in the exported folder where there is one; says so, or why not and how to get one.

    Args:
        ties: those at the exported model's last rank, which are said as well.
    """
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
    for line in (said, *(() if ties is None else (ties.said,))):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def judgement(folder: Path, handle: IndexerHandle) -> dict[str, Any] | None:
    """What the report in `folder`/report says of the handle's indexers, for an export to record.

    Without a report, what a native folder itself records; None where it records nothing.

    Raises:
        ValueError: the report is damaged, or of other weights.
    """
    judged = _report_of(folder, handle)
    if judged is None:
        return read_native(indexer_folder(folder)).config.judged
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


def tied_rows(folder: Path, handle: IndexerHandle, topk: int) -> Ties:
    """tied / queries that see more than `topk` keys, as the report in `folder`/report counted them for these weights.

    Of a report in a server's arithmetic those in the model's, in which Transformers computes.
    """
    why = f"no report in {folder}"
    try:
        found = _report_of(folder, handle)
    except ValueError as error:
        found, why = None, str(error)
    if found is not None:
        judged = found.unserved or found
        ties = [(x.layer, tie) for x in (judged.mean, *judged.layers) for tie in x.ties if tie.k == topk]
        if ties:
            (_, of_all), *layers = ties
            said = f"ties at rank {topk}: {percent(of_all.share)} of the queries that see more keys"
            most = sorted((x for x in layers if x[1].tied_rows), key=lambda x: -x[1].share)[:MOST]
            named = ", ".join(f"{layer} ({percent(tie.share)})" for layer, tie in most)
            said += f", most in layers {named}" if named else ""
            return Ties(of_all.share, said + _taken_otherwise(of_all, layers))
        ranks = ", ".join(str(tie.k) for tie in judged.mean.ties) or "none"
        why = f"the report in {folder} counts them at these ranks: {ranks}"
    command = shlex.join(["flash-indexer", "evaluate", "--run", str(folder), "--perplexity-k", str(topk)])
    return Ties(
        None,
        f"ties at rank {topk} not counted: {why}; `{command}` counts them, on documents of more than {topk} tokens",
    )


def _taken_otherwise(of_all: TiesAtK, layers: Sequence[tuple[int | None, TiesAtK]]) -> str:
    """In which layers torch.topk takes other keys than were judged, and for how many queries; where it was counted."""
    if not of_all.tied_rows or of_all.taken_otherwise is None:
        return ""
    if not of_all.taken_otherwise:
        return "; torch.topk, by which the exported model selects, takes the same keys there"
    named = ", ".join(f"{layer} ({tie.taken_otherwise:,})" for layer, tie in layers if tie.taken_otherwise)
    return (
        f"; torch.topk, by which the exported model selects, takes other keys for {of_all.taken_otherwise:,} of these "
        f"{of_all.tied_rows:,} queries: of layers {named}"
    )


def _report_of(folder: Path, handle: IndexerHandle) -> Evaluation | None:
    """What the report in `folder`/report measured; None where there is none.

    Raises:
        ValueError: the report is damaged, or of other weights than the handle's indexers have.
    """
    file = folder / "report" / "report.json"
    if not file.exists():
        return None
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        weights, judged = report["run"].get(INDEXERS), Evaluation.from_dict(report["evaluation"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no report of ours ({error!r})") from error
    if weights is None:
        raise ValueError(f"{file} doesn't say which indexers it judges, as reports of older versions")
    if weights != indexer_fingerprint(handle):
        raise ValueError(f"{file} judges other weights than the indexers have now")
    return judged
