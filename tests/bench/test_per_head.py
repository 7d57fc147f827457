"""The benchmark of `warmup_attention`: its table, its checks and what it refuses (the timing itself needs a GPU)."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from flash_indexer.bench import per_head as bench_heads
from flash_indexer.bench.timing import Size
from flash_indexer.cli import app

TINY = Size(4, 2, 16, 4, 8, (20, 30), 12)


def record(**changes):
    times = {
        name: {"p20": ms, "p50": ms, "p80": ms, "sm_mhz": 1800.0}
        for name, ms in (
            ("ours_forward", 0.7), ("fa2_forward", 1.0), ("ours_backward", 1.2), ("fa2_backward", 3.0),
            ("ours_once", 0.9), ("ours_attention", 0.4), ("cudnn_forward", 0.5),
        )
    }  # fmt: skip
    return {"tokens": 8192, **times, "ratios": bench_heads.ratios(times), "both": 1.9, **changes}


def test_a_row_of_the_table():
    assert bench_heads.line(record()).split() == [
        "8,192", "0.700", "1.000", "0.70x", "1.200", "3.000", "0.40x", "1.900", "0.900", "0.30x", "0.400", "0.500",
        "0.80x",
    ]  # fmt: skip
    assert len(bench_heads.header().split()) == len(bench_heads.COLUMNS) + 1
    assert "p80 0.700 ms at 1800 MHz" in bench_heads.details(record())


def test_what_was_not_measured_is_a_dash():
    row = record(ratios={"forward": 0.7, "backward": 0.4})
    del row["cudnn_forward"]
    assert bench_heads.line(row).split()[-2:] == ["-", "-"]


def test_documents_are_of_the_suites_lengths_and_the_same_each_time():
    size = bench_heads.sized(bench_heads.SUITES["mqa64"], 16)
    assert len(size.documents) == 16 and all(2028 <= n <= 2048 for n in size.documents)
    assert size == bench_heads.sized(bench_heads.SUITES["mqa64"], 16)
    assert len(set(size.documents)) > 1


def test_the_check_passes_on_the_cpu():
    bench_heads.check(TINY, "cpu", (20, 1, 13))


@pytest.mark.parametrize("what", ["out", "lse", "kl", "loss"])
def test_the_check_refuses_a_wrong_result(what, monkeypatch):
    right = bench_heads.warmup_attention

    def wrong(*operands, **options):
        result = right(*operands, **options)
        return result._replace(**{what: getattr(result, what) * 1.001})

    monkeypatch.setattr(bench_heads, "warmup_attention", wrong)
    with pytest.raises(AssertionError):
        bench_heads.check(TINY, "cpu", (20, 1, 13))


def test_sampled_rows_refuse_a_wrong_result():
    generator = torch.Generator().manual_seed(0)
    T = 30
    shapes = [(T, 4, 16), (T, 2, 16), (T, 2, 12), (T, 4, 8), (T, 8), (T, 4)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    end = torch.arange(1, T + 1, dtype=torch.int32)
    others = dict(softmax_scale=0.25, key_start=torch.zeros_like(end), key_end=end)
    result = bench_heads.warmup_attention(*tensors, **others, target="per_head")
    bench_heads.check_rows(TINY, tensors, others, result.out, result.kl)
    with pytest.raises(RuntimeError, match="is wrong, so no speed is reported"):
        bench_heads.check_rows(TINY, tensors, others, result.out * 1.1, result.kl)
    with pytest.raises(RuntimeError, match="is wrong, so no speed is reported"):
        bench_heads.check_rows(TINY, tensors, others, result.out, result.kl + 1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "mqa"], "suite must be of mqa64, attention, fp8, sparse, got mqa"),
        (["--suite", "mqa64", "--batch", "0"], "batch must be a number of documents"),
        (["--batch", "4"], "--batch and --verbose belong to --suite mqa64"),
        (["--suite", "sparse", "--verbose"], "--batch and --verbose belong to --suite mqa64"),
        (["--suite", "mqa64", "--sizes", "mqa64"], "--sizes must be left out with --suite mqa64"),
        *(
            (["--suite", suite, "--sizes", f"{right},v33"], f"sizes must be of {first}")
            for suite, first, right in (
                ("sparse", "v32, v32_causal", "v32_causal"),
                ("fp8", "v32_absorbed", "gqa32"),
                ("attention", "gqa32, mqa64", "mqa64"),
            )
        ),
        *(
            []
            if torch.cuda.is_available()
            else [(["--suite", name], "needs a CUDA GPU") for name in ("mqa64", "attention", "fp8", "sparse")]
        ),
    ],
)
def test_bad_options_are_named(options, message, tmp_path):
    done = CliRunner().invoke(app, ["bench", "--out", str(tmp_path), *options])
    assert done.exit_code == 1 and message in " ".join((done.output + done.stderr).split())
