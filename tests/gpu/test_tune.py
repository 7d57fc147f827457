"""Tuning on the GPU: a short search end to end, what the operator launches then, and candidates that misbehave."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from flash_indexer.bench import per_head as bench_heads
from flash_indexer.bench import tune, tune_worker
from flash_indexer.bench.tune_worker import Lost, Worker
from flash_indexer.kernels import tuned
from flash_indexer.kernels.sm_90 import sizes as tiles
from flash_indexer.ops import launch
from flash_indexer.ops.attention import layout

pytestmark = pytest.mark.gpu
SIZE = tune.parse_size(64, 1, 128, 128, 64, "700,1,500")
HANGING = """
import json, sys, torch
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
while True:
    cycles = json.loads(pipe.recv_bytes())["cycles"]
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    pipe.send_bytes(b"{}")
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Where winners are looked for."""
    monkeypatch.setattr(tuned, "location", lambda: tmp_path / "tuned.json")
    tuned.forget()
    yield tmp_path / "tuned.json"
    tuned.forget()


def test_the_operator_uses_what_tuning_found(file, monkeypatch):
    """Of three candidates a kernel; whichever is fastest of those that are not the default is declared the winner."""
    every = tiles.candidates
    monkeypatch.setattr(tiles, "candidates", lambda kernel, shape: every(kernel, shape)[:3])
    monkeypatch.setattr(tune, "NOISE", -100.0)
    text = io.StringIO()
    searched = tune.run(SIZE, out=None, dry_run=False, console=Console(file=text, width=200))
    print(text.getvalue())
    for stage, result in zip(tune.stages(SIZE), searched, strict=True):
        assert result.best in tiles.candidates(stage.kernel, stage.shape)[1:] and result.lost == [], stage.title
    assert len(json.loads(file.read_text())["entries"]) == 4

    launched, load = {}, launch.load

    def recorded(name, **static):
        launched[name] = static
        return load(name, **static)

    monkeypatch.setattr(launch, "load", recorded)
    bench_heads.check(SIZE)  # by the ruler
    results = dict(zip(tiles.KERNELS, (searched[0], *searched[2:]), strict=True))  # the second is attention alone
    for name, result in results.items():
        assert result.best.items() <= launched[name].items(), name
        assert not result.default.items() <= launched[name].items(), name
    tune.reset(file, print)
    bench_heads.check(SIZE)
    assert all(result.default.items() <= launched[name].items() for name, result in results.items())


def test_a_kernel_that_hangs_is_ended_and_the_gpu_goes_on():
    with Worker(HANGING, seconds=3.0) as worker:
        worker.ask({"cycles": 1})
        with pytest.raises(Lost, match="no answer within 3 s"):
            worker.ask({"cycles": 10**12})
        assert worker.ask({"cycles": 1}) == {}


@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_a_candidate_that_writes_nothing_is_wrong(kernel, monkeypatch):
    """Memory for its outputs may have held right results a moment before."""
    launch = tune_worker.launch
    default, outputs = tiles.default(kernel, layout.shapes(128, 128, 64, 64)[kernel]), {}

    def idle(size, kernel, indexer, sizes):
        if sizes == default:
            results = launch(size, kernel, indexer, sizes)
            outputs.update({name: (x.shape, x.dtype) for name, x in results.items()})
            return results
        return {name: torch.empty(shape, dtype=dtype, device="cuda") for name, (shape, dtype) in outputs.items()}

    monkeypatch.setattr(tune_worker, "launch", idle)
    request = dict(
        size=dict(H=64, G=1, D=128, I=64, E=64, documents=[300, 200], V=128),
        kernel=kernel, indexer=True, default=default, sizes={"N": -1}, rounds=2,
    )  # fmt: skip
    with pytest.raises(ArithmeticError, match="is off by"):
        tune_worker.judge(request)
