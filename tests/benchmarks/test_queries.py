"""benchmarks/queries.py at a tiny size: what it trains, records and draws."""

from __future__ import annotations

import importlib
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def queries(scripts: Path) -> Any:
    return importlib.import_module("queries")


@pytest.mark.slow
def test_a_record_for_each_training_and_a_plot(queries: Any, checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{queries.BEGIN}\n{queries.END}\nafter\n", encoding="utf-8")
    words = [
        "--model", str(checkpoint), "--data", str(texts), "--held-out", str(texts), "--steps", "4", "--points", "2",
        "--sequence-length", "64", "--sequences", "2", "--k", "4", "--out", str(tmp_path), "--picture",
        str(tmp_path / "plot.png"), "--page", str(page),
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
    written = page.read_text(encoding="utf-8")
    assert written == f"before\n{queries.BEGIN}\n{queries.section(tmp_path)}\n{queries.END}\nafter\n"
    assert written.count("\n| 1/8 | ") == 2 and "| all | 4 | " in written


def test_the_same_time_is_counted_in_median_steps(queries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert queries.median_step([9.0, 10.0, 11.0, 13.0, 14.0, 40.0, 41.0]) == 1.5
    trained: list[tuple[float, int]] = []

    def train(arguments: Any, fraction: float, steps: int) -> dict[str, Any]:
        trained.append((fraction, steps))
        return {"seconds_per_step": 1.0 + fraction}

    monkeypatch.setattr(queries, "train", train)
    list(queries.measure(queries.parse(["--steps", "100"])))
    assert trained == [(1.0, 100), (0.5, 100), (0.5, 133), (0.25, 100), (0.25, 160), (0.125, 100), (0.125, 178)]


def test_the_page_says_what_the_records_give(queries: Any) -> None:
    text = queries.PAGE.read_text(encoding="utf-8")
    made = queries.rewrite(text, queries.section(), queries.BEGIN, queries.END)
    assert made == text, "run python benchmarks/queries.py --plot"


def test_the_recommended_part_follows_from_every_recorded_series(queries: Any) -> None:
    """What docs/math.md says of an eighth: nearly as much in as many steps, the best of all in as much time."""
    records = queries.lines_of(queries.RESULTS / "queries.jsonl")
    series = [list(one) for _, one in groupby(records, key=lambda record: record["commit"])]
    assert len(series) >= 3
    for one in series:
        assert {(record["sequence_length"], record["queries"] == 1 or record["compared"]) for record in one} == {
            (8192, True), (8192, "steps"), (8192, "time"),
        }  # fmt: skip
        ends = {(record["queries"], record["compared"]): record["curve"][-1] for record in one}
        whole, steps, time = ends[1.0, "steps"], ends[1 / 8, "steps"], ends[1 / 8, "time"]
        assert steps["kl_over_uniform"] == pytest.approx(whole["kl_over_uniform"], rel=0.02)
        assert steps["mass"] == pytest.approx(whole["mass"], abs=0.001)
        assert time["kl_over_uniform"] == min(end["kl_over_uniform"] for end in ends.values())
        assert time["mass"] == max(end["mass"] for end in ends.values())


def test_the_kernels_time_is_beside_that_of_all_queries(queries: Any) -> None:
    def step(
        length: int, fraction: float, score: float, *, documents: bool = False, commit: str = "new"
    ) -> dict[str, Any]:
        return {
            "commit": commit, "gpu": "GPU", "length": length, "queries": fraction, "documents": documents,
            "shapes": {"num_hidden_layers": 4}, "indexer": {"num_heads": 16, "head_dim": 128},
            "share": {"score": score, "gradient": score, "attention": 99.0, "idle": 1.0},
        }  # fmt: skip

    older = [step(64, 1.0, 7.0), step(64, 1.0, 8.0, commit="old"), step(64, 1 / 8, 2.0, commit="old")]
    others = [step(64, 1.0, 1.0, documents=True), step(32, 0.5, 1.0), step(64, 0.5, 1.0, commit="alone")]
    records = [*older, step(64, 0.25, 1.5), step(64, 1.0, 5.0), *others]
    lines = [line for line in queries.kernels(records) if line.startswith(("| 64", "| 32"))]
    builds = ["| 64 | all | 10.0 ms | 1.000 |", "| 64 | 1/4 | 3.0 ms | 0.300 |", "| 64 | 1/8 | 4.0 ms | 0.250 |"]
    assert lines == builds, "each part over all queries of its own build"
    assert queries.kernels([]) == []
    assert [queries.part(x) for x in (1.0, 0.5, 1 / 16, 0.3)] == ["all", "1/2", "1/16", "0.3"]
