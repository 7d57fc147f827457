"""A user's text, from files in the formats that people keep it in: `load_documents`."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets

from flash_indexer.recipe.rows import (
    dataset_in_memory,
    dataset_of,
    decode,
    json_texts,
    no_rows,
    parquet_texts,
    saved_table,
    unreadable,
)
from flash_indexer.recipe.text_folders import Kind, find_text

__all__ = ["load_documents", "read_documents"]

READERS_VERSION = 1
"""To be raised when the readers make other texts of the same bytes: it is a part of the name of a cached copy."""
LFS_POINTER = b"version https://git-lfs.github.com/spec"


def load_documents(path: str | Path, *, column: str = "text", splits: Sequence[str] = ("train",)) -> datasets.Dataset:
    """One row, with a string column "text", for each document at `path`. Reads local files only.

    A file is text (.txt, .md, .py: one document) or rows (.jsonl, .json, either with .gz, .parquet: one document a row;
    a .json file holds an array of objects or one object a line). A folder is what `Dataset.save_to_disk` wrote, or
    holds files of one kind at any depth: text, JSON or Parquet, read in the order of their names. Names that begin
    with a dot and pictures are left out, and beside rows what is written about a data set (README, LICENSE and the
    like, dataset_infos.json); anything else that lies there is refused by name.

    Where the names of rows, or of all texts, say that they belong to several splits (data/train-00000-of-00002.parquet,
    test.jsonl, validation/...), the first of `splits` that there is is read, with a warning that names them all.

    Only the text's column is read, whatever types the others have. What is read is told apart by its contents: a file
    that was replaced is read anew, whatever its time says. Of JSON and Parquet `datasets` keeps a memory-mapped copy of
    the texts in its cache, under the hash of the files' contents.

    Args:
        column: the column that holds the text, for the formats that have columns.
        splits: names of splits in the order of preference.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: unknown suffix, a folder of several kinds or splits, unreadable contents (names file and line),
            missing or non-string column, or no text at all.

    Warns:
        UserWarning: which split is read, and what is left out.
    """
    documents, notes = read_documents(path, column=column, splits=splits)
    for note in notes:
        warnings.warn(f"load_documents: {note}", stacklevel=2)
    return documents


def read_documents(
    path: str | Path, *, column: str = "text", splits: Sequence[str] = ("train",)
) -> tuple[datasets.Dataset, tuple[str, ...]]:
    """What `load_documents` returns, and the texts of its warnings, for a caller that tells them in its own way."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"load_documents: path must be an existing file or directory, got {str(path)!r}")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(
            f"load_documents: path must hold at least one non-empty document, got {str(path)!r} of 0 bytes"
        )
    text = find_text(path, (splits,) if isinstance(splits, str) else splits)
    if text.kind == "text":
        documents = dataset_in_memory({"text": [_read_text(file) for file in text.files]})
    elif text.kind == "saved":
        documents = dataset_of(saved_table(text.files[0], column))
    else:
        documents = _read_rows(path, text.kind, text.files, column)
    if not any(document and not document.isspace() for document in documents["text"]):
        raise ValueError(
            f"load_documents: path must hold at least one non-empty document, got {str(path)!r} with "
            f"{len(documents)} documents, all empty"
        )
    return documents, text.notes


def _read_text(file: Path) -> str:
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise unreadable(file, error) from error
    _refuse_pointer(raw[: len(LFS_POINTER)], file)
    return decode(raw, file).replace("\r\n", "\n").replace("\r", "\n")


def _read_rows(path: Path, kind: Kind, files: Sequence[Path], column: str) -> datasets.Dataset:
    fingerprint = _contents(files, f"{READERS_VERSION} {kind} {column}")
    with _no_progress_bars():
        try:
            return datasets.Dataset.from_generator(
                _texts,
                features=datasets.Features({"text": datasets.Value("large_string")}),
                gen_kwargs=dict(files=[str(file) for file in files], kind=kind, column=column),
                fingerprint=fingerprint,
            )
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, ValueError):
                raise error.__cause__ from None
            raise _no_cache(path, error.__cause__ or error) from error
        except OSError as error:
            raise _no_cache(path, error) from error
        except ValueError as error:
            if "corresponds to no data" in str(error):
                raise no_rows(path) from error
            raise


def _texts(files: list[str], kind: Kind, column: str) -> Iterator[dict[str, str | None]]:
    read = json_texts if kind == "JSON" else parquet_texts
    for file in files:
        for text in read(Path(file), column):
            yield {"text": text}


def _contents(files: Sequence[Path], reading: str) -> str:
    """SHA-256 (hex) of the bytes of all files, in their order, and of how they are read."""
    digest = hashlib.sha256(reading.encode())
    for file in files:
        try:
            with file.open("rb") as stream:
                _refuse_pointer(stream.read(len(LFS_POINTER)), file)
                stream.seek(0)
                digest.update("".join(file.suffixes[-2:]).encode() + hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise unreadable(file, error) from error
    return digest.hexdigest()


def _refuse_pointer(head: bytes, file: Path) -> None:
    if head == LFS_POINTER:
        raise ValueError(
            f"load_documents: {str(file)!r} must hold the data, got a Git LFS pointer to it; fetch it with "
            "`git lfs pull`"
        )


def _no_cache(path: Path, error: BaseException) -> ValueError:
    return ValueError(
        f"load_documents: the texts of {str(path)!r} can't be kept in the cache of datasets, "
        f"{str(datasets.config.HF_DATASETS_CACHE)!r}: {error}; make room there, or set HF_HOME to another folder"
    )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
