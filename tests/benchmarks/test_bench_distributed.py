"""The benchmark of context and tensor parallel, on two processes of the CPU: its record, and its refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SCRIPT = str(Path(__file__).resolve().parents[2] / "benchmarks" / "bench_distributed.py")


def test_every_way_is_measured_beside_one(pair: Any) -> None:
    for record in pair.call("benchmark", 2, path=SCRIPT, wrong=""):
        assert set(record["milliseconds"]) == {
            "one", "context", "contiguous", "tensor", "gather_keys", "reduce_scatter"
        }  # fmt: skip
        assert set(record["speedup"]) == set(record["errors"]) - {"one"} == {"context", "contiguous", "tensor"}
        assert record["ranks"] == 2


@pytest.mark.parametrize("wrong", ["loss", "kl", "d_index_q", "d_index_k", "d_index_weights"])
def test_a_wrong_result_of_one_rank_is_no_speed(pair: Any, wrong: str) -> None:
    for told in pair.call("benchmark", 2, path=SCRIPT, wrong=wrong):
        assert "context is wrong, so no speed is reported" in told and wrong in told
