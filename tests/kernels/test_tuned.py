"""Winners of `flash-indexer tune`: used for exactly their kernel, GPU, shape and source, and only where they build."""

from __future__ import annotations

import json

import pytest

from flash_indexer.kernels import tuned
from flash_indexer.kernels.sm_90 import sizes as tiles

GPU, SHAPE = "NVIDIA H100 80GB HBM3", dict(D=128, E=64, HG=64)
DEFAULT, WINNER = (tiles.candidates("head_gradients_query", SHAPE)[n] for n in (0, 3))


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Where winners are looked for."""
    monkeypatch.setattr(tuned, "location", lambda: tmp_path / "tuned.json")
    tuned.forget()
    yield tmp_path / "tuned.json"
    tuned.forget()


def entry(**changes):
    source = tuned.source("head_gradients_query")
    return dict(kernel="head_gradients_query", gpu=GPU, source=source, shape=SHAPE, sizes=WINNER) | changes


def looked_up(file, *entries, gpu=GPU, **changes):
    content = dict(format=tuned.FORMAT, version=tuned.VERSION, entries=list(entries)) | changes
    file.write_text(json.dumps(content), encoding="utf-8")
    tuned.forget()
    return tuned.sizes("head_gradients_query", gpu, SHAPE)


def test_another_shape_does_not_read_it_again(file):
    """A search that ends while a process runs changes none of the process's tiles."""
    looked_up(file)  # nothing in it, and one shape asked for
    later = SHAPE | {"HG": 32}
    content = dict(format=tuned.FORMAT, version=tuned.VERSION, entries=[entry(shape=later)])
    file.write_text(json.dumps(content), encoding="utf-8")
    assert tuned.sizes("head_gradients_query", GPU, later) == tiles.default("head_gradients_query", later)
    tuned.forget()
    assert tuned.sizes("head_gradients_query", GPU, later) == WINNER


def test_an_entry_replaces_the_default(file):
    assert tuned.sizes("head_gradients_query", GPU, SHAPE) == DEFAULT, "without a file"
    assert looked_up(file, entry()) == WINNER != DEFAULT
    assert tuned.sizes("head_gradients_key", GPU, SHAPE) == tiles.default("head_gradients_key", SHAPE)
    assert tuned.sizes("head_gradients_query", GPU, SHAPE | {"HG": 32}) == tiles.default("head_gradients_query", SHAPE)


def test_the_file_is_read_once(file, monkeypatch):
    assert looked_up(file, entry()) == WINNER
    monkeypatch.setattr(tuned, "read", lambda path: pytest.fail("read again"))
    assert tuned.sizes("head_gradients_query", GPU, SHAPE) == WINNER


def test_what_is_returned_may_be_changed(file):
    looked_up(file, entry())["N"] = 0
    assert tuned.sizes("head_gradients_query", GPU, SHAPE) == WINNER


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(gpu="NVIDIA H200"), "of another GPU"),
        (dict(gpu=None), "of another GPU"),
        (dict(source="0" * 16), "of another version of the kernel"),
        (dict(kernel="attention_mla"), "of no kernel that has tiles to choose"),
        (dict(kernel=["attention"]), "of no kernel that has tiles to choose"),
        (dict(shape=SHAPE | {"V": 128}), "of no shape that the kernel takes"),
        (dict(shape={"D": "128"}), "of no shape that the kernel takes"),
        (dict(shape=None), "of no shape that the kernel takes"),
        (dict(sizes=WINNER | {"N": 120}), "with sizes that the kernel does not take"),
        (dict(sizes=WINNER | {"N": 512}), "with sizes that the kernel does not take"),
        (dict(sizes=WINNER | {"MORE": 1}), "with sizes that the kernel does not take"),
        (dict(sizes={"N": 96}), "with sizes that the kernel does not take"),
        (dict(sizes=None), "with sizes that the kernel does not take"),
    ],
)
def test_an_entry_of_anything_else_is_ignored(file, changes, why):
    other = entry(**changes)
    assert tuned.refusal(other, GPU) == why and tuned.refusal(entry(), GPU) is None
    assert looked_up(file, other) == DEFAULT
    assert looked_up(file, other, entry()) == WINNER, "and hides no other"


def test_an_entry_of_another_shape_is_not_taken(file):
    other = SHAPE | {"HG": 32}
    assert tuned.refusal(entry(shape=other), GPU) is None
    assert looked_up(file, entry(shape=other)) == DEFAULT


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"entries": 3}', "\x00\xff", '{"format": "flash-indexer/tuned"}']
)
def test_a_damaged_file_is_ignored(file, text):
    file.write_text(text, encoding="latin-1")
    tuned.forget()
    assert tuned.read(file) is None
    assert tuned.sizes("head_gradients_query", GPU, SHAPE) == DEFAULT


@pytest.mark.parametrize("changes", [dict(format="other"), dict(version=2), dict(entries={}), dict(entries=["x", 1])])
def test_a_file_of_another_format_is_ignored(file, changes):
    assert looked_up(file, entry(), **changes) == DEFAULT


def test_a_folder_in_its_place_is_ignored(file):
    file.mkdir()
    assert tuned.sizes("head_gradients_query", GPU, SHAPE) == DEFAULT


def test_the_file_lies_beside_the_kernel_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    assert tuned.location() == tmp_path / "flash-indexer" / "tuned.json"


def test_a_number_equal_to_a_size_is_launched_as_the_size(file):
    """96.0 and true are equal to sizes, but a kernel's name would not be."""
    found = looked_up(file, entry(sizes={name: float(value) for name, value in WINNER.items()}))
    assert found == WINNER and all(type(value) is int for value in found.values())
