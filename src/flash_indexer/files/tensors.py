"""Tensors by name in safetensors files, of which one is in memory at a time: whole, or each process's rows of them.

    STEM.safetensors                   whole tensors
    STEM-00001-of-00008.safetensors    what the first of 8 processes holds: its rows of the tensors that FSDP2 shares
                                       out, and the other tensors whole, which the other 7 files leave out

A tensor that FSDP2 shares out is a DTensor, cut along its first dimension. The metadata in a file's header says which
rows it holds (`rows`: {name: [first row, rows of the whole tensor]} as JSON) and which save it belongs to (`save`, the
same in all its files). Who reads takes the rows that it needs from the files that hold them, however many processes
wrote them.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What a safetensors file calls them."""
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors")
_ROWS, _SAVE = "rows", "save"  # in a header's metadata


class Shard(NamedTuple):
    """Which of the processes that share tensors out this one is, from 0."""

    rank: int
    world: int


def write_tensors(
    folder: Path, stem: str, tensors: Mapping[str, Tensor], shard: Shard | None = None, *, save: str | None = None
) -> None:
    """Writes a safetensors file: the length of a JSON header in 8 bytes, the header, and the tensors' bytes by name.

    Args:
        shard: where FSDP2 shares tensors out: every process writes a file of its own, and calls with the same names.
        save: what tells this save from others, the same for all its files.

    Raises:
        ValueError: a dtype that no checkpoint of ours has.
    """
    header: dict[str, Any] = {}
    rows: dict[str, tuple[int, int]] = {}
    parts, end = {}, 0
    for name, x in sorted(tensors.items()):
        if x.dtype not in DTYPES:
            raise ValueError(f"write_tensors: {name} must be of {[str(d) for d in DTYPES]}, got {x.dtype}")
        if isinstance(x, DTensor):
            rows[name] = own_rows(x)[0], x.shape[0]
        elif shard is not None and shard.rank > 0:
            continue
        parts[name] = part = local(x)
        begin, end = end, end + math.prod(part.shape) * part.element_size()
        header[name] = dict(dtype=DTYPES[x.dtype], shape=list(part.shape), data_offsets=[begin, end])
    metadata = ({_ROWS: json.dumps(rows)} if rows else {}) | ({} if save is None else {_SAVE: save})
    if metadata:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / _file_name(stem, shard)).open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for x in parts.values():
            target.write(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        target.flush()
        os.fsync(target.fileno())  # the process that moves the folder into place may be on another machine


def tensor_files(folder: Path, stem: str) -> list[Path]:
    """The file of whole tensors, or those of all shards in their order; empty where there is none.

    Raises:
        FileNotFoundError: the file of a shard is missing. ValueError: there are files of more than one save.
    """
    shards = {
        Shard(int(match[1]) - 1, int(match[2])): file
        for file in folder.glob(f"{stem}-*.safetensors")
        if (match := _SHARD.fullmatch(file.name.removeprefix(stem)))
    }
    file, worlds = folder / _file_name(stem, None), sorted({shard.world for shard in shards})
    kinds = [file.name] * file.is_file() + [f"{stem}-*-of-{world:05}.safetensors" for world in worlds]
    if len(kinds) > 1:
        raise ValueError(
            f"tensor_files: {folder} must hold the files of one save, got {' and '.join(kinds)}; delete those of the "
            "earlier save, or copy the whole checkpoint into an empty folder"
        )
    if not worlds:
        return [file] if kinds else []
    wanted = [Shard(rank, worlds[0]) for rank in range(worlds[0])]
    if missing := [_file_name(stem, shard) for shard in wanted if shard not in shards]:
        raise FileNotFoundError(
            f"tensor_files: {folder} must hold a file of each of {worlds[0]} processes, got none named {missing[0]}; "
            "copy the whole checkpoint"
        )
    return [shards[shard] for shard in wanted]


class StoredTensors:
    """The tensors of open files that `write_tensors` wrote, by name.

    Raises:
        ValueError: a header is damaged, the files are of several saves, or together don't hold each row once.
    """

    def __init__(self, files: Mapping[Path, Any], save: str | None = None) -> None:
        self._parts: dict[str, list[tuple[int, int, Any]]] = {}  # first row, rows, and the file that holds them
        self.shapes: dict[str, torch.Size] = {}
        dtypes: dict[str, str] = {}
        for path, file in files.items():
            metadata = file.metadata() or {}
            if save is not None and metadata.get(_SAVE, save) != save:
                raise ValueError(_again(f"{path} must be of the save {save}, as its checkpoint, got {metadata[_SAVE]}"))
            save = metadata.get(_SAVE, save)
            for name, (first, whole, x) in _contents(path, file, metadata.get(_ROWS, "{}")).items():
                shape = list(x.get_shape())
                size, dtype = torch.Size([whole, *shape[1:]] if shape else []), x.get_dtype()
                if self.shapes.setdefault(name, size) != size or dtypes.setdefault(name, dtype) != dtype:
                    raise ValueError(
                        _again(f"{name} of {path} must be of {list(self.shapes[name])} and {dtypes[name]} as in the "
                               f"other files, got {list(size)} and {dtype}")
                    )  # fmt: skip
                self._parts.setdefault(name, []).append((first, shape[0] if shape else 0, file))
        for name, size in self.shapes.items():
            own = sorted(self._parts[name], key=lambda part: part[:2])
            ends = [0, *(first + rows for first, rows, _ in own)]
            if [first for first, _, _ in own] != ends[:-1] or ends[-1] != (size or [0])[0]:
                spans = ", ".join(f"{first} to {first + rows}" for first, rows, _ in own)
                where = next(iter(files)).parent
                raise ValueError(
                    _again(f"the files in {where} must hold each row of {name} once, got rows {spans} of {size[0]}")
                )

    def whole(self, name: str) -> Tensor:
        """All of a tensor."""
        shape = self.shapes[name]
        return self.rows(name, 0, shape[0]) if shape else self._parts[name][0][2].get_tensor(name)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Those rows of a tensor."""
        parts = [part for part in self._parts[name] if part[0] < end and begin < part[0] + part[1]]
        found: list[Tensor] = [
            file.get_slice(name)[max(begin - first, 0) : min(end - first, rows)]
            for first, rows, file in parts or self._parts[name][:1]
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def part(self, name: str, like: Tensor) -> Tensor:
        """What a process has of a tensor that is shared out as `like` is, of the same shape."""
        return self.rows(name, *own_rows(like)) if isinstance(like, DTensor) else self.whole(name)


def _contents(path: Path, file: Any, rows: str) -> dict[str, tuple[int, int, Any]]:
    """Of each tensor in a file: its first row, the rows of the whole tensor, and its slice."""
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no dict
    try:
        cut = {name: (int(first), int(whole)) for name, (first, whole) in json.loads(rows).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(_again(f"the rows in the header of {path} are damaged ({error!r})")) from error
    return {name: (*cut.get(name, (0, (x.get_shape() or [0])[0])), x) for name, x in slices.items()}


def _again(fault: str) -> str:
    return f"stored_tensors: {fault}; copy the whole checkpoint again or use an earlier one"


@contextmanager
def stored_tensors(folder: Path, stem: str, save: str | None = None) -> Iterator[StoredTensors]:
    """What `write_tensors` wrote, in one file or in shards; no tensor is read yet.

    Args:
        save: that the files must belong to, where they say so; None: to one, whichever.

    Raises:
        ValueError: a file is truncated or damaged, StoredTensors' or tensor_files'. FileNotFoundError: tensor_files'.
    """
    with ExitStack() as held:
        files = {}
        for file in tensor_files(folder, stem):
            try:
                files[file] = held.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(_again(f"{file} is truncated or damaged ({error})")) from error
        yield StoredTensors(files, save)


def own_rows(x: DTensor) -> tuple[int, int]:
    """The first row that this process has of x, and the one behind its last; FSDP2 cuts as torch.chunk does."""
    assert x.device_mesh.ndim == 1 and x.placements[0].is_shard(0)
    each = -(-x.shape[0] // x.device_mesh.size())
    begin = min(x.device_mesh.get_local_rank() * each, x.shape[0])
    return begin, begin + x.to_local().shape[0]


def local(x: Tensor) -> Tensor:
    """What this process has of x."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """All of x; every process that has a shard of it calls."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shared_out(part: Tensor, like: Tensor) -> Tensor:
    """A tensor as `like` is shared out, and on its device, of what this process has of it."""
    part = part.to(like.device)
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _file_name(stem: str, shard: Shard | None) -> str:
    return f"{stem}.safetensors" if shard is None else f"{stem}-{shard.rank + 1:05}-of-{shard.world:05}.safetensors"
