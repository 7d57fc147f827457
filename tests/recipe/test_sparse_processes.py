"""The sparse stage on 2 and 4 processes, in every way of sharing it out, against one: gradients, losses, parameters."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flash_indexer.files.native import read_native
from flash_indexer.models.load import load_model
from flash_indexer.recipe.run_record import read_metrics

STEPS = 20
RUN = """
import os, sys
os.environ.update(environment)
from pathlib import Path
from rich.console import Console
from flash_indexer.files.tensors import write_tensors
from flash_indexer.files.trained import trainable
from flash_indexer.recipe import sparse as stage
from flash_indexer.recipe.processes import ParallelSettings, leave
from flash_indexer.recipe.sparse_loop import SparseLoop
from flash_indexer.recipe.sparse_record import SparseRunSettings

clip = SparseLoop._clip
def clip_and_save(self, step):
    if step == 1:
        named = dict(self.handle.indexers.named_parameters()) | trainable(self.handle.model)
        found = {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}
        write_tensors(Path(out + ".gradients") if self.processes.is_main else None, found)
    return clip(self, step)
SparseLoop._clip = clip_and_save
sys.stderr = open(f"{out}.{environment.get('RANK', 0)}", "a")  # an error that ends the process is read there too
console = Console(file=sys.stderr, width=500)
try:
    stage.train_sparsely(
        SparseRunSettings(**chosen), out, resume=True, console=console, parallel=ParallelSettings(**parallel)
    )
except (ValueError, ConnectionError) as error:
    console.print(str(error))
    if isinstance(error, ConnectionError):
        console.file.flush()
        os._exit(1)
leave()
"""


@pytest.fixture(scope="module")
def base(warm: Path, texts: Path) -> dict[str, Any]:
    """Four sequences a step, of documents that are not equally long."""
    return dict(
        init_from=str(warm), data=str(texts), topk=8, sequence_length=32, batch_size=4, steps=STEPS, lr=1e-3,
        indexer_lr=2e-3, clip=0.5, indexer_clip=0.05, save_every=8,
    )  # fmt: skip


class Starter:
    """`start(out, count, parallel, codes, **settings)`: the processes of one run."""

    def __init__(self, runs: Any, base: dict[str, Any]) -> None:
        self.runs, self.base = runs, base

    def __call__(
        self, out: Path, count: int = 1, *, parallel: dict[str, Any] | None = None, codes: Sequence[str] = (),
        **changes: Any,
    ) -> list[Any]:  # fmt: skip
        chosen, parallel = self.base | changes, parallel or {}
        programs = [(codes[rank] if rank < len(codes) else "") + RUN for rank in range(count)]
        if count == 1:
            return [self.runs.start(programs[0], None, out, chosen=chosen, parallel=parallel)]
        started: list[Any] = self.runs.ranks(count, None, out, codes=programs, chosen=chosen, parallel=parallel)
        return started


@pytest.fixture(scope="module")
def start(runs: Any, base: dict[str, Any]) -> Starter:
    return Starter(runs, base)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, runs: Any, start: Starter) -> Path:
    """One process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    runs.finish(start(out))
    return out


def test_x(tmp_path: Path, runs: Any, start: Starter, alone: Path, checkpoint: Path) -> None:
    runs.finish(start(tmp_path / "micro", batch_size=2, accumulation=2))
    for name, count, parallel, batch in (("dp", 2, {}, 2), ("fsdp", 2, dict(fsdp=True), 2), ("cp", 2, dict(cp=2), 4), ("cpfsdp", 2, dict(cp=2, fsdp=True), 4)):
        import time
        t = time.perf_counter()
        runs.finish(start(tmp_path / name, count, parallel=parallel, batch_size=batch))
        print(name, time.perf_counter() - t)
    model, _ = load_model(checkpoint, dtype=torch.float32)
    began = dict(model.named_parameters())
    for name in ("micro", "dp", "fsdp", "cp", "cpfsdp"):
        out = tmp_path / name
        one, other = load_file(str(alone) + ".gradients"), load_file(str(out) + ".gradients")
        assert one.keys() == other.keys()
        print(name, "grad", max((one[n] - other[n]).norm() / one[n].norm() for n in one))
        a, b = (load_file(x / "checkpoint" / "trained.safetensors") for x in (alone, out))
        d = sum((a[n] - b[n]).pow(2).sum() for n in a) ** 0.5
        m = sum((a[n] - began[n]).pow(2).sum() for n in a) ** 0.5
        print(name, "param moved", float(m), "differ", float(d), float(d / m))
        ra, rb = (read_metrics(x / "metrics.jsonl") for x in (alone, out))
        print(max(abs(x["loss"] - y["loss"]) for x, y in zip(ra, rb)), max(abs(x["norm"] / y["norm"] - 1) for x, y in zip(ra, rb)), max(abs(x["indexer_norm"] / y["indexer_norm"] - 1) for x, y in zip(ra, rb)), [max(abs(p / q - 1) for p, q in zip(x["kl"], y["kl"])) for x, y in zip(ra, rb)][::6])
