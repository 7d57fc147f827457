"""Device code is written once: what headers hold, who includes them, and that they go together."""

from __future__ import annotations

import os
import re
import subprocess
from enum import IntEnum
from pathlib import Path

import pytest

from flash_indexer import kernels
from flash_indexer.kernels.device import items, sources
from flash_indexer.kernels.sm_90 import sizes

FOLDER = Path(kernels.__file__).parent
HEADERS = sorted(FOLDER.rglob("*.cuh"))
FUNCTION = re.compile(r"^static __device__ (?:__forceinline__|constexpr) [\w ]+?[*&]* ?(\w+)\(([^)]*)\)", re.MULTILINE)


def test_every_header_belongs_to_a_kernel():
    """Its own, or by includes, those of included headers counted."""
    used: set[Path] = set()
    for module in FOLDER.glob("sm_*/*.py"):
        text = module.read_text(encoding="utf-8")
        if "source(__file__)" in text:
            sources.inlined(module.with_suffix(".cuh"), used)
        for name in re.findall(r'with_name\("(\w+)\.py"\)', text):  # a second form of the kernel
            sources.inlined(module.with_name(name + ".cuh"), used)
    assert len(HEADERS) > 10
    assert [str(path) for path in HEADERS if path not in used] == []


def test_a_module_with_a_header_of_its_name_uses_it():
    for header in FOLDER.glob("sm_*/*.cuh"):
        module = header.with_suffix(".py")
        if module.exists() and module.stem != "head_gradients":  # the header of two kernels and their template
            assert "source(__file__)" in module.read_text(encoding="utf-8"), module


def test_no_function_is_defined_twice():
    """But for overloads of one file, which differ in the types of their parameters."""
    homes: dict[str, list[tuple[Path, tuple[str, ...]]]] = {}
    for path in HEADERS:
        for name, parameters in FUNCTION.findall(path.read_text(encoding="utf-8")):
            types = tuple(parameter.strip().rpartition(" ")[0] for parameter in parameters.split(","))
            homes.setdefault(name, []).append((path, types))
    assert len(homes) > 60
    assert {name: found for name, found in homes.items() if len(set(found)) < len(found)} == {}
    assert {name: found for name, found in homes.items() if len({path for path, _ in found}) > 1} == {}


def test_no_body_stands_twice():
    """Functions whose text is the same but for names: what differs in a prefix alone is one function."""
    bodies: dict[str, list[str]] = {}
    for path in HEADERS:
        for function in re.split(r"^(?=static __device__)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            head, _, body = function.partition("{")
            name = re.search(r"(\w+)\(", head)
            text = re.sub(r"\s+", " ", body.partition("\n}\n")[0])
            if name and len(text) > 40:
                bodies.setdefault(text, []).append(name[1])
    assert [names for names in bodies.values() if len(names) > 1] == []


@pytest.mark.slow
def test_all_headers_compile_together(tmp_path, nvcc):
    """In one translation unit, in either order."""
    import tilelang  # noqa: F401  where its headers are, in environment variables

    program = tmp_path / "all.cu"
    paths = [*HEADERS, *reversed(HEADERS)]
    lines = ["#include <tl_templates/cuda/common.h>", *(f'#include "{path}"' for path in paths)]
    program.write_text("\n".join(lines) + "\n", encoding="utf-8")
    includes = [f"-I{os.environ[variable]}" for variable in ("TL_TEMPLATE_PATH", "TL_CUTLASS_PATH")]
    command = [
        nvcc,
        "-std=c++20",
        "-w",
        "--ptx",
        "-arch=sm_90a",
        *includes,
        "-o",
        str(tmp_path / "all.ptx"),
        str(program),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_headers_are_inlined_once_with_those_that_they_include(tmp_path):
    (tmp_path / "device").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "device" / "low.cuh").write_text("#pragma once\nint low;\n", encoding="utf-8")
    (tmp_path / "device" / "high.cuh").write_text('#pragma once\n#include "low.cuh"\nint high;\n', encoding="utf-8")
    kernel = tmp_path / "own" / "kernel.cuh"
    includes = '#include <there.h>\n#include "../device/high.cuh"\n#include "../device/low.cuh"\n'
    kernel.write_text(f"#pragma once\n{includes}int own;\n", encoding="utf-8")
    assert sources.source(kernel.with_suffix(".py")) == "#include <there.h>\nint low;\nint high;\nint own;\n"


def test_a_header_that_is_missing_is_named(tmp_path):
    (tmp_path / "kernel.cuh").write_text('#include "nowhere.cuh"\n', encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.cuh"):
        sources.source(tmp_path / "kernel.py")


@pytest.mark.parametrize("fields", [items.RowItem, items.KeyItem], ids=lambda fields: fields.__name__)
def test_items_have_the_same_fields_on_host_and_device(fields: type[IntEnum]):
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", fields.__name__).lower()
    text = (FOLDER / "device" / "items.cuh").read_text(encoding="utf-8")
    found = re.search(rf"namespace {name} \{{\nenum \{{ (.*) \}};\n\}}", text)
    assert found is not None
    assert found[1].split(", ") == [field.name for field in fields]
    assert [field.value for field in fields] == list(range(len(fields)))


def test_items_have_the_same_size_on_host_and_device():
    text = (FOLDER / "device" / "items.cuh").read_text(encoding="utf-8")
    assert f"enum {{ ITEM = {items.ITEM}, ITEM_BYTES = 4 * ITEM }};" in text and items.ITEM_BYTES == 4 * items.ITEM
    softmax = (FOLDER / "sm_90" / "attention_softmax.cuh").read_text(encoding="utf-8")
    assert f"enum {{ ROW_BYTES = {sizes.ROW_BYTES} }};" in softmax
    assert all(len(fields) <= items.ITEM for fields in (items.RowItem, items.KeyItem, items.LatentItem))
    short = (
        items.ScoreItem, items.NarrowItem, items.QueryTilesItem, items.KeyBlocksItem, items.Block, items.ReduceItem
    )  # fmt: skip
    assert all(len(fields) <= items.SHORT_ITEM for fields in short)
