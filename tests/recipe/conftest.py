"""Runs of the recipe in this process, what two of them must have in common, and a `datasets` cache of their own."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from rich.console import Console

from flash_indexer.models.attach import IndexerHandle
from flash_indexer.recipe.run_record import read_metrics
from flash_indexer.recipe.warmup import warm_up


class Recipe:
    """`train(out, **settings)` on the tiny Llama, 12 steps with a checkpoint every 4; `printed` is what it said."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self.build, self.printed = build, ""

    def __call__(
        self, out: Path, *, resume: bool = False, to: int | None = None, parallel: Any = None, **changes: Any
    ) -> IndexerHandle:
        console = Console(file=io.StringIO(), width=500)
        try:
            return warm_up(self.build(**changes), out, resume=resume, steps=to, console=console, parallel=parallel)
        finally:
            self.printed = console.file.getvalue()  # type: ignore[attr-defined]


def rows(out: Path) -> list[dict[str, Any]]:
    """Metrics without what the clock decides."""
    return [{name: x for name, x in row.items() if name != "seconds"} for row in read_metrics(out / "metrics.jsonl")]


def assert_same_bits(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    for name in ("indexer.safetensors", "optimizer.safetensors", "training_state.json"):
        assert (one / "checkpoint" / name).read_bytes() == (other / "checkpoint" / name).read_bytes(), name
    assert sorted(path.name for path in other.iterdir()) == ["checkpoint", "metrics.jsonl", "run.json"]


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory, tiny_settings: Callable[..., Any]) -> Path:
    """Indexers of the tiny Llama's three layers after twelve steps. Read only."""
    out = tmp_path_factory.mktemp("warm") / "run"
    warm_up(tiny_settings(lr=0.01), out, console=Console(file=io.StringIO()))
    return out


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, tiny_settings: Callable[..., Any]) -> Path:
    """The folder of a run that nothing ended, of the settings that `recipe` has. Read only."""
    out = tmp_path_factory.mktemp("whole") / "run"
    warm_up(tiny_settings(), out, console=Console(file=io.StringIO()))
    return out


@pytest.fixture
def recipe(tiny_settings: Callable[..., Any]) -> Recipe:
    return Recipe(tiny_settings)


@pytest.fixture
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    return rows


@pytest.fixture
def same_bits() -> Callable[[Path, Path], None]:
    return assert_same_bits


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test of the recipe reads or fills the cache that `datasets` keeps for its user."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
