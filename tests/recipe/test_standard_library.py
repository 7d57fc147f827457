"""The text of the Python installation: two halves, by name alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from flash_indexer.recipe import standard_library
from flash_indexer.recipe.standard_library import standard_library_documents

HELD_OUT = {"http/server.py", "pprint.py", "statistics.py", "topics/try", "unittest/mock.py"}
TRAINED = {"argparse.py", "inspect.py", "json/decoder.py", "topics/class", "typing.py"}


def test_the_standard_library_is_split_by_name() -> None:
    train, heldout = standard_library_documents("train"), standard_library_documents("heldout")
    names = {"train": list(train["name"]), "heldout": list(heldout["name"])}
    assert set(names["train"]).isdisjoint(names["heldout"])
    assert set(train["text"]).isdisjoint(text for text in heldout["text"] if len(text) > 200)
    for side in names.values():
        assert side == sorted(side)
        assert any(name.startswith("topics/") for name in side)
        assert not [name for name in side if "/test/" in name or "site-packages" in name or "topics.py" in name]
    sizes = [sum(map(len, documents["text"])) for documents in (train, heldout)]
    assert sum(sizes) > 4_000_000
    assert 0.05 <= sizes[1] / sum(sizes) <= 0.10
    assert sum(len(text) > 12_000 for text in heldout["text"]) >= 8, "long contexts want long held-out documents"
    assert list(standard_library_documents("heldout")["text"]) == list(heldout["text"])


def test_the_side_of_a_file_never_changes() -> None:
    """Names that Python 3.11 and 3.12 both have; a change of the rule would leak old training text into evaluation."""
    heldout, train = (
        set(standard_library_documents("heldout")["name"]),
        set(standard_library_documents("train")["name"]),
    )
    assert heldout >= HELD_OUT
    assert train >= TRAINED


def test_another_split_is_refused() -> None:
    with pytest.raises(ValueError, match='split must be "train" or "heldout", got \'test\''):
        standard_library_documents("test")


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standard_library.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no readable .py files below"):
        standard_library_documents("train")
