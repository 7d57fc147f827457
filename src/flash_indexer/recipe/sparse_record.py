"""The record of a sparse run: its settings (run.json). Imports no torch, so that options are refused at once."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flash_indexer.recipe.run_record import LARGEST_SEED, RUN_FILE, read_run

STAGE = "sparse"
"""What `stage` says in the record of such a run; that of a warm-up has none."""
WHOLE = (
    "topk", "sequence_length", "batch_size", "accumulation", "steps", "warmup_steps", "seed", "lora", "save_every",
)  # fmt: skip
REAL = ("lr", "indexer_lr", "clip", "indexer_clip")
POSITIVE = (
    "topk", "batch_size", "accumulation", "steps", "lora", "save_every", "lr", "indexer_lr", "clip", "indexer_clip",
)  # fmt: skip
CHOICES = {"keys": ("indexer", "oracle"), "decay": ("cosine", "none"), "dtype": ("auto", "float32", "bfloat16")}


@dataclass(frozen=True)
class SparseRunSettings:
    """Everything that determines a sparse run. Recorded in run.json; a resumed run takes it from there."""

    init_from: str = ""
    """Run folder or native indexer folder whose warmed-up indexers the training begins with, or a model with some of
    its own, which are taken as they are."""
    model: str | None = None
    """None: the model that init_from names."""
    data: str | None = None
    column: str = "text"
    topk: int | None = None
    """None: the model's index_topk where its own indexers train, else 2048."""
    keys: str = "indexer"
    """Whose keys queries attend to: "indexer", or "oracle", those of largest attention: a bound to compare with."""
    layers: tuple[int, ...] | None = None
    """Layers that become sparse; None: all that have an indexer."""
    lora: int | None = None
    """Rank of the adapters that train in place of the model's parameters; None: these train themselves."""
    indexers_alone: bool = False
    """The model stays frozen."""
    sequence_length: int = 4096
    """Above topk, else no key is left out and attention is dense."""
    batch_size: int = 1
    accumulation: int = 1
    steps: int = 200
    lr: float = 7.3e-6
    """Of the model, or of its adapters."""
    indexer_lr: float = 7.3e-6
    warmup_steps: int = 0
    decay: str = "none"
    clip: float | None = 1.0
    """Largest norm of the model's gradient; None: no clipping. indexer_clip: of the indexers'."""
    indexer_clip: float | None = None
    activation_checkpointing: bool = False
    deterministic: bool = True
    """False: MLA's backward may add the keys' gradients in any order."""
    seed: int = 0
    dtype: str = "auto"
    """ "float32", "bfloat16" (products; parameters that train are float32), or "auto": bfloat16 on CUDA."""
    save_every: int = 50

    def __post_init__(self) -> None:
        """Raises ValueError for a value that no run can use."""
        optional = {field.name for field in fields(self) if field.default is None or field.name.endswith("clip")}
        for name in WHOLE + REAL:
            value, kind = getattr(self, name), "a whole number" if name in WHOLE else "a number"
            if value is None and name in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int if name in WHOLE else int | float):
                raise ValueError(f"sparse: {name} must be {kind}, got {value!r}")
            if name in POSITIVE and not 0 < value < math.inf:
                raise ValueError(f"sparse: {name} must be positive and finite, got {value}")
        if not self.init_from:
            raise ValueError("sparse: init_from must name the run or native folder of warmed-up indexers, got none")
        if self.sequence_length < 2:
            raise ValueError(f"sparse: sequence_length must be at least 2, got {self.sequence_length}")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"sparse: seed must be from 0 to {LARGEST_SEED}, got {self.seed}")
        if self.warmup_steps < 0:
            raise ValueError(f"sparse: warmup_steps must not be negative, got {self.warmup_steps}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"sparse: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.lora is not None and self.indexers_alone:
            raise ValueError(
                f"sparse: lora must be left out with indexers_alone, which trains nothing else, got {self.lora}"
            )


def read_sparse_record(out: Path, resume: bool, command: str = STAGE) -> dict[str, Any] | None:
    """The record of the sparse run in `out`, where there is one to resume."""
    file = out / RUN_FILE
    if not file.exists():
        return None
    if not resume:
        raise ValueError(f"{command}: {out} already holds a run; pass --resume to go on with it, or another --out")
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if record.get("stage") != STAGE:
            raise ValueError(f"stage is {record.get('stage')!r}")
        sparse_settings_from(record["settings"])
        record["base_fingerprint"], record["init_fingerprint"], record["data_fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{command}: {file} is no sparse run's record ({error}); choose another folder") from error
    return record


def sparse_settings_from(plain: Mapping[str, Any]) -> SparseRunSettings:
    """Settings from what run.json holds; entries that are no settings are passed over."""
    known = {field.name for field in fields(SparseRunSettings)}
    values = {name: value for name, value in plain.items() if name in known}
    if values.get("layers") is not None:
        values["layers"] = tuple(values["layers"])
    return SparseRunSettings(**values)


def read_any_run(out: Path, command: str) -> dict[str, Any]:
    """`read_run` of a warm-up, or the settings of a sparse run; empty where `out` holds no run."""
    file = out / RUN_FILE
    if not file.exists() or f'"stage": "{STAGE}"' not in file.read_text(encoding="utf-8"):
        return read_run(out, command)
    record = read_sparse_record(out, True, command)
    if record is None:
        return {}
    shared = {name: record[name] for name in ("sequences_per_step",) if name in record}
    return dict(record["settings"]) | shared


def sparse_command(run: Mapping[str, Any], out: str | Path) -> str:
    """The command line that trains with a sparse run's settings, in one process as much as in several."""
    words = ["flash-indexer", "sparse", "--out", str(out)]
    if "sequences_per_step" in run:
        run = {**run, "accumulation": run["sequences_per_step"] // run["batch_size"]}
    for field in fields(SparseRunSettings):
        value = run.get(field.name, field.default)
        if value == field.default:
            continue
        if field.name == "deterministic":
            words.append("--any-order")
            continue
        words.append(f"--{field.name.replace('_', '-')}")
        if value is not True:
            shown = 0 if value is None else ",".join(map(str, value)) if field.name == "layers" else value
            words.append(str(shown))
    return shlex.join(words)


def refuse_other_sparse_settings(recorded: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises ValueError where an option given beside --resume says something else than the run was started with."""
    for name, value in settings.items():
        before = recorded.get(name, SparseRunSettings.__dataclass_fields__[name].default)
        if name == "activation_checkpointing" or (name, value) in (("dtype", "auto"), ("model", None)):
            continue
        if name in ("model", "data", "init_from") and value is not None and before is not None:
            before, value = os.path.normpath(before), os.path.normpath(value)
        if (tuple(before) if isinstance(before, list) else before) != value:
            raise ValueError(
                f"sparse: --{name.replace('_', '-')} must be {before} as when the run began, got {value}; leave it "
                "out, or start a new run in another --out"
            )
