"""Who may import whom, and limits of size: rules as data, checked on the syntax trees of the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
OURS = "flash_indexer"


def ours(*parts: str) -> frozenset[str]:
    return frozenset(f"{OURS}.{part}" for part in parts)


@dataclass(frozen=True)
class Row:
    """What a part may import (besides the standard library and itself) and what it must not.

    Names are dotted prefixes; must_not wins. late: allowed inside functions only.
    """

    may: frozenset[str]
    must_not: frozenset[str] = frozenset()
    late: frozenset[str] = frozenset()


TORCH = frozenset({"torch"})
LIBRARIES = frozenset({"transformers", "accelerate", "datasets", "safetensors", "gguf", "pyarrow", "matplotlib"})
RECIPE = Row(may=TORCH | LIBRARIES | {OURS, "numpy", "rich"}, must_not=ours("kernels", "cli"))
TABLE = {
    "__init__": Row(may=TORCH | ours("indexer", "intervals", "ops"), must_not=ours("kernels", "reference")),
    "reference": Row(may=TORCH, must_not=frozenset({OURS})),
    "intervals": Row(may=TORCH, must_not=frozenset({OURS})),
    "kernels": Row(may=frozenset({"tilelang", "tvm_ffi"}), must_not=TORCH),
    "ops": Row(
        may=TORCH | ours("intervals", "kernels"),
        must_not=ours("reference") | {"tilelang", "torch.distributed"},
        late=ours("kernels"),
    ),
    "indexer": Row(may=TORCH, must_not=ours("kernels", "ops") | {"transformers"}),
    "testing": Row(may=TORCH | ours("intervals", "ops", "reference"), must_not=ours("kernels") | {"transformers"}),
    "parallel": Row(may=TORCH | ours("indexer", "intervals", "ops"), must_not=frozenset({"tilelang", "transformers"})),
    **dict.fromkeys(("models", "files", "judge", "recipe"), RECIPE),
    "bench": Row(may=TORCH | {OURS, "rich"}, must_not=ours("cli", "reference")),
    "__main__": Row(may=ours("cli")),
    "cli": Row(may=TORCH | {OURS, "typer", "rich"}, must_not=ours("kernels")),
}
KERNEL_DATA = ours("kernels.sm_90.sizes", "kernels.device.items")  # no TileLang: imported like any other
NOBODY = frozenset({"os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"})
TORCH_ALONE = ("reference", "intervals", "ops", "indexer", "testing", "parallel")
FORBIDDEN_FILES = frozenset({"utils.py", "util.py", "helpers.py", "misc.py"})
MAX_LINES, MAX_LINES_KERNELS = 400, 600
MAX_PARAMETERS, MAX_PARAMETERS_OPS = 10, 14  # the public operators, and what wraps them for many GPUs
MISSPELLING = re.compile("(?<![A-Za-z])l{0}|L{0}|L{1}".format("ight" + "ing", "IGHT" + "ING"))


@dataclass(frozen=True)
class Use:
    """A dotted name that a file imports or reaches through an imported module."""

    name: str
    line: int
    nested: bool
    imported: bool


def part_of(path: Path, src: Path) -> str:
    return path.relative_to(src / OURS).with_suffix("").parts[0]


def files(src: Path) -> list[Path]:
    return sorted((src / OURS).rglob("*.py"))


def inside(name: str, prefixes: frozenset[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def walk(node: ast.AST, nested: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below, with whether it lies in a function."""
    for child in ast.iter_child_nodes(node):
        yield child, nested
        yield from walk(child, nested or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def origin(node: ast.ImportFrom, package: list[str]) -> list[str]:
    """The absolute module, in pieces, that a file of `package` imports from."""
    base = package[: len(package) - node.level + 1] if node.level else []
    return [*base, *(node.module or "").split(".")] if node.module else base


def assigned(node: ast.AST) -> list[str]:
    """Names that a module-level assignment binds."""
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return []
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def uses(path: Path, src: Path) -> Iterator[Use]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = list(path.relative_to(src).parent.parts)
    bound: dict[str, str] = {}
    for node, nested in walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.split(".")[0]
                bound[alias.asname or root] = alias.name if alias.asname else root
                yield Use(alias.name, node.lineno, nested, True)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(origin(node, package))
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{module}.{alias.name}"
                yield Use(f"{module}.{alias.name}", node.lineno, nested, True)
        elif isinstance(node, ast.Call):
            yield from (Use(name, node.lineno, nested, True) for name in import_by_name(node))
    for node, nested in walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if root in bound:
                yield Use(f"{bound[root]}.{rest}", node.lineno, nested, False)


def import_by_name(call: ast.Call) -> list[str]:
    imports = ast.unparse(call.func).split(".")[-1] in ("import_module", "__import__")
    return [str(name.value) for name in call.args[:1] if imports and isinstance(name, ast.Constant)]


def broken_imports(src: Path) -> Iterator[str]:
    for path in files(src):
        part = part_of(path, src)
        where = path.relative_to(src).as_posix()
        if part not in TABLE:
            yield f"{where}: {part} has no row in the import table"
            continue
        row, own = TABLE[part], frozenset() if part == "__init__" else ours(part)
        for use in uses(path, src):
            name = use.name
            here = f"{where}:{use.line}: {part}"
            if inside(name, NOBODY):
                yield f"{here} must not use {name}"
            elif inside(name, own) or (inside(name, KERNEL_DATA) and part == "ops"):
                continue
            elif inside(name, row.must_not):
                yield f"{here} must not use {name}"
            elif use.imported and not inside(name, row.may) and name.split(".")[0] not in sys.stdlib_module_names:
                yield f"{here} may not import {name}"
            elif use.imported and not use.nested and inside(name, row.late):
                yield f"{here} may import {name} inside a function only"
            elif inside(name, frozenset({OURS})) and re.search(r"\._(?!_)", name):
                yield f"{here} must not use {name}, which is private to its part"


def broken_sizes(src: Path) -> Iterator[str]:
    for path in files(src):
        part, where = part_of(path, src), path.relative_to(src).as_posix()
        text = path.read_text(encoding="utf-8")
        lines, limit = len(text.splitlines()), MAX_LINES_KERNELS if part == "kernels" else MAX_LINES
        if lines > limit:
            yield f"{where}: {lines} lines, at most {limit}"
        if path.name in FORBIDDEN_FILES:
            yield f"{where}: name the file after what it holds"
        limit = MAX_PARAMETERS_OPS if part in ("ops", "parallel") else MAX_PARAMETERS
        free = part in ("cli", "kernels")  # a command has a parameter for each option, a device program for each tensor
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not (free and node.decorator_list):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = sum(argument.arg not in ("self", "cls") for argument in arguments)
                if count > limit:
                    yield f"{where}:{node.lineno}: {node.name} has {count} parameters, at most {limit}"


def broken_docstrings(src: Path) -> Iterator[str]:
    """The names in __all__ of modules without a leading underscore, each judged where it is defined."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files(src)}
    for path, tree in trees.items():
        relative = path.relative_to(src)
        if any(piece.startswith("_") and piece != "__init__.py" for piece in relative.parts):
            continue
        if not first_paragraph(tree):
            yield f"{relative.as_posix()}: the module has no docstring that begins on its first line"
        for name in public_names(tree):
            found = definition(name, path, trees, src)
            if found is None:
                yield f"{relative.as_posix()}: {name} of __all__ is not defined or imported"
            elif isinstance(found, ast.FunctionDef | ast.ClassDef) and not first_paragraph(found):
                yield f"{relative.as_posix()}: {name} has no docstring that begins on its first line"


def public_names(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if "__all__" in assigned(node):
            return list(ast.literal_eval(node.value))
    return []


def definition(name: str, path: Path, trees: dict[Path, ast.Module], src: Path) -> ast.AST | None:
    """The class or function behind a name, through re-exports; another node if it is neither; or None."""
    package = list(path.relative_to(src).parent.parts)
    body = trees[path].body
    for node in [*body, *(below for block in body if isinstance(block, ast.If) for below in block.body)]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom):
            module = src.joinpath(*origin(node, package))
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    for file in (module.with_suffix(".py"), module / "__init__.py"):
                        if file in trees:
                            return definition(alias.name, file, trees, src)
                    return node
        if name in assigned(node):
            return node
    file = path.parent / f"{name}.py"
    return trees.get(file, trees.get(path.parent / name / "__init__.py"))


def first_paragraph(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    return (ast.get_docstring(node, clean=False) or "").partition("\n")[0].strip()


def misspelled(paths: list[Path]) -> list[str]:
    found = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if MISSPELLING.search(line):
                found.append(f"{path}:{number}: lightning is misspelled: {line.strip()}")
    return found


def tree(root: Path, sources: dict[str, str]) -> Path:
    for name, source in sources.items():
        path = root / OURS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root


@pytest.mark.parametrize("rule", [broken_imports, broken_sizes, broken_docstrings])
def test_package_keeps_the_rule(rule: Callable[[Path], Iterator[str]]) -> None:
    assert files(SRC), f"no sources under {SRC}"
    assert list(rule(SRC)) == []


def test_benchmarks_do_not_import_tests() -> None:
    paths = sorted((ROOT / "benchmarks").rglob("*.py"))
    found = [(path, use) for path in paths for use in uses(path, ROOT)]
    assert [f"{path}:{use.line}" for path, use in found if inside(use.name, frozenset({"tests"}))] == []


def test_lightning_is_spelled_right() -> None:
    folders = [ROOT / name for name in ("src", "tests", "docs", "benchmarks")]
    paths = [p for f in folders for p in f.rglob("*") if p.suffix in (".py", ".md", ".json") and p.is_file()]
    paths += [*ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / "Makefile"]
    assert misspelled(paths) == []


def test_import_needs_torch_alone() -> None:
    """In a fresh interpreter where every other third-party package of ours refuses to be imported."""
    present = [part for part in TORCH_ALONE if part in {part_of(path, SRC) for path in files(SRC)}]
    program = f"""
import sys
heavy = {sorted(LIBRARIES | {"tilelang", "tvm_ffi", "typer"})}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        importer = sys._getframe()
        while importer and not importer.f_globals.get("__name__", "").startswith("flash_indexer"):
            importer = importer.f_back
        if importer and name.split(".")[0] in heavy:
            raise ImportError(f"{{name}} wanted by {{importer.f_globals['__name__']}}")

sys.meta_path.insert(0, Refuse())
import flash_indexer
for part in {present}:
    __import__("flash_indexer." + part)
print(sorted(set(heavy) & sys.modules.keys()))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


GOOD = {
    "__init__.py": '"""A package."""\nfrom flash_indexer.ops import op\n\n__all__ = ["op"]\n',
    "ops/__init__.py": '"""Operators."""\nfrom .one import op\n\n__all__ = ["op"]\n',
    "ops/one.py": '"""One."""\nimport torch\ndef op():\n    """x"""\n    import flash_indexer.kernels\n',
    "kernels/score.py": '"""A kernel."""\nimport tilelang.language as T\n',
    "recipe/a.py": '"""Recipe."""\nimport os, accelerate\nfrom flash_indexer import op\nos.sync()\n',
}


def test_the_rules_accept_a_good_tree(tmp_path: Path) -> None:
    src = tree(tmp_path, GOOD)
    assert [*broken_imports(src), *broken_sizes(src), *broken_docstrings(src)] == []


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("reference.py", "from flash_indexer.ops import op", "reference must not use flash_indexer.ops.op"),
        ("reference.py", "from . import ops", "reference must not use flash_indexer.ops"),
        ("intervals.py", "import numpy", "intervals may not import numpy"),
        ("kernels/score.py", "from torch.autograd import Function", "kernels must not use torch.autograd"),
        ("ops/a.py", "import tilelang", "ops must not use tilelang"),
        (
            "ops/a.py",
            "def f():\n    import torch.distributed as dist",
            ":2: ops must not use torch.distributed",
        ),
        ("ops/a.py", "import torch\ntorch.distributed.init()", ":2: ops must not use torch.distributed"),
        ("ops/a.py", "import torch as t\nt.distributed.init()", "ops must not use torch.distributed"),
        ("ops/a.py", "from .. import reference", "ops must not use flash_indexer.reference"),
        ("ops/a.py", "from flash_indexer.kernels import score", "inside a function only"),
        ("ops/a.py", "from flash_indexer.indexer import M", "ops may not import flash_indexer.indexer"),
        ("indexer.py", "from .ops import op", "indexer must not use flash_indexer.ops"),
        ("indexer.py", "def f():\n    import transformers", "indexer must not use transformers"),
        (
            "indexer.py",
            "import importlib\nimportlib.import_module('transformers')",
            "must not use transformers",
        ),
        ("testing.py", "import transformers", "testing must not use transformers"),
        ("parallel/a.py", "if True:\n    import tilelang", "parallel must not use tilelang"),
        ("recipe/a.py", "from flash_indexer import kernels", "recipe must not use flash_indexer.kernels"),
        (
            "recipe/a.py",
            "import flash_indexer\nflash_indexer.kernels.x",
            ":2: recipe must not use flash_indexer.kernels",
        ),
        ("recipe/a.py", "from flash_indexer.ops.one import _f", "private to its part"),
        ("cli.py", "import flash_indexer.kernels.score", "cli must not use flash_indexer.kernels"),
        ("cli.py", "import matplotlib", "cli may not import matplotlib"),
        ("extra.py", "", "extra has no row in the import table"),
        ("judge/a.py", "import os\nx = os.environ['A']", ":2: judge must not use os.environ"),
        ("judge/a.py", "from os import getenv", "judge must not use os.getenv"),
        ("judge/a.py", "import os as o\no.getenv('A')", "judge must not use os.getenv"),
        ("judge/a.py", "\n" * 401, "401 lines, at most 400"),
        ("kernels/score.py", "\n" * 601, "601 lines, at most 600"),
        ("ops/utils.py", "", "name the file after what it holds"),
        (
            "judge/a.py",
            f"def f({', '.join(f'a{n}' for n in range(11))}): ...",
            "f has 11 parameters, at most 10",
        ),
        (
            "ops/a.py",
            f"def f(a, *, {', '.join(f'a{n}' for n in range(14))}): ...",
            "f has 15 parameters, at most 14",
        ),
        ("judge/a.py", "x = 1", "judge/a.py: the module has no docstring"),
        ("ops/one.py", '"""One."""\ndef op(): ...', "ops/__init__.py: op has no docstring"),
        (
            "judge/a.py",
            '"""D."""\n__all__ = ["A"]\nclass A:\n    """\n    Late.\n    """',
            "A has no docstring that begins",
        ),
        ("judge/a.py", '"""D."""\n__all__ = ["A"]', "A of __all__ is not defined or imported"),
    ],
)
def test_the_rules_reject(tmp_path: Path, name: str, source: str, complaint: str) -> None:
    src = tree(tmp_path, GOOD | {name: source})
    complaints = [*broken_imports(src), *broken_sizes(src), *broken_docstrings(src)]
    assert any(complaint in line for line in complaints), complaints


def test_the_limits_are_inclusive(tmp_path: Path) -> None:
    ten = f"def f(self, {', '.join(f'a{n}' for n in range(10))}): ...\n"
    src = tree(tmp_path, GOOD | {"judge/a.py": ten + "\n" * 399})
    assert list(broken_sizes(src)) == []


def test_the_misspelling_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    word = "Light" + "ing"
    path.write_text(f"{word}Indexer\nflash-{word.lower()}\nhigh{word.lower()} is a word\nlightning\n", encoding="utf-8")
    assert [line.split(":")[-3] for line in misspelled([path])] == ["1", "2"]
