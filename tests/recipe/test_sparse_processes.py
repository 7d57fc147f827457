"""The sparse stage on 2 and 4 processes, in every way of sharing it out, against one: gradients, losses, parameters."""

from __future__ import annotations

import io
import json
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GptOssConfig

from flash_indexer.files.tensors import stored_tensors
from flash_indexer.models.load import load_model
from flash_indexer.recipe.judging import load_trained
from flash_indexer.recipe.processes import ParallelSettings, Processes
from flash_indexer.recipe.run_record import read_metrics
from flash_indexer.recipe.sparse import notes
from flash_indexer.recipe.sparse_record import SparseRunSettings, read_any_run, sparse_command
from flash_indexer.recipe.warmup import warm_up

STEPS = 20
HANG = 240.0  # seconds after which a process is taken to hang
EXACT = """
import torch
from flash_indexer.recipe import sparse as stage
load, attach, prepare, add = stage.load_model, stage.attach_start, stage._sparse, stage.add_adapters
def load_in_float64(name, dtype, indexers):
    model, tokenizer = load(name, dtype=torch.float64)
    model.set_experts_implementation("eager")  # torch's grouped products know no float64
    return model, tokenizer
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
stage._sparse = prepare_in_float64
"""
"""In float64, where no rounding decides which key is selected; the loss is float32, row by row."""
RUN = """
import os, sys
os.environ.update(environment)
from pathlib import Path
from rich.console import Console
from flash_indexer.files.tensors import whole, write_tensors
from flash_indexer.files.trained import trainable
from flash_indexer.recipe import sparse as stage
from flash_indexer.recipe.processes import ParallelSettings, leave
from flash_indexer.recipe.sparse_loop import SparseLoop
from flash_indexer.recipe.sparse_record import SparseRunSettings

clip = SparseLoop._clip
def clip_and_save(self, step):
    if step == 1:
        named = dict(self.handle.indexers.named_parameters()) | trainable(self.handle.model)
        found = {name: whole(parameter.grad) for name, parameter in named.items() if parameter.grad is not None}
        if self.processes.is_main:
            write_tensors(self.out.parent, f"{self.out.name}.gradients", found)
    return clip(self, step)
SparseLoop._clip = clip_and_save
sys.stderr = open(f"{out}.{environment.get('RANK', 0)}", "a")  # an error that ends the process is read there too
console = Console(file=sys.stderr, width=500)
try:
    for folder, chosen, parallel in ways:
        handle = stage.train_sparsely(
            SparseRunSettings(**chosen), folder, resume=True, console=console, parallel=ParallelSettings(**parallel)
        )
        local = [x.to_local() if hasattr(x, "to_local") else x for x in handle.model.parameters()]
        Path(f"{folder}.held.{environment.get('RANK', 0)}").write_text(str(sum(x.numel() for x in local)))
except (ValueError, ConnectionError) as error:
    console.print(str(error), markup=False)
    console.file.flush()
    os._exit(1 if isinstance(error, ConnectionError) else 2)
leave()
"""
STOP = """
import os
from flash_indexer.recipe.sparse_loop import SparseLoop
gradients = SparseLoop._gradients
def stopping(self, step, stop):
    if step == 11:
        os._exit(3)
    return gradients(self, step, stop)
SparseLoop._gradients = stopping
"""


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """The tiny Llama, whose output layer has the embedding's weights. Read only."""
    path = tmp_path_factory.mktemp("tied") / "model"
    model, tokenizer = load_model(checkpoint, dtype=torch.float32)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def with_sinks(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A GPT-OSS of 2 layers, whose first has a window. Read only."""
    path = tmp_path_factory.mktemp("sinks") / "model"
    config = GptOssConfig(
        vocab_size=61, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, num_local_experts=4, num_experts_per_tok=2, sliding_window=9,
        bos_token_id=None, eos_token_id=60, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * (2.0 if "sinks" in name else 0.3) + ("norm" in name))
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def warmed_up(
    tmp_path_factory: pytest.TempPathFactory, tiny_settings: Callable[..., Any]
) -> Callable[[Path], dict[str, Any]]:
    """`warmed_up(checkpoint, **sizes)`: a run's settings that begin with indexers after two steps. Read only."""
    made: dict[Path, str] = {}

    def run(model: Path, **sizes: Any) -> dict[str, Any]:
        if model not in made:
            out = tmp_path_factory.mktemp("warm") / "run"
            settings = tiny_settings(model=str(model), rope_dim=None, steps=2, lr=0.01, **sizes)
            warm_up(settings, out, console=Console(file=io.StringIO()))
            made[model] = str(out)
        return dict(init_from=made[model])

    return run


@pytest.fixture(scope="module")
def base(warmed_up: Any, tied: Path, texts: Path) -> dict[str, Any]:
    """Four sequences a step, of documents that are not equally long."""
    return dict(
        **warmed_up(tied), data=str(texts), topk=8, sequence_length=32, batch_size=4, steps=STEPS, lr=1e-3,
        indexer_lr=2e-3, clip=0.5, indexer_clip=0.05, save_every=8,
    )  # fmt: skip


Way = tuple[Path, dict[str, Any], dict[str, Any]]
"""The folder of a run, what its settings have in the place of the base's, and how it is shared out."""


class Starter:
    """`start(out, count, parallel, code, codes, **settings)`: the processes of one run. `train` waits for them too."""

    def __init__(self, runs: Any, base: dict[str, Any]) -> None:
        self.runs, self.base = runs, base

    def __call__(
        self, out: Path, count: int = 1, *, parallel: dict[str, Any] | None = None, code: str = "",
        codes: Sequence[str] = (), **changes: Any,
    ) -> list[Any]:  # fmt: skip
        """code: runs first on every process. codes: after it, on one each."""
        return self.several(out, [(out, changes, parallel or {})], count, code=code, codes=codes)

    def several(
        self, out: Path, ways: Sequence[Way], count: int = 1, *, code: str = EXACT, codes: Sequence[str] = ()
    ) -> list[Any]:
        """Processes that run several ways, one after the other."""
        programs = [code + (codes[rank] if rank < len(codes) else "") + RUN for rank in range(count)]
        chosen = [(str(folder), self.base | changes, parallel) for folder, changes, parallel in ways]
        if count == 1:
            return [self.runs.start(programs[0], None, out, ways=chosen)]
        started: list[Any] = self.runs.ranks(count, None, out, codes=programs, ways=chosen)
        return started

    def train(self, out: Path, count: int = 1, **options: Any) -> Path:
        self.runs.finish(self(out, count, **options))
        return out


@pytest.fixture(scope="module")
def start(runs: Any, base: dict[str, Any]) -> Starter:
    return Starter(runs, base)


class Alone:
    """`alone(code, **settings)`: a run of one process, made once; `several(every settings)` are made by one process."""

    def __init__(self, start: Starter, folder: Path) -> None:
        self.start, self.folder = start, folder
        self.made: dict[str, Path] = {}

    def __call__(self, code: str = EXACT, **changes: Any) -> Path:
        (out,) = self.several([changes], code)
        return out

    def several(self, every: Sequence[dict[str, Any]], code: str = EXACT) -> list[Path]:
        keys = [json.dumps([code, changes], sort_keys=True) for changes in every]
        missing = {key: changes for key, changes in zip(keys, every, strict=True) if key not in self.made}
        ways = [
            (self.folder / str(number), changes, {}) for number, changes in enumerate(missing.values(), len(self.made))
        ]
        if ways:
            self.start.runs.finish(self.start.several(self.folder / "said", ways, code=code))
        self.made |= {key: folder for key, (folder, _, _) in zip(missing, ways, strict=True)}
        return [self.made[key] for key in keys]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, start: Starter) -> Alone:
    return Alone(start, tmp_path_factory.mktemp("alone"))


def tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """Of a file, or of the shards of several processes."""
    with stored_tensors(folder, stem) as stored:
        return {name: stored.whole(name).double() for name in stored.shapes}


def gradients(out: Path) -> dict[str, Tensor]:
    return tensors(out.parent, f"{out.name}.gradients")


def rows(out: Path) -> list[dict[str, Any]]:
    return [{name: x for name, x in row.items() if name != "seconds"} for row in read_metrics(out / "metrics.jsonl")]


def assert_near(found: dict[str, Tensor], truth: dict[str, Tensor], scale: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == truth.keys()
    for name, x in truth.items():
        assert float((found[name] - x).norm()) <= tolerance * float(scale[name].norm()) + 1e-12, name


def assert_same_training(one: Path, other: Path, checkpoint: Path, *, steps: int = STEPS, near: float = 1e-5) -> None:
    """The first gradients, the parameters by how far they moved, and the losses and norms of every step."""
    truth, found = gradients(one), gradients(other)
    assert_near(found, truth, truth, near)
    model, _ = load_model(checkpoint, dtype=torch.float64)
    began = {name: x.detach() for name, x in model.named_parameters()}
    for kind in ("trained", "indexer"):
        truth, found = (tensors(out / "checkpoint", kind) for out in (one, other))
        moved = {name: x - began[name] if name in began else x for name, x in truth.items()}
        assert_near(found, truth, moved, near)
    mine, theirs = rows(one), rows(other)
    assert len(mine) == len(theirs) == steps
    for row, same in zip(mine, theirs, strict=True):
        for name in ("loss", "kl", "norm", "indexer_norm"):
            assert same[name] == (None if row[name] is None else pytest.approx(row[name], rel=near)), name
        for name in ("tokens", "lr", "indexer_lr"):
            assert same[name] == row[name]


def assert_same_bits(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    for file in sorted((one / "checkpoint").iterdir()):
        assert file.read_bytes() == (other / "checkpoint" / file.name).read_bytes(), file.name


PLAIN: dict[str, Any] = {}
FSDP, CP, BOTH, TP = dict(fsdp=True), dict(cp=2), dict(cp=2, fsdp=True), dict(tp=2)
CONTIGUOUS = dict(cp=2, layout="contiguous")
AGAIN, ORACLE = dict(activation_checkpointing=True), dict(keys="oracle")
LORA, ALONE = dict(lora=4), dict(indexers_alone=True)
GROUPS: dict[str, tuple[int, list[tuple[dict[str, Any], dict[str, Any]]]]] = {
    "data parallel": (2, [(PLAIN, {})]),
    "model": (2, [(FSDP, {}), (CP, {}), (BOTH, {}), (TP, {})]),
    "heads": (2, [(TP | FSDP, AGAIN), (TP, ALONE), (TP | FSDP, ALONE), (TP, dict(layers=[1]))]),
    "contiguous": (2, [(CONTIGUOUS, AGAIN), (CONTIGUOUS | FSDP, AGAIN)]),
    "contiguous, less trains": (2, [(way, less) for way in (CONTIGUOUS, CONTIGUOUS | FSDP) for less in (LORA, ALONE)]),
    "some layers, oracle": (2, [(CP, dict(layers=[1])), (PLAIN, ORACLE), (FSDP, ORACLE)]),
    "some layers, shards": (2, [(way, dict(layers=[1])) for way in (PLAIN, FSDP, BOTH, TP | FSDP)]),
    "indexers alone": (2, [(way, ALONE) for way in (PLAIN, FSDP, CP, BOTH)]),
    "adapters": (
        2,
        [(PLAIN, LORA), (FSDP, LORA), (CP, LORA | AGAIN), (BOTH, LORA | AGAIN), (TP, LORA), (TP | FSDP, LORA)],
    ),
    "four": (4, [(PLAIN, AGAIN), (BOTH, {}), (dict(cp=4), {}), (TP | CP, AGAIN), (TP | BOTH, {}), (TP, {})]),
    "four, less trains": (4, [(way, less) for way in (TP | CP, TP | BOTH, TP | CONTIGUOUS) for less in (LORA, ALONE)]),
}
"""Processes, and what is run on them by one start of them: how the run is shared out, and its settings."""


@pytest.mark.parametrize("group", ["data parallel", *(pytest.param(x, marks=pytest.mark.slow) for x in [*GROUPS][1:])])
def test_many_processes_train_what_one_does(
    tmp_path: Path, start: Starter, alone: Alone, tied: Path, group: str
) -> None:
    count, ways = GROUPS[group]
    if any("lora" in changes for _, changes in ways):
        pytest.importorskip("peft")
    assert_all_train_the_same(tmp_path, start, alone, tied, count, ways)


def assert_all_train_the_same(
    folder: Path, start: Starter, alone: Alone, checkpoint: Path, count: int, ways: Any, **common: Any
) -> None:
    """common: settings of all ways, and of the runs of one process that they are held to.

    Micro-batches are of two sequences at most, so that two processes which share sequences accumulate.
    """
    settled, started = [], []
    for number, (parallel, changes) in enumerate(ways):
        dp = count // parallel.get("cp", 1) // parallel.get("tp", 1)
        size = min(2, 4 // dp)
        sizes = dict(batch_size=size, accumulation=4 // dp // size, save_every=STEPS)
        settled.append({name: x for name, x in changes.items() if name not in AGAIN} | common)  # which changes no bit
        started.append((folder / str(number), changes | common | sizes, parallel))
    truths = alone.several(settled)
    start.runs.finish(start.several(folder / "said", started, count))
    for truth, (out, changes, parallel) in zip(truths, started, strict=True):
        print(parallel, changes)  # what failed, if it does
        assert_same_training(truth, out, checkpoint)
        held = [int(Path(f"{out}.held.{rank}").read_text()) for rank in range(count)]
        whole = int(Path(f"{truth}.held.0").read_text())
        assert sum(held) == whole if parallel.get("fsdp") else held == [whole] * count
        assert max(held) <= 1.1 * whole / count or not parallel.get("fsdp")
        assert json.loads((out / "run.json").read_text())["sequences_per_step"] == 4
        command = sparse_command(read_any_run(out, "evaluate"), "x") + " --accumulation 1"
        assert f"--accumulation {4 // changes['batch_size']}" in command


@pytest.mark.slow
def test_a_models_own_indexers_train_likewise(
    tmp_path: Path, start: Starter, alone: Alone, warmed_up: Any, own_checkpoint: Path
) -> None:
    """Each process holds the whole model, and a part of the sequences."""
    changes = warmed_up(own_checkpoint, indexers="own", num_heads=8, head_dim=64)
    out = start.train(tmp_path / "run", 2, code=EXACT, batch_size=2, **changes)
    assert_same_training(alone(**changes), out, own_checkpoint)


MLA: dict[str, tuple[int, list[tuple[dict[str, Any], dict[str, Any]]]]] = {
    "model": (2, [(PLAIN, {}), (FSDP, {}), (CP, {}), (BOTH, AGAIN), (TP, {})]),
    "heads": (2, [(TP | FSDP, AGAIN), *((way, less) for way in (TP, TP | FSDP) for less in (ALONE, LORA))]),
    "contiguous": (2, [(way, less) for way in (CONTIGUOUS, CONTIGUOUS | FSDP) for less in ({}, LORA, ALONE)]),
    "indexers alone": (2, [(way, ALONE) for way in (PLAIN, FSDP, CP, BOTH)]),
    "adapters": (2, [(way, LORA) for way in (PLAIN, FSDP, CP, BOTH)]),
    "four": (4, [(FSDP, AGAIN), (TP | BOTH, {}), (TP | CP, {}), (TP | CONTIGUOUS, {})]),
    "four, less trains": (4, [(way, less) for way in (TP | CP, TP | BOTH) for less in (LORA, ALONE)]),
}


@pytest.mark.parametrize("group", MLA)
@pytest.mark.slow
def test_mla_and_experts_train_likewise(
    tmp_path: Path, start: Starter, alone: Alone, warmed_up: Any, mla_checkpoint: Path, group: str
) -> None:
    count, ways = MLA[group]
    if any("lora" in changes for _, changes in ways):
        pytest.importorskip("peft")
    common = warmed_up(mla_checkpoint, num_heads=16)
    assert_all_train_the_same(tmp_path, start, alone, mla_checkpoint, count, ways, **common)


@pytest.mark.slow
def test_one_key_head_is_on_each_process_that_shares_heads(
    tmp_path: Path, start: Starter, alone: Alone, warmed_up: Any, checkpoint: Path
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint, num_key_value_heads=1))
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
    ways = [(TP, {}), (TP | FSDP, AGAIN)]
    assert_all_train_the_same(tmp_path, start, alone, tmp_path / "model", 2, ways, **warmed_up(tmp_path / "model"))


@pytest.mark.slow
def test_sinks_train_likewise(tmp_path: Path, start: Starter, alone: Alone, warmed_up: Any, with_sinks: Path) -> None:
    ways = [(PLAIN, {}), (FSDP, {})]
    assert_all_train_the_same(tmp_path, start, alone, with_sinks, 2, ways, **warmed_up(with_sinks))


@pytest.fixture(scope="module")
def rows_of_one_document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 documents of 31 words, which an end-of-document token makes 32. Read only."""
    path, draw = tmp_path_factory.mktemp("even"), random.Random(1)
    for n in range(40):
        (path / f"{n:02}.txt").write_text(" ".join(f"w{draw.randrange(60)}" for _ in range(31)), encoding="utf-8")
    return path


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "a document a row"])
def test_four_micro_batches_make_the_update_of_one(
    tmp_path: Path, start: Starter, alone: Alone, tied: Path, rows_of_one_document: Path, packed: bool
) -> None:
    """Eight sequences, on one process and on two."""
    common = dict(steps=2) if packed else dict(steps=2, data=str(rows_of_one_document))
    at_once, by_four = alone.several([common | dict(batch_size=8), common | dict(batch_size=2, accumulation=4)])
    on_two = tmp_path / "two"
    start.train(on_two, 2, code=EXACT, **common, batch_size=1, accumulation=4)
    for out in (by_four, on_two):
        assert_same_training(at_once, out, tied, steps=2)
        run = json.loads((out / "run.json").read_text())
        assert run["sequences_per_step"] == 8
        assert (run["text"]["documents"] == run["text"]["sequences"] == 16) is not packed


@pytest.mark.slow
def test_windows_and_layers_without_indexers_see_all_processes_keys(
    tmp_path: Path, start: Starter, alone: Alone, warmed_up: Any, window_checkpoint: Path
) -> None:
    changes = dict(**warmed_up(window_checkpoint), layers=[0, 2])
    ways = [(way, {}) for way in (CP, FSDP, BOTH, TP, TP | FSDP, CONTIGUOUS)]
    assert_all_train_the_same(tmp_path, start, alone, window_checkpoint, 2, ways, **changes)


@pytest.mark.slow
def test_bfloat16_products_have_the_same_gradients(tmp_path: Path, start: Starter, alone: Any) -> None:
    """To the rounding of a product of all tokens against two products of half of them."""
    changes = dict(dtype="bfloat16", steps=1)
    out = start.train(tmp_path / "run", 2, parallel=dict(fsdp=True), batch_size=2, **changes)
    truth = gradients(alone("", **changes))
    assert_near(gradients(out), truth, truth, 2e-2)


DIE = """
import os, signal
from flash_indexer.{module} import {owner} as owner
function, left = owner.{name}, [{call}]
def dying(*args, **options):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **options)
owner.{name} = dying
"""
IN_A_STEP = DIE.format(module="recipe.sparse_loop", owner="SparseLoop", name="_set_rates", call=11)
WHILE_SAVING = DIE.format(module="files", owner="tensors", name="local", call=270)
WHILE_SAVING_SHARDS = DIE.format(module="files", owner="tensors", name="local", call=130)
"""The second of two savings, of some 160 tensors in the main process, 90 in another where FSDP2 shares them out."""


@pytest.mark.parametrize(
    ("parallel", "dying", "code", "mla"),
    [
        (dict(cp=2, fsdp=True), 1, IN_A_STEP, True),
        (dict(cp=2), 1, IN_A_STEP, True),
        (dict(fsdp=True), 0, IN_A_STEP, False),
        (dict(cp=2, fsdp=True), 0, WHILE_SAVING, False),
        (dict(fsdp=True), 1, WHILE_SAVING_SHARDS, False),
        (dict(), 0, WHILE_SAVING, False),
    ],
    ids=["cp and fsdp, mla", "cp, mla", "fsdp", "cp and fsdp", "fsdp, its shards", "data parallel"],
)
@pytest.mark.slow
def test_after_a_kill_the_run_goes_on_with_the_same_bits(
    tmp_path: Path,
    start: Starter,
    warmed_up: Any,
    mla_checkpoint: Path,
    parallel: dict[str, Any],
    dying: int,
    code: str,
    mla: bool,
) -> None:
    """The process that is not killed says so, and ends."""
    options: dict[str, Any] = dict(parallel=parallel | dict(timeout=20.0), batch_size=2, steps=12)
    if mla:
        options |= warmed_up(mla_checkpoint, num_heads=16)
    whole = start.train(tmp_path / "whole", 2, **options)
    codes = [code if rank == dying else "" for rank in range(2)]
    started = start(tmp_path / "cut", 2, codes=codes, **options)
    for process in started:
        process.join(HANG)
    assert [process.exitcode for process in started] == [-signal.SIGKILL if n == dying else 1 for n in range(2)]
    said = Path(f"{tmp_path / 'cut'}.{1 - dying}").read_text()
    assert f"sparse: process {1 - dying} of 2 lost contact with another process" in said, said
    assert "checkpoint is intact" in said and "--resume" in said
    assert 8 <= len(rows(tmp_path / "cut")) <= 12
    start.train(tmp_path / "cut", 2, **options)
    assert_same_bits(whole, tmp_path / "cut")


UNABLE = """
from flash_indexer.files import {module} as owner
function, left = owner.{name}, [{call}]
def unable(*args):
    left[0] -= 1
    if left[0] <= 0:
        {fault}
    return function(*args)
owner.{name} = unable
"""
OUT_OF_SPACE = 'raise OSError(28, "No space left on device")'
FULL = UNABLE.format(module="tensors", name="local", call=130, fault=OUT_OF_SPACE)
FULL_AT_THE_END = UNABLE.format(module="atomic", name="_sync_tree", call=2, fault=OUT_OF_SPACE)
ELSEWHERE = UNABLE.format(module="trained", name="shared_directory", call=2, fault='args = [Path("/nowhere/run")]')


@pytest.mark.parametrize(
    ("unable", "code", "message"),
    [
        (1, FULL, "no space left while writing {out}/checkpoint; the unfinished copy was removed"),
        (1, ELSEWHERE, "must be on a disk that all processes see"),
        (0, FULL_AT_THE_END, "no space left while writing {out}/checkpoint; the unfinished copy was removed"),
    ],
    ids=["full disk", "no shared disk", "full disk at the end"],
)
@pytest.mark.slow
def test_where_one_process_can_not_save_all_end_with_a_message_and_the_last_checkpoint_stays(
    tmp_path: Path, start: Starter, unable: int, code: str, message: str
) -> None:
    options: dict[str, Any] = dict(parallel=dict(fsdp=True), batch_size=2, steps=12)
    whole = start.train(tmp_path / "whole", 2, **options)
    out = tmp_path / "run"
    started = start(out, 2, codes=[code if rank == unable else "" for rank in range(2)], **options)
    for process in started:
        process.join(HANG)
    assert [process.exitcode for process in started] == [1 if rank == unable else 2 for rank in range(2)]
    said = Path(f"{out}.{1 - unable}").read_text()
    assert f"sparse: process {unable} could not save; see its message, in its output; the checkpoint in {out}" in said
    assert "checkpoint is intact: start again with --resume when it can" in said
    assert message.format(out=out) in Path(f"{out}.{unable}").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint", "metrics.jsonl", "run.json"]
    assert json.loads((out / "checkpoint" / "training_state.json").read_text())["step"] == 8
    start.train(out, 2, **options)
    assert_same_bits(whole, out)
    handle, _, _ = load_trained(out, None, Console(file=io.StringIO()))  # as evaluate and export do
    own = dict(handle.model.named_parameters())
    assert all(torch.equal(own[name].double(), x) for name, x in tensors(out / "checkpoint", "trained").items())


UNSEEN = """
from pathlib import Path
from flash_indexer.recipe import sparse_loop
sparse_loop.readable_directory = lambda path: Path("/nowhere")
"""


@pytest.mark.slow
def test_a_checkpoint_that_one_process_does_not_see_is_refused_by_all(tmp_path: Path, start: Starter) -> None:
    options: dict[str, Any] = dict(parallel=dict(timeout=20.0), batch_size=2, steps=4)
    out = start.train(tmp_path / "run", 2, **options)
    start.runs.finish(start(out, 2, codes=["", UNSEEN], **options), exitcode=2)
    for rank in range(2):
        said = Path(f"{out}.{rank}").read_text()
        assert f"sparse: --out must be one folder that all processes see, got {out}, where process 1" in said


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, dict(fsdp=True)), (1, dict())),
        pytest.param((1, dict()), (4, dict(cp=2, fsdp=True)), marks=pytest.mark.slow),
        pytest.param((4, dict(fsdp=True)), (2, dict(cp=2)), marks=pytest.mark.slow),
        pytest.param((2, dict(tp=2)), (4, dict(tp=2, fsdp=True)), marks=pytest.mark.slow),
    ],
    ids=["fsdp to one", "one to cp and fsdp", "fsdp to cp", "tp to tp and fsdp"],
)
def test_a_run_goes_on_under_another_number_of_processes(
    tmp_path: Path, start: Starter, alone: Alone, tied: Path, before: Any, after: Any
) -> None:
    """Ended by an error in its eleventh step, with a checkpoint of the eighth."""
    out, codes = tmp_path / "run", [STOP] * 4
    (first, parallel), (second, other) = before, after
    size = 4 // (first // parallel.get("cp", 1) // parallel.get("tp", 1))
    start.runs.finish(start(out, first, parallel=parallel, code=EXACT, codes=codes, batch_size=size), 3)
    start.train(out, second, parallel=other, code=EXACT, batch_size=size)
    assert_same_training(alone(), out, tied)


def test_what_can_not_be_shared_out_is_refused_on_every_process(tmp_path: Path, start: Starter) -> None:
    """And what does nothing is said; none of it writes anything."""
    for name, parallel, changes, message in (
        ("tp", dict(tp=2), ORACLE, 'sparse: keys="oracle" must run with cp=1 and tp=1, got cp=1 and tp=2'),
        ("cp", dict(cp=2), dict(sequence_length=30), "sparse: sequence_length must be a multiple of 4 for cp=2"),
        ("cps", dict(cp=3), {}, "make_parallel: the number of processes must be a multiple of cp * tp = 3 * 1, got 2"),
    ):
        start.runs.finish(start(tmp_path / name, 2, parallel=parallel, **changes), exitcode=2)
        for rank in range(2):
            assert message in (tmp_path / f"{name}.{rank}").read_text(), name
        assert not (tmp_path / name / "run.json").exists()
    out = start.train(tmp_path / "run", parallel=dict(fsdp=True, layout="contiguous"), steps=1)
    said = (tmp_path / "run.0").read_text()
    assert "sparse: --fsdp does nothing in one process" in said
    assert "sparse: --cp-layout contiguous does nothing without --cp" in said
    start.runs.finish(start(out, 3), exitcode=2)
    for rank in range(3):
        assert "must divide the 4 sequences of an optimizer step" in (tmp_path / f"run.{rank}").read_text()


def test_a_run_says_which_options_do_nothing_or_less_than_they_could(base: dict[str, Any]) -> None:
    settings, processes = SparseRunSettings(**base, dtype="bfloat16"), Processes(ParallelSettings(fsdp=True))
    (said,) = notes(settings, processes, False)
    assert "--fsdp does nothing in one process" in said
    processes.count, processes.device = 2, torch.device("cuda")
    (said,) = notes(settings, processes, False)
    assert "--fsdp without --activation-checkpointing keeps the bfloat16 weights of all layers" in said
    for changes in (dict(activation_checkpointing=True), dict(lora=4), dict(indexers_alone=True)):
        assert notes(replace(settings, **changes), processes, False) == []
    (said,) = notes(replace(settings, activation_checkpointing=True, indexers_alone=True), processes, False)
    assert "--activation-checkpointing does nothing with --indexers-alone" in said


COMMAND = """
import os, sys
os.environ.update(environment)
sys.argv, sys.stdout = arguments, open(f"{out}.{environment['RANK']}", "a")
sys.stderr = sys.stdout
from flash_indexer.cli import main
main()
"""
ASKED_TO_END = """
import os, signal
from flash_indexer.recipe.sparse_loop import SparseLoop
parts = SparseLoop._parts
def asked(self, step):
    if step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return parts(self, step)
SparseLoop._parts = asked
"""


@pytest.mark.slow
def test_the_command_trains_on_two_processes_ends_when_one_is_asked_to_and_goes_on(
    tmp_path: Path, runs: Any, base: dict[str, Any]
) -> None:
    out = tmp_path / "run"
    words = ["flash-indexer", "sparse", "--out", str(out), "--cp", "2", "--fsdp", "--resume"]
    for name, value in (base | dict(steps=6)).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    codes = [COMMAND, ASKED_TO_END + COMMAND]
    started = runs.ranks(2, None, out, codes=codes, arguments=words)
    for process in started:
        process.join(HANG)
    assert [process.exitcode for process in started] == [143, 143]
    assert [row["step"] for row in rows(out)] == [1, 2, 3]
    assert "sparse: ended by SIGTERM after step 3 of 6, which is saved in" in Path(f"{out}.0").read_text().replace(
        "\n", " "
    )
    runs.finish(runs.ranks(2, None, out, codes=[COMMAND] * 2, arguments=words))
    assert [row["step"] for row in rows(out)] == [*range(1, 7)]
    said = [Path(f"{out}.{rank}").read_text() for rank in range(2)]
    assert "trained" in said[0] and "trained" not in said[1]
    words = ["flash-indexer", "sparse", "--out", str(tmp_path / "tp"), "--tp", "2", *words[words.index("--resume") :]]
    runs.finish(runs.ranks(2, None, tmp_path / "said", codes=[COMMAND] * 2, arguments=words))
    assert [row["step"] for row in rows(tmp_path / "tp")] == [*range(1, 7)]
