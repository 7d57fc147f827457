"""A note in a folder of ours: how its indexers were judged, and in which arithmetic (docs/format.md)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from flash_indexer.files.atomic import readable_directory
from flash_indexer.files.checkpoint import write_json
from flash_indexer.files.native import apart
from flash_indexer.files.native_config import CONFIG_FILE, read_config
from flash_indexer.models.attach import IndexerHandle


def record_judgement(path: str | os.PathLike[str], judged: Mapping[str, Any]) -> None:
    """Writes `judged` into the indexer_config.json of a native checkpoint or an exported model; a kill leaves it whole.

    Args:
        path: the folder, as `export` wrote it.
        judged: JSON-serialisable, with an "arithmetic" such as "fp8".

    Raises:
        FileNotFoundError, ValueError: the folder is not one of ours, or `judged` names no arithmetic.
    """
    arithmetic = judged.get("arithmetic")
    if not isinstance(arithmetic, str):
        raise ValueError(
            f"record_judgement: judged must name its arithmetic, a string such as 'fp8', got {arithmetic!r}"
        )
    folder = readable_directory(path)
    write_json(folder / CONFIG_FILE, {**read_config(folder), "judged": dict(judged)})


def indexer_fingerprint(handle: IndexerHandle) -> str:
    """SHA-256 (hex) over the indexers' tensors as they are written: names, shapes, bytes."""
    digest = sha256()
    for name, tensor in sorted(apart(handle.state_dict()).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().numpy().data)
    return digest.hexdigest()
