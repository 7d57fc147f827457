"""How the GPU tests' verdict comes about; what it is of, a GPU must say."""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

TESTS = """
import pytest
from pathlib import Path

pytestmark = pytest.mark.gpu
FLAG = Path(__file__).with_name("flag")

@pytest.mark.parametrize("place", ["a b", "c::d"])
def test_alone(place):
    if not FLAG.exists():
        raise RuntimeError("CUDA error: out of memory")

def test_last():
    FLAG.touch()

def test_wrong():
    assert 1 == 2

def test_never_fits():
    raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")

@pytest.mark.skip
def test_skipped():
    pass
"""


@pytest.fixture
def gpu_tests(scripts: Path) -> ModuleType:
    return importlib.import_module("gpu_tests")


def test_tests_that_ran_out_of_memory_run_again(gpu_tests: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "test_planted.py"
    file.write_text(TESTS, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n", encoding="utf-8")
    counts, status = gpu_tests.run_pytest([str(file)])
    wanted = dict(passed=3, failed=2, skipped=1, again=3)
    assert {name: counts[name] for name in wanted} == wanted and status
    assert sorted(counts["failures"]) == ["test_never_fits", "test_wrong"]
    counts, status = gpu_tests.run_pytest([str(file), "-k", "alone or last"])
    assert (counts["passed"], counts["failed"], counts["again"], status) == (3, 0, 0, 0)
    (tmp_path / "flag").unlink()
    counts, status = gpu_tests.run_pytest([str(file), "-k", "alone or last"])
    assert (counts["passed"], counts["failed"], counts["again"], status) == (3, 0, 2, 0)
    (tmp_path / "flag").unlink()
    counts, status = gpu_tests.run_pytest([str(file), "-x"])  # what comes behind the first has not run
    assert (counts["failed"], counts["again"]) == (1, 0) and status


def test_packages_that_the_project_rules_out_are_named(gpu_tests: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_tests.unfit_packages() == []
    versions = {"transformers": "5.17.0"}
    original = metadata.version
    monkeypatch.setattr(gpu_tests.metadata, "version", lambda name: versions.get(name) or original(name))
    assert gpu_tests.unfit_packages() == ["transformers must be <6,>=5.23, got 5.17.0"]
