"""The first call of a process: each size has one of its own, after a call here has had the kernels compiled."""

from __future__ import annotations

import os

import pytest

from flash_indexer.bench import sparse_first_call

CALLS = []


def count(name, device="cpu"):
    """Whose call it is, and how many this process has made."""
    CALLS.append(name)
    if name == "no size":
        raise OSError("no GPU")
    return {"first_s": float(len(CALLS)), "next_ms": 2.5, "process": os.getpid()}


def test_each_size_has_a_process_of_its_own():
    found = sparse_first_call.in_processes(count, ("v32", "gqa32"))
    assert {name: x["first_s"] for name, x in found.items()} == {"v32": 1.0, "gqa32": 1.0}
    assert len({os.getpid(), *(x["process"] for x in found.values())}) == 3


def test_this_process_calls_before_them(monkeypatch):
    order = []
    monkeypatch.setattr(sparse_first_call, "time_calls", order.append)
    monkeypatch.setattr(sparse_first_call, "in_processes", lambda call, names: order.append("others") or dict(a=1))
    assert sparse_first_call.measure() == {"first_call": dict(a=1)} and order == ["v32", "gqa32", "others"]


def test_a_process_that_fails_is_told():
    with pytest.raises(RuntimeError, match="the first call of no size failed: OSError: no GPU"):
        sparse_first_call.in_processes(count, ("no size",))


def test_a_line_names_both_calls():
    record = {"name": "sparse_first_call", "first_call": {"v32": {"first_s": 0.5, "next_ms": 2.5}}}
    assert sparse_first_call.line(record).endswith("first call of a process: v32 0.50 s, then 2.5 ms")


def test_both_calls_are_timed(monkeypatch):
    monkeypatch.setattr(sparse_first_call, "TOKENS", 4)
    monkeypatch.setattr(sparse_first_call, "KEYS", 8)
    monkeypatch.setattr(sparse_first_call, "TOPK", 2)
    times = sparse_first_call.time_calls("gqa32", "cpu")
    assert times["first_s"] > 0 and times["next_ms"] > 0
