"""Which files of a folder are read: one kind, one split, and a word for what is not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from flash_indexer.recipe.text_files import load_documents

SHARDS = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]


def texts(path: Path, **options: Any) -> list[str]:
    return list(load_documents(path, **options)["text"])


def write_files(folder: Path, *names: str) -> Path:
    """Files that hold their own names, as text or as rows."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            datasets.Dataset.from_dict({"text": [name]}).to_parquet(str(file))
        elif name.endswith(".gz"):
            file.write_bytes(gzip.compress(json.dumps({"text": name}).encode()))
        elif ".json" in name.lower():
            file.write_text(json.dumps({"text": name}), encoding="utf-8")
        else:
            file.write_text(name, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (("b.txt", "a/z.py", "a/c.md", ".git/config.txt", "a/.hidden.py"), ["a/c.md", "a/z.py", "b.txt"]),
        (("README.md", "a.md", "LICENSE"), ["README.md", "a.md"]),
        (("train.py", "model.py", "test/eval.py"), ["model.py", "test/eval.py", "train.py"]),
        (("b.jsonl", "a.json", "c.jsonl.gz", "d.json.gz"), ["a.json", "b.jsonl", "c.jsonl.gz", "d.json.gz"]),
        (("B.JSONL", "c.jsonl"), ["B.JSONL", "c.jsonl"]),
        (
            ("README.md", "LICENSE", ".gitattributes", "dataset_infos.json", ".cache/huggingface/x.json", *SHARDS),
            SHARDS,
        ),
        (("README.md", "test.jsonl"), ["test.jsonl"]),
        (("CHANGELOG.md", "changelog.jsonl", "other.jsonl"), ["changelog.jsonl", "other.jsonl"]),
    ],
)
def test_files_of_a_folder(tmp_path: Path, recwarn: pytest.WarningsRecorder, names: Any, read: list[str]) -> None:
    assert texts(write_files(tmp_path / "corpus", *names)) == read
    assert not [warning for warning in recwarn if warning.category is UserWarning]


@pytest.mark.parametrize(
    ("names", "there"),
    [
        (("README.md", "data/a.csv"), "1 .csv, 1 .md"),
        (("a.jsonl", "b.jsonl", "notes.txt"), "2 .jsonl, 1 .txt"),
        (("a.jsonl", "b.parquet"), "1 .jsonl, 1 .parquet"),
        (("README.md", "a.parquet", "b.parquet", "c.jsonl.zst", "tool.py"), r"2 .parquet, 1 .jsonl.zst, 1 .py"),
        (("a.txt", "Makefile"), "1 .txt, 1 without suffix"),
        (("a.docx", "b.pdf"), "1 .docx, 1 .pdf"),
    ],
)
def test_a_folder_of_several_kinds_is_refused_by_what_lies_there(tmp_path: Path, names: Any, there: str) -> None:
    with pytest.raises(ValueError, match=rf"text of one kind .* got .*corpus' with {there}; name the one"):
        load_documents(write_files(tmp_path / "corpus", *names))


def test_a_folder_with_nothing_but_what_is_about_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"beside what is written about it, got .* with \['README.md'\] alone"):
        load_documents(write_files(tmp_path / "corpus", "README.md", "LICENSE", ".gitattributes"))
    with pytest.raises(ValueError, match=r"got .* with \['README.md', 'dataset_infos.json'\] alone"):
        load_documents(write_files(tmp_path / "another", "README.md", "dataset_infos.json"))
    assert texts(tmp_path / "corpus" / "README.md") == ["README.md"]


def test_pictures_are_skipped_with_a_word(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"pictures are skipped \(2 .png\)"):
        assert texts(write_files(tmp_path / "corpus", "a.md", "a.png", "b/c.PNG")) == ["a.md"]


def test_linked_folders_are_entered_once(tmp_path: Path) -> None:
    write_files(tmp_path / "elsewhere", "b.txt")
    write_files(tmp_path / "corpus", "a.txt")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "circle").symlink_to(tmp_path / "corpus")
    assert texts(tmp_path / "corpus") == ["a.txt", "b.txt"]
    (tmp_path / "corpus" / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"gone.txt' can't be read: .*No such file"):
        load_documents(tmp_path / "corpus")


