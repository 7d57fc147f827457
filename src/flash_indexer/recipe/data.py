"""Text -> packed token sequences of one fixed length, with document boundaries kept as position ids.

`load_documents` reads a user's text, `standard_library_documents` the text that every Python installation has,
`pack` turns either into a `PackedDataset`.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Literal

import datasets
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

__all__ = ["PackedDataset", "load_documents", "pack", "standard_library_documents"]

TEXT_SUFFIXES = (".txt", ".md", ".py")
HELD_OUT_PERCENT = 7
NO_PROSE = frozenset({"__pycache__", "dist-packages", "encodings", "idle_test", "site-packages", "test", "tests"})
GENERATED = ("_sysconfigdata", "config-", "html/entities.py", "pydoc_data/")
CHARACTERS_PER_CALL = 2**20


class PackedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sequence n is tokens[n·L : (n+1)·L]; position_ids[t] = t - max(start of t's document, n·L).

    Items are `{"input_ids": int64 [L], "position_ids": int64 [L]}`: positions restart at 0 where a document starts
    and where the sequence starts. An item depends on its index alone, so workers and resumed runs see the same data.

    Args:
        tokens: int32 [N·L], the token stream.
        document_starts: int64 [documents], increasing offsets into the stream, the first one 0.
        sequence_length: L.
    """

    def __init__(self, tokens: Tensor, document_starts: Tensor, sequence_length: int) -> None:
        self.tokens = tokens
        self.document_starts = document_starts
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return self.tokens.numel() // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"PackedDataset: index must be in 0..{len(self) - 1}, got {index}")
        first = index * self.sequence_length
        offsets = torch.arange(first, first + self.sequence_length)
        document = torch.searchsorted(self.document_starts, offsets, right=True) - 1
        return {
            "input_ids": self.tokens[first : first + self.sequence_length].long(),
            "position_ids": offsets - self.document_starts[document].clamp_min(first),
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of L, the tokens and the document starts: equal exactly when all items are equal."""
        digest = hashlib.sha256(f"{self.sequence_length} {self.tokens.numel()}".encode())
        digest.update(self.tokens.numpy().astype("<i4", copy=False).data)
        digest.update(self.document_starts.numpy().astype("<i8", copy=False).data)
        return digest.hexdigest()


def load_documents(path: str | Path, *, column: str = "text") -> datasets.Dataset:
    """One row, with a string column "text", for each document found at `path`. Reads local files only.

    Args:
        path: a .txt, .md or .py file (one document); a .jsonl or .parquet file, or a directory written by
            `Dataset.save_to_disk` (one document per row); or a folder holding .txt, .md and .py files at any depth
            (one document per file, in the order of their names; names that begin with a dot are left out).
        column: the column that holds the text, for the formats that have columns.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: unknown suffix, unreadable contents, missing or non-string column, or no text at all.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"load_documents: path must be an existing file or directory, got {str(path)!r}")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(
            f"load_documents: path must hold at least one non-empty document, got {str(path)!r} of 0 bytes"
        )
    saved = (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    if saved or (path.is_file() and path.suffix in (".jsonl", ".parquet")):
        documents = _text_column(_read_rows(path), path, column)
    else:
        documents = datasets.Dataset.from_dict({"text": [_read_text(file) for file in _text_files(path)]})
    if not any(text and not text.isspace() for text in documents["text"]):
        raise ValueError(
            f"load_documents: path must hold at least one non-empty document, got {str(path)!r} with "
            f"{len(documents)} documents, all empty"
        )
    return documents


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
    return datasets.Dataset.from_dict({"name": names, "text": [texts[name] for name in names]})


def pack(
    documents: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    seed: int,
    max_sequences: int | None = None,
    min_document_tokens: int = 0,
    one_document: bool = False,
    progress: bool = False,
) -> PackedDataset:
    """stream = doc_1 <eos> doc_2 <eos> ... in an order drawn from `seed`, cut into sequences of exactly L tokens.

    The last, incomplete sequence is dropped. A tokenizer without an eos token puts its bos token before each document
    instead. The result depends on the documents, the tokenizer and the arguments alone. Tokenising stops as soon as
    `max_sequences` are full.

    Args:
        documents: rows with a string column "text"; empty and missing texts are skipped.
        sequence_length: L.
        seed: of the order of the documents.
        max_sequences: an upper bound on the number of sequences; None: all there is.
        min_document_tokens: shorter documents (separator included) are skipped.
        one_document: cut each document by itself, so that no sequence crosses a boundary: n tokens give n // L
            sequences, the remainder is dropped. Then query t of every sequence sees exactly t + 1 keys.
        progress: show a progress bar.

    Raises:
        ValueError: an argument out of range, a tokenizer without eos and bos, or too little text for one sequence.
    """
    for name, value, least in (
        ("sequence_length", sequence_length, 1),
        ("max_sequences", 1 if max_sequences is None else max_sequences, 1),
        ("min_document_tokens", min_document_tokens, 0),
    ):
        if value < least:
            raise ValueError(f"pack: {name} must be at least {least}, got {value}")
    wanted = None if max_sequences is None else max_sequences * sequence_length
    parts: list[Tensor] = []
    starts: list[int] = []
    total = found = longest = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task("tokens", total=wanted)
        for tokens in _tokenised(documents, tokenizer, seed, wanted and max(wanted, min_document_tokens)):
            found, longest = found + len(tokens), max(longest, len(tokens))
            kept = tokens[: len(tokens) // sequence_length * sequence_length] if one_document else tokens
            if len(kept) and len(tokens) >= min_document_tokens:
                starts.append(total)
                parts.append(kept)
                total += len(kept)
                bar.update(task, completed=total)
            if wanted is not None and total >= wanted:
                break
    if total < sequence_length:
        raise ValueError(
            f"pack: one sequence needs sequence_length={sequence_length} tokens, got {total} (of {found} found, the "
            f"longest document {longest}, min_document_tokens={min_document_tokens}, one_document={one_document}); "
            "give more text or a shorter sequence_length"
        )
    end = total // sequence_length * sequence_length
    end = end if wanted is None else min(end, wanted)
    boundaries = torch.tensor([start for start in starts if start < end], dtype=torch.int64)
    return PackedDataset(torch.cat(parts)[:end].clone(), boundaries, sequence_length)


def _tokenised(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, seed: int, limit: int | None
) -> Iterator[Tensor]:
    """One int32 vector per non-empty document, separator included, tokenised many at a time for speed.

    A document longer than `limit` tokens may come incomplete, but with at least that many.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if eos is None and bos is None:
        raise ValueError("pack: tokenizer must have an eos or a bos token to separate documents, got neither")

    def encode(texts: list[str]) -> list[list[int]]:
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])

    def separated(ids: list[int]) -> Tensor:
        return torch.tensor([*ids, eos] if eos is not None else [bos, *ids], dtype=torch.int32)

    waiting: list[str] = []
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    for row in documents.select_columns("text").select(order.tolist()):
        text = row["text"]
        if not text or text.isspace():
            continue
        if sum(map(len, waiting)) + len(text) > CHARACTERS_PER_CALL or len(waiting) == 64:
            yield from map(separated, encode(waiting) if waiting else [])
            waiting = []
        if len(text) <= CHARACTERS_PER_CALL:
            waiting.append(text)
            continue
        ids: list[int] = []
        for piece in _pieces(text):
            ids += encode([piece])[0]
            if limit is not None and len(ids) >= limit:
                break
        yield separated(ids)
    yield from map(separated, encode(waiting) if waiting else [])


def _pieces(text: str) -> Iterator[str]:
    """A very long text in pieces that end, where possible, at the end of a line."""
    start = 0
    while start < len(text):
        stop = start + CHARACTERS_PER_CALL
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def _is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT


def _text_files(path: Path) -> list[Path]:
    accepted = ", ".join(TEXT_SUFFIXES)
    if path.is_file():
        if path.suffix not in TEXT_SUFFIXES:
            raise ValueError(
                f"load_documents: path must end in one of {accepted}, .jsonl, .parquet, got "
                f"{str(path)!r}; rename or convert it"
            )
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise ValueError(
            f"load_documents: path must be one split of a data set, got {str(path)!r} with {splits}; name one"
        )
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in TEXT_SUFFIXES
        and file.is_file()
        and not any(piece.startswith(".") for piece in file.relative_to(path).parts)
    )
    if not files:
        raise ValueError(
            f"load_documents: a directory must come from Dataset.save_to_disk or hold files in {accepted}, got "
            f"{str(path)!r} with neither"
        )
    return files


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"load_documents: {str(file)!r} must be UTF-8, got byte {error.object[error.start]:#04x} at offset "
            f"{error.start}; convert it"
        ) from error


def _read_rows(path: Path) -> datasets.Dataset:
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        if path.is_dir():
            return datasets.Dataset.load_from_disk(str(path))
        read = datasets.Dataset.from_json if path.suffix == ".jsonl" else datasets.Dataset.from_parquet
        return read(str(path))
    except (OSError, ValueError, IndexError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        # Without rows, load_from_disk raises IndexError and the readers of files say that there is no data.
        if isinstance(error, IndexError) or "corresponds to no data" in str(cause):
            raise ValueError(
                f"load_documents: path must hold at least one non-empty document, got {str(path)!r} without any row"
            ) from error
        raise ValueError(f"load_documents: {str(path)!r} can't be read: {cause}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _text_column(rows: datasets.Dataset, path: Path, column: str) -> datasets.Dataset:
    if column not in rows.column_names:
        raise ValueError(
            f"load_documents: column must be one of {rows.column_names} in {str(path)!r}, got {column!r}; name the one "
            "that holds the text"
        )
    dtype = getattr(rows.features[column], "dtype", str(rows.features[column]))
    if dtype not in ("string", "large_string"):
        raise ValueError(f"load_documents: column {column!r} must hold strings, got {dtype} in {str(path)!r}")
    rows = rows.select_columns([column])
    return rows if column == "text" else rows.rename_column(column, "text")
