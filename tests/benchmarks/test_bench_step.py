"""benchmarks/bench_step.py at a tiny size: what it records."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_indexer.recipe import loop

TINY = dict(
    vocab_size=1024, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
)  # fmt: skip


@pytest.fixture
def bench_step(scripts: Path) -> Any:
    return importlib.import_module("bench_step")


@pytest.mark.parametrize("documents", [False, True])
def test_a_record_for_each_fraction(
    bench_step: Any, documents: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_step, "SHAPES", TINY)
    monkeypatch.setattr(bench_step, "INDEXER", dict(num_heads=2, head_dim=32))
    words = ["--length", "300", "--steps", "2", "--out", str(tmp_path)]
    bench_step.main([*words, "--documents"] if documents else words)
    records = [json.loads(line) for line in (tmp_path / "warmup_step.jsonl").read_text().splitlines()]
    assert [record["queries"] for record in records] == [1.0, 0.25]
    for record in records:
        assert record["length"] == 300 and record["documents"] == documents and record["shapes"] == TINY
        assert record["step"]["p50"] > 0
        assert record["over_plain"] == pytest.approx(record["step"]["p50"] / record["plain"]["p50"])


def test_steps_are_the_commands_and_sequences_are_whole_documents(
    bench_step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    forward = loop.forward

    def seen(handle: Any, batch: dict[str, torch.Tensor]) -> None:
        found.append((batch["position_ids"].clone(), len(handle.queries)))
        forward(handle, batch)

    monkeypatch.setattr(loop, "forward", seen)
    monkeypatch.setattr(bench_step, "SHAPES", TINY)
    monkeypatch.setattr(bench_step, "INDEXER", dict(num_heads=2, head_dim=32))
    bench_step.main(["--length", "256", "--steps", "2", "--queries", "0.25", "--out", str(tmp_path)])
    assert len(found) == 2 + bench_step.WARM_UP + 2
    for positions, drawn in found:
        assert torch.equal(positions, torch.arange(256)[None]) and drawn == 64


def test_overhead_is_what_is_neither_the_forward_nor_ours(bench_step: Any) -> None:
    """Ours run for 5 ms, 1 of them side by side; the plain forward without its attention for 4."""
    forward = [("gemm", 0.0, 3.0), ("pytorch_flash::flash_fwd_kernel", 3.0, 8.0), ("copy", 9.0, 10.0)]
    step = [
        ("gemm", 0.0, 3.0), ("flash_indexer_score_kernel", 3.0, 6.0), ("flash_indexer_score_kernel", 5.0, 7.0),
        ("flash_indexer_kl_gradients_kernel", 7.0, 8.0), ("cast", 8.5, 9.0), ("copy", 9.0, 10.0),
    ]  # fmt: skip
    found = bench_step.overhead(11.0, step, forward)
    assert found == dict(ms=2.0, of_step=2.0 / 11.0, ours=5.0, model=4.0, plain_attention=5.0)
    shares = bench_step.shares(step)
    assert shares["score"] == 5.0 and shares["kl_gradients"] == 1.0 and shares["gradient"] == 0.0
    assert shares["model and others"] == 4.5 and shares["idle"] == 0.5
    with pytest.raises(RuntimeError, match="plain forward must have a kernel named like"):
        bench_step.overhead(11.0, step, [("gemm", 0.0, 3.0)])


def test_no_speed_of_wrong_losses(bench_step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def __init__(self) -> None:
            self.indexers, self.runs = self, 0

        def eval(self) -> None: ...

        def train(self) -> None: ...

        def decoder(self, **_: Any) -> None:
            self.runs += 1

        def losses(self) -> dict[int, Any]:
            return {0: type("Loss", (), {"kl": 1.0 + 0.01 * self.runs})}

    with pytest.raises(RuntimeError, match="losses must be the torch body's"):
        bench_step.check_loss(Wrong(), torch.device("cpu"))


def test_documents_differ_from_step_to_step(bench_step: Any) -> None:
    first, second = (bench_step.batch(40_000, n, True, torch.device("cpu"))["position_ids"] for n in (0, 1))
    assert first.shape == second.shape == (1, 40_000) and not torch.equal(first, second)
    assert int((first == 0).sum()) > 2 and int(first.max()) < 12_000