SPLITS = [
    (("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"), "data/train-00000-of-00001.parquet"),
    (("en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"), "en/c4-train.00000"),
    (("training/a.jsonl", "dev/a.jsonl", "test/a.jsonl"), "training/a.jsonl"),
    (("train.txt", "valid.txt", "README.md"), "train.txt"),
    (("train.jsonl", "more.jsonl"), "train.jsonl"),
]


@pytest.mark.parametrize(("names", "read"), SPLITS)
def test_of_several_splits_train_is_read_and_said(tmp_path: Path, names: Any, read: str) -> None:
    write_files(tmp_path / "corpus", *names)
    with pytest.warns(UserWarning, match=r"holds the splits \[.*\]: 'train' is read, the others are not"):
        (text,) = texts(tmp_path / "corpus")
    assert text.startswith(read)


def test_the_first_split_of_those_wanted_is_read(tmp_path: Path) -> None:
    write_files(tmp_path / "corpus", "train.jsonl", "test.jsonl", "eval-2.jsonl", "validation/a.jsonl")
    for splits, read in (
        (("validation", "test"), ["validation/a.jsonl"]),
        (("dev", "test"), ["eval-2.jsonl", "test.jsonl"]),
        ("train", ["train.jsonl"]),
    ):
        with pytest.warns(UserWarning, match=r"holds the splits \['test', 'train', 'validation'\]"):
            assert texts(tmp_path / "corpus", splits=splits) == read


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("validation.jsonl", "test.jsonl"), r"\['test', 'validation'\]"),
        (("more.jsonl", "test.jsonl"), r"\['\(no split\)', 'test'\]"),
        (
            ("data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet"),
            r"\['train_gen', 'train_sft'\]",
        ),
        (("train_sft-00000-of-00001.parquet", "test_sft-00000-of-00001.parquet"), r"\['test_sft', 'train_sft'\]"),
    ],
)
def test_several_splits_without_the_one_wanted_are_refused(tmp_path: Path, names: Any, splits: str) -> None:
    with pytest.raises(ValueError, match=rf"one split of a data set, or one called train, got .* with {splits}"):
        load_documents(write_files(tmp_path / "corpus", *names))


def test_rows_from_several_folders_are_said(tmp_path: Path) -> None:
    write_files(tmp_path / "corpus", "a/1.jsonl", "b/c/2.jsonl")
    with pytest.warns(UserWarning, match=r"2 files are read, from 2 folders \(a, b/c\)"):
        assert texts(tmp_path / "corpus") == ["a/1.jsonl", "b/c/2.jsonl"]


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("text")
    with pytest.raises(ValueError, match=r"must end in one of .txt, .*, .parquet, got .*a.docx"):
        load_documents(tmp_path / "a.docx")


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.png").touch()
    with pytest.raises(ValueError, match=r"a folder must come from Dataset.save_to_disk or hold files in"):
        load_documents(tmp_path)


def test_a_saved_dictionary_of_splits(tmp_path: Path) -> None:
    train, other = (datasets.Dataset.from_dict({"text": [word]}) for word in ("train", "other"))
    datasets.DatasetDict({"train": train, "test": other}).save_to_disk(str(tmp_path / "several"))
    with pytest.warns(UserWarning, match=r"holds the splits \['test', 'train'\]: 'train' is read"):
        assert texts(tmp_path / "several") == ["train"]
    with pytest.warns(UserWarning, match="'test' is read"):
        assert texts(tmp_path / "several", splits=("validation", "test")) == ["other"]
    with pytest.raises(ValueError, match=r"or one called dev, got .* with \['test', 'train'\]"):
        load_documents(tmp_path / "several", splits=("dev",))
    datasets.DatasetDict({"test": other}).save_to_disk(str(tmp_path / "one"))
    assert texts(tmp_path / "one") == ["other"]


@pytest.mark.parametrize("content", ["{", "[]", '{"splits": []}', '{"splits": [1]}'])
def test_a_broken_dictionary_of_splits_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset_dict.json").write_text(content)
    with pytest.raises(ValueError, match=r"dataset_dict.json' can't be read: "):
        load_documents(tmp_path)
