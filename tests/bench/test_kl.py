"""The benchmark: its floor, and its refusal of wrong results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flash_indexer import cli
from flash_indexer.bench import kl as bench
from flash_indexer.bench.timing import Size
from flash_indexer.ops import bodies
from flash_indexer.reference import indexer_kl as definition
from flash_indexer.testing import Shape, make_inputs

TINY = Size(H=4, G=2, D=16, I=3, E=32, documents=(20, 20), V=16)


def test_the_floor_counts_pairs_and_flops() -> None:
    assert TINY.pairs == 2 * 210
    assert TINY.flops == (2 * 4 * 16 + 8 * 3 * 32) * 420
    assert bench.SIZES["v32_absorbed"].flops == pytest.approx(7.147e12, rel=1e-3)


@pytest.mark.parametrize(
    ("teacher", "index", "index_first"),
    [("score", "score_narrow", False), ("score_fp8", "score_narrow_fp8", True), ("score", "score_narrow_fp8", False),
     ("score_fp8", "score_narrow", False)],
)  # fmt: skip
def test_passes_are_told_apart(teacher: str, index: str, index_first: bool) -> None:
    """Of two chunks; in e4m3 the index scores may come first."""
    scores = [(f"flash_indexer_{teacher}_kernel", 6.0), (f"flash_indexer_{index}_kernel", 1.0)]
    chunk = [("void fill", 0.25), *(scores[::-1] if index_first else scores), ("flash_indexer_quantize_index", 0.5)]
    assert bench.slices(chunk * 2) == {"teacher": 12.0, "index": 2.0, "torch": 0.5, "quantize": 1.0}


def test_a_pass_is_the_median_of_profiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([3.0, 90.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(bench, "profiled", lambda step: [("flash_indexer_score_kernel", next(times)), ("fill", 1.0)])
    found = bench.passes(lambda: None, TINY)
    assert found["teacher"]["ms"] == 3.0 and found["torch"] == {"ms": 1.0}
    assert found["teacher"]["tflops"] == pytest.approx(2 * TINY.H * TINY.D * TINY.pairs / 3.0 / 1e9)
    assert next(times, None) is None


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

    monkeypatch.setattr(bodies, "no_kernels", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
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
