"""The rules of architecture: each accepts a good tree, and finds what a planted file breaks."""

from __future__ import annotations

from pathlib import Path

import pytest
from house_rules import RULES
from house_sources import OURS, Sources

GOOD = {
    "__init__.py": '"""A package."""\nfrom flash_indexer.ops import op\n\n__all__ = ["op"]\n',
    "reference.py": '"""The definition."""\nimport torch\n',
    "intervals.py": '"""Intervals."""\nimport torch\n',
    "indexer.py": '"""The module."""\nfrom torch.nn import Module\n',
    "testing.py": '"""The ruler."""\nfrom flash_indexer.reference import x\nfrom flash_indexer.ops import op\n',
    "kernels/cache.py": '"""Loads."""\ndef load():\n    """x"""\n    import tilelang\n',
    "kernels/catalog.py": '"""Kernels."""\ndef f():\n    from .sm_90 import score\n    from .sm_80 import score\n',
    "kernels/device/rows.cuh": '#include "items.cuh"\n#include <cuda.h>\n',
    "kernels/device/items.cuh": "#pragma once\n",
    "kernels/sm_90/sizes.py": '"""Sizes."""\nWIDTHS = (1,)\n',
    "kernels/sm_90/score.py": '"""A kernel."""\nimport tilelang\nfrom .sizes import WIDTHS\nH = "score.cuh"\n',
    "kernels/sm_90/score.cuh": '#include "../device/rows.cuh"\n#include "device/items.cuh"\n#include "wide.cuh"\n',
    "kernels/sm_90/wide.cuh": "#pragma once\n",
    "kernels/sm_80/score.py": '"""A kernel."""\nimport tilelang\n',
    "ops/__init__.py": '"""Operators."""\nfrom .kl.op import op\nfrom .kl.torch_body import st\n\n__all__ = ["op"]\n',
    "ops/bodies.py": '"""Bodies."""\nimport torch\nfrom .kl import torch_body\n'
    "def f():\n    return torch.cuda.get_device_capability(), torch.cuda.get_device_properties(0).major\n",
    "ops/kl/op.py": '"""KL."""\nimport torch\nfrom flash_indexer.kernels import cache\nfrom .plan import _f\n'
    'from flash_indexer.kernels.sm_90 import sizes\ndef op():\n    """x"""\n    from ...kernels.sm_90 import score\n',
    "ops/kl/plan.py": '"""Plan."""\nfrom ..checks import N\nfrom ..attention import wide_op\ndef _f(): N._fields\n',
    "ops/kl/torch_body.py": '"""Torch."""\nfrom flash_indexer.ops.attention.op import y\ndef st(): ...\n',
    "ops/attention/op.py": '"""Attention."""\nfrom ..checks import z\n',
    "ops/attention/gpu_body.py": '"""GPU."""\n',
    "ops/attention/wide_op.py": '"""Wide attention."""\n',
    "ops/checks.py": '"""Checks."""\nfrom flash_indexer.intervals import i\n',
    "parallel/a.py": '"""Parallel."""\nimport torch.distributed\nfrom flash_indexer import op\n',
    "models/a.py": '"""Models."""\nimport transformers\n',
    "files/a.py": '"""Files."""\nimport safetensors\nfrom flash_indexer.models import a\n',
    "judge/a.py": '"""Judge."""\nimport numpy\n',
    "recipe/a.py": '"""Recipe."""\nimport os, accelerate\nfrom flash_indexer import op\nos.sync()\n',
    "recipe/b.py": '"""Recipe."""\nfrom flash_indexer.recipe.a import _x\n',
    "bench/a.py": '"""Bench."""\nimport flash_indexer.testing\nfrom flash_indexer.kernels import cache\n',
    "cli.py": '"""Commands."""\nimport typer\ndef main():\n    from flash_indexer.recipe import a\n',
    "__main__.py": "from flash_indexer.cli import main\n",
}
ELEVEN = ", ".join(f"a{n}" for n in range(11))
SCHEMA = f"import torch\ndef f({ELEVEN}): ...\n"


def faults_of(tmp_path: Path, files: dict[str, str]) -> dict[str, list[str]]:
    """For each rule what breaks it in a package of these files."""
    for name, text in files.items():
        path = tmp_path / OURS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    sources = Sources(tmp_path)
    return {rule.__name__: [str(fault) for fault in rule(sources)] for rule in RULES}


