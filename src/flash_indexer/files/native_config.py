"""`indexer_config.json`, which makes a directory a checkpoint of ours: its fields, read and checked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

FORMAT = "flash-indexer/native"
VERSION = 1
CONFIG_FILE = "indexer_config.json"
_OURS = "flash-indexer/"


@dataclass(frozen=True)
class NativeConfig:
    """What `indexer_config.json` says, apart from `format` and `version`.

    The fields base_* tell which model and tokenizer the indexers belong to (None: not recorded), judged how good they
    were and in which arithmetic (None: not recorded); the others are `attach`'s and LightningIndexer's.
    """

    base_name: str
    base_model_type: str
    base_hidden_size: int
    base_num_layers: int
    base_fingerprint: str | None
    layers: tuple[int, ...]
    num_heads: int
    head_dim: int
    rope_dim: int
    rope_interleaved: bool
    q_lora_rank: int | None
    target: str
    base_dtype: str = "float32"
    judged: dict[str, Any] | None = None
    index_dtype: str | None = None
    teacher_dtype: str | None = None
    indexers: str = "fresh"
    teachers: str = "shared"
    base_vocab_size: int | None = None
    base_tokenizer_fingerprint: str | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by its key `model.layers.N.self_attn.indexer.*`; own indexers may have more."""
        width = self.base_hidden_size
        q_in = width if self.q_lora_rank is None else self.q_lora_rank
        one = {
            "wq_b.weight": (self.num_heads * self.head_dim, q_in),
            "wk.weight": (self.head_dim, width),
            "k_norm.weight": (self.head_dim,),
            "k_norm.bias": (self.head_dim,),
            "weights_proj.weight": (self.num_heads, width),
        }
        return {f"model.layers.{n}.self_attn.indexer.{key}": one[key] for n in self.layers for key in one}

    def may_hold(self, key: str) -> bool:
        """Whether a model's own indexer may have a tensor of this name beside those of `shapes`."""
        begins = tuple(f"model.layers.{n}.self_attn.indexer." for n in self.layers)
        return self.indexers == "own" and key.startswith(begins)


def write_config(folder: str | os.PathLike[str], format: str, values: dict[str, Any]) -> None:
    """Write `indexer_config.json`, which makes a directory one of ours."""
    text = json.dumps({"format": format, "version": VERSION, **values}, indent=2)
    (Path(folder) / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """Read `indexer_config.json` of any format of ours; errors as read_native's."""
    if not folder.is_dir():
        raise FileNotFoundError(f"read_native: no directory {folder}; train or export an indexer there first")
    file = folder / CONFIG_FILE
    if not file.is_file():
        of_run = folder / "checkpoint"
        is_run = (of_run / CONFIG_FILE).is_file()
        wanted = str(of_run) if is_run else "the directory that `flash-indexer export` wrote, or a run's checkpoint/"
        raise ValueError(
            f"read_native: {folder} is not a flash-indexer checkpoint: it has no {CONFIG_FILE}; give {wanted}"
        )
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"read_native: {file} is no valid JSON ({error}); use an earlier checkpoint") from error
    if not isinstance(record, dict) or not str(record.get("format")).startswith(_OURS):
        raise ValueError(
            f"read_native: {folder} is not a flash-indexer checkpoint: its {CONFIG_FILE} must name a format "
            f"that begins with {_OURS!r}; give the directory that `flash-indexer warmup` or "
            "`flash-indexer export` wrote"
        )
    version: Any = record.get("version")
    if not _is_int(version) or version < 1:
        raise ValueError(f"read_native: version in {file} must be a positive integer, got {version!r}")
    if version > VERSION:
        raise ValueError(
            f"read_native: {folder} has version {version} of the format, this flash-indexer reads up to "
            f"{VERSION}; upgrade flash-indexer"
        )
    return record


def parse(record: dict[str, Any], file: Path) -> NativeConfig:
    """Check each field's type and build the config."""
    values: dict[str, Any] = {}
    for field in fields(NativeConfig):
        if field.name not in record and field.default is not MISSING:
            continue
        if field.name not in record:
            raise ValueError(f"read_native: {file} lacks {field.name!r}; use an earlier checkpoint")
        value = record[field.name]
        if not _FIELD_CHECKS[str(field.type)](value):
            raise ValueError(f"read_native: {field.name} in {file} must be {field.type}, got {value!r}")
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return NativeConfig(**values)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_FIELD_CHECKS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "str | None": lambda value: value is None or isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: _is_int(value) and value > 0,
    "int | None": lambda value: value is None or (_is_int(value) and value > 0),
    "dict[str, Any] | None": lambda value: value is None or isinstance(value, dict),
    "tuple[int, ...]": lambda value: isinstance(value, list) and value != [] and all(map(_is_int, value)),
}
