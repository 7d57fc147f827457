"""The sparse stage on two GPUs, by NCCL, in every way of sharing it out, against one GPU.

In bfloat16, by the kernels, as a run has it; and in float64, by the torch bodies, where no rounding decides which key
is selected, so that what has trained can be compared after many steps. A run on a GPU refuses float64: here it may not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_indexer.files.native import save_native
from flash_indexer.files.tensors import stored_tensors
from flash_indexer.models.attach import attach
from flash_indexer.models.load import load_model, model_fingerprint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
PROGRAM = """
import io, json, sys
from pathlib import Path
import torch
from rich.console import Console
from flash_indexer.files.tensors import whole, write_tensors
from flash_indexer.files.trained import trainable
from flash_indexer.models.sparse import SparseHandle
from flash_indexer.ops import bodies, checks
from flash_indexer.recipe import sparse as stage
from flash_indexer.recipe.processes import ParallelSettings, leave
from flash_indexer.recipe.sparse_loop import SparseLoop
from flash_indexer.recipe.sparse_record import SparseRunSettings
folder, (ways, exact_ways) = Path(sys.argv[1]), map(json.loads, sys.argv[2:])
clip = SparseLoop._clip
def clip_and_save(self, step):
    if step == 1:
        named = dict(self.handle.indexers.named_parameters()) | trainable(self.handle.model)
        found = {name: whole(parameter.grad) for name, parameter in named.items() if parameter.grad is not None}
        if self.processes.is_main:
            write_tensors(self.out.parent, f"{self.out.name}.gradients", found)
    return clip(self, step)
SparseLoop._clip = clip_and_save
def run(ways):
    for name, (parallel, settings) in ways.items():
        stage.train_sparsely(SparseRunSettings(**settings), folder / name, console=Console(file=io.StringIO()),
                             parallel=ParallelSettings(**parallel, timeout=60.0))
run(ways)
begin, load, attach, prepare = stage.load_start, stage.load_model, stage.attach_start, stage._sparse
add, leaves = stage.add_adapters, SparseHandle._leaves
def plain_experts(model):
    model.set_experts_implementation("eager")  # torch's grouped products know no float64
    return model
def begin_plainly(*rest):
    start, model, tokenizer = begin(*rest)
    return start, plain_experts(model), tokenizer
def load_in_float64(name, dtype, indexers):
    model, tokenizer = load(name, dtype=torch.float64)
    return plain_experts(model), tokenizer
def attach_in_float64(model, held, **options):
    handle = attach(model, held, **options)
    handle.indexers.double()
    return handle
def add_in_float64(model, rank):
    add(model, rank)
    model.double()
def prepare_in_float64(settings, model, *rest):
    stage.load_model, stage.attach_start, stage.add_adapters = load_in_float64, attach_in_float64, add_in_float64
    return prepare(settings, model.double(), *rest)
def leaves_of_any_dtype(self, tap, forward, q):
    return leaves(self, tap, forward, q.new_empty(0, device="cpu"))
checks.check_dtypes.__code__ = (lambda op, tensors: None).__code__  # wherever it is imported
stage.load_start, stage._sparse, SparseHandle._leaves = begin_plainly, prepare_in_float64, leaves_of_any_dtype
with bodies.use(bodies.TORCH):
    run(exact_ways)
