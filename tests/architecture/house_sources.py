"""What the sources say: imports, includes, who reaches whom, read from the text without running it."""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

OURS = "flash_indexer"
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)
HEADER = re.compile(r"[\w./-]+\.cuh")


@dataclass(frozen=True)
class Use:
    """A dotted name that a file imports or reaches through an imported module.

    nested: inside a function, so it is not run when the file is imported. imported: by an import, not by an attribute.
    """

    name: str
    line: int
    nested: bool
    imported: bool


@dataclass(frozen=True)
class Edge:
    """A file that another one of ours imports or includes; `late` where that happens inside a function."""

    target: str
    line: int
    late: bool


class Sources:
    """The package below `src`. Files are named by their path below the package: `ops/kl/op.py`."""

    def __init__(self, src: Path) -> None:
        root = src / OURS
        paths = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".cuh"))
        self.text = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}
        self.trees = {name: ast.parse(text) for name, text in self.text.items() if name.endswith(".py")}
        self.folders = {posixpath.dirname(name) for name in self.text}

    @cached_property
    def nodes(self) -> dict[str, list[tuple[ast.AST, bool]]]:
        """Every node of each Python file, with whether it lies in a function."""
        return {name: list(walk(tree)) for name, tree in self.trees.items()}

    @cached_property
    def uses(self) -> dict[str, list[Use]]:
        """What each Python file imports or reaches."""
        return {name: list(uses_among(nodes, package_of(name))) for name, nodes in self.nodes.items()}

    @cached_property
    def edges(self) -> dict[str, list[Edge]]:
        """For every file the files of ours that it imports, includes or names as its header, itself left out."""
        edges: dict[str, list[Edge]] = {name: [] for name in self.text}
        for name, found in self.uses.items():
            for use in found:
                if (target := self.file_of(use.name)) and target != name:
                    edges[name].append(Edge(target, use.line, use.nested))
        for name in self.text:
            edges[name] += [Edge(target, line, False) for target, line in self.headers(name) if target in self.text]
        return edges

    def file_of(self, dotted: str) -> str | None:
        """The file that holds a dotted name of ours: the module itself, or the one where the name lives."""
        first, *pieces = dotted.split(".")
        if first != OURS:
            return None
        for count in range(len(pieces), -1, -1):
            path = "/".join(pieces[:count])
            for file in [f"{path}.py", f"{path}/__init__.py"] if path else ["__init__.py"]:
                if file in self.text:
                    return file
            if path in self.folders:
                return None
        return None

    def headers(self, name: str) -> Iterator[tuple[str, int]]:
        """Headers that a file includes, or that a string of a Python file names: each with its line.

        A path counts from the file's own folder, then from kernels/. A quoted include that is neither is handed out as
        written; one in angle brackets is somebody else's.
        """
        if name.endswith(".cuh"):
            for match in INCLUDE.finditer(self.text[name]):
                quoted, angled = match.groups()
                target = self.header(name, quoted or angled)
                if target or quoted:
                    yield target or quoted, self.text[name].count("\n", 0, match.start()) + 1
            return
        for node, _ in self.nodes[name]:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and ".cuh" in node.value:
                for path in HEADER.findall(node.value):
                    if target := self.header(name, path):
                        yield target, node.lineno

    def header(self, name: str, path: str) -> str | None:
        for folder in (posixpath.dirname(name), "kernels"):
            if (target := posixpath.normpath(posixpath.join(folder, path))) in self.text:
                return target
        return None

    def circles(self) -> list[list[str]]:
        """Groups of files that reach each other (strongly connected components of two or more), each sorted."""
        reach = {name: self.reach(name) for name in self.text}
        groups = {
            tuple(sorted(m for m in reach[name] if name in reach[m])) for name in self.text if name in reach[name]
        }
        return [list(group) for group in sorted(groups)]

    def reach(self, name: str, late: bool = True) -> set[str]:
        """Every file that `name` leads to; without `late` those that run when it is imported."""
        reached: set[str] = set()
        open_files = [name]
        while open_files:
            for edge in self.edges[open_files.pop()]:
                if edge.target not in reached and (late or not edge.late):
                    reached.add(edge.target)
                    open_files.append(edge.target)
        return reached


def package_of(name: str) -> list[str]:
    return [OURS, *name.split("/")[:-1]]


def walk(node: ast.AST, nested: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below, with whether it lies in a function."""
    for child in ast.iter_child_nodes(node):
        yield child, nested
        yield from walk(child, nested or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def origin(node: ast.ImportFrom, package: list[str]) -> list[str]:
    """The absolute module, in pieces, that a file of `package` imports from."""
    base = package[: len(package) - node.level + 1] if node.level else []
    return [*base, *(node.module or "").split(".")] if node.module else base


def uses(tree: ast.Module, package: list[str]) -> Iterator[Use]:
    return uses_among(list(walk(tree)), package)


def uses_among(nodes: list[tuple[ast.AST, bool]], package: list[str]) -> Iterator[Use]:
    bound: dict[str, str] = {}
    for node, nested in nodes:
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
    for node, nested in nodes:
        if isinstance(node, ast.Attribute):
            root, _, rest = dotted(node).partition(".")
            if root in bound:
                yield Use(f"{bound[root]}.{rest}", node.lineno, nested, False)


def dotted(node: ast.expr) -> str:
    """`a.b.c` for such an expression, the empty string for another."""
    if isinstance(node, ast.Name):
        return node.id
    start = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{start}.{node.attr}" if start and isinstance(node, ast.Attribute) else ""


def import_by_name(call: ast.Call) -> list[str]:
    imports = dotted(call.func).split(".")[-1] in ("import_module", "__import__")
    return [str(name.value) for name in call.args[:1] if imports and isinstance(name, ast.Constant)]


def top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported, those under `if`, `try` and `with` included."""
    for node in body:
        yield node
        for field in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from top_level(getattr(node, field, []))


def assigned(node: ast.stmt) -> list[str]:
    """Names that an assignment binds."""
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return []
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def public_names(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if "__all__" in assigned(node) and isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            return list(ast.literal_eval(node.value))
    return []
