"""A user's text, from files in the formats that people keep it in: `load_documents`."""

from __future__ import annotations

from pathlib import Path

import datasets

__all__ = ["load_documents"]

TEXT_SUFFIXES = (".txt", ".md", ".py")


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
