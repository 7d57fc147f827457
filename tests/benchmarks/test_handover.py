"""The hours of docs/handover.md: what they are made of, and that the page says what the records give."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def handover(scripts: Path) -> ModuleType:
    return importlib.import_module("handover")


def test_a_sequence_takes_its_layers_a_forward_more_and_what_they_lack(handover: ModuleType) -> None:
    model = handover.Sparse("tiny", "gqa", 2, 6, 64, 1e6, 1e5, 1e4, 32)
    record = {"length": 1000, "sparse": {"ms": {"p50": 400.0}}}
    rates = type("Rates", (), {"product": 1e9, "links": 1e7})
    each = 6 * 0.2 * 4 / 3 + 1000 * (6e5 + 8e4) / 1e9
    assert handover.seconds(model, record, rates) == pytest.approx(each)
    assert handover.step_hours(model, record, rates, 1) == pytest.approx(32 * each / 3600)
    assert handover.step_hours(model, record, rates, 8) == pytest.approx(4 * (each + 1.2 * 7 / 8) / 3600)
    assert handover.step_hours(model, record, rates, 64) == pytest.approx((each / 2 + 1.2 * 63 / 64) / 3600)


def test_the_models_are_the_published_ones(handover: ModuleType) -> None:
    small, large = handover.sparse_models()
    assert small.parameters == pytest.approx(8.19e9, rel=0.01) and large.parameters == pytest.approx(671e9, rel=0.01)
    assert large.experts == pytest.approx(24.4e9, rel=0.02)
    assert handover.glm_lite().parameters == pytest.approx(29.9e9, rel=0.02)


def test_what_does_not_fit_is_in_brackets(handover: ModuleType) -> None:
    assert handover.fitting(2.0, 80.0) == "2.0 h" and handover.fitting(200.0, 80.1) == "(200 h)"


def test_the_page_is_what_the_records_make(handover: ModuleType) -> None:
    page = (ROOT / "docs" / "handover.md").read_text(encoding="utf-8")
    assert handover.rewrite(page, handover.section(), handover.BEGIN, handover.END) == page


def test_the_newest_step_beside_a_dense_one_counts(handover: ModuleType, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"model": "gqa", "deterministic": True, "fastest": "cuDNN", "length": 1},
        {"model": "gqa", "deterministic": True, "fastest": "cuDNN", "length": 2},
        {"model": "gqa", "deterministic": True, "length": 3},
        {"model": "gqa", "deterministic": False, "fastest": "cuDNN", "length": 4},
    ]
    (tmp_path / "sparse_step.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert handover.newest("gqa", tmp_path)["length"] == 2
