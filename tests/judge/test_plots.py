"""judge.plots: what is drawn on the axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from flash_indexer.judge.plots import plot_loss, plot_mass
from flash_indexer.judge.scores import Evaluation


def rows(ratios: list[float]) -> list[dict[str, Any]]:
    """Training's rows: three layers at 0.9, 1 and 1.1 times the mean."""
    return [
        {"step": step, "loss": 2 * r, "kl_over_uniform": r, "kl": [1.8 * r, 2 * r, 2.2 * r]}
        for step, r in enumerate(ratios, 1)
    ]


@pytest.mark.parametrize(
    "ratios",
    [
        [1.0], [1.0, 1.0, 1.0], [0.999, 0.998, 0.997], [1 - 0.02 * step for step in range(5)], [0.3, 0.21, 0.15, 0.1],
        [0.05 + 0.95 * math.exp(-step / 60) for step in range(500)],
    ],
    ids=["one", "flat", "three", "five", "four", "five hundred"],
)  # fmt: skip
def test_the_loss_has_whole_steps_and_two_labels_at_least(ratios: list[float]) -> None:
    figure = plot_loss(rows(ratios), ratios[-1])
    figure.draw_without_rendering()
    (ax,) = figure.axes
    ticks = {}
    for name, axis, limits in (("x", ax.xaxis, ax.get_xlim()), ("y", ax.yaxis, ax.get_ylim())):
        low, high = sorted(limits)
        ticks[name] = [
            tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_text()
        ]
    steps = [tick.get_loc() for tick in ticks["x"]]
    assert steps and all(step == int(step) for step in steps), steps
    labels = [tick.label1.get_text() for tick in ticks["y"]]
    assert len(labels) >= 2 and len(set(labels)) == len(labels), labels
    assert all(float(tick.label1.get_text()) == pytest.approx(tick.get_loc()) for tick in ticks["y"])


@pytest.mark.parametrize(
    ("queries", "text"), [(49, "only 49 queries a layer"), (1, "only 1 query a layer"), (50, None)]
)
def test_a_panel_that_rests_on_few_queries_says_so(
    make_evaluation: Callable[[], Evaluation], queries: int, text: str | None
) -> None:
    good = make_evaluation()
    layers = tuple(replace(x, at_k=(x.at_k[0], replace(x.at_k[1], queries=queries))) for x in good.layers)
    many, few = plot_mass(replace(good, layers=layers)).axes
    assert [t.get_text() for t in many.texts] == []
    assert [t.get_text() for t in few.texts] == ([] if text is None else [f"{text}: too few to judge"])
