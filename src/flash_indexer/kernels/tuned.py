"""The tiles that kernels are launched with: winners of `flash-indexer tune` on this GPU, otherwise those of `sizes`.

Winners are in a file beside the kernel cache (docs/format.md), read once a process. An entry counts for exactly its
kernel, its version of the kernel's source, its GPU and its shape, and only where `sizes.candidates` admits its sizes.
"""

import functools
import json

from flash_indexer.kernels import cache as kernels
from flash_indexer.kernels.sm_90 import sizes as tiles

FORMAT, VERSION = "flash-indexer/tuned", 1


def location():
    """The file that is read."""
    return kernels.folder() / "flash-indexer" / "tuned.json"


def source(kernel):
    """The version of a kernel's source: that of all kernels, of which any may share code with it."""
    return kernels.version()


def sizes(kernel, gpu, shape):
    """Static sizes for one of `sizes.KERNELS` and its shape (see `sizes.default`) on the GPU of that name."""
    return dict(_sizes(kernel, gpu, tuple(sorted(shape.items()))))


def forget():
    """Reads the file again when sizes are asked for next."""
    _entries.cache_clear()
    _sizes.cache_clear()


@functools.cache
def _entries():
    return read(location()) or []


@functools.cache
def _sizes(kernel, gpu, shape):
    shape = dict(shape)
    for entry in _entries():
        if (entry.get("kernel"), entry.get("shape")) == (kernel, shape) and refusal(entry, gpu) is None:
            return next(x for x in tiles.candidates(kernel, shape) if x == entry["sizes"])
    return tiles.default(kernel, shape)


def read(path):
    """The entries of a file; None where it is missing, damaged or of another format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        return None
    entries = content.get("entries")
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else None


def refusal(entry, gpu):
    """Why an entry does not count on the GPU of that name, or None where it does."""
    kernel, shape = entry.get("kernel"), entry.get("shape")
    if kernel not in tiles.KERNELS:
        return "of no kernel that has tiles to choose"
    if entry.get("gpu") != gpu:
        return "of another GPU"
    if entry.get("source") != source(kernel):
        return "of another version of the kernel"
    try:
        admitted = entry.get("sizes") in tiles.candidates(kernel, shape)
    except (TypeError, KeyError, ValueError, ArithmeticError):
        return "of no shape that the kernel takes"
    return None if admitted else "with sizes that the kernel does not take"
