"""Which files at a path hold the text: one kind of data, one split of it, and nothing passed over without a word."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["TextFiles", "find_text"]

Kind = Literal["text", "JSON", "Parquet", "saved"]
SUFFIXES: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "JSON",
    ".jsonl.gz": "JSON",
    ".json": "JSON",
    ".json.gz": "JSON",
    ".parquet": "Parquet",
}
PICTURES = frozenset({".bmp", ".gif", ".ico", ".jpeg", ".jpg", ".png", ".svg", ".webp"})
ABOUT = frozenset({"authors", "changelog", "citation", "contributing", "licence", "license", "notice", "readme"})
ABOUT_DATA_SETS = frozenset({"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json"})
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}")
NO_SPLIT = "(no split)"
REMEDY = "name the one file or folder that holds the text"


@dataclass(frozen=True)
class TextFiles:
    """Files of one kind, in the order of their names; of kind "saved" the one folder that save_to_disk wrote."""

    kind: Kind
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    """What the user should be told: what was left out, and why."""


def find_text(path: Path, splits: Sequence[str]) -> TextFiles:
    """The files of text at `path`, a file or a folder that exists. See `load_documents` for the rule.

    Args:
        splits: where the files belong to several splits, the first of these that there is.

    Raises:
        ValueError: a file of an unknown suffix; a folder of several kinds, of several splits and none of `splits`, or
            without any text.
    """
    if path.is_file():
        kind = _kind(path)
        if kind is None:
            raise ValueError(
                f"load_documents: path must end in one of {', '.join(SUFFIXES)}, got {str(path)!r}; rename "
                "or convert it"
            )
        return TextFiles(kind, (path,))
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        return TextFiles("saved", (path,))
    if (path / "dataset_dict.json").is_file():
        names = _saved_splits(path / "dataset_dict.json")
        name, notes = _choose(path, names, splits)
        return TextFiles("saved", (path / name,), notes)
    return _files_of_one_kind(path, splits)


def _files_of_one_kind(path: Path, splits: Sequence[str]) -> TextFiles:
    files = _visible_files(path)
    kinds = {file: _kind(file) for file in files}
    has_rows = any(kind in ("JSON", "Parquet") and not _is_about(file) for file, kind in kinds.items())
    pictures = [file for file in files if file.suffix.lower() in PICTURES]
    data = [
        file
        for file in files
        if file.suffix.lower() not in PICTURES and not (_is_about(file) and (has_rows or not file.suffix))
    ]
    if not data:
        raise ValueError(
            f"load_documents: a folder must come from Dataset.save_to_disk or hold files in {', '.join(SUFFIXES)}, got "
            f"{str(path)!r} with {_suffixes(files) or 'no file'}; {REMEDY}"
        )
    if not has_rows and all(map(_is_about, data)):
        raise ValueError(
            f"load_documents: a folder must hold text beside what is written about it, got {str(path)!r} with "
            f"{sorted(file.name for file in data)} alone; {REMEDY}"
        )
    kind = kinds[data[0]]
    if kind is None or any(kinds[file] != kind for file in data):
        raise ValueError(
            f"load_documents: a folder must hold text of one kind (.txt, .md and .py; or JSON; or Parquet), got "
            f"{str(path)!r} with {_suffixes(data)}; {REMEDY}"
        )
    notes = []
    if pictures:
        notes.append(f"{str(path)!r}: pictures are skipped ({_suffixes(pictures)})")
    groups: dict[str, list[Path]] = {}
    for file in data:
        if has_rows or not _is_about(file):
            groups.setdefault(_split_of(file.relative_to(path)) or NO_SPLIT, []).append(file)
    if len(groups) > 1 and (has_rows or NO_SPLIT not in groups):
        name, more = _choose(path, list(groups), splits)
        data, notes = groups[name], [*notes, *more]
    folders = sorted({file.parent.relative_to(path).as_posix() for file in data})
    if has_rows and len(folders) > 1:
        shown = ", ".join(folders[:8]) + (", ..." if len(folders) > 8 else "")
        notes.append(f"{str(path)!r}: {len(data)} files are read, from {len(folders)} folders ({shown})")
    return TextFiles(kind, tuple(data), tuple(notes))


def _visible_files(path: Path) -> list[Path]:
    """Files at any depth, through links too, without those below a name that begins with a dot; sorted by name."""
    files, entered = [], set()
    for folder, below, names in os.walk(path, followlinks=True):
        if (real := os.path.realpath(folder)) in entered:
            below.clear()
            continue
        entered.add(real)
        below[:] = [name for name in below if not name.startswith(".") and name != "__pycache__"]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(file for file in files if file.is_file() or file.is_symlink())


def _kind(file: Path) -> Kind | None:
    return SUFFIXES.get(_suffix(file))


def _suffix(file: Path) -> str:
    """The last suffix in lower case, and the one before it where the file is compressed."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] in ([".gz"], [".zst"], [".bz2"], [".xz"]) else suffixes[-1:])


def _suffixes(files: Sequence[Path]) -> str:
    """ "3 .parquet, 1 .csv" """
    counts = Counter(_suffix(file) or "without suffix" for file in files)
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items(), key=lambda x: (-x[1], x[0])))


def _is_about(file: Path) -> bool:
    """Whether a file's name says that it is about a data set, as on the Hugging Face hub, rather than a part of it."""
    is_note = file.name.partition(".")[0].lower() in ABOUT and _kind(file) in ("text", None)
    return is_note or file.name in ABOUT_DATA_SETS


def _split_of(file: Path) -> str | None:
    """The split that the name of a file, or else of a folder, tells by the words and shard numbers of the hub."""
    shard = SHARD.match(file.name)
    if shard and file.parent.name == "data":
        return SPLIT_WORDS.get(shard[1], shard[1])
    for name in (file.name, *(folder.name for folder in file.parents)):
        words = [SPLIT_WORDS[word] for word in re.split(r"[-._ 0-9]+", name.lower()) if word in SPLIT_WORDS]
        if words:
            return words[0] if shard is None or name != file.name else SPLIT_WORDS.get(shard[1], shard[1])
    return None


def _choose(path: Path, names: Sequence[str], splits: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The split to read of those there, and what to tell about it."""
    if len(names) == 1:
        return names[0], ()
    name = next((name for name in splits if name in names), None)
    if name is None:
        raise ValueError(
            f"load_documents: path must hold one split of a data set, or one called {' or '.join(splits)}, got "
            f"{str(path)!r} with {sorted(names)}; {REMEDY}"
        )
    return name, (f"{str(path)!r} holds the splits {sorted(names)}: {name!r} is read, the others are not",)


def _saved_splits(file: Path) -> list[str]:
    try:
        names = json.loads(file.read_text(encoding="utf-8"))["splits"]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"splits are {names!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"load_documents: {str(file)!r} can't be read: {error!r}") from error
    return list(names)
