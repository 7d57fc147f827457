"""The text of the recorded sparse stage: Python sources of the installation, in three parts that share no document.

    python benchmarks/stage_text.py --out text

Writes train.jsonl, validation.jsonl and held_out.jsonl. A document is a file of the standard library (Python's licence)
or of one of PACKAGES (BSD and MIT licences), of LEAST characters or more, without tests. Where it goes depends on its
name alone, on (first 8 bytes of SHA-256(name), big-endian) mod 100, by PARTS. What is below 7, the held-out text of
`standard_library_documents`, is left out: records of the sparse stage up to 2026-11-28 were judged on it, and what was
seen there is known to who chose the rates that are tried.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from flash_indexer.recipe.standard_library import standard_library_documents

PACKAGES = ("fontTools", "mpmath", "networkx", "sympy", "torch")
LEAST, MOST = 8_000, 400_000  # characters; longer files are tables
PARTS = {"held_out": range(93, 100), "validation": range(7, 9), "train": range(9, 93)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=80_000_000, help="at most so many, the first by hash of name")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = sorted(documents(), key=lambda document: number(document[0]))
    kept, total = [], 0
    for document in found:
        total += len(document[1])
        if total > arguments.characters:
            break
        kept.append(document)
    for part, places in PARTS.items():
        own = [document for document in kept if number(document[0]) % 100 in places]
        with (arguments.out / f"{part}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"name": name, "text": text}) + "\n" for name, text in own)
        print(f"{part}: {len(own)} documents, {sum(len(text) for _, text in own):,} characters")


def documents() -> Iterator[tuple[str, str]]:
    """Name and text."""
    for split in ("train", "heldout"):
        for row in standard_library_documents(split):
            if LEAST <= len(row["text"]) <= MOST:
                yield row["name"], row["text"]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"stage_text: the package {package} must be installed; pip install it")
        root = Path(spec.origin).parent
        for file in root.rglob("*.py"):
            if "tests" not in file.parts and LEAST <= file.stat().st_size <= MOST:
                yield f"{package}/{file.relative_to(root).as_posix()}", file.read_text(encoding="utf-8")


def number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


if __name__ == "__main__":
    main()