def test_the_rules_accept_a_good_tree(tmp_path: Path) -> None:
    assert faults_of(tmp_path, GOOD) == {rule.__name__: [] for rule in RULES}


@pytest.mark.parametrize(
    ("rule", "name", "source", "complaint"),
    [
        # floors: every pair of neighbours, from below; beside; by every way to import
        ("floors", "reference.py", "from flash_indexer.intervals import i", "intervals lies beside reference"),
        ("floors", "intervals.py", "from . import kernels", "kernels lies above intervals"),
        ("floors", "kernels/cache.py", "from flash_indexer.ops import op", "ops lies above kernels"),
        ("floors", "indexer.py", "from .ops import op", "ops lies beside indexer"),
        ("floors", "ops/checks.py", "from flash_indexer.indexer import M", "indexer lies beside ops"),
        ("floors", "ops/checks.py", "from flash_indexer import op", "__init__ lies above ops"),
        ("floors", "__init__.py", "from flash_indexer.parallel.a import x", "parallel lies above __init__"),
        ("floors", "parallel/a.py", "from ..models.a import x", "models lies above parallel"),
        ("floors", "parallel/a.py", "from .. import testing", "testing lies beside parallel"),
        ("floors", "models/a.py", "def f():\n    import flash_indexer.files.a", "files lies above models"),
        ("floors", "files/a.py", "from flash_indexer.judge import a", "judge lies beside files"),
        ("floors", "judge/a.py", "from flash_indexer.files import a", "files lies beside judge"),
        (
            "floors",
            "judge/a.py",
            "import importlib\nimportlib.import_module('flash_indexer.recipe')",
            "lies above judge",
        ),
        ("floors", "recipe/a.py", "from flash_indexer.bench import a", "bench lies beside recipe"),
        ("floors", "bench/a.py", "from flash_indexer.cli import main", "cli lies above bench"),
        ("floors", "cli.py", "from flash_indexer.__main__ import main", "__main__ lies above cli"),
        ("floors", "ops/checks.py", "from .. import reference", "reference is for ('testing',) alone"),
        ("floors", "judge/a.py", "import flash_indexer.reference", "reference is for ('testing',) alone"),
        ("floors", "judge/a.py", "from flash_indexer.testing import x", "testing is for ('bench',) alone"),
        ("floors", "recipe/a.py", "from flash_indexer.kernels import cache", "kernels is for ('ops', 'bench') alone"),
        ("floors", "recipe/a.py", "import flash_indexer\nflash_indexer.kernels.x", "alone (line 2)"),
        ("floors", "extra.py", "", "extra.py: extra has no floor"),
        ("floors", "ops/kl/a.cuh", "", "device code lies in kernels alone"),
        # libraries
        ("libraries", "intervals.py", "import numpy", "intervals does without numpy"),
        ("libraries", "kernels/sm_90/score.py", "from torch.autograd import Function", "kernels does without torch"),
        ("libraries", "ops/checks.py", "import tilelang", "ops does without tilelang"),
        ("libraries", "bench/a.py", "def f():\n    import tilelang", "bench does without tilelang"),
        ("libraries", "ops/kl/op.py", "def f():\n    import torch.distributed as dist", "torch.distributed (line 2)"),
        ("libraries", "ops/kl/op.py", "import torch\ntorch.distributed.init()", "torch.distributed.init (line 2)"),
        ("libraries", "ops/kl/op.py", "import torch as t\nt.distributed.init()", "must not use torch.distributed"),
        ("libraries", "indexer.py", "def f():\n    import transformers", "indexer does without transformers"),
        ("libraries", "testing.py", "import transformers", "testing does without transformers"),
        ("libraries", "parallel/a.py", "if True:\n    import transformers", "parallel does without transformers"),
        ("libraries", "parallel/a.py", "__import__('transformers.models')", "parallel does without transformers"),
        ("libraries", "cli.py", "import matplotlib", "cli does without matplotlib"),
        ("libraries", "judge/a.py", "import os\nx = os.environ['A']", "must not use os.environ (line 2)"),
        ("libraries", "judge/a.py", "from os import getenv", "must not use os.getenv"),
        ("libraries", "kernels/cache.py", "import os as o\no.getenv('A')", "must not use os.getenv"),
        # what loads TileLang is imported late, at one remove as well
        ("late_imports", "ops/kl/op.py", "from flash_indexer.kernels.sm_90 import score", "inside a function only"),
        (
            "late_imports",
            "kernels/cache.py",
            "from . import catalog\nfrom .sm_80 import score",
            "inside a function only",
        ),
        # families
        ("families", "ops/attention/op.py", "from ..kl.torch_body import x", "must not use ops/kl/torch_body.py"),
        ("families", "ops/attention/op.py", "def f():\n    from ..kl import plan", "must not use ops/kl/plan.py"),
        ("families", "ops/checks.py", "from flash_indexer.ops.attention import gpu_body", "of attention only `op`"),
        (
            "families",
            "ops/bodies.py",
            "from flash_indexer.ops.kl import plan",
            "ops/bodies.py must not use ops/kl/plan",
        ),
        ("families", "judge/a.py", "import flash_indexer.ops.kl.torch_body as b", "must not use ops/kl/torch_body.py"),
        (
            "families",
            "parallel/a.py",
            "import flash_indexer\nflash_indexer.ops.kl.plan.f()",
            "must not use ops/kl/plan.py",
        ),
        # generations
        ("generations", "kernels/sm_80/score.py", "from ..sm_90 import sizes", "sm_80 stands alone"),
        (
            "generations",
            "kernels/sm_80/score.py",
            "from .. import cache",
            "must not use kernels/cache.py: sm_80 stands",
        ),
        ("generations", "kernels/sm_80/score.py", "H = '../sm_90/score.cuh'", "must not use kernels/sm_90/score.cuh"),
        ("generations", "kernels/sm_80/a.cuh", '#include "../sm_90/wide.cuh"', "must not use kernels/sm_90/wide.cuh"),
        ("generations", "kernels/sm_80/a.cuh", "#  include <sm_90/wide.cuh>", "must not use kernels/sm_90/wide.cuh"),
        ("generations", "kernels/device/a.cuh", '\n#include "sm_90/wide.cuh"', "device stands alone (line 2)"),
        ("generations", "kernels/device/a.py", "from flash_indexer.kernels import cache", "device stands alone"),
        ("generations", "kernels/sm_90/wide.cuh", '#include "absent.cuh"', "absent.cuh, which is no header of ours"),
        # capabilities
        ("capabilities", "ops/kl/op.py", "import torch\ntorch.cuda.get_device_capability()", "capability: ask ops/bod"),
        (
            "capabilities",
            "bench/a.py",
            "from torch.cuda import get_device_capability as g",
            "asks for a GPU's capability",
        ),
        ("capabilities", "bench/a.py", "import torch\np = torch.cuda.get_device_properties(0)\np.major", "(line 3)"),
        # private names
        ("private_names", "recipe/a.py", "from flash_indexer.ops.kl.plan import _f", "private to its part"),
        ("private_names", "ops/checks.py", "from .kl.op import _f", "private to its part"),
        ("private_names", "judge/a.py", "from flash_indexer.models import a\na._x", "private to its part (line 2)"),
        # sizes of files
        ("file_sizes", "judge/a.py", "\n" * 401, "judge/a.py is too long: 401 lines, at most 400"),
        ("file_sizes", "kernels/cache.py", "\n" * 401, "401 lines, at most 400"),
        ("file_sizes", "kernels/device/rows.cuh", "\n" * 401, "401 lines, at most 400"),
        ("file_sizes", "kernels/sm_90/wide.cuh", "\n" * 401, "401 lines, at most 400"),
        ("file_sizes", "kernels/sm_80/score.py", "\n" * 601, "601 lines, at most 600"),
        ("file_sizes", "kernels/sm_90/score.cuh", "\n" * 597, "score.py is too long: 601 lines, at most 600"),
        ("file_sizes", "ops/utils.py", "", "name the file after what it holds"),
        # parameters
        ("parameters", "judge/a.py", f"def f({ELEVEN}): ...", "f has too many parameters: 11 positional, at most 10"),
        ("parameters", "judge/a.py", f"def f(*, {ELEVEN}): ...", "f has too many parameters: 11, at most 10"),
        ("parameters", "kernels/sm_90/a.py", f"class A:\n    def f(self, {ELEVEN}): ...", "11 positional, at most 10"),
        (
            "parameters",
            "ops/kl/op.py",
            f"def op(*, b, c, d, e, f, g, h, i, j, k, {ELEVEN}): ...",
            "op has too many parameters: 21, at most",
        ),
        ("parameters", "ops/kl/op.py", f"def op({ELEVEN}): ...", "op has too many parameters: 11 positional, at most"),
        ("parameters", "ops/kl/plan.py", f"def op(*, {ELEVEN}): ...", "op has too many parameters: 11, at most 10"),
        ("parameters", "ops/kl/op.py", f"{SCHEMA}table.define(f)", "f has too many parameters: 11 positional"),
        # docstrings
        ("docstrings", "judge/a.py", "x = 1", "judge/a.py: the module has no docstring"),
        ("docstrings", "ops/kl/op.py", '"""One."""\ndef op(): ...', "ops/__init__.py: op has no docstring"),
        (
            "docstrings",
            "judge/a.py",
            '"""D."""\n__all__ = ["A"]\nclass A:\n    """\n    Late."""',
            "A has no docstring",
        ),
        ("docstrings", "judge/a.py", '"""D."""\n__all__ = ["A"]', "A of __all__ is not defined or imported"),
    ],
)
def test_the_rules_reject(tmp_path: Path, rule: str, name: str, source: str, complaint: str) -> None:
    faults = faults_of(tmp_path, GOOD | {name: source})[rule]
    assert any(complaint in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        ({"judge/a.py": "from . import b", "judge/b.py": "from .a import x"}, "judge/a.py <-> judge/b.py"),
        (
            {
                "judge/a.py": "def f():\n    from .b import x",
                "judge/b.py": "from . import c",
                "judge/c.py": "from . import a",
            },
            "judge/a.py <-> judge/b.py <-> judge/c.py",
        ),
        ({"ops/checks.py": "from flash_indexer.ops import op"}, "ops/__init__.py <-> ops/attention/op.py"),
        (
            {"ops/attention/op.py": "from ..kl.op import op", "ops/kl/op.py": "from ..attention.op import y"},
            "op.py <-> ",
        ),
        ({"kernels/device/items.cuh": '#include "rows.cuh"'}, "kernels/device/items.cuh <-> kernels/device/rows.cuh"),
    ],
)
def test_circles_are_found(tmp_path: Path, files: dict[str, str], circle: str) -> None:
    faults = faults_of(tmp_path, GOOD | files)["circles"]
    assert any(circle in fault for fault in faults), faults


