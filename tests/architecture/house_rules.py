"""The floors of the house, and every rule about files as data with a function that finds what breaks it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from house_sources import OURS, Sources, Use, assigned, dotted, origin, package_of, public_names, top_level

# Lowest first. A part imports from floors below its own and from itself, never from beside or above.
FLOORS = (
    ("reference", "intervals"),
    ("kernels",),
    ("ops", "indexer"),
    ("__init__",),
    ("parallel", "testing"),
    ("models",),
    ("files", "judge"),
    ("recipe", "bench"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
LEVEL = {part: level for level, floor in enumerate(FLOORS) for part in floor}
# The definition and the ruler are for judges of operators alone, the GPU programs for who launches or tunes them.
ONLY_FOR = {"reference": ("testing",), "testing": ("bench",), "kernels": ("ops", "bench")}
TORCH = frozenset({"torch"})
FILES = frozenset({"datasets", "gguf", "matplotlib", "pyarrow", "safetensors"})
WITH_MODELS = TORCH | FILES | {"accelerate", "numpy", "peft", "rich", "transformers"}
LIBRARIES = {
    "kernels": frozenset({"tilelang", "tvm_ffi"}),
    **dict.fromkeys(("reference", "intervals", "indexer", "__init__", "parallel", "testing"), TORCH),
    "ops": TORCH | {"numpy"},  # lists of work are dealt by its operators on small arrays, faster than torch's
    **dict.fromkeys(("models", "files", "judge", "recipe"), WITH_MODELS),
    "bench": TORCH | {"rich", "cudnn"},  # a peer, where it is installed
    **dict.fromkeys(("commands", "cli"), TORCH | {"rich", "typer"}),
    "__main__": frozenset(),
}
FORBIDDEN_NAMES = {"ops": frozenset({"torch.distributed"})}
NOBODY = frozenset({"os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"})
FORBIDDEN_FILES = frozenset({"utils.py", "util.py", "helpers.py", "misc.py"})
CAPABILITY_FILE = "ops/bodies.py"
MAX_LINES, MAX_LINES_KERNEL = 400, 600  # a kernel: its Python file and the header of the same name together
MAX_POSITIONAL, MAX_PARAMETERS = 10, 10
MAX_PARAMETERS_OPERATOR = 20  # of `dsa_attention`; of a shared sequence: group and layout, no sinks
GENERATION = re.compile(r"kernels/(sm_\w+)/")
PRIVATE = re.compile(r"\._(?!_|(?:asdict|fields|make|replace)\b)")  # those of a NamedTuple are public
FAMILY = re.compile(r"ops/(\w+)/")
SCHEMA_CALLS = frozenset({"infer_schema", "define", "impl", "register_fake", "register_kernel", "custom_op"})


@dataclass(frozen=True)
class Fault:
    """What breaks a rule. The key has no line and no number: it is the same as long as the fault is."""

    key: str
    detail: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.key}{self.detail}" + (f" (line {self.line})" if self.line else "")


def part_of(name: str) -> str:
    return name.partition("/")[0].removesuffix(".py").removesuffix(".cuh")


def target_part(dotted: str) -> str | None:
    """The part of ours that a dotted name belongs to, or None."""
    first, _, rest = dotted.partition(".")
    if first != OURS:
        return None
    part = rest.partition(".")[0]
    return part if part in LEVEL else "__init__"


def inside(name: str, prefixes: frozenset[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def python_uses(sources: Sources) -> Iterator[tuple[str, Use]]:
    for name, found in sources.uses.items():
        yield from ((name, use) for use in found)


def floors(sources: Sources) -> Iterator[Fault]:
    """Imports go down only, and some parts are for some parts alone."""
    for name in sources.text:
        if part_of(name) not in LEVEL:
            yield Fault(f"{name}: {part_of(name)} has no floor")
        if name.endswith(".cuh") and part_of(name) != "kernels":
            yield Fault(f"{name}: device code lies in kernels alone")
    for name, use in python_uses(sources):
        part, target = part_of(name), target_part(use.name)
        if part not in LEVEL or target in (None, part):
            continue
        assert target is not None
        if LEVEL[target] >= LEVEL[part]:
            relation = "above" if LEVEL[target] > LEVEL[part] else "beside"
            yield Fault(f"{name} must not use {use.name}", f": {target} lies {relation} {part}", use.line)
        elif part not in ONLY_FOR.get(target, (part,)):
            yield Fault(f"{name} must not use {use.name}", f": {target} is for {ONLY_FOR[target]} alone", use.line)


def libraries(sources: Sources) -> Iterator[Fault]:
    """Which part may use which library; nobody reads environment variables."""
    for name, use in python_uses(sources):
        part, root = part_of(name), use.name.split(".")[0]
        if inside(use.name, NOBODY | FORBIDDEN_NAMES.get(part, frozenset())):
            yield Fault(f"{name} must not use {use.name}", line=use.line)
        elif use.imported and root not in {OURS, *sys.stdlib_module_names, *LIBRARIES.get(part, ())}:
            yield Fault(f"{name} must not use {use.name}", f": {part} does without {root}", line=use.line)


def late_imports(sources: Sources) -> Iterator[Fault]:
    """What imports TileLang when it is loaded is imported inside functions only, but for kernels themselves."""
    heavy = {
        name for name, found in sources.uses.items()
        if any(use.imported and not use.nested and inside(use.name, LIBRARIES["kernels"]) for use in found)
    }  # fmt: skip
    for name, edges in sources.edges.items():
        for edge in edges:
            reached = {edge.target} | sources.reach(edge.target, late=False)
            if part_of(name) != "kernels" and not edge.late and reached & heavy:
                yield Fault(f"{name} may import {edge.target} inside a function only", line=edge.line)


def circles(sources: Sources) -> Iterator[Fault]:
    """No circle between files, imports inside functions and includes counted."""
    for circle in sources.circles():
        yield Fault(f"{' <-> '.join(circle)}: a circle of imports")


def families(sources: Sources) -> Iterator[Fault]:
    """From outside a family of operators only its operators are seen: op.py, NAME_op.py.

    `bodies` knows the bodies, `ops` itself re-exports what is public of them, and `bench` measures and tunes them.
    """
    for name, edges in sources.edges.items():
        own = room(name, FAMILY)
        for edge in edges:
            family, leaf = room(edge.target, FAMILY), edge.target.rpartition("/")[2]
            is_operator = leaf == "op.py" or leaf.endswith("_op.py")
            knows_bodies = (name == CAPABILITY_FILE and leaf.endswith("_body.py")) or part_of(name) == "bench"
            if family and family != own and not is_operator and not knows_bodies and name != "ops/__init__.py":
                yield Fault(f"{name} must not use {edge.target}", f": of {family} only `op` is seen outside", edge.line)


def generations(sources: Sources) -> Iterator[Fault]:
    """A generation uses kernels/device and itself, kernels/device itself alone; `.cuh` files obey the same rule."""
    for name, edges in sources.edges.items():
        own, in_device = room(name, GENERATION), name.startswith("kernels/device/")
        if name.endswith(".cuh"):
            for target, line in sources.headers(name):
                if target not in sources.text:
                    yield Fault(f"{name} includes {target}, which is no header of ours", line=line)
        for edge in edges:
            if not edge.target.startswith("kernels/") or not (own or in_device):
                continue
            allowed = edge.target.startswith("kernels/device/") or (own and room(edge.target, GENERATION) == own)
            if not allowed:
                yield Fault(f"{name} must not use {edge.target}", f": {own or 'device'} stands alone", line=edge.line)


def room(name: str, pattern: re.Pattern[str]) -> str | None:
    match = pattern.match(name)
    return match[1] if match else None


def capabilities(sources: Sources) -> Iterator[Fault]:
    """One file asks which GPU this is."""
    for name, nodes in sources.nodes.items():
        if name == CAPABILITY_FILE:
            continue
        asks_properties = "get_device_properties" in sources.text[name]
        for node, _ in nodes:
            word = node.attr if isinstance(node, ast.Attribute) else node.name if isinstance(node, ast.alias) else ""
            if word == "get_device_capability" or (asks_properties and word in ("major", "minor")):
                yield Fault(f"{name} asks for a GPU's capability", f": ask {CAPABILITY_FILE}", node.lineno)


def private_names(sources: Sources) -> Iterator[Fault]:
    """A name with a leading underscore stays in its part; in a family or generation, there."""
    for name, use in python_uses(sources):
        target = sources.file_of(use.name) or ""
        if not PRIVATE.search(use.name) or not inside(use.name, frozenset({OURS})):
            continue
        if target_part(use.name) != part_of(name) or any(
            room(target, kind) not in (None, room(name, kind)) for kind in (FAMILY, GENERATION)
        ):
            yield Fault(f"{name} must not use {use.name}, which is private to its part", line=use.line)


def file_sizes(sources: Sources) -> Iterator[Fault]:
    """Files that a reader can hold in mind, under names that say what they hold."""
    lines = {name: len(text.splitlines()) for name, text in sources.text.items()}
    for name, count in lines.items():
        if name.rpartition("/")[2] in FORBIDDEN_FILES:
            yield Fault(f"{name}: name the file after what it holds")
        limit, partner = MAX_LINES, name.removesuffix(".py") + ".cuh"
        if name.startswith("kernels/") and name.endswith(".py") and (partner in lines or GENERATION.match(name)):
            count, limit = count + lines.get(partner, 0), MAX_LINES_KERNEL
        elif name.startswith("kernels/") and name.removesuffix(".cuh") + ".py" in lines:
            continue
        if count > limit:
            yield Fault(f"{name} is too long", f": {count} lines, at most {limit}")


def parameters(sources: Sources) -> Iterator[Fault]:
    """Ten parameters; the public operators and `attach` take up to 20, the further ones by keyword.

    Free are the functions whose parameters the schema of a custom operator dictates, commands (a parameter for each
    option) and device programs (one for each tensor).
    """
    entries = ("__init__.py", "ops/__init__.py", "parallel/__init__.py", "models/attach.py")
    operators = [
        definition(name, file, sources) for file in entries
        if file in sources.trees for name in public_names(sources.trees[file])
    ]  # fmt: skip
    for file, nodes in sources.nodes.items():
        schemas = schema_functions(nodes)
        for node, _ in nodes:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name in schemas:
                continue
            if node.decorator_list and part_of(file) in ("cli", "commands", "kernels"):
                continue
            positional = [a for a in [*node.args.posonlyargs, *node.args.args] if a.arg not in ("self", "cls")]
            count = len(positional) + len(node.args.kwonlyargs)
            limit = MAX_PARAMETERS_OPERATOR if node in operators else MAX_PARAMETERS
            if len(positional) > MAX_POSITIONAL:
                detail = f": {len(positional)} positional, at most {MAX_POSITIONAL}"
                yield Fault(f"{file}: {node.name} has too many parameters", detail, node.lineno)
            elif count > limit:
                detail = f": {count}, at most {limit}"
                yield Fault(f"{file}: {node.name} has too many parameters", detail, node.lineno)


def schema_functions(nodes: list[tuple[ast.AST, bool]]) -> set[str]:
    """Functions that are handed to torch.library (as an argument or under its decorator)."""
    names: set[str] = set()
    for node, _ in nodes:
        if isinstance(node, ast.Call) and of_torch_library(node.func):
            names |= {argument.id for argument in node.args if isinstance(argument, ast.Name)}
        elif isinstance(node, ast.FunctionDef):
            decorators = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
            names |= {node.name for decorator in decorators if of_torch_library(decorator)}
    return names


def of_torch_library(function: ast.expr) -> bool:
    path, _, name = dotted(function).rpartition(".")
    return name in SCHEMA_CALLS and path.endswith("library")


def docstrings(sources: Sources) -> Iterator[Fault]:
    """Modules, and the names in __all__ of modules without a leading underscore, each judged where it is defined."""
    for file, tree in sources.trees.items():
        if any(piece.startswith("_") and piece != "__init__.py" for piece in file.split("/")):
            continue
        if not first_paragraph(tree):
            yield Fault(f"{file}: the module has no docstring that begins on its first line")
        for name in public_names(tree):
            node = definition(name, file, sources)
            if node is None:
                yield Fault(f"{file}: {name} of __all__ is not defined or imported")
            elif isinstance(node, ast.FunctionDef | ast.ClassDef) and not first_paragraph(node):
                yield Fault(f"{file}: {name} has no docstring that begins on its first line")


def definition(name: str, file: str, sources: Sources) -> ast.AST | None:
    """The class or function behind a name, through re-exports; another node if it is neither; or None."""
    package = package_of(file)
    for node in top_level(sources.trees[file].body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    target = sources.file_of(".".join([*origin(node, package), alias.name]))
                    return definition(alias.name, target, sources) if target and target != file else node
        if name in assigned(node):
            return node
    module = sources.file_of(".".join([*package, name]))
    return sources.trees[module] if module and module.endswith((f"/{name}.py", f"/{name}/__init__.py")) else None


def first_paragraph(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    return (ast.get_docstring(node, clean=False) or "").partition("\n")[0].strip()


RULES: tuple[Callable[[Sources], Iterator[Fault]], ...] = (
    floors, libraries, late_imports, circles, families, generations, capabilities, private_names, file_sizes,
    parameters, docstrings,
)  # fmt: skip
