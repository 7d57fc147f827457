"""The recorded sparse stage, at a tiny size: every step runs, nothing runs twice, and the page says what was found."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


def row(nats: float, **bases: float) -> dict[str, Any]:
    over = {name: dict(nats=nats - x, error=0.001, cost=math.expm1(nats - x)) for name, x in bases.items()}
    return dict(tokens=1000, nats=nats, perplexity=math.exp(nats), over_dense_of=over)


def found(indexer: float, oracle: float, dense: float = 1.8) -> dict[str, Any]:
    bases = dict(warm=2.0, dense=dense)
    warm = {"dense": row(2.0, **bases), "indexer 128": row(2.1, **bases), "oracle 128": row(2.02, **bases)}
    runs = {"warm": warm, "dense": {"dense": row(dense, **bases), "indexer 128": row(dense + 0.09, **bases)}}
    for name, nats in (("indexer", indexer), ("oracle", oracle)):
        runs[f"{name}-128"] = {f"{name} 128": row(nats, **bases)}
    return dict(sequences=4, runs=runs)


@pytest.mark.parametrize(
    "indexer, oracle, over_oracle, of_before",
    [(1.811, 1.81, "met", "met"), (1.82, 1.81, "missed", "met"), (1.84, 1.838, "met", "missed")],
)
def test_the_verdict_is_that_of_both_bars(
    scripts: Path, indexer: float, oracle: float, over_oracle: str, of_before: str
) -> None:
    page = importlib.import_module("stage_page")
    control, line = page.verdict(found(indexer, oracle))
    assert control.endswith("no worse.")
    assert f"bar 1.2: {over_oracle})" in line and f"bar a third: {of_before})" in line
    (at,) = page.costs(found(indexer, oracle))
    assert at.before.cost == pytest.approx(math.expm1(0.1)) and at.after.cost == pytest.approx(
        math.expm1(indexer - 1.8)
    )
    assert "no control" in page.verdict(found(2.2, 2.1, dense=2.05))[0]
    assert str(page.Cost(0.0171, None)) == "+1.71%" and str(page.Cost(-0.0171, 0.002)) == "-1.71% ± 0.20%"
    assert at.ratio_error is None and "times" in line and "±" not in line.partition("times")[0].rpartition(":")[2]
    judged = found(indexer, oracle)
    judged["runs"]["indexer-128"]["indexer 128"]["over_oracle"] = dict(ratio=1.0, error=0.123)
    assert " ± 0.12 times as much" in page.verdict(judged)[1]


def test_the_ratio_has_the_error_of_its_spread_over_sequences(scripts: Path) -> None:
    """Against the spread of ratios of problems drawn anew."""
    stage = importlib.import_module("stage")
    tokens = torch.full((50,), 20.0, dtype=torch.float64)

    def drawn(seed: int) -> dict[str, float]:
        random = torch.Generator().manual_seed(seed)
        dense = torch.rand(50, 20, generator=random, dtype=torch.float64).sum(1)
        each = torch.randn(2, 50, generator=random, dtype=torch.float64)
        oracle, indexer = 0.1 + 0.02 * each[0], 0.13 + 0.02 * (each[0] + each[1])
        parts = (stage.SequenceLosses(dense + 20 * x, tokens) for x in (indexer, oracle, torch.zeros(50)))
        return stage.ratio(*parts)

    whole = stage.SequenceLosses(torch.ones(50, dtype=torch.float64), tokens)
    assert stage.ratio(whole, whole, whole) == dict(ratio=None, error=None)
    found = [drawn(seed) for seed in range(200)]
    spread = torch.tensor([x["ratio"] for x in found]).std()
    assert torch.tensor([x["ratio"] for x in found]).mean() == pytest.approx(1.3, abs=0.01)
    assert torch.tensor([x["error"] for x in found]).mean() == pytest.approx(float(spread), rel=0.15)


@pytest.mark.parametrize(
    "ratios, chosen",
    [((1.0, 1.1, 1.3), "1e-4"), ((1.0, 1.1, 1.2), "3e-4"), ((1.5, 1.3, 1.4), "1e-4"), ((None, 1.3, 1.4), "3e-5")],
)
def test_the_rate_is_the_best_of_those_at_which_the_indexer_follows(
    scripts: Path, tmp_path: Path, ratios: tuple[float | None, ...], chosen: str
) -> None:
    """The higher the rate, the lower the loss here."""
    record, files = importlib.import_module("record_stage"), {}
    for rate, nats, ratio in zip(("3e-5", "1e-4", "3e-4"), (2.0, 1.9, 1.8), ratios, strict=True):
        files[rate] = tmp_path / f"{rate}.json"
        judged = {"indexer 128": dict(nats=nats, over_oracle=dict(ratio=ratio, error=0.1))}
        files[rate].write_text(json.dumps(dict(runs={"indexer-128": judged})))
    assert record.fastest_that_follows(files, 128) == chosen


@pytest.mark.slow
def test_from_text_to_page(
    scripts: Path, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, page = importlib.import_module("record_stage"), importlib.import_module("stage_page")
    documents = [file.read_text() for file in sorted(texts.iterdir())]
    for part, some in (("train", documents[:20]), ("validation", documents[20:30]), ("held_out", documents[30:])):
        lines = "".join(json.dumps(dict(text=text)) + "\n" for text in some)
        (tmp_path / f"{part}.jsonl").write_text(lines)
    words = ["--model", str(checkpoint), "--text", str(tmp_path), "--length", "32", "--topk", "8", "--steps", "3"]
    words += ["--warm-up-steps", "3", "--batch-size", "1", "--sequences", "4", "--jobs", "2"]
    words += ["--needles", "0"]
    first, out = tmp_path / "first", tmp_path / "stage"
    monkeypatch.setattr(record, "RATES", ("1e-2",))
    monkeypatch.setattr(record, "INDEXER_RATES", ("1e-3", "1e-2"))

    def call(folder: Path, *more: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["record_stage", "--out", str(folder), "--dtype", "float32", *words, *more])
        record.main()
        return (folder / "commands.txt").read_text().splitlines()

    assert len(call(first, "--until", "rates")) == 8  # a warm-up; three runs of a rate, each judged; a comparison
    assert json.loads((first / "rates.json").read_text()) == dict(lr="1e-2", tried=["1e-2"])
    shutil.copytree(first / "warm", out / "warm")  # what another machine needs
    (out / "logs").mkdir()
    shutil.copy(first / "logs" / "warm.done", out / "logs")
    commands = call(out, "--until", "runs", "--rates", str(first))
    shutil.copy(first / "validation-1e-2.json", out)
    shutil.rmtree(first)
    assert len(commands) == 7 and all(" sparse " in line for line in commands[:4])
    assert len(call(out)) == 13 and call(out)[:7] == commands and len(call(out)) == 13
    rates = json.loads((out / "rates.json").read_text())
    validated = json.loads((out / "validation-indexers.json").read_text())["runs"]
    nats = {rate: validated[f"indexer-8-{rates['lr']}-at-{rate}"]["indexer 8"]["nats"] for rate in ("1e-3", "1e-2")}
    assert rates["lr"] == "1e-2" and rates["indexer_lr"] == {"8": min(nats, key=nats.__getitem__)}
    assert (out / "indexer-8").resolve().name == f"indexer-8-{rates['lr']}-at-{rates['indexer_lr']['8']}"
    assert (out / "dense").resolve().name == f"dense-{rates['lr']}"
    held_out = json.loads((out / "held_out.json").read_text())["runs"]
    assert set(held_out) == {"warm", "dense", "indexer-8", "oracle-8"}
    assert all(set(x) == {"dense", "indexer 8", "oracle 8"} for x in held_out.values())
    assert held_out["dense"]["dense"]["over_dense_of"]["dense"]["nats"] == 0
    assert held_out["warm"]["indexer 8"]["nats"] != held_out["warm"]["oracle 8"]["nats"]
    assert (out / "indexer-8" / "report" / "comparison.md").exists()
    monkeypatch.setattr(sys, "argv", ["stage_page", "--record", str(out), "--out", str(tmp_path / "docs")])
    page.main()
    text = (tmp_path / "docs" / "sparse.md").read_text()
    assert f"Rates: {rates['lr']} for the model, from an earlier comparison on validation text; for" in text
    (out / "rates.json").write_text(json.dumps(rates | dict(tried=["1e-2"])))
    found = json.loads((out / "held_out.json").read_text())
    found["runs"]["indexer-8"]["indexer 8"]["over_dense_of"]["dense"]["error"] = None
    again = page.page(found, out, tmp_path, "c", "commit d")
    assert f"{rates['lr']} for the model, of 1e-2 the one of the lowest" in again
    judged = json.loads((out / "validation-1e-2.json").read_text())["runs"]["indexer-8"]["indexer 8"]
    row = next(line for line in again.splitlines() if line.startswith("| 1e-2 |")).split(" | ")
    assert row[2] == str(page.cost_of(judged["over_dense_of"]["dense"])) and "±" in row[2]
    assert row[4].startswith(f"{judged['over_oracle']['ratio']:.2f} ± ")
    assert "errors" not in text.lower().partition("paired, over sequences")[2].partition("\n")[0]
    assert "those between runs were not kept" in again and "of an earlier record (commit d)" in again
    assert f"chosen on validation text, {rates['indexer_lr']['8']} at K=8." in text
    assert f"echo '{json.dumps({'lr': rates['lr']})}' > runs/rates/rates.json" in text
    printed = next(line for line in text.splitlines() if "record_stage.py" in line).split()
    given = {name: words[words.index(name) + 1] for name in words if name.startswith("--")}
    for name in ("--length", "--topk", "--steps", "--warm-up-steps", "--batch-size", "--sequences", "--needles"):
        assert printed[printed.index(name) + 1] == given[name]
    assert "--rates" in printed
    assert "32 index heads of 128, 3 steps of 16 sequences of 32 tokens" in text
    kept = tmp_path / "docs" / "sparse_record"
    assert (kept / "held_out.json").read_bytes() == (out / "held_out.json").read_bytes()
    assert {"rates.json", "validation-1e-2.json", "validation-indexers.json"} < {file.name for file in kept.iterdir()}
    assert (tmp_path / "docs" / "sparse_k8" / "comparison.md").read_text().startswith("#")
    assert "K=8: the indexer's keys cost" in text and (tmp_path / "docs" / "sparse_costs.png").stat().st_size > 1000
