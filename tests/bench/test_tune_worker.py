"""Candidates in a process that may hang, crash or lie: the search goes on in a fresh one."""

from __future__ import annotations

import os

import pytest
import torch

from flash_indexer.bench import tune_worker
from flash_indexer.bench.tune_worker import Lost, Worker, compare

FAKE = """
import json, os, signal, sys, time
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
while True:
    request = json.loads(pipe.recv_bytes())
    what = request["do"]
    if what == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True: time.sleep(1)
    if what == "crash":
        print("an illegal memory access", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "leave":
        sys.exit(3)
    answer = {"error": "wrong"} if what == "fail" else {"process": os.getpid()}
    pipe.send_bytes(json.dumps(answer).encode())
"""


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_process_answers_many_requests():
    with Worker(FAKE) as worker:
        assert worker.ask({"do": "x"}) == worker.ask({"do": "x"})


@pytest.mark.parametrize(
    ("do", "seconds", "why"),
    [
        ("hang", 2.0, "no answer within 2 s"),
        ("crash", 60.0, "its process ended: an illegal memory access"),
        ("leave", 60.0, "its process ended: status 3"),
        ("fail", 60.0, "wrong"),
    ],
)
def test_what_a_candidate_does_costs_its_process_alone(do, seconds, why):
    with Worker(FAKE, seconds=seconds) as worker:
        before = worker.ask({"do": "x"})["process"]
        with pytest.raises(Lost, match=why):
            worker.ask({"do": do})
        assert not alive(before)
        assert worker.ask({"do": "x"})["process"] != before


def test_the_first_request_may_take_longer():
    with Worker(FAKE, seconds=0.01, start_seconds=0.01) as worker, pytest.raises(Lost, match="no answer within 0.02 s"):
        worker.ask({"do": "hang"})


def test_nothing_is_left_behind():
    with Worker(FAKE) as worker:
        process = worker.ask({"do": "x"})["process"]
        assert alive(process)
    assert not alive(process)


def test_the_real_process_says_what_went_wrong():
    """A request that no problem can be made of; on a machine without a GPU as well."""
    with Worker() as worker, pytest.raises(Lost, match="KeyError: 'size'"):
        worker.ask({})


RIGHT = {name: torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0)) for name in ("out", "d_index_q")}
RIGHT |= {"kl": torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) * 3}


def changed(name, at, by):
    got = {key: value.clone() for key, value in RIGHT.items()}
    got[name][at] += by
    return got


def test_rounding_is_admitted():
    compare({name: x.bfloat16() if name != "kl" else x for name, x in RIGHT.items()}, RIGHT)
    compare(changed("kl", (5, 3), 1e-5), RIGHT)


@pytest.mark.parametrize(
    "name, by", [("out", 0.2), ("d_index_q", 0.2), ("kl", 1e-3), ("out", torch.nan), ("kl", torch.nan)]
)
def test_one_wrong_element_is_seen(name, by):
    at = (5, 3) if name == "kl" else (5, 3, 7)
    with pytest.raises(ArithmeticError, match=f"{name} is off by"):
        compare(changed(name, at, by), RIGHT)


def run_judge(monkeypatch, candidate):
    """judge() of a kernel whose default gives RIGHT."""

    def launch(size, kernel, indexer, tiles):
        return {name: x.clone() for name, x in RIGHT.items()} if tiles == {"N": 1} else candidate(size)

    def timed(contestants, rounds):
        for contestant in contestants.values():
            contestant()
        return {"default": {"p50": 2.0}, "ms": {"p50": 1.0 + rounds}}

    monkeypatch.setattr(tune_worker, "launch", launch)
    monkeypatch.setattr(tune_worker, "time_in_turns", timed)
    size = dict(H=4, G=1, D=64, I=4, E=64, documents=[500, 500], V=64)
    request = dict(size=size, kernel="attention", indexer=True, default={"N": 1}, sizes={"N": 2}, rounds=3)
    return tune_worker.judge(request)


def test_a_right_candidate_gets_its_time(monkeypatch):
    assert run_judge(monkeypatch, lambda size: dict(RIGHT)) == {"ms": 4.0, "default_ms": 2.0}


@pytest.mark.parametrize("documents", [tune_worker.SHORT, (500, 500)])
def test_a_wrong_candidate_gets_none(documents, monkeypatch):
    """Wrong in the short documents or in those that are timed."""
    with pytest.raises(ArithmeticError, match="out is off by"):
        run_judge(
            monkeypatch, lambda size: changed("out", (0, 0, 0), 1.0) if size.documents == documents else dict(RIGHT)
        )


def test_a_candidate_that_writes_elsewhere_gets_none(monkeypatch):
    """Its own results are right, but what the default reads is not what it was."""
    calls = []

    def candidate(size):
        calls.append(size)
        if len(calls) == 3:
            monkeypatch.setitem(RIGHT, "kl", RIGHT["kl"] + 1e-6)
        return dict(RIGHT)

    with pytest.raises(ArithmeticError, match="the candidate wrote where it must not"):
        run_judge(monkeypatch, candidate)