def test_what_a_schema_dictates_is_free(tmp_path: Path) -> None:
    """So are commands and device programs; the limits themselves are allowed."""
    registered = [
        f"{SCHEMA}torch.library.define('a::b', torch.library.infer_schema(f, mutates_args=()))\n",
        f"import torch\n@torch.library.register_fake('a::b')\ndef f({ELEVEN}): ...\n",
        f"import torch\ndef f(self, {ELEVEN.removesuffix(', a10')}): ...\n",
    ]
    twenty = f"def op(a, b, *, c, d, e, f, g, h, i, {ELEVEN}):\n    'x'\n"
    free = {
        **{f"ops/kl/registered{n}.py": f'"""D."""\n{source}' for n, source in enumerate(registered)},
        "ops/kl/op.py": f'"""KL."""\n{twenty}',
        "cli.py": f'"""Commands."""\nimport typer\n@typer.Typer().command()\ndef main({ELEVEN}): ...\n',
        "kernels/sm_90/score.py": f'"""K."""\nimport tilelang.language as T\n@T.prim_func\ndef main({ELEVEN}): ...\n',
        "kernels/sm_90/score.cuh": "\n" * 595,
        "judge/a.py": '"""D."""' + "\n" * 400,
    }
    assert faults_of(tmp_path, GOOD | free) == {rule.__name__: [] for rule in RULES}


def test_a_fault_has_one_key_wherever_it_stands(tmp_path: Path) -> None:
    keys = []
    for folder, blank in (("a", ""), ("b", "\n" * 7)):
        path = tmp_path / folder / OURS / "intervals.py"
        path.parent.mkdir(parents=True)
        path.write_text(f"{blank}import numpy\n", encoding="utf-8")
        keys.append([fault.key for rule in RULES[:2] for fault in rule(Sources(tmp_path / folder))])
    assert keys[0] == keys[1] == ["intervals.py must not use numpy"]
