"""The scripts of benchmarks/ as modules: they import their neighbours."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Iterator[Path]:
    """The folder, in which Python looks for modules meanwhile."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield BENCHMARKS
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def report(scripts: Path) -> ModuleType:
    return importlib.import_module("report")


@pytest.fixture(scope="module")
def costs(scripts: Path) -> ModuleType:
    return importlib.import_module("costs")
