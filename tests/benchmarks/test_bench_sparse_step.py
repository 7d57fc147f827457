"""The benchmark of a sparse step, on a CPU at small sizes: it checks before it times, and records what it claims."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SMALL: dict[str, dict[str, int]] = {
    "gqa": dict(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16,
    ),
    "mla": dict(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=24,
        qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12,
    ),
}  # fmt: skip


@pytest.fixture
def bench(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("bench_sparse_step")
    small = {
        name: (make, shapes | SMALL[name], dict(num_heads=2, head_dim=16))
        for name, (make, shapes, _) in module.MODELS.items()
    }
    monkeypatch.setattr(module, "MODELS", small)
    monkeypatch.setattr(module, "SHORT", 40)
    monkeypatch.setattr(module, "SHORT_K", 8)
    return module


@pytest.mark.parametrize("model", ["gqa", "mla"])
def test_it_records_steps_and_tokens_of_both(bench: ModuleType, model: str, tmp_path: Path) -> None:
    words = ["--model", model, "--length", "64", "--topk", "16", "--steps", "2", "--generate", "2"]
    bench.main([*words, "--out", str(tmp_path)])
    (record,) = map(json.loads, (tmp_path / "sparse_step.jsonl").read_text().splitlines())
    assert record["fastest"] == "torch" and record["length"] == 64 and record["topk"] == 16
    times = [record["sparse"]["ms"]["p50"], record["dense"]["torch"]["ms"]["p50"]]
    assert record["over_dense"] == pytest.approx(times[0] / times[1])
    assert all(x > 0 for x in (*times, record["dense_token"]["p50"], record["sparse_token"]["p50"]))


def test_no_speed_is_recorded_of_wrong_results(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = bench.results, []

    def wrong_once(*args: Any) -> dict[str, Any]:
        calls.append(real(*args))
        return calls[-1] if len(calls) > 1 else {name: 1.1 * x for name, x in calls[-1].items()}

    monkeypatch.setattr(bench, "results", wrong_once)
    with pytest.raises(RuntimeError, match="the output must be the torch body's, differs by"):
        bench.main(["--length", "64", "--topk", "16", "--out", str(tmp_path)])
    assert not (tmp_path / "sparse_step.jsonl").exists()
