"""Four processes that stay: forked from a server that has imported torch, joined by gloo, asked over pipes."""

from __future__ import annotations

import importlib.util
import multiprocessing
import socket
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_indexer.testing import Result, Shape, assert_close, eager_indexer_kl, make_inputs, reference_indexer_kl

WORLD = 4
SECONDS = 60  # after which a rank that has not answered is taken to hang
PROGRAMS = Path(__file__).with_name("programs.py")


def serve(rank: int, port: int, pipe: Connection) -> None:
    """Runs the functions of programs.py by name until told None; answers with (True, result) or (False, traceback)."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=SECONDS)
    )
    spec = importlib.util.spec_from_file_location("programs", PROGRAMS)
    assert spec is not None and spec.loader is not None
    programs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(programs)
    groups = programs.make_groups()
    while (asked := pipe.recv()) is not None:
        name, arguments = asked
        try:
            pipe.send((True, getattr(programs, name)(groups, **arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """call(program, world, ...): what the first `world` ranks return, in order."""

    def __init__(self) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["flash_indexer.testing", "flash_indexer.distributed"])
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(WORLD):
            ours, theirs = server.Pipe()
            self.pipes.append(ours)
            self.processes.append(server.Process(target=serve, args=(rank, port, theirs), daemon=True))
            self.processes[-1].start()

    def call(self, program: str, world: int, **arguments: Any) -> list[Any]:
        for pipe in self.pipes[:world]:
            pipe.send((program, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes[:world]):
            if not pipe.poll(SECONDS):
                self.end()
                pytest.fail(f"{program}: rank {rank} of {world} did not answer in {SECONDS} s")
            answers.append(pipe.recv())
        for rank, (good, value) in enumerate(answers):
            assert good, f"rank {rank}: {value}"
        return [value for _, value in answers]

    def end(self) -> None:
        for process in self.processes:
            process.kill()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    for pipe in pool.pipes:
        pipe.send(None)
    for process in pool.processes:
        process.join(10)
    pool.end()


@pytest.fixture(scope="session")
def judge() -> Callable[..., None]:
    return compare


def compare(
    got: Result, shape: Shape, *, seed: int, dtype: torch.dtype, d_loss: float, lse: bool, weighted: bool,
    target: str = "mean",
) -> None:  # fmt: skip
    """float32 by the ruler, float64 to 1e-10, both against the definition of the whole problem in float64."""
    x = make_inputs(shape, seed=seed, dtype=dtype)
    common = dict(target=target, token_weight=x.token_weight if weighted else None, d_loss=d_loss)
    truth = reference_indexer_kl(x, **common)
    if dtype == torch.float64:
        for value, expected in zip(got, truth, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-13)
        return
    eager = eager_indexer_kl(x, lse=x.lse if lse else None, **common)
    for name, *values in list(zip(Result._fields, got, truth, eager, strict=True))[1:]:
        assert_close(name, *values)
    seen = x.key_end > x.key_start
    terms = got.kl.double() * (x.token_weight.double() if weighted else seen / seen.sum())
    assert abs(float(got.loss) - float(terms.sum())) <= 1e-6 * float(terms.abs().sum())
