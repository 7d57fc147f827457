"""The model of docs/scaling.md: what it is fitted to, and that the page says what the records give."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def scaling() -> Any:
    """benchmarks/scaling.py, which imports its neighbour."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("scaling", BENCHMARKS / "scaling.py")
        assert spec is not None and spec.loader is not None
        module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


def point(tokens: int, heads: int) -> dict[str, Any]:
    pairs = tokens * (tokens + 1) / 2
    time, peak = pairs * (1e-7 + 2e-9 * heads), 5e8 + tokens * (4e4 + 1e3 * heads)
    return {"size": {"tokens": tokens, "H": heads}, "pairs": pairs, "milliseconds": {"p50": time}, "peak_bytes": peak}


def test_the_fit_finds_what_made_the_points(scaling: Any) -> None:
    points = [point(n, h) for n, h in ((8192, 128), (16384, 16), (16384, 64), (65536, 128))]
    medians = dict(one=100.0, context=52.0, gather_keys=0.5)
    pair = {"milliseconds": {k: {"p50": v} for k, v in medians.items()}, "key_bytes": 2e8, "ranks": 2}
    model = scaling.fit(points, pair)
    assert model.pair == pytest.approx(1e-7) and model.pair_head == pytest.approx(2e-9)
    assert (model.base, model.token, model.token_head) == pytest.approx((5e8, 4e4, 1e3))
    assert model.efficiency == pytest.approx(100 / 104) and model.bytes_per_ms == pytest.approx(2e8)
    assert model.milliseconds(32768, 32) == pytest.approx(point(32768, 32)["milliseconds"]["p50"])
    alone, exchange = model.step(scaling.SEQUENCES)
    assert exchange == 0 and alone == pytest.approx(61 * model.milliseconds(131072, 128) / 1e3 / model.efficiency)
    assert model.step(2048)[1] > model.step(64)[1] > 0


def test_the_page_says_what_the_records_give(scaling: Any) -> None:
    points, pair = scaling.newest()
    page = scaling.DOCUMENT.read_text(encoding="utf-8")
    assert scaling.section(points, pair, scaling.fit(points, pair)) in page
    for measured in points:
        model = scaling.fit(points, pair).milliseconds(measured["size"]["tokens"], measured["size"]["H"])
        assert model == pytest.approx(measured["milliseconds"]["p50"], rel=0.15)
