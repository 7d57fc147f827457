"""The weight files of a Transformers checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open


def shards(directory: Path) -> list[Path]:
    """model.safetensors, or the files that its index names; none where the weights are in another format."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        return [directory / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return [single] if single.is_file() else []


def stored_names(directory: Path) -> set[str]:
    """The names of the tensors in these files."""
    names = set[str]()
    for shard in shards(directory):
        with safe_open(shard, framework="pt") as file:
            names.update(file.keys())
    return names


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file of JSON holds."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
