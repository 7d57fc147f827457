"""The record of a run: its settings (run.json) and its metrics (metrics.jsonl, a row a step).

Imports no torch, so that a command can refuse its options before it imports what takes seconds.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

RUN_FILE, METRICS_FILE = "run.json", "metrics.jsonl"
CHECKPOINT = "checkpoint"
LARGEST_SEED = 2**32 - 1
WHOLE = (
    "sequence_length", "batch_size", "accumulation", "steps", "warmup_steps", "seed", "num_heads", "head_dim",
    "rope_dim", "save_every",
)  # fmt: skip
REAL = ("minutes", "lr", "clip", "queries")
CHOICES = {
    "decay": ("cosine", "none"),
    "target": ("mean", "per_head", "sum_logits"),
    "dtype": ("auto", "float32", "bfloat16"),
    "index_dtype": (None, "fp8", "fp8_unrotated"),
    "teacher_dtype": (None, "fp8", "fp8_unrotated"),
    "indexers": ("fresh", "own"),
    "teachers": ("shared", "own"),
}


@dataclass(frozen=True)
class WarmupSettings:
    """Everything that determines a run. Recorded in run.json; a resumed run takes it from there."""

    model: str = "smollm2-135m"
    """A local Transformers checkpoint, or the name of the embedded one."""
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
    init_from: str | None = None
    """Run folder or native indexer folder whose indexers, of the same layers and sizes, the training begins with."""
    dtype: str = "auto"
    """ "float32", "bfloat16", or "auto": bfloat16 on CUDA, else float32."""
    save_every: int = 50
    index_dtype: str | None = None
    """ "fp8" or "fp8_unrotated": indexers are trained in the arithmetic that they are served in."""
    teacher_dtype: str | None = None
    """ "fp8" or "fp8_unrotated": the teacher's probabilities are those of e4m3 queries and keys, rotated or not."""
    indexers: str = "fresh"
    """ "own": those that the model has are trained, of their own sizes, instead of new ones."""
    teachers: str = "shared"
    """ "own": an indexer that serves several layers learns from the one that has it, else from all of them."""
    queries: float = 1.0
    """The part of a sequence's queries whose loss is computed, drawn anew for every sequence and step."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value that no run can use."""
        for name in WHOLE + REAL:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int if name in WHOLE else int | float):
                if value is None and type(self).__dataclass_fields__[name].default is None:
                    continue
                kind = "a whole number" if name in WHOLE else "a number"
                raise ValueError(f"warmup: {name} must be {kind}, got {value!r}")
        for name in ("batch_size", "accumulation", "minutes", "lr", "save_every", "num_heads", "head_dim", "rope_dim"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"warmup: {name} must be positive and finite, got {value}")
        if self.sequence_length < 2:
            raise ValueError(f"warmup: sequence_length must be at least 2, got {self.sequence_length}")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"warmup: seed must be from 0 to {LARGEST_SEED}, got {self.seed}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"warmup: steps must be at least 1, got {self.steps}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                shown = ", ".join("none" if x is None else f'"{x}"' for x in choices[:-1])
                raise ValueError(f'warmup: {name} must be {shown} or "{choices[-1]}", got {getattr(self, name)!r}')
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"warmup: clip must be positive, got {self.clip}; leave it out for no clipping")
        if not 0 < self.queries <= 1:
            raise ValueError(f"warmup: queries must be above 0 and at most 1 (all of them), got {self.queries}")
        if self.queries * self.sequence_length < 1:
            raise ValueError(
                f"warmup: queries must leave one of the {self.sequence_length} tokens of a sequence, at least "
                f"{1 / self.sequence_length:.3g}, got {self.queries}; or take a larger sequence_length"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"warmup: warmup_steps must not be negative, got {self.warmup_steps}")


def read_run(out: Path, command: str = "warmup") -> dict[str, Any]:
    """The settings of the run in `out` with its steps, the sequences of one, what ended it, and warnings; or empty.

    ended_by is "time" where --minutes chose the number of steps, else "steps". command: what an error begins with.
    """
    record = read_record(out, True, command)
    if record is None:
        return {}
    names = ("steps", "sequences_per_step", "ended_by", "extensions", "warnings")
    return {**record["settings"], **{name: record[name] for name in names if name in record}}


