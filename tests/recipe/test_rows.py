"""One column of files of rows, whatever the others hold; what can't be read is named with its line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flash_indexer.recipe.text_files import load_documents

TEXTS = ["one two", "  \n", "trois\nquatre", "", "fünf sechs"]


def texts(path: Path, **options: Any) -> list[str]:
    return list(load_documents(path, **options)["text"])


@pytest.mark.parametrize("format", ["torch", "numpy", "pandas", "arrow", "a library that is not there"])
def test_the_format_that_was_set_on_a_saved_data_set_is_no_matter(tmp_path: Path, format: str) -> None:
    rows = datasets.Dataset.from_dict({"id": [1, 2], "text": ["one", "two"]})
    rows.with_format("numpy", columns=["id"]).save_to_disk(str(tmp_path / "corpus"))
    state = json.loads((tmp_path / "corpus" / "state.json").read_text())
    assert state["_format_type"] == "numpy" and state["_format_columns"] == ["id"]
    (tmp_path / "corpus" / "state.json").write_text(json.dumps(state | {"_format_type": format}))
    assert texts(tmp_path / "corpus") == ["one", "two"]


def test_features_of_other_columns_of_a_saved_data_set_are_no_matter(tmp_path: Path) -> None:
    schema = pa.schema([("text", pa.string()), ("x", pa.int64())])
    features = {"text": {"dtype": "string", "_type": "Value"}, "x": {"_type": "OfAnotherRelease"}}
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(str(tmp_path))
    with pa.ipc.new_stream(str(next(tmp_path.glob("*.arrow"))), schema) as writer:
        writer.write_table(pa.table({"text": ["two"], "x": [1]}, schema=schema))
    assert texts(tmp_path) == ["two"]


def test_a_missing_part_of_a_saved_data_set_is_named(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path))
    next(tmp_path.glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match=r"\.arrow' can't be read: .*No such file"):
        load_documents(tmp_path)


def test_rows_that_an_old_release_reordered_are_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path))
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(ValueError, match="keeps the order of rows in a file of its own; load it and save it again"):
        load_documents(tmp_path)


def test_other_fields_of_json_may_drift(tmp_path: Path) -> None:
    """Beyond the 10 MB after which readers that infer types have settled on them."""
    rows: list[dict[str, Any]] = [{"text": "x" * 2**20, "n": 1, "who": None} for _ in range(12)]
    rows += [{"text": "last", "n": 1.5, "who": {"name": "a"}, "late": [1]}, {"n": "two"}, {"text": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert texts(tmp_path / "a.jsonl")[11:] == ["x" * 2**20, "last", None, None]


def test_other_columns_of_parquet_may_be_maps(tmp_path: Path) -> None:
    maps = pa.array([[("k", 1)], None], type=pa.map_(pa.string(), pa.int64()))
    words = pa.array(["one", "two"]).dictionary_encode()
    pq.write_table(pa.table({"meta": maps, "text": words}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["one", "two"]


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
@pytest.mark.parametrize("head", ["", "\ufeff", " \n\t"])
def test_a_json_file_is_an_array_or_lines(tmp_path: Path, suffix: str, head: str) -> None:
    rows = [{"text": text, "n": n} for n, text in enumerate(TEXTS)]
    contents = dict(array=json.dumps(rows, indent=1), lines="\n".join(map(json.dumps, rows)))
    for name, content in contents.items():
        raw = (head + content).encode()
        (tmp_path / f"{name}{suffix}").write_bytes(gzip.compress(raw) if suffix.endswith(".gz") else raw)
        assert texts(tmp_path / f"{name}{suffix}") == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n\n{"text": "caf\xe9"}\n', "must be UTF-8, got byte 0xe9 in line 3; convert it"),
        ("a.json", b'[{"text": "one"},\n{"text": "caf\xe9"}]', "must be UTF-8, got byte 0xe9 in line 2; convert it"),
        ("a.txt", b"\xff\xfea\x00", "must be UTF-8, got byte 0xff in line 1"),
        ("a.jsonl", b'{"text": "one"}\n{"text": 2}\n', "must hold strings, got int in line 2 in"),
        ("a.json", b'[{"text": "one"}, {"text": ["a"]}]', "must hold strings, got list in item 2 of the array in"),
        ("a.jsonl", b'{"text": "one"}\n["two"]\n', "must hold JSON objects .* got list in line 2"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "cut', "can't be read: line 2 is no JSON: Unterminated string"),
        ("a.json", b'[{"text": "one"},', "can't be read: the file is no JSON"),
        ("a.json", b'{\n"text": "one"\n}', "can't be read: line 1 is no JSON"),
        ("a.jsonl", b'{"text": "half \\ud83d"}', "got half of a surrogate pair in line 1; repair or remove that row"),
        ("a.jsonl", b'{"text": ' + b"[" * 9**6, "can't be read: line 1 is no JSON"),
        ("a.jsonl.gz", b'{"text": "no gzip"}', "can't be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}', mtime=0)[:-9], "can't be read: Compressed file ended"),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1",
            "got a Git LFS pointer to it; fetch it",
        ),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid", "got a Git LFS pointer to it; fetch it"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_documents(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load_documents(tmp_path)


def test_parquet_that_is_no_utf8_names_the_row(tmp_path: Path) -> None:
    raw = pa.array([b"x"] * 300 + [b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": raw}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet' must hold UTF-8, got byte 0xe9 in row 301"):
        load_documents(tmp_path)


@pytest.mark.parametrize("format", ["json", "parquet", "saved"])
def test_columns_of_every_format_are_checked(tmp_path: Path, format: str) -> None:
    rows = datasets.Dataset.from_dict({"id": [1], "body": ["one"]})
    path = tmp_path / f"a.{format}"
    write: Callable[[str], Any] = {"json": rows.to_json, "parquet": rows.to_parquet, "saved": rows.save_to_disk}[format]
    write(str(path))
    with pytest.raises(ValueError, match=r"column must be one of \['id', 'body'\] in .*, got 'text'; name the one"):
        load_documents(path)
    with pytest.raises(ValueError, match=r"column 'id' must hold strings, got int"):
        load_documents(path, column="id")
    assert texts(path, column="body") == ["one"]


def test_a_shard_without_the_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    (tmp_path / "b.jsonl").write_text('{"body": "two"}')
    with pytest.raises(ValueError, match=r"column must be one of \['body'\] in .*b.jsonl', got 'text'"):
        load_documents(tmp_path)
