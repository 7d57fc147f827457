"""Reading text in every format: a document a row or a file, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow
import pytest

from flash_indexer.recipe import text_files
from flash_indexer.recipe.standard_library import standard_library_documents
from flash_indexer.recipe.text_files import load_documents

TEXTS = ["one two", "  \n", "trois\nquatre", "", "fünf sechs"]


def write_jsonl(path: Path, texts: list[str | None], column: str = "text") -> Path:
    rows = [json.dumps({"id": n, column: text}) + "\n" for n, text in enumerate(texts)]
    path.write_text("".join(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("column", ["text", "content"])
@pytest.mark.parametrize("format", ["jsonl", "parquet", "saved"])
def test_rows_come_back_in_order(tmp_path: Path, format: str, column: str) -> None:
    rows = datasets.Dataset.from_dict({"id": list(range(len(TEXTS))), column: TEXTS})
    path = tmp_path / {"saved": "corpus"}.get(format, f"corpus.{format}")
    if format == "jsonl":
        write_jsonl(path, TEXTS, column)
    elif format == "parquet":
        rows.to_parquet(str(path))
    else:
        rows.save_to_disk(str(path))
    documents = load_documents(str(path), column=column)
    assert documents.column_names == ["text"]
    assert list(documents["text"]) == TEXTS


@pytest.mark.parametrize("format", ["txt", "jsonl", "parquet", "saved", "the standard library"])
def test_packages_may_lie_in_any_folder(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip install --target: dill, which `datasets` asks for fingerprints, takes such a pyarrow for the user's own code
    and fails to pickle it."""
    path, rows = tmp_path / f"corpus.{format}", datasets.Dataset.from_dict({"text": TEXTS})
    if format == "txt":
        path.write_text(TEXTS[0])
    elif format == "jsonl":
        write_jsonl(path, TEXTS)
    elif format == "parquet":
        rows.to_parquet(str(path))
    elif format == "saved":
        rows.save_to_disk(str(path))
    monkeypatch.setattr(pyarrow, "__file__", "/packages/pyarrow/__init__.py")
    if format == "the standard library":
        assert len(standard_library_documents("heldout")) > 8
    else:
        assert list(load_documents(path)["text"]) == (TEXTS if format != "txt" else TEXTS[:1])


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_text("fünf\n\nsechs\n", encoding="utf-8")
    assert list(load_documents(path)["text"]) == ["fünf\n\nsechs\n"]


def test_reading_leaves_the_progress_bars_as_they_were(tmp_path: Path) -> None:
    assert not datasets.are_progress_bars_disabled()
    load_documents(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    assert not datasets.are_progress_bars_disabled()


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path must be an existing file or directory, got .*nowhere"):
        load_documents(tmp_path / "nowhere")


def test_a_missing_column_is_refused_with_those_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"column must be one of \['id', 'content'\] in .*, got 'text'"):
        load_documents(write_jsonl(tmp_path / "a.jsonl", TEXTS, "content"))


def test_a_column_of_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"column 'id' must hold strings, got int in line 1 in .*a.jsonl"):
        load_documents(write_jsonl(tmp_path / "a.jsonl", TEXTS), column="id")


@pytest.mark.parametrize("texts", [["", " \n"], [None, ""]])
def test_a_data_set_without_text_is_refused(tmp_path: Path, texts: list[str | None]) -> None:
    with pytest.raises(ValueError, match=r"at least one non-empty document, got .* 2 documents, all empty"):
        load_documents(write_jsonl(tmp_path / "a.jsonl", texts))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"at least one non-empty document, got .* of 0 bytes"):
        load_documents(tmp_path / name)


@pytest.mark.parametrize("format", ["jsonl", "parquet", "saved"])
def test_a_data_set_without_rows_is_refused(tmp_path: Path, format: str) -> None:
    features = datasets.Features({"text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"text": []}, features=features)
    path = tmp_path / f"corpus.{format}"
    if format == "jsonl":
        path.write_text("\n\n")
    elif format == "parquet":
        rows.to_parquet(str(path))
    else:
        rows.save_to_disk(str(path))
    with pytest.raises(ValueError, match=r"at least one non-empty document, got .* without rows"):
        load_documents(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "cut off')
    with pytest.raises(ValueError, match=rf"load_documents: .*{name}' can't be read: \w+"):
        load_documents(tmp_path / name)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ncaf\xe9")
    with pytest.raises(ValueError, match=r"a.txt' must be UTF-8, got byte 0xe9 in line 2"):
        load_documents(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt", "saved"])
def test_a_file_replaced_at_the_same_time_is_read_anew(tmp_path: Path, name: str) -> None:
    path = tmp_path / name

    def write(text: str) -> None:
        rows = datasets.Dataset.from_dict({"text": [text]})
        if name == "saved":
            rows.save_to_disk(str(tmp_path / "new"))
            source = next((tmp_path / "new").glob("*.arrow"))
            target = source if not path.exists() else path / source.name
            source.replace(target)
            if not path.exists():
                (tmp_path / "new").rename(path)
        elif name.endswith(".parquet"):
            rows.to_parquet(str(path))
        else:
            line = text if name == "a.txt" else json.dumps({"text": text})
            path.write_bytes(gzip.compress(line.encode()) if name.endswith(".gz") else line.encode())
        for file in [path, *path.glob("*")]:
            os.utime(file, (1e9, 1e9))

    fingerprints = []
    for text in ("first", "other", "first"):
        write(text)
        documents = load_documents(path)
        assert list(documents["text"]) == [text]
        fingerprints.append(documents._fingerprint)
    assert fingerprints[0] != fingerprints[1]


def test_a_copy_in_the_cache_is_used_where_the_contents_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    write_jsonl(tmp_path / "one" / "a.jsonl", ["a.jsonl"])
    first = load_documents(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    monkeypatch.setattr(text_files, "json_texts", None)
    second = load_documents(tmp_path / "two")
    assert first.cache_files == second.cache_files != [] and list(second["text"]) == ["a.jsonl"]
    monkeypatch.undo()


def test_a_cache_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "below")
    with pytest.raises(ValueError, match=r"can't be kept in the cache of datasets, .*file/below'.* set HF_HOME"):
        load_documents(write_jsonl(tmp_path / "a.jsonl", TEXTS))