def read_record(out: Path, resume: bool, command: str = "warmup") -> dict[str, Any] | None:
    """The record of the run in `out`, where there is one to resume."""
    file = out / RUN_FILE
    if not file.exists():
        return None
    if not resume:
        raise ValueError(f"{command}: {out} already holds a run; pass --resume to go on with it, or another --out")
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        settings_from(record["settings"])
        record["steps"], record["base_fingerprint"], record["data_fingerprint"], record["sequences_per_step"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{command}: {file} is not a run's record ({error!r}); choose another folder") from error
    return record


def extended(record: Mapping[str, Any], done: int, steps: int, data_fingerprint: str) -> dict[str, Any]:
    """The record of a run that has more steps to do than it was to have, from step done + 1 on."""
    extension = {"after": done, "from": record["steps"], "to": steps}
    return {
        **record, "steps": steps, "data_fingerprint": data_fingerprint, "ended_by": "steps",
        "extensions": [*record.get("extensions", []), extension],
    }  # fmt: skip


def settings_from(plain: dict[str, Any]) -> WarmupSettings:
    """Settings from what run.json holds; entries that are no settings are passed over."""
    known = {field.name for field in fields(WarmupSettings)}
    values: dict[str, Any] = dict(plain)
    if values.get("layers") is not None:
        values["layers"] = tuple(values["layers"])
    return WarmupSettings(**{name: value for name, value in values.items() if name in known})


def warmup_command(run: Mapping[str, Any], out: str | Path) -> str:
    """The command lines that train with a run's settings; what it chose by time budget is spelled out as steps.

    One process then takes the sequences that a run over data-parallel processes shared out, in more micro-batches. A
    run whose steps were extended has a line for each extension.
    """
    words = ["flash-indexer", "warmup", "--out", str(out)]
    extensions = list(run.get("extensions", []))
    again = [[*words, "--resume", "--steps", str(extension["to"])] for extension in extensions]
    if extensions:
        run = {**run, "steps": extensions[0]["from"]}
    if "sequences_per_step" in run:
        run = {**run, "accumulation": run["sequences_per_step"] // run["batch_size"]}
    for field in fields(WarmupSettings):
        value = run.get(field.name, field.default)
        if value is not None and value != field.default and field.name != "minutes":
            text = ",".join(map(str, value)) if field.name == "layers" else str(value)
            words += [f"--{field.name.replace('_', '-')}", text]
    return "\n".join(shlex.join(line) for line in [words, *again])


def refuse_other_settings(recorded: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises ValueError where an option given beside --resume says something else than the run was started with."""
    defaults = {field.name: field.default for field in fields(WarmupSettings)}
    for name, value in settings.items():
        before = recorded.get(name, defaults[name]) if recorded else value  # records of older versions lack some
        if name == "steps" or (name, value) == ("dtype", "auto"):
            continue  # steps may grow; auto is what it came to when the run began
        if name in ("model", "data", "init_from") and value is not None and before is not None:
            before, value = os.path.normpath(before), os.path.normpath(value)
        if (tuple(before) if isinstance(before, list) else before) != value:
            raise ValueError(
                f"warmup: --{name.replace('_', '-')} must be {before} as when the run began, got {value}; "
                "leave it out, or start a new run in another --out"
            )


def parse_layers(text: str | None, command: str) -> tuple[int, ...] | None:
    """ "0,1,5-7" -> (0, 1, 5, 6, 7)."""
    if text is None:
        return None
    try:
        chosen: list[int] = []
        for part in text.split(","):
            first, dash, last = part.partition("-")
            span = range(int(first), int(last if dash else first) + 1)
            if not span:
                raise ValueError
            chosen += span
    except ValueError:
        raise ValueError(f"{command}: --layers must be like 0,1,5-9, got {text!r}") from None
    return tuple(chosen)


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
