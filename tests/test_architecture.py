"""The house: who may import and include whom, sizes, docstrings. The rules are data in architecture/house_rules.py.

architecture/test_house_rules.py tests the rules themselves: each finds what a planted file breaks.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from house_rules import LEVEL, LIBRARIES, RULES, WITH_MODELS, Fault, inside, part_of
from house_sources import OURS, Sources, uses

ROOT = Path(__file__).resolve().parents[1]
# What still breaks a rule while the files move: a list that shrinks, and is empty when the house is built.
BELOW_MODELS = sorted(part for part, level in LEVEL.items() if level < LEVEL["models"] and part != "__init__")
HEAVY = sorted(set().union(*LIBRARIES.values(), WITH_MODELS) - {"torch", "numpy"})
MISSPELLING = re.compile("(?<![A-Za-z])l{0}|L{0}|L{1}".format("ight" + "ing", "IGHT" + "ING"))


@pytest.fixture(scope="module")
def house() -> Sources:
    return Sources(ROOT / "src")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(house: Sources, rule: Callable[[Sources], Iterator[Fault]]) -> None:
    assert len(house.text) > 50, "the sources were not found"
    assert [str(fault) for fault in rule(house)] == []


def test_benchmarks_do_not_import_tests() -> None:
    paths = sorted((ROOT / "benchmarks").rglob("*.py"))
    assert len(paths) > 3, "the benchmarks were not found"
    imports = [(path, use) for path in paths for use in uses(ast.parse(path.read_text("utf-8")), ["benchmarks"])]
    assert [f"{path}:{use.line}" for path, use in imports if inside(use.name, frozenset({"tests"}))] == []


def test_the_process_that_deals_tests_out_waits_for_no_library() -> None:
    """It reads tests/conftest.py before any other process begins: seconds of one core while the others idle."""
    body = ast.parse((ROOT / "tests" / "conftest.py").read_text("utf-8")).body  # imports under `if` are for types
    imports = ast.Module([node for node in body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    names = {use.name.split(".")[0] for use in uses(imports, ["tests"])}
    assert "pytest" in names and names <= {"pytest", *sys.stdlib_module_names}


def test_import_needs_torch_alone(house: Sources) -> None:
    """In a fresh interpreter where every other third-party package of ours refuses to be imported.

    All files below models are imported, but for the GPU programs, which are made of TileLang.
    """
    files = [file for file in house.trees if part_of(file) in BELOW_MODELS and not file.startswith("kernels/")]
    modules = [f"{OURS}.{file.removesuffix('.py').replace('/', '.').removesuffix('.__init__')}" for file in files]
    assert len(modules) > 20
    program = f"""
import importlib, sys
heavy = {HEAVY}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        importer = sys._getframe()
        while importer and not importer.f_globals.get("__name__", "").startswith("flash_indexer"):
            importer = importer.f_back
        if importer and name.split(".")[0] in heavy:
            raise ImportError(f"{{name}} wanted by {{importer.f_globals['__name__']}}")

sys.meta_path.insert(0, Refuse())
for module in {["flash_indexer", *modules]}:
    importlib.import_module(module)
print(sorted(set(heavy) & sys.modules.keys()))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def misspelled(paths: list[Path]) -> list[str]:
    lines = [(path, n, line) for path in paths for n, line in enumerate(path.read_text("utf-8").splitlines(), 1)]
    return [
        f"{path}:{n}: lightning is misspelled: {line.strip()}" for path, n, line in lines if MISSPELLING.search(line)
    ]


def test_lightning_is_spelled_right() -> None:
    folders = [ROOT / name for name in ("src", "tests", "docs", "benchmarks", "examples")]
    endings = (".py", ".cuh", ".md", ".json", ".sh")
    paths = [p for f in folders for p in f.rglob("*") if p.suffix in endings and p.is_file()]
    assert misspelled([*paths, *ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / "Makefile"]) == []


def test_the_misspelling_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    word = "Light" + "ing"
    path.write_text(f"{word}Indexer\nflash-{word.lower()}\nhigh{word.lower()} is a word\nlightning\n", encoding="utf-8")
    assert [line.split(":")[-3] for line in misspelled([path])] == ["1", "2"]
