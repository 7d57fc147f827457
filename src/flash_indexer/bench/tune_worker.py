"""A candidate of `flash-indexer tune` in a process of its own: one that hangs or crashes takes only that process along.

Requests and answers are JSON objects over a pipe. A request names a problem, a kernel, the default's sizes and the
candidate's; the process compares the candidate's results with the default's, times both in turns, and answers with
milliseconds. After anything but that it is replaced, since a wrong kernel may have written anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from typing import Any

import torch
from torch import Tensor

from flash_indexer.bench.per_head import problem
from flash_indexer.bench.timing import Size, time_in_turns
from flash_indexer.ops import worklists
from flash_indexer.ops.attention import gpu_body
from flash_indexer.ops.attention.gpu_gradients import per_head_gradients
from flash_indexer.ops.problem import Problem

PROGRAM = "import sys; sys.path[:] = {path!r}; from flash_indexer.bench.tune_worker import main; main(int(sys.argv[1]))"
SECONDS, START_SECONDS = 60.0, 120.0  # for an answer; for starting and making the problem before the first one
SHORT = (300, 1, 211)  # documents that are compared besides those that are timed
ROW_ERROR, NUMBER_ERROR = 2**-7, 2e-5  # of outputs and gradients, of logsumexps and KL: twice what `bench` admits


class Lost(Exception):
    """A candidate that gave no time: wrong, crashed or hanging. The text says which."""


class Worker:
    """The process, started by the first request and by the one after a loss."""

    def __init__(
        self, program: str | None = None, *, seconds: float = SECONDS, start_seconds: float = START_SECONDS
    ) -> None:
        self._program = PROGRAM.format(path=sys.path) if program is None else program
        self._seconds, self._start_seconds = seconds, start_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            Lost: where the process answers with an error, ends, or is silent for too long; it is gone then.
        """
        limit = self._seconds
        if self._process is None:
            self._start()
            limit += self._start_seconds
        answered = False
        try:
            self._pipe.send_bytes(json.dumps(request).encode())
            if not self._pipe.poll(limit):
                raise Lost(f"no answer within {limit:g} s")
            answer: dict[str, Any] = json.loads(self._pipe.recv_bytes())
            if "error" in answer:
                raise Lost(answer["error"])
            answered = True
            return answer
        except (EOFError, OSError) as error:
            raise Lost(f"its process ended: {self._last_line()}") from error
        finally:
            if not answered:
                self.close()

    def close(self) -> None:
        """Ends the process, whatever it is at."""
        if self._process is None:
            return
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may take its time
            self._process.wait(30)
        self._pipe.close()
        self._output.close()
        self._process = None

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        self._output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", self._program, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        finally:
            theirs.close()

    def _last_line(self) -> str:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._output.seek(0)
        lines = self._output.read().split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), f"status {self._process.returncode}")


def main(descriptor: int) -> None:
    """Answers the requests that come over a pipe until it is closed or one fails. Ends the process."""
    pipe: Connection[Any, Any] = Connection(descriptor)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            request = json.loads(pipe.recv_bytes())
            try:
                answer = judge(request)
            except Exception as error:
                pipe.send_bytes(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}).encode())
                break
            pipe.send_bytes(json.dumps(answer).encode())
    os._exit(0)  # a kernel that failed may leave a context whose end hangs


def judge(request: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of the candidate and of the default, {"ms", "default_ms"}, timed in turns.

    Raises:
        ArithmeticError: where a result differs from the default's by more than rounding.
    """
    size = Size(**request["size"] | {"documents": tuple(request["size"]["documents"])})
    kernel, indexer, default, sizes = (request[key] for key in ("kernel", "indexer", "default", "sizes"))

    def results(of: Size, tiles: dict[str, int]) -> dict[str, Tensor]:
        return launch(of, kernel, indexer, tiles)

    for each in (replace(size, documents=SHORT), size):
        right = results(each, default)
        poison(right)
        compare(results(each, sizes), right)
    times = time_in_turns(
        {"default": lambda: results(size, default), "ms": lambda: results(size, sizes)}, request["rounds"]
    )
    again = results(size, default)
    if not all(torch.equal(again[name], right[name]) for name in right):
        raise ArithmeticError("the default's results changed: the candidate wrote where it must not")
    return {"ms": times["ms"]["p50"], "default_ms": times["default"]["p50"]}


def launch(size: Size, kernel: str, indexer: bool, tiles: dict[str, int]) -> dict[str, Tensor]:
    """The outputs of one kernel with these static sizes."""
    tensors, others = made(size)
    q, k, v, *index = tensors
    intervals = (others["key_start"], others["key_end"], others["softmax_scale"])
    sizes = {kernel: tiles}
    if kernel == "attention":
        indices = (index[0], index[1], index[2])
        if indexer:
            return gpu_body.attention_with_kl(q, k, v, indices, *intervals, sizes)._asdict()
        return gpu_body.attention(q, k, v, *intervals, sizes)._asdict()
    problem, lse_index = backward_problem(size)
    needs = (False, True, False) if kernel == "head_gradients_key" else (True, False, True)
    gradients = per_head_gradients(problem._replace(needs=needs), lse_index, sizes)
    names = ("d_index_q", "d_index_k", "d_index_weights")
    return {name: x for name, x in zip(names, gradients, strict=True) if x is not None}


@functools.cache
def made(size: Size) -> tuple[list[Tensor], dict[str, Any]]:
    """The problem: `bench.per_head`'s own."""
    return problem(size)


@functools.cache
def backward_problem(size: Size) -> tuple[Problem, Tensor]:
    """What the gradients need of the pass before: both logsumexps, and each token's share of the loss."""
    (q, k, v, index_q, index_k, weights), others = made(size)
    starts, ends, scale = others["key_start"], others["key_end"], others["softmax_scale"]
    forward = gpu_body.attention_with_kl(q, k, v, (index_q, index_k, weights), starts, ends, scale)
    share = worklists.mean_weight(starts, ends, k.shape[0]) / q.shape[1]
    needs = (True, True, True)
    problem = Problem(
        q, k, index_q, index_k, weights, forward.lse, starts, ends, share, scale, "per_head", 0, needs
    )  # fmt: skip
    return problem, forward.lse_index


def poison(results: dict[str, Tensor]) -> None:
    """Fills memory that outputs like these are going to get with NaN: what a kernel does not write shows."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    held = [torch.full_like(x, float("nan")) for x in results.values() for _ in range(3)]
    del held


def compare(got: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Raises ArithmeticError where results differ by more than rounding.

    Rows of outputs and gradients by their norm and the mean row's, logsumexps and KL by 1 and their size.
    """
    for name, expected in right.items():
        a, b = got[name].float(), expected.float()
        if name in ("lse", "lse_index", "kl"):
            error, limit = ((a - b).abs() / (1 + b.abs())).max(), NUMBER_ERROR
        else:
            norms = b.norm(dim=-1)
            error, limit = ((a - b).norm(dim=-1) / (norms + norms.mean())).max(), ROW_ERROR
        if not float(error) <= limit:
            raise ArithmeticError(f"{name} is off by {float(error):.1e}, at most {limit:.1e}")
