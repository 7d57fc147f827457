"""What benchmarks share: the parts that need no GPU."""

from __future__ import annotations

import json

import pytest
import torch

from flash_indexer.bench import timing


def test_a_size_counts_visible_pairs() -> None:
    """Of two causal documents; where only the last queries are asked for, of these alone."""
    size = timing.Size(H=1, G=1, D=1, I=1, E=1, documents=(20, 7), V=1)
    assert size.pairs == sum(range(1, 21)) + sum(range(1, 8))
    last = timing.Size(H=1, G=1, D=1, I=1, E=1, documents=(20, 7), V=1, queries=3)
    assert last.pairs == 18 + 19 + 20 + 5 + 6 + 7


def test_percentiles() -> None:
    assert timing.percentiles([float(n) for n in range(11)]) == {"p20": 2.0, "p50": 5.0, "p80": 8.0}
    assert timing.percentiles([3.0]) == {"p20": 3.0, "p50": 3.0, "p80": 3.0}


def test_each_record_is_a_line_as_soon_as_it_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "needs_gpu", lambda: None)
    monkeypatch.setattr(timing, "environment", lambda commit: {"commit": commit})
    path = tmp_path / "new" / "records.jsonl"

    def fails():
        raise RuntimeError("wrong")

    found = timing.measured([("a", lambda: {"ms": 1.0}), ("b", fails)], path, "abc")
    assert next(found) == {"commit": "abc", "name": "a", "ms": 1.0}
    with pytest.raises(RuntimeError, match="wrong"):
        next(found)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"commit": "abc", "name": "a", "ms": 1.0}]


def test_nothing_is_measured_without_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(OSError, match="needs a CUDA GPU"):
            next(timing.measured([("a", dict)], tmp_path / "records.jsonl", "abc"))
        assert not list(tmp_path.iterdir())
