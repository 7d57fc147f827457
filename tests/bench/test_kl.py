"""The benchmark: its floor, its refusal of wrong results, and README's tables, which come from what is recorded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from flash_indexer import cli
from flash_indexer.bench import kl as bench
from flash_indexer.bench.timing import Size
from flash_indexer.reference import indexer_kl as definition
from flash_indexer.testing import Shape, make_inputs

ROOT = Path(__file__).resolve().parents[2]
TINY = Size(H=4, G=2, D=16, I=3, E=32, documents=(20, 20), V=16)


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(name: str, **changes: object) -> dict[str, object]:
    times = dict.fromkeys(("p20", "p50", "p80"), 10.0)
    passes = {name: {"ms": 2.0, "tflops": 700.0} for name in ("teacher", "index", "gradient_query", "gradient_key")}
    return {
        "name": name, "gpu": "GPU", "ours": times, "matmul_tflops": 770.0, "floor_ms": 9.0, "over_floor": 10 / 9,
        "passes": passes | {"rows": {"ms": 0.2}}, "pairs": 1000, "extra_bytes": 2**29, "fa2_forward": times,
        "fa2_backward": times, "cudnn_forward": times, "cudnn_backward": times, "short_repeated": times,
        "notes": {"short_repeated": "v32_absorbed 2 times: 900 pairs"}, "picoseconds_a_pair": 1e7, "host_ms": 1.0,
    } | changes  # fmt: skip


def test_the_floor_counts_pairs_and_flops() -> None:
    assert TINY.pairs == 2 * 210
    assert TINY.flops == (2 * 4 * 16 + 8 * 3 * 32) * 420
    assert bench.SIZES["v32_absorbed"].flops == pytest.approx(7.147e12, rel=1e-3)


def problem(size: Size) -> tuple[list[torch.Tensor], dict[str, object]]:
    documents = tuple((n, n) for n in size.documents)
    x = make_inputs(Shape(documents, size.H, size.G, size.D, size.I, size.E), seed=0, dtype=torch.float64)
    others = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end, lse=x.lse)
    return [x.q, x.k, x.index_q, x.index_k, x.index_weights], others


def test_right_rows_pass() -> None:
    bench.check_rows(TINY, *problem(TINY))


@pytest.mark.parametrize("wrong", ["kl", "gradient", "nan"])
def test_a_wrong_result_has_no_speed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(q, k, index_q, index_k, index_weights, *, lse, **options):
        loss, kl = definition(q, k, index_q, index_k, index_weights, **options)
        factor = {"kl": 1.0, "gradient": 1.05, "nan": float("nan")}[wrong]
        kl = kl * (1.001 if wrong == "kl" else 1.0)
        return type("Result", (), dict(loss=loss * factor, kl=kl))

    monkeypatch.setattr(bench, "indexer_kl", broken)
    with pytest.raises(RuntimeError, match=r"query \d+ is wrong, so no speed is reported"):
        bench.check_rows(TINY, *problem(TINY))


def test_a_wrong_result_leaves_no_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(q, k, index_q, index_k, index_weights, *, lse, **options):
        loss, kl = definition(q, k, index_q, index_k, index_weights, **options)
        return type("Result", (), dict(loss=loss, kl=kl + 1))

    def timed(*_: object) -> None:
        pytest.fail("a wrong result was timed")

    for name, value in {"is_available": True, "get_device_capability": (9, 0), "get_device_name": "GPU"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name, value in {"indexer_kl": wrong, "problem": problem, "time_in_turns": timed}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "check_gradients", lambda size: None)
    monkeypatch.setitem(bench.SIZES, "tiny", TINY)
    with pytest.raises(RuntimeError, match="no speed is reported"):
        bench.run(["tiny"], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_without_a_gpu_the_command_says_what_it_needs(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["bench", "--out", str(tmp_path)])
    assert result.exit_code == 1 and "needs a CUDA GPU of compute capability 9.0" in result.output
    assert list(tmp_path.iterdir()) == []


def test_unknown_sizes_are_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["bench", "--sizes", "v32_absorbed,v33", "--out", str(tmp_path)])
    assert result.exit_code == 1 and "v33" in result.output and "v32_absorbed" in result.output


def test_the_table_says_what_is_met_and_what_is_missed(report: ModuleType, tmp_path: Path) -> None:
    slow = dict.fromkeys(("p20", "p50", "p80"), 30.0)
    rows = [record("v32_absorbed"), record("smollm2", ours=slow), record("v32_absorbed")]
    rows.append(record("v32_128k", picoseconds_a_pair=1.12e7))
    (tmp_path / "indexer_kl.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    text = report.section(tmp_path)
    assert "| 10.00 ms | 1.11 x floor | 1.25 | met |" in text
    assert "| 2.00 ms | 1.10 x floor | 1.14 | met |" in text
    assert "| 30.00 ms | 1.50 x FlashAttention-2 forward + backward | 1 | missed |" in text
    assert "1.12 x that at 8K | 1 | missed |" in text and "0.90 x that of 8K repeated for as many pairs | | |" in text
    assert "0.50 GiB | 1 | met" in text
    assert text.count("absorbed: H=128") == 1


def test_a_missing_baseline_is_told_with_its_reason(report: ModuleType, tmp_path: Path) -> None:
    lacking = {k: v for k, v in record("gqa32", notes={"cudnn": "no kernel"}).items() if not k.startswith("cudnn")}
    rows = [lacking, record("v32_128k", notes={})]
    del rows[1]["short_repeated"]
    (tmp_path / "indexer_kl.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    text = report.section(tmp_path)
    assert "| 10.00 ms | no kernel | 0.6 | not measured |" in text
    assert "v32_absorbed is not recorded | 1 | not measured |" in text
    assert "8K was not repeated beside it |  | not measured |" in text


def test_a_host_slower_than_the_device_is_told(report: ModuleType, tmp_path: Path) -> None:
    rows = [record("gqa32"), record("smollm2", host_ms=12.5)]
    (tmp_path / "indexer_kl.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    text = report.section(tmp_path)
    assert "H=9 G=3 D=64 I=8 E=64, 8K: 12.50 ms to launch what runs in 10.00 ms." in text
    assert text.count("to launch") == 1


def test_a_record_without_the_atomic_backward_keeps_its_row(report: ModuleType, tmp_path: Path) -> None:
    names = ("ours_forward", "ours_backward", "ours_attention")
    old = {"tokens": 8143, "both": 3.0, "ratios": {"backward": 0.5}} | {name: {"p50": 1.5} for name in names}
    rows = [old, old | {"tokens": 16271, "ours_once": {"p50": 0.875}, "ratios": {"once": 0.25}}]
    (tmp_path / "warmup_attention.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    lines = report.heads(tmp_path)
    assert "| 8,143 | 1.50 ms |  | 1.50 ms | 0.50 x | 3.00 ms | not measured |  | 1.50 ms |  |" in lines
    assert "| 16,271 | 1.50 ms |  | 1.50 ms |  | 3.00 ms | 0.88 ms | 0.25 x | 1.50 ms |  |" in lines


def test_no_measurements(report: ModuleType, tmp_path: Path) -> None:
    assert report.section(tmp_path) == "No measurements are recorded yet."


def test_the_readme_is_what_the_results_make(report: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.rewrite(readme, report.section()) == readme, "run python benchmarks/report.py"


def test_the_plot_is_drawn(report: ModuleType, tmp_path: Path) -> None:
    report.plot({name: record(name) for name in ("v32_absorbed", "smollm2")}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
