"""The record of a run: its settings (run.json) and its metrics (metrics.jsonl, a row a step)."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flash_indexer.models.load import EMBEDDED_MODEL

RUN_FILE, METRICS_FILE = "run.json", "metrics.jsonl"
CHECKPOINT = "checkpoint"
LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class WarmupSettings:
    """Everything that determines a run. Recorded in run.json; a resumed run takes it from there."""

    model: str = EMBEDDED_MODEL
    data: str | None = None
    """Text, JSONL, Parquet or a datasets directory; None: the Python standard library's sources and topics."""
    column: str = "text"
    sequence_length: int = 1024
    batch_size: int = 1
    accumulation: int = 1
    steps: int | None = None
    minutes: float = 3.0
    """Time budget that chooses the number of steps where `steps` is None, measured on this machine before the first."""
    lr: float = 1e-3
    warmup_steps: int = 20
    decay: str = "cosine"
    """ "cosine" (towards zero after the last step) or "none"."""
    clip: float | None = None
    seed: int = 0
    num_heads: int = 8
    head_dim: int = 64
    rope_dim: int | None = None
    target: str = "mean"
    layers: tuple[int, ...] | None = None
    dtype: str = "auto"
    """ "float32", "bfloat16", or "auto": bfloat16 on CUDA, else float32."""
    save_every: int = 50

    def __post_init__(self) -> None:
        """Raises ValueError for a value that no run can use."""
        positive = ("batch_size", "accumulation", "minutes", "lr", "save_every")
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"warmup: {name} must be positive and finite, got {getattr(self, name)}")
        if self.sequence_length < 2:
            raise ValueError(f"warmup: sequence_length must be at least 2, got {self.sequence_length}")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"warmup: seed must be from 0 to {LARGEST_SEED}, got {self.seed}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"warmup: steps must be at least 1, got {self.steps}")
        if self.decay not in ("cosine", "none"):
            raise ValueError(f'warmup: decay must be "cosine" or "none", got {self.decay!r}')
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f'warmup: dtype must be "auto", "float32" or "bfloat16", got {self.dtype!r}')
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"warmup: clip must be positive, got {self.clip}; leave it out for no clipping")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup: warmup_steps must not be negative, got {self.warmup_steps}")


def read_run(out: Path) -> dict[str, Any]:
    """The settings of the run in `out`, with its steps and the sequences of one; empty where there is none."""
    record = read_record(out, resume=True)
    if record is None:
        return {}
    return {**record["settings"], "steps": record["steps"], "sequences_per_step": record["sequences_per_step"]}


def read_record(out: Path, resume: bool) -> dict[str, Any] | None:
    """The record of the run in `out`, where there is one to resume."""
    file = out / RUN_FILE
    if not file.exists():
        return None
    if not resume:
        raise ValueError(f"warmup: {out} already holds a run; pass --resume to go on with it, or another --out")
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        settings_from(record["settings"])
        record["steps"], record["base_fingerprint"], record["data_fingerprint"], record["sequences_per_step"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"warmup: {file} is not a run's record ({error!r}); choose another --out") from error
    return record


def check_new(out: Path) -> None:
    """Raises ValueError where a new run would take what lies in `out` for its own, or where no folder can be."""
    check_folder("warmup: --out", out)
    for name in (CHECKPOINT, f".{CHECKPOINT}.old", METRICS_FILE, "indexer_config.json"):
        if (out / name).exists():
            raise ValueError(
                f"warmup: --out must be a new folder or that of a run, got {out}, which holds {name} and no "
                f"{RUN_FILE}; nothing was written: choose another --out"
            )


def check_folder(option: str, path: Path) -> None:
    """Raises ValueError naming the option where no folder can be at `path`, because of a file."""
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise ValueError(f"{option} must be a folder, got {path}, where {part} is a file; choose another")


def settings_from(plain: dict[str, Any]) -> WarmupSettings:
    """Settings from what run.json holds; entries that are no settings are passed over."""
    known = {field.name for field in fields(WarmupSettings)}
    values: dict[str, Any] = dict(plain)
    if values.get("layers") is not None:
        values["layers"] = tuple(values["layers"])
    return WarmupSettings(**{name: value for name, value in values.items() if name in known})


def warmup_command(run: Mapping[str, Any], out: str | Path) -> str:
    """The command line that trains with a run's settings; what it chose by time budget is spelled out as steps.

    One process then takes the sequences that a run over data-parallel processes shared out, in more micro-batches.
    """
    words = ["flash-indexer", "warmup", "--out", str(out)]
    if "sequences_per_step" in run:
        run = {**run, "accumulation": run["sequences_per_step"] // run["batch_size"]}
    for field in fields(WarmupSettings):
        value = run.get(field.name, field.default)
        if value is not None and value != field.default and field.name != "minutes":
            text = ",".join(map(str, value)) if field.name == "layers" else str(value)
            words += [f"--{field.name.replace('_', '-')}", text]
    return shlex.join(words)


def keep_rows(file: Path, done: int) -> float:
    """Drops rows of steps after the checkpoint, and a last line that a kill cut short; the last row's seconds."""
    rows = [row for row in read_metrics(file) if row["step"] <= done]
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(file)
    return float(rows[-1]["seconds"]) if rows else 0.0


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, without a last line that a kill cut short; empty where there is no file."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