leave()
"""
HANG = 240.0  # seconds after which a process is taken to hang
STEPS = 20
Ways = dict[str, tuple[dict[str, Any], dict[str, Any]]]
ONE_BY_ONE = dict(batch_size=1, accumulation=2)
TOGETHER = dict(batch_size=2, accumulation=1)
ALONE: Ways = {"one by one": ({}, ONE_BY_ONE), "together": ({}, TOGETHER)}
WAYS: Ways = {
    "data parallel": ({}, dict(batch_size=1)),
    "fsdp": (dict(fsdp=True), dict(batch_size=1, activation_checkpointing=True)),
    "cp": (dict(cp=2), TOGETHER),
    "cp and fsdp": (dict(cp=2, fsdp=True), TOGETHER | dict(activation_checkpointing=True)),
    "tp": (dict(tp=2), TOGETHER),
}
EXACT_WAYS: Ways = WAYS | {
    "contiguous": (dict(cp=2, layout="contiguous"), TOGETHER),
    "contiguous and fsdp": (dict(cp=2, layout="contiguous", fsdp=True), TOGETHER),
    "tp and fsdp": (dict(tp=2, fsdp=True), TOGETHER | dict(activation_checkpointing=True)),
}
LESS: dict[str, dict[str, Any]] = {"all": {}, "adapters": dict(lora=4), "indexers": dict(indexers_alone=True)}
NEAR = 1e-5


def launch(folder: Path, every: list[Ways], places: list[dict[str, str]]) -> list[subprocess.Popen[str]]:
    words = [sys.executable, "-c", PROGRAM, str(folder), *map(json.dumps, every)]
    return [subprocess.Popen(words, env=os.environ | place, stderr=subprocess.PIPE, text=True) for place in places]


def started_with(folder: Path, checkpoint: Path, heads: int) -> str:
    """A folder of fresh indexers for a model."""
    torch.manual_seed(0)
    model, _ = load_model(checkpoint, dtype=torch.float32)
    handle = attach(model, num_heads=heads, head_dim=32)
    save_native(handle, folder, base_name=str(checkpoint), base_fingerprint=model_fingerprint(model))
    return str(folder)


def tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """Of a file, or of the shards of several processes."""
    with stored_tensors(folder, stem) as stored:
        return {name: stored.whole(name).double() for name in stored.shapes}


def gradients(folder: Path, name: str) -> dict[str, Tensor]:
    return tensors(folder, f"{name}.gradients")


def trained(folder: Path) -> dict[str, Tensor]:
    return tensors(folder / "checkpoint", "trained") | tensors(folder / "checkpoint", "indexer")


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def far(found: dict[str, Tensor], truth: dict[str, Tensor], began: dict[str, Tensor] | None = None) -> float:
    """The largest distance of a tensor, over its norm, or over how far it is from where it began."""
    assert found.keys() == truth.keys()
    began = began or {}
    moved = {name: x - began[name] if name in began else x for name, x in truth.items()}
    return max(float((found[name] - x).norm() / moved[name].norm().clamp_min(1e-12)) for name, x in truth.items())


def finished(started: list[subprocess.Popen[str]]) -> None:
    try:
        for process in started:
            _, said = process.communicate(timeout=HANG)
            assert process.returncode == 0, said
    finally:
        for process in started:
            process.kill()


def settings_of(texts: Path, begin: str, **changes: Any) -> dict[str, Any]:
    return dict(
        data=str(texts), init_from=begin, topk=24, sequence_length=64, save_every=2, lr=1e-3, indexer_lr=1e-3, clip=0.5
    ) | changes  # fmt: skip


def settled(ways: Ways, settings: dict[str, Any]) -> Ways:
    return {name: (parallel, settings | changes) for name, (parallel, changes) in ways.items()}


def test_two_gpus_train_what_one_does(tmp_path: Path, checkpoint: Path, texts: Path, ports: Any) -> None:
    """Data parallel and FSDP2 run the same products as one GPU sequence by sequence; cp and tp others, in bfloat16."""
    begin = started_with(tmp_path / "warm", checkpoint, 4)
    settings = settings_of(texts, begin, steps=4, dtype="bfloat16")
    started = launch(tmp_path, [settled(ALONE, settings), {}], [{}])
    finished(started + launch(tmp_path, [settled(WAYS, settings), {}], ports.places(2)))
    truth, other = (gradients(tmp_path, name) for name in ALONE)
    rounding = far(other, truth)
    for name in WAYS:
        distance = far(gradients(tmp_path, name), truth)
        print(f"{name}: gradients {distance:.2e} from one GPU's, which are {rounding:.2e} from its own together")
        assert distance <= (1e-4 if name in ("data parallel", "fsdp") else 4 * rounding + 2e-2), name
    last = {name: rows(tmp_path, name)[-1] for name in (*ALONE, *WAYS)}
    for name in WAYS:
        assert last[name]["step"] == 4 and last[name]["tokens"] == last["together"]["tokens"]
        assert last[name]["loss"] == pytest.approx(last["together"]["loss"], rel=1e-2), name


@pytest.mark.parametrize("less", LESS)
@pytest.mark.parametrize("mla", [False, True], ids=["gqa", "mla"])
def test_in_float64_two_gpus_train_what_one_does(
    tmp_path: Path, checkpoint: Path, mla_checkpoint: Path, texts: Path, ports: Any, mla: bool, less: str
) -> None:
    """Twenty steps: the first gradients, how far parameters moved, and all losses."""
    path, heads = (mla_checkpoint, 16) if mla else (checkpoint, 4)
    begin = started_with(tmp_path / "warm", path, heads)
    settings = settings_of(texts, begin, steps=STEPS, dtype="float32") | dict(save_every=STEPS) | LESS[less]
    ways = EXACT_WAYS | ({} if mla or less != "all" else {
        "layers, tp and fsdp": (dict(tp=2, fsdp=True), TOGETHER | dict(layers=[1])),
    })  # fmt: skip
    alone: Ways = {"alone": ({}, ONE_BY_ONE), "alone, layers": ({}, ONE_BY_ONE | dict(layers=[1]))}
    started = launch(tmp_path, [{}, settled(alone, settings)], [{}])
    finished(started + launch(tmp_path, [{}, settled(ways, settings)], ports.places(2)))
    model, _ = load_model(path, dtype=torch.float64)
    began = {key: value.detach() for key, value in model.named_parameters()} | tensors(Path(begin), "indexer")
    for name in ways:
        one = "alone, layers" if "layers" in name else "alone"
        first = far(gradients(tmp_path, name), gradients(tmp_path, one))
        moved = far(trained(tmp_path / name), trained(tmp_path / one), began)
        print(f"{name}: after {STEPS} steps {moved:.2e} of how far parameters moved; first gradients {first:.2e}")
        assert first <= NEAR and moved <= NEAR, name
        assert len(rows(tmp_path, name)) == STEPS
        for row, same in zip(rows(tmp_path, one), rows(tmp_path, name), strict=True):
            assert (row["loss"], *row["kl"]) == pytest.approx((same["loss"], *same["kl"]), rel=NEAR), name
