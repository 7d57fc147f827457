"""The first call of a process: two are started for each size, and the second is what counts."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from flash_indexer.bench import sparse_first_call


@pytest.fixture
def started(monkeypatch):
    """Commands that were run; the n-th process says that its first call took n seconds."""
    commands = []

    def run(command, **_):
        commands.append(command)
        said = f"compiling\n{json.dumps({'first_s': float(len(commands)), 'next_ms': 2.5})}\n"
        return SimpleNamespace(returncode=0, stdout=said, stderr="")

    monkeypatch.setattr(sparse_first_call.subprocess, "run", run)
    return commands


def test_the_second_process_counts(started):
    record = sparse_first_call.measure()
    assert [command[-1] for command in started] == ["v32", "v32", "gqa32", "gqa32"]
    assert {name: x["first_s"] for name, x in record["first_call"].items()} == {"v32": 2.0, "gqa32": 4.0}
    text = sparse_first_call.line(record | {"name": "sparse_first_call"})
    assert text.endswith("v32 2.00 s, then 2.5 ms; gqa32 4.00 s, then 2.5 ms")


def test_a_process_that_fails_is_told(monkeypatch):
    failed = SimpleNamespace(returncode=1, stdout="", stderr="no GPU")
    monkeypatch.setattr(sparse_first_call.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="first call of v32 failed: no GPU"):
        sparse_first_call.measure()


def test_both_calls_are_timed(monkeypatch):
    monkeypatch.setattr(sparse_first_call, "TOKENS", 4)
    monkeypatch.setattr(sparse_first_call, "KEYS", 8)
    monkeypatch.setattr(sparse_first_call, "TOPK", 2)
    times = sparse_first_call.time_calls("gqa32", "cpu")
    assert times["first_s"] > 0 and times["next_ms"] > 0
