"""The text that every Python installation has, in two halves that share no document: to train on, and to judge on."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from contextlib import suppress
from pathlib import Path
from typing import Literal

import datasets

from flash_indexer.recipe.rows import dataset_in_memory

__all__ = ["standard_library_documents"]

HELD_OUT_PERCENT = 7
NO_PROSE = frozenset({"__pycache__", "dist-packages", "encodings", "idle_test", "site-packages", "test", "tests"})
GENERATED = ("_sysconfigdata", "config-", "html/entities.py", "pydoc_data/")


def standard_library_documents(split: Literal["train", "heldout"]) -> datasets.Dataset:
    """The running Python's own sources and `pydoc` topics: real text on every machine, with nothing to download.

    A document is held out when (first 8 bytes of SHA-256(name), big-endian) mod 100 < 7, so its side depends on its
    name alone: it is the same on every machine and Python version, and no document is on both sides. Tests, installed
    packages, tables and generated files are left out.

    Returns:
        Columns "name" (path below the library, or "topics/...") and "text", sorted by name.

    Raises:
        ValueError: another split. FileNotFoundError: this Python was installed without its sources.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f'standard_library_documents: split must be "train" or "heldout", got {split!r}')
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    sources = {f"topics/{name}": text for name, text in topics.items()}
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in NO_PROSE]
        for file in (Path(folder, name) for name in files if name.endswith(".py")):
            name = file.relative_to(root).as_posix()
            if not name.startswith(GENERATED):
                with suppress(OSError, UnicodeDecodeError):
                    sources[name] = file.read_text(encoding="utf-8")
    texts = {name: text for name, text in sources.items() if _is_held_out(name) == (split == "heldout")}
    if all(name.startswith("topics/") for name in texts):
        raise FileNotFoundError(
            f"standard_library_documents: no readable .py files below {root}; use a Python that was installed with its "
            "sources, or name a text of your own"
        )
    names = sorted(texts)
    return dataset_in_memory({"name": names, "text": [texts[name] for name in names]})


def _is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT
