"""README's five numbers and docs/performance.md, which come from what is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(indexer_kl=[record, ...], ...)`: a folder of records."""

    def build(**files: list[dict[str, Any]]) -> Path:
        for name, records in files.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        return tmp_path

    return build


def record(name: str, **changes: object) -> dict[str, Any]:
    times = dict.fromkeys(("p20", "p50", "p80"), 10.0) | {"sm_mhz": 1500.4}
    passes = {name: {"ms": 2.0, "tflops": 700.0} for name in ("teacher", "index", "gradient_query", "gradient_key")}
    return {
        "name": name, "gpu": "GPU", "ours": times, "matmul_tflops": 770.0, "floor_ms": 9.0, "over_floor": 10 / 9,
        "passes": passes | {"rows": {"ms": 0.2}}, "pairs": 1000, "extra_bytes": 2**29, "fa2_forward": times,
        "fa2_backward": times, "cudnn_forward": times, "cudnn_backward": times, "short_repeated": times,
        "notes": {"short_repeated": "v32_absorbed 2 times: 900 pairs"}, "picoseconds_a_pair": 1e7, "host_ms": 1.0,
    } | changes  # fmt: skip


def test_the_latest_record_of_a_size_stands_beside_attention_and_the_least_time(
    report: ModuleType, write: Write
) -> None:
    slow = dict.fromkeys(("p20", "p50", "p80"), 30.0)
    text = report.page(write(indexer_kl=[record("mqa64", ours=slow), record("smollm2", ours=slow), record("mqa64")]))
    assert "| H=64 G=1 D=128 I=64 E=128, 8K | 10.00 ms | 1.11 x | 0.50 x | 0.50 x | 0.50 GiB |" in text
    assert "| H=9 G=3 D=64 I=8 E=64, 8K | 30.00 ms | 1.11 x | 1.50 x | 1.50 x | 0.50 GiB |" in text
    assert "| H=64 G=1 D=128 I=64 E=128, 8K | 2.00 ms, 700 TFLOP/s |" in text
    assert text.count("| H=64 G=1") == 2, "one row of each table, of the later record"


def test_kernels_that_a_call_does_not_have_are_left_out(report: ModuleType, write: Write) -> None:
    fused = record("smollm2")
    passes = fused["passes"]
    passes["kl_gradients"] = passes.pop("gradient_query")
    del passes["rows"]
    text = report.page(write(indexer_kl=[fused, record("mqa64")]))
    rate = "2.00 ms, 700 TFLOP/s"
    assert f"8K | {rate} | {rate} |  |  | {rate} | {rate} |" in text
    assert f"8K | {rate} | {rate} | 0.20 ms | {rate} |  | {rate} |" in text


def test_the_rows_of_128k_have_their_clocks(report: ModuleType, write: Write) -> None:
    long = record("v32_128k", ours={"p50": 2000.0, "sm_mhz": 1200}, picoseconds_a_pair=3e8)
    text = report.page(write(indexer_kl=[record("v32_absorbed", picoseconds_a_pair=2e8), long]))
    assert "| 8K, one call | 10.00 ms | 200000000 ps | 1,500 MHz |" in text
    assert "| 128K, one call | 2,000.00 ms | 300000000 ps | 1,200 MHz |" in text
    assert f"| 8K, repeated for as many pairs | 10.00 ms | {10 / 900 * 1e9:.0f} ps | 1,500 MHz |" in text
    del long["short_repeated"]
    assert "8K, repeated" not in report.page(write(indexer_kl=[long]))
    assert "## 128K tokens" not in report.page(write(indexer_kl=[record("gqa32")]))


def test_a_missing_baseline_is_told_with_its_reason(report: ModuleType, write: Write) -> None:
    without = {k: v for k, v in record("gqa32", notes={"cudnn": "no kernel"}).items() if not k.startswith("cudnn")}
    text = report.page(write(indexer_kl=[without]))
    assert "8 documents of 4K | 10.00 ms | 1.11 x |  | 0.50 x | 0.50 GiB |" in text
    assert "Where a ratio is missing: no kernel." in text
    assert "Where a ratio is missing" not in report.page(write(indexer_kl=[record("gqa32")]))


def test_a_host_slower_than_the_device_is_told(report: ModuleType, write: Write) -> None:
    text = report.page(write(indexer_kl=[record("gqa32"), record("smollm2", host_ms=12.5)]))
    assert "H=9 G=3 D=64 I=8 E=64, 8K: 12.50 ms to launch what runs in 10.00 ms." in text
    assert text.count("to launch") == 1


def test_a_record_without_the_atomic_backward_keeps_its_row(report: ModuleType, write: Write) -> None:
    names = ("ours_forward", "ours_backward", "ours_attention")
    old = {"tokens": 8143, "both": 3.0, "ratios": {"backward": 0.5}} | {name: {"p50": 1.5} for name in names}
    new = old | {"tokens": 16271, "ours_once": {"p50": 0.875}, "ratios": {"once": 0.25}}
    lines = report.per_head(write(warmup_attention=[old, new]))
    assert "| 8,143 | 1.50 ms | 1.50 ms, 0.50 x | 3.00 ms | not measured | 1.50 ms |" in lines
    assert "| 16,271 | 1.50 ms | 1.50 ms | 3.00 ms | 0.88 ms, 0.25 x | 1.50 ms |" in lines


def test_five_numbers_of_five_records(report: ModuleType, write: Write) -> None:
    warmup = {
        "name": "mean", "gpu": "GPU", "sequence_length": 8192, "seconds_per_step": {"kernels": 0.25, "torch body": 1.0},
        "largest_relative_difference": 3e-7,
    }  # fmt: skip
    pair = {"name": "v32_64k", "gpu": "GPU", "ranks": 2, "size": {"tokens": 65536}, "speedup": {"context": 1.97}}
    sizes = [record("gqa32"), record("v32_absorbed"), record("v32_128k")]
    lines = report.summary(write(indexer_kl=sizes, warmup=[warmup], distributed=[pair])).splitlines()
    answers = [line.split(" | ")[1] for line in lines if line.startswith("| ")]
    assert answers[2:] == [
        "0.50 x its time", "1.11 x the time of the same flops in a plain matrix product", "0.50 GiB",
        "0.25 s; 1.00 s with its loss in plain torch, the same loss to 3e-07", "1.97 x",
    ]  # fmt: skip
    assert lines[0].startswith("Medians on GPU;")


def test_runs_of_parts_of_the_gpu_tests_are_added_up_for_the_last_trees(report: ModuleType, write: Write) -> None:
    def run(src: str, passed: int, failures: list[str], gpus: int = 1) -> dict[str, Any]:
        trees, clean = {"src": src, "tests": "b" * 9}, {"memcheck": {"clean": not failures}}
        counts = {"passed": passed, "failed": len(failures), "failures": failures}
        return {"gpu": "GPU", "gpus": gpus, "trees": trees, "sanitizers": clean} | counts

    parts = [run("old", 7, []), run("new", 1000, []), run("two", 5, [], 2), run("new", 23, ["test_x"])]
    text = "\n".join(report.gpu_tests(write(gpu_tests=parts)))
    assert "1 x GPU (trees src new, tests bbbbbbb): 1,023 passed, 1 failed, test_x; compute-sanitizer: " in text
    assert "memcheck clean, memcheck see record." in text
    assert "2 x GPU (trees src two, tests bbbbbbb): 5 passed, 0 failed; compute-sanitizer: memcheck clean." in text


def test_no_measurements(report: ModuleType, tmp_path: Path) -> None:
    assert report.summary(tmp_path) == report.page(tmp_path) == "No measurements are recorded yet."


@pytest.mark.parametrize(("page", "make"), [("README.md", "summary"), ("docs/performance.md", "page")])
def test_a_page_is_what_the_results_make(report: ModuleType, page: str, make: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert report.rewrite(text, getattr(report, make)()) == text, "run python benchmarks/report.py"


def test_a_page_without_its_markers_is_refused(report: ModuleType) -> None:
    with pytest.raises(ValueError, match="must hold the lines"):
        report.rewrite("# README", "text")


def test_the_plot_is_drawn(report: ModuleType, tmp_path: Path) -> None:
    report.plot({name: record(name) for name in ("v32_absorbed", "smollm2")}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def timed(*names: str, ms: float = 2.5) -> dict[str, Any]:
    return {name: dict.fromkeys(("p20", "p50", "p80"), ms) for name in names}


SPARSE_STEPS = (
    "select", "forward", "backward", "backward_alone", "any_order", "learn", "layer", "layer_any_order"
)  # fmt: skip


def test_the_sparse_stage_has_a_row_for_each_size_and_names_what_runs_in_torch(
    report: ModuleType, write: Write
) -> None:
    absorbed = {"name": "v32", "peers": [], **timed(*SPARSE_STEPS)}
    grouped = {
        "name": "gqa32", "peers": ["cudnn_forward", "cudnn_backward", "fa2_forward"],
        **timed("select", "forward", "cudnn_forward", "cudnn_backward", "fa2_forward"),
    }  # fmt: skip
    text = report.page(write(indexer_kl=[record("mqa64")], sparse=[absorbed, grouped]))
    assert "of 16,384 positions, random keys | 2.50 ms" + " | 2.50 ms" * 6 + " |" in text
    assert "8,192 of 8,192, random keys | 2.50 ms | 2.50 ms" + " | torch" * 5 + " |" in text
    assert "8,192 of 8,192, random keys: cuDNN, dense 5.00 ms." in text
    assert "Over the time of cuDNN's kernels" not in text and "last 512 queries" not in text
    assert "## The sparse stage" not in report.page(write(indexer_kl=[record("mqa64")], sparse=[]))


def test_a_sparse_step_stands_beside_the_dense_one_and_has_none_where_none_was_run(
    report: ModuleType, write: Write
) -> None:
    def step(ms: float, gb: float, attention: float) -> dict[str, Any]:
        return dict(ms=dict(p50=ms), peak_gb=gb, kernels=dict(attention=attention, idle=1.0))

    given = dict(gpu="GPU", topk=2048, deterministic=True, dense={}, sparse=step(1900.4, 56.54, 1000.0))
    both = given | dict(
        dense=dict(cuDNN=step(580.0, 36.7, 225.0), slow=dict(absent="no")), fastest="cuDNN", over_dense=1.304,
        sparse=step(756.0, 41.0, 370.0), dense_token=dict(p50=55.0), sparse_token=dict(p50=15.5),
    )  # fmt: skip
    records = [dict(model="gqa", length=32768, **x) for x in (given, both)] + [
        dict(model="mla", length=131072, **given)
    ]
    text = "\n".join(report.steps(write(sparse_step=records)))
    assert "4 layers, 32,768 tokens | 580 ms, cuDNN | 756 ms | 1.30 x | 225 ms | 370 ms | 36.7 GB | 41.0 GB |" in text
    assert "1 layer, 131,072 tokens |  | 1,900 ms |  |  | 1,000 ms |  | 56.5 GB |" in text and text.count("gqa") == 0
    assert "behind 32,768 in the cache, Qwen3-8B's layer shapes, 4 layers: dense 55.0 ms, sparse 15.5 ms." in text
    assert text.count("| Qwen3-8B") == 1, "one row of a size, of its last record"
    (asked,) = [line for line in report.summary(write(sparse_step=records)).splitlines() if "sparse stage" in line]
    assert (
        "the dense one (cuDNN)? | 1.30 x its time | Qwen3-8B's layer shapes, 4 layers, 32K tokens, K=2,048 |" in asked
    )
    assert report.steps(write(sparse_step=[])) == []


def test_the_sparse_stage_beside_cudnn_dense_attention_and_gathering(report: ModuleType, write: Write) -> None:
    theirs = timed("dsa_scores", "dsa_topk", "dsa_backward", "dsa_target", "dsa_index_scores", ms=2.0)
    absorbed = {"name": "v32", "peers": list(theirs), **timed(*SPARSE_STEPS), **theirs}
    grouped = {"name": "gqa32", "peers": ["cudnn_forward"], **timed(*SPARSE_STEPS, "cudnn_forward", "cudnn_backward")}
    late = {"name": "mqa64_late_16k", "peers": [], **timed("forward", "backward"),
            **timed("torch_forward", "torch_backward", ms=10.0)}  # fmt: skip
    all_six = timed("dsa_index_gradients", ms=2.0) | theirs
    causal = absorbed | all_six | {"name": "v32_causal", "peers": list(all_six)}
    absorbed["notes"] = {"dsa_index_gradients": "ValueError: other widths", "flex": "is no kernel for selected keys"}
    text = "\n".join(report.sparse(write(sparse=[absorbed, grouped, late, causal])))
    assert "random keys | 0.62 x (2.00 + 2.00 ms) | 0.62 x (2.00 + 2.00 ms) |  |  |" in text
    assert "slots empty | 0.62 x (2.00 + 2.00 ms)" + " | 0.62 x (2.00 + 2.00 ms)" * 2 + " | 0.62 x (12.00 ms) |" in text
    assert "- `dsa_index_gradients` was not timed: ValueError: other widths" in text and "`flex`" not in text
    assert "learn, any order" not in text
    added = {
        "name": "v32",
        "peers": list(all_six),
        **timed(*SPARSE_STEPS),
        **timed("learn_any_order", ms=2.0),
        **all_six,
    }
    text = "\n".join(report.sparse(write(sparse=[added, grouped, late])))
    assert "| learn | learn, any order | layer |" in text and "| 2.50 ms | 2.00 ms | 2.50 ms | 2.50 ms |" in text
    assert "| 0.62 x (2.00 + 2.00 ms) | 0.50 x (2.00 + 2.00 ms) | 0.58 x (12.00 ms) |" in text
    assert "| 2.50 ms | torch | 2.50 ms |" in text
    assert "random keys: cuDNN, dense 5.00 ms; ours 5.00 ms, with the target 5.00 ms." in text
    assert "| H=64 G=1 D=128, 16,384 keys | 5.00 ms | 20.00 ms | 0.25 x |" in text


@pytest.mark.parametrize(("deterministic", "order"), [(True, "the same bits every time"), (False, "deterministic=Fal")])
def test_the_memory_of_a_long_layer(report: ModuleType, write: Write, deterministic: bool, order: str) -> None:
    long = {
        "name": "v32_layer_128k", "size": {"tokens": 131072, "queries": 4096}, "peak_bytes": 45.26e9,
        "tensor_bytes": 13e9, "seconds": 21.5, "deterministic": deterministic,
    }  # fmt: skip
    first = {"name": "sparse_first_call", "first_call": {"v32": {"first_s": 0.514, "next_ms": 2.0}}}
    row = {"name": "v32", "peers": [], **timed("select")}
    text = " ".join(report.sparse(write(sparse=[row, long, first])))
    assert "forward and backward: 0.51 s at the heads of `v32`." in text
    assert "131,072 tokens" in text and "45.3 GB are allocated, 13.0 GB" in text and order in text
    assert "4,096 queries at a time" in text and "it takes 21.5 s." in text


def test_steps_of_the_warm_up_stand_beside_the_plain_forward(report: ModuleType, write: Write) -> None:
    """The last record of each length and fraction, of one document and by the command."""

    def step(queries: float, ms: float, **changes: object) -> dict[str, Any]:
        return {
            "name": "shapes", "gpu": "GPU", "length": 32768, "queries": queries, "documents": False,
            "plain": {"p50": 100.0}, "step": {"p50": ms}, "over_plain": ms / 100,
            "overhead": {"ms": 9.0, "of_step": 9 / ms, "ours": 60.0, "model": 50.0, "plain_attention": 46.0},
        } | changes  # fmt: skip

    records = [step(1.0, 900.0), step(0.25, 120.0), step(1.0, 160.0), step(1.0, 700.0, documents=True)]
    del (without := step(1.0, 800.0))["overhead"]
    folder = write(indexer_kl=[record("gqa32")], warmup_step=[*records, without])
    page = report.page(folder)
    assert "| 32,768 tokens, --queries 1 | 100 ms | 160 ms | 1.60 x | 60 ms | 50 ms | 5.6% | 4 of 9 ms |" in page
    assert "| 32,768 tokens, --queries 0.25 | 100 ms | 120 ms | 1.20 x | 60 ms | 50 ms | 7.5% | 4 of 9 ms |" in page
    assert page.count("32,768 tokens, --queries") == 2 and "More than a tenth" not in page
    more = report.page(write(indexer_kl=[record("gqa32")], warmup_step=[*records, step(0.125, 80.0)]))
    assert "More than a tenth is neither with --queries 0.125 at 32,768 tokens: as many launches" in more
    assert "| 1.60 x its time; 1.20 x with `--queries 0.25` | Qwen3-8B's layer shapes" in report.summary(folder)


def test_an_earlier_build_stands_beside_this_one_on_the_same_card(report: ModuleType, write: Write) -> None:
    slow = dict.fromkeys(("p20", "p50", "p80"), 20.0)
    earlier = [
        record("gqa32", ours=slow, commit=report.EARLIER + "5", gpu="other"), record("gqa32", commit="f" * 7),
        record("gqa32", ours=slow, commit=report.EARLIER + "5"), record("gqa32", commit="a" * 7),
    ]  # fmt: skip
    text = report.page(write(indexer_kl=[record("mqa64", commit="b" * 7), *earlier]))
    row = "| H=32 G=8 D=128 I=16 E=64, 8 documents of 4K | 20.00 ms | 10.00 ms | 0.50 x |"
    assert row in text and text.count(row.partition(" | ")[0]) == 3
    assert "## Beside" not in report.page(write(indexer_kl=[earlier[0], earlier[3]]))
