"""The sparse stage on two GPUs, by NCCL, in every way of sharing it out, against one GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flash_indexer.files.native import save_native
from flash_indexer.models.attach import attach
from flash_indexer.models.load import load_model, model_fingerprint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
PROGRAM = """
import io, json, sys
from pathlib import Path
from rich.console import Console
from flash_indexer.files.tensors import write_tensors
from flash_indexer.files.trained import trainable
from flash_indexer.recipe.processes import ParallelSettings, leave
from flash_indexer.recipe.sparse import train_sparsely
from flash_indexer.recipe.sparse_loop import SparseLoop
from flash_indexer.recipe.sparse_record import SparseRunSettings
folder, settings, ways = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
clip = SparseLoop._clip
def clip_and_save(self, step):
    if step == 1:
        named = dict(self.handle.indexers.named_parameters()) | trainable(self.handle.model)
        found = {name: parameter.grad for name, parameter in named.items()}
        write_tensors(Path(f"{self.out}.gradients") if self.processes.is_main else None, found)
    return clip(self, step)
SparseLoop._clip = clip_and_save
for name, (parallel, changes) in ways.items():
    train_sparsely(SparseRunSettings(**(settings | changes)), folder / name, console=Console(file=io.StringIO()),
                   parallel=ParallelSettings(**parallel, timeout=60.0))
leave()
"""
HANG = 240.0  # seconds after which a process is taken to hang
ONE_BY_ONE = dict(batch_size=1, accumulation=2)
TOGETHER = dict(batch_size=2, accumulation=1)
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "data parallel": ({}, dict(batch_size=1)),
    "fsdp": (dict(fsdp=True), dict(batch_size=1, activation_checkpointing=True)),
    "cp": (dict(cp=2), TOGETHER),
    "cp and fsdp": (dict(cp=2, fsdp=True), TOGETHER | dict(activation_checkpointing=True)),
}


def launch(
    folder: Path, settings: dict[str, Any], ways: dict[str, Any], places: list[dict[str, str]]
) -> list[subprocess.Popen[str]]:
    words = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(settings), json.dumps(ways)]
    return [subprocess.Popen(words, env=os.environ | place, stderr=subprocess.PIPE, text=True) for place in places]


def gradients(folder: Path, name: str) -> dict[str, Tensor]:
    return {key: value.double() for key, value in load_file(folder / f"{name}.gradients").items()}


def far(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest distance of a gradient, over its norm."""
    assert found.keys() == truth.keys()
    return max(float((found[name] - x).norm() / x.norm().clamp_min(1e-30)) for name, x in truth.items())


def test_two_gpus_train_what_one_does(tmp_path: Path, checkpoint: Path, texts: Path, ports: Any) -> None:
    """Data parallel and FSDP2 run the same products as one GPU sequence by sequence; cp others, in bfloat16."""
    model, _ = load_model(checkpoint, dtype=torch.float32)
    handle = attach(model, num_heads=4, head_dim=32)
    save_native(handle, tmp_path / "warm", base_name=str(checkpoint), base_fingerprint=model_fingerprint(model))
    settings: dict[str, Any] = dict(
        init_from=str(tmp_path / "warm"), data=str(texts), topk=24, sequence_length=64, steps=4, save_every=2,
        lr=1e-3, indexer_lr=1e-3, clip=0.5, dtype="bfloat16",
    )  # fmt: skip
    alone = {"one by one": ({}, ONE_BY_ONE), "together": ({}, TOGETHER)}
    started = [*launch(tmp_path, settings, alone, [{}]), *launch(tmp_path, settings, WAYS, ports.places(2))]
    try:
        for process in started:
            _, said = process.communicate(timeout=HANG)
            assert process.returncode == 0, said
    finally:
        for process in started:
            process.kill()
    truth, other = (gradients(tmp_path, name) for name in alone)
    rounding = far(other, truth)
    for name in WAYS:
        distance = far(gradients(tmp_path, name), truth)
        print(f"{name}: gradients {distance:.2e} from one GPU's, which are {rounding:.2e} from its own together")
        assert distance <= (4 * rounding + 2e-2 if "cp" in name else 1e-4), name
    last = {
        name: json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in (*alone, *WAYS)
    }
    for name in WAYS:
        assert last[name]["step"] == 4 and last[name]["tokens"] == last["together"]["tokens"]
        assert last[name]["loss"] == pytest.approx(last["together"]["loss"], rel=1e-2), name
