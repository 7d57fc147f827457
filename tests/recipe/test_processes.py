"""Settings of a shared run, the parts of a batch, and which failures count as lost contact."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from flash_indexer.parallel.mesh import Parallel
from flash_indexer.recipe.processes import ParallelSettings, Processes
from flash_indexer.recipe.run_record import warmup_command

PORT_RANGE = 51  # IP_LOCAL_PORT_RANGE, of Linux 6.3 and later: the ports that a socket is given one of


def one_of(parallel: Parallel) -> Processes:
    """A process at a place among others that aren't there."""
    processes = Processes(ParallelSettings())
    processes.parallel = parallel
    return processes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(cp=0), "warmup: cp must be at least 1, got 0"),
        (dict(tp=-1), "warmup: tp must be at least 1, got -1"),
        (dict(layout="ring"), r"warmup: layout \(--cp-layout\) must be one of .* got 'ring'"),
        (dict(timeout=0.0), r"warmup: timeout must be positive and at most 1e\+06 s, got 0.0"),
        (dict(timeout=float("inf")), r"warmup: timeout must be positive and at most 1e\+06 s, got inf"),
    ],
)
def test_unusable_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelSettings(**changes)


def test_a_sequence_must_divide_into_the_pieces() -> None:
    one_of(Parallel(cp=2)).check_length(12)
    one_of(Parallel(cp=2, layout="contiguous")).check_length(6)
    one_of(Parallel(tp=2)).check_length(7)
    with pytest.raises(ValueError, match="sequence_length must be a multiple of 4 for cp=2 in layout 'zigzag', got 6"):
        one_of(Parallel(cp=2)).check_length(6)
    with pytest.raises(ValueError, match="must be a multiple of 3 for cp=3 in layout 'contiguous', got 8"):
        one_of(Parallel(cp=3, layout="contiguous")).check_length(8)


def test_the_parts_of_a_batch_are_its_rows_in_one_sequence() -> None:
    batch = dict(input_ids=torch.arange(16).view(2, 8), position_ids=torch.arange(8).repeat(2, 1))
    assert one_of(Parallel(dp=2)).part(batch) is batch
    first = one_of(Parallel(cp=2)).part(batch)
    assert first["input_ids"].tolist() == [[0, 1, 2, 3, 12, 13, 14, 15]]
    assert first["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    second = one_of(Parallel(cp=2, cp_rank=1, layout="contiguous")).part(batch)
    assert second["input_ids"].tolist() == [[8, 9, 10, 11, 12, 13, 14, 15]]


@pytest.mark.parametrize(
    "reason",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5",
        "Operation timed out!",
    ],
)
def test_lost_contact_is_told_in_one_message(tmp_path: Path, reason: str) -> None:
    processes = one_of(Parallel())
    with (
        pytest.raises(
            ConnectionError, match="process 0 of 1 lost contact .* no checkpoint was written: look for the first"
        ),
        processes.telling(tmp_path / "checkpoint"),
    ):
        raise RuntimeError(reason)
    (tmp_path / ".checkpoint.old").mkdir()  # what a kill between a checkpoint's two renames leaves
    (tmp_path / ".checkpoint.old" / "file").touch()
    with pytest.raises(ConnectionError, match="is intact"), processes.telling(tmp_path / "checkpoint"):
        raise RuntimeError(reason)
    with pytest.raises(RuntimeError, match="another thing"), processes.telling(tmp_path / "checkpoint"):
        raise RuntimeError("another thing")


def test_the_command_of_a_shared_run_trains_as_much_in_one_process() -> None:
    run = dict(batch_size=2, accumulation=1, steps=5, sequences_per_step=8)
    assert warmup_command(run, "out") == ("flash-indexer warmup --out out --batch-size 2 --accumulation 4 --steps 5")


def bind(found: socket.socket) -> None:
    found.bind(("127.0.0.1", 0))


def connect(found: socket.socket) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        found.connect(server.getsockname())


@pytest.mark.parametrize("ask", [bind, connect])
@pytest.mark.parametrize("reuse", [0, 1])
def test_the_port_of_processes_that_tests_start_is_given_to_nobody_else(
    ports: Any, reuse: int, ask: Callable[[socket.socket], None]
) -> None:
    """Even where there is no other: and yet the store by which they meet listens at it."""
    port = ports.take()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        try:
            other.setsockopt(socket.IPPROTO_IP, PORT_RANGE, struct.pack("I", port << 16 | port))
        except OSError:
            pytest.skip("this kernel can't be told which port to give")
        with pytest.raises(OSError, match="Address already in use|Cannot assign requested address"):
            ask(other)
    store = TCPStore("127.0.0.1", port, 1, True, wait_for_workers=False)
    store.set("name", "value")
    assert TCPStore("127.0.0.1", port, 1, False).get("name") == b"value"
