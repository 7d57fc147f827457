"""The record of a run: its settings (run.json) and its metrics (metrics.jsonl, a row a step)."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flash_indexer.integration.models import EMBEDDED_MODEL

RUN_FILE, METRICS_FILE = "run.json", "metrics.jsonl"


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
        positive = ("sequence_length", "batch_size", "accumulation", "minutes", "lr", "save_every")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"warmup: {name} must be positive, got {getattr(self, name)}")
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


def keep_rows(file: Path, done: int) -> None:
    """Drops rows of steps after the checkpoint, and a last line that a kill cut short."""
    rows = read_metrics(file)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= done), encoding="utf-8")
    partial.replace(file)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, without a last line that a kill cut short; empty where there is no file."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
