"""The texts in files of rows. One column is read; what the others hold, and whether their types agree, is no matter."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable, MemoryMappedTable, Table, concat_tables

__all__ = ["dataset_in_memory", "dataset_of", "json_texts", "parquet_texts", "saved_table"]

ROWS_AT_ONCE = 256
NAMES_SHOWN = 20


def json_texts(file: Path, column: str) -> Iterator[str | None]:
    """row[column] of each object: one a line, or in one array where a .json file begins with a bracket.

    A row without the column, or with null in it, gives None.

    Raises:
        ValueError: bytes that are no UTF-8, a line that is no JSON object, a text that is no string; names the line.
            Or no row has the column.
    """
    names: dict[str, None] = {}
    has_column = False
    for place, row in _json_rows(file):
        if not isinstance(row, dict):
            raise ValueError(
                f"load_documents: {str(file)!r} must hold JSON objects with the column {column!r}, got "
                f"{type(row).__name__} in {place}"
            )
        text = row.get(column)
        if text is not None:
            if not isinstance(text, str):
                raise _no_strings(file, column, f"{type(text).__name__} in {place}")
            if not _is_unicode(text):
                raise ValueError(
                    f"load_documents: {str(file)!r} must hold Unicode text, got half of a surrogate pair in {place}; "
                    "repair or remove that row"
                )
        has_column = has_column or column in row
        if len(names) < NAMES_SHOWN:
            names |= dict.fromkeys(row)
        yield text
    if names and not has_column:
        raise _no_column(file, column, list(names)[:NAMES_SHOWN])


def parquet_texts(file: Path, column: str) -> Iterator[str | None]:
    """The column's values, row by row. Errors as of `json_texts`."""
    try:
        with pq.ParquetFile(file) as reader:
            _check_column(file, column, reader.schema_arrow)
            row = 0
            for batch in reader.iter_batches(batch_size=ROWS_AT_ONCE, columns=[column]):
                for value in batch.column(0):
                    row += 1
                    yield value.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"load_documents: {str(file)!r} must hold UTF-8, got byte {error.object[error.start]:#04x} in row {row}; "
            "convert it"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, error) from error


def saved_table(folder: Path, column: str) -> Table:
    """The column "text" of a data set that `Dataset.save_to_disk` wrote, memory-mapped, whatever format was set on it.

    Raises:
        ValueError: unreadable files, a missing column or one without strings, no rows.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(folder / "state.json", error) from error
    if state.get("_indices_data_files"):
        raise ValueError(
            f"load_documents: {str(folder)!r} was saved by a release of datasets that keeps the order of rows in a "
            "file of its own; load it and save it again"
        )
    parts = []
    for file in files:
        try:
            table = MemoryMappedTable.from_file(str(file))
        except (pa.ArrowException, OSError) as error:
            raise unreadable(file, error) from error
        _check_column(file, column, table.schema)
        part = table.select([column]).rename_columns(["text"])
        parts.append(part.replace_schema_metadata(None))
    if not sum(part.num_rows for part in parts):
        raise no_rows(folder)
    return concat_tables(parts)


def dataset_in_memory(columns: Mapping[str, Sequence[str]]) -> datasets.Dataset:
    """One row for each text of a column. `Dataset.from_dict` would pickle the table for its fingerprint, which fails
    where pyarrow lies in a folder that is not called site-packages (pip install --target)."""
    return dataset_of(InMemoryTable.from_pydict(dict(columns)))


def dataset_of(table: Table) -> datasets.Dataset:
    """The table as it is, under a fingerprint drawn at random."""
    return datasets.Dataset(table, fingerprint=generate_random_fingerprint())


def no_rows(path: Path) -> ValueError:
    return ValueError(f"load_documents: path must hold at least one non-empty document, got {str(path)!r} without rows")


def unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"load_documents: {str(file)!r} can't be read: {str(error) or repr(error)}")


def decode(raw: bytes, file: Path, line: int = 1) -> str:
    """UTF-8 to text, without a byte order mark. `line` is the number of the first one."""
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"load_documents: {str(file)!r} must be UTF-8, got byte {error.object[error.start]:#04x} in line "
            f"{line + raw.count(bytes([10]), 0, error.start)}; convert it"
        ) from error


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Where a row stands, and the row."""
    compressed = file.name.lower().endswith(".gz")
    try:
        with gzip.open(file, "rb") if compressed else file.open("rb") as stream:
            if ".json" in (suffix.lower() for suffix in file.suffixes[-2:]) and _begins_with_bracket(stream):
                rows = _parse(decode(stream.read(), file), file, "the file")
                yield from ((f"item {number} of the array", row) for number, row in enumerate(rows, 1))
                return
            for number, line in enumerate(stream, 1):
                text = decode(line, file, number)
                if text and not text.isspace():
                    yield f"line {number}", _parse(text, file, f"line {number}")
    except (EOFError, OSError, zlib.error) as error:
        raise unreadable(file, error) from error


def _begins_with_bracket(stream: gzip.GzipFile | io.BufferedReader) -> bool:
    return stream.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _parse(text: str, file: Path, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_documents: {str(file)!r} can't be read: {place} is no JSON: {error}") from error


def _is_unicode(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _check_column(file: Path, column: str, schema: pa.Schema) -> None:
    if column not in schema.names:
        raise _no_column(file, column, schema.names)
    dtype = schema.field(column).type
    values = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
    if not (pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_string_view(values)):
        raise _no_strings(file, column, str(dtype))


def _no_column(file: Path, column: str, names: list[str]) -> ValueError:
    return ValueError(
        f"load_documents: column must be one of {names} in {str(file)!r}, got {column!r}; name the one that holds the "
        "text"
    )


def _no_strings(file: Path, column: str, value: str) -> ValueError:
    return ValueError(
        f"load_documents: column {column!r} must hold strings, got {value} in {str(file)!r}; name the one that holds "
        "the text"
    )
