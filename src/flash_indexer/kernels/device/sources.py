"""How the .cuh beside a kernel's module becomes the CUDA text that TileLang imports: headers of this package inlined.

TileLang hands the compiler one text without a folder of its own. Hence `#include "..."` (relative to the file that says
it, as for any compiler) is replaced by the header's text, once: a header may include others. `#include <...>` stays.
"""

import re
from pathlib import Path

INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)
ONCE = "#pragma once\n"


def source(module):
    """The CUDA text of a kernel, from the .cuh beside its module: `source(__file__)`.

    Raises:
        FileNotFoundError: where it, or a header that is included directly or by another, is missing.
    """
    return inlined(Path(module).with_suffix(".cuh"))


def inlined(path, included=None):
    """The text of a .cuh with its headers in it; empty where `included`, a set of paths, has it already."""
    path, included = path.resolve(), set() if included is None else included
    if path in included:
        return ""
    included.add(path)
    text = path.read_text(encoding="utf-8").replace(ONCE, "", 1)
    return INCLUDE.sub(lambda include: inlined(path.parent / include[1], included), text)
