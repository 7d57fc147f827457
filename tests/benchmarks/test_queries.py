"""benchmarks/queries.py at a tiny size: what it trains, records and draws."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def queries(scripts: Path) -> Any:
    return importlib.import_module("queries")


@pytest.mark.slow
def test_a_record_for_each_training_and_a_plot(queries: Any, checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    words = [
        "--model", str(checkpoint), "--data", str(texts), "--held-out", str(texts), "--steps", "4", "--points", "2",
        "--sequence-length", "64", "--sequences", "2", "--k", "4", "--out", str(tmp_path), "--picture",
        str(tmp_path / "plot.png"),
    ]  # fmt: skip
    queries.main(words)
    records = [json.loads(line) for line in (tmp_path / "queries.jsonl").read_text().splitlines()]
    assert [(r["queries"], r["compared"]) for r in records] == [
        (1.0, "steps"), *((f, way) for f in (0.5, 0.25, 0.125) for way in ("steps", "time")),
    ]  # fmt: skip
    for record in records:
        assert record["compared"] == "time" or record["steps"] == 4
        assert record["curve"][-1]["step"] == record["steps"]
        for point in record["curve"]:
            assert 0 < point["kl_over_uniform"] < 2 and 0 < point["mass"] <= point["best_mass"] <= 1
            assert point["seconds"] == pytest.approx(point["step"] * record["seconds_per_step"], abs=1e-3)
    first, later = records[0]["curve"][0], records[0]["curve"][-1]
    assert first["kl_over_uniform"] != later["kl_over_uniform"], "each checkpoint is judged, not the last alone"
    picture = tmp_path / "plot.png"
    assert picture.stat().st_size > 10_000
    picture.unlink()
    queries.main([*words, "--plot"])
    assert picture.exists() and len((tmp_path / "queries.jsonl").read_text().splitlines()) == 7


def test_the_same_time_is_counted_in_median_steps(queries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert queries.median_step([9.0, 10.0, 11.0, 13.0, 14.0, 40.0, 41.0]) == 1.5
    trained: list[tuple[float, int]] = []

    def train(arguments: Any, fraction: float, steps: int) -> dict[str, Any]:
        trained.append((fraction, steps))
        return {"seconds_per_step": 1.0 + fraction}

    monkeypatch.setattr(queries, "train", train)
    list(queries.measure(queries.parse(["--steps", "100"])))
    assert trained == [(1.0, 100), (0.5, 100), (0.5, 133), (0.25, 100), (0.25, 160), (0.125, 100), (0.125, 178)]
