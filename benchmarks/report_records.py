"""Records of results/*.jsonl, and tables of Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def lines_of(path: Path) -> list[Record]:
    """Every record, oldest first."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def latest(path: Path) -> dict[str, Record]:
    """The last record of each size."""
    return {record.get("name", "all"): record for record in lines_of(path)}


def table(titles: str, rows: list[list[str]]) -> list[str]:
    """A Markdown table. titles: "a | b": the first column to the left, all others to the right."""
    names = titles.split(" | ")
    marks = ["---"] + ["---:"] * (len(names) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (names, marks, *rows)]


def cards(records: Iterable[Record]) -> list[str]:
    """The GPUs of these records, the one of most of them first."""
    return [gpu for gpu, _ in Counter(record["gpu"] for record in records if "gpu" in record).most_common()]


def marked(title: str, record: Record, records: Mapping[str, Record]) -> str:
    """The title, with the GPU where it is not that of most of the records."""
    gpu = record.get("gpu")
    return title if gpu is None or gpu == cards(records.values())[0] else f"{title}; {gpu}"
