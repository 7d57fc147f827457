"""recipe.checking: what makes the checks fail, and how they say it."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from flash_indexer.judge.fp8_check import GRADIENTS, VARIANTS, Gradient, LayerFP8, Variant
from flash_indexer.recipe import checking

pytestmark = pytest.mark.usefixtures("blank_plots")


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """check(each layer's row errors, target) with measurements that are made up; returns what was printed."""

    def run(errors: list[tuple[float, ...]], target: str = "mean") -> str:
        variants = {name: Variant(1.0, {g: Gradient(0.99, 1.0) for g in GRADIENTS}) for name in VARIANTS}
        layers = tuple(LayerFP8(n + 3, 1.0, variants, (), found) for n, found in enumerate(errors))
        monkeypatch.setattr(checking, "fp8_check", lambda *args: layers)
        console = Console(file=io.StringIO(), width=200)
        handle: Any = SimpleNamespace(target=target)
        checking.check_fp8(handle, dict(input_ids=torch.zeros(1, 5)), tmp_path / "fp8", {}, console)
        return console.file.getvalue()  # type: ignore[attr-defined]

    return run


def test_sums_within_a_hundredth_are_right(check: Callable[..., str], tmp_path: Path) -> None:
    said = check([(0.01, 0.002), (0.0, 0.009)])
    assert f"plot     {tmp_path}/fp8/fp8.png" in said and f"JSON     {tmp_path}/fp8/fp8.json" in said


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        (
            [(0.01, 0.0), (0.02, 0.3)],
            r"2 of 4 heads .* the worst within 3.00e-01 \(layer 4, head 1\): give indexer_kl\(",
        ),
        ([(0.5, math.nan), (0.02, 0.3)], r"4 of 4 heads .* the worst within nan \(layer 3, head 1\)"),
    ],
)
def test_sums_beyond_it_fail_where_the_target_reads_a_logsumexp(
    check: Callable[..., str], tmp_path: Path, errors: list[tuple[float, ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(errors)
    written = json.loads((tmp_path / "fp8" / "fp8.json").read_text())  # all the same
    shown = [tuple(layer["row_errors"]) for layer in written["layers"]]
    assert shown == [tuple(None if math.isnan(error) else error for error in layer) for layer in errors]
    assert "plot" in check(errors, target="sum_logits")


def test_a_teacher_that_is_not_the_models_attention_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    handle: Any = SimpleNamespace(description="indexers on 1 of 1 layers: 0")
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(checking, "teacher_errors", lambda *args: {0: 0.01, 2: 1e-6})
    checking.check_teacher(handle, {}, console)
    assert "layer 2: max |sum_s a[t,h,s] - 1| = 1.00e-06" in console.file.getvalue()  # type: ignore[attr-defined]
    for worst in (0.011, math.nan):
        monkeypatch.setattr(checking, "teacher_errors", lambda *args, worst=worst: {0: 1e-6, 1: worst, 2: 1e-6})
        with pytest.raises(ValueError, match=f"check: layer 1's rows sum to 1 only within {worst:.2e}, above 0.01"):
            checking.check_teacher(handle, {}, console)
