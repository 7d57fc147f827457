"""benchmarks/directions.py and overlap.py at a tiny size: what they train, compare and record."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def directions(scripts: Path) -> ModuleType:
    return importlib.import_module("directions")


@pytest.fixture
def overlap(scripts: Path) -> ModuleType:
    return importlib.import_module("overlap")


def words(checkpoint: Path, texts: Path, out: Path) -> list[str]:
    text = ["--data", str(texts), "--held-out", str(texts), "--sequence-length", "64"]
    return ["--model", str(checkpoint), *text, "--out", str(out)]


def test_cosines_and_lengths_of_each_training(
    directions: ModuleType, checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directions.main([*words(checkpoint, texts, tmp_path), "--steps", "1", "2", "--device", "cpu"])
    records = [json.loads(line) for line in (tmp_path / "directions.jsonl").read_text().splitlines()]
    assert [record["steps"] for record in records] == [1, 2]
    for record in records:
        for name in ("bfloat16", "index", "both"):
            for gradient, least in record["least_cosine"][name].items():
                assert 0.5 < least <= record["cosine"][name][gradient] + 1e-6 <= 1 + 2e-6, (name, gradient)
        assert record["cosine"]["bfloat16"]["index_k"] > record["cosine"]["both"]["index_k"]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 1 |")]
    assert rows and "| 1, 1, 1 |" in rows[-1], "lengths are told in those of the first training"


def test_the_cosine_of_all_layers_weighs_them_by_their_length(directions: ModuleType) -> None:
    exact = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]
    got = [torch.tensor([3.0, 0.0]), torch.tensor([4.0, 0.0])]
    assert directions.cosine_of_all(got, exact) == pytest.approx(9 / 25)
    assert directions.least_cosine(got, exact) == 0.0


def test_both_trainings_of_each_seed(
    overlap: ModuleType, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "SELECTIONS", ((4, 64),))
    overlap.main([*words(checkpoint, texts, tmp_path), "--steps", "2", "--seeds", "0", "1"])
    records = [json.loads(line) for line in (tmp_path / "overlap.jsonl").read_text().splitlines()]
    assert [(record["seed"], record["training"]) for record in records] == [
        (0, "plain"), (0, "fp8"), (1, "plain"), (1, "fp8"),
    ]  # fmt: skip
    assert all(0.5 < record["same"]["top-4 of 64"] <= 1 for record in records)


def test_differences_are_taken_seed_by_seed(overlap: ModuleType) -> None:
    """Their spread counts, not that of the seeds."""
    found = {"plain": (0.90, 0.80), "fp8": (0.92, 0.81)}
    records = [dict(seed=n, training=t, same={"x": found[t][n]}) for n in (0, 1) for t in ("plain", "fp8")]
    assert "| x | 85.00% | 86.50% | +1.500 ± 0.500 points |" in overlap.summary(records)
