"""benchmarks/precision.py at tiny sizes: its sampled truth, its inputs, what it records of an error, its page."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flash_indexer import reference
from flash_indexer.testing import reference_indexer_kl


@pytest.fixture(scope="module")
def precision(scripts: Path) -> ModuleType:
    return importlib.import_module("precision")


@pytest.fixture(scope="module")
def page(scripts: Path) -> ModuleType:
    return importlib.import_module("precision_page")


@pytest.fixture(scope="module")
def inputs(scripts: Path) -> ModuleType:
    return importlib.import_module("precision_inputs")


@pytest.fixture(scope="module")
def truth(scripts: Path) -> ModuleType:
    return importlib.import_module("precision_truth")


@pytest.fixture(scope="module")
def records(precision: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run at 6 and 9 tokens."""
    out = tmp_path_factory.mktemp("records")
    precision.run("cpu", [6, 9], 9, out, "a commit")
    return out


@pytest.fixture
def make(inputs: ModuleType) -> Any:
    def build(dtype: torch.dtype = torch.float32, case: str = "usual") -> Any:
        return inputs.problem(inputs.SIZES["gqa"], case, 70, dtype, "cpu")

    return build


def test_a_run_records_every_job(precision: ModuleType, records: Path) -> None:
    lines = [json.loads(line) for line in (records / "precision.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = [(job.case, job.tokens, *setting) for job in precision.jobs((6, 9), 9, 0) for setting in job.settings]
    names = ("case", "tokens", "operator", "target", "index_dtype", "teacher_dtype")
    assert [tuple(line[name] for name in names) for line in lines] == expected
    for line in lines:
        quantised = line["index_dtype"] is not None or line["teacher_dtype"] is not None
        assert line["tensors"] and line["device"] == "CPU" and line["dtype"] == "float32"
        for name, errors in line["tensors"].items():
            assert ("quantisation" in errors) == quantised
            if (name, line["case"]) not in (("entropy", "one_hot"), ("kl", "near_uniform"), ("loss", "near_uniform")):
                assert max(errors["ours"] + errors["eager"]) < 1e-3, (line["case"], name)


def test_widths_of_deepseek_are_measured_too(precision: ModuleType) -> None:
    (job,) = (job for job in precision.jobs((), 0, 5) if job.size == "v32")
    found = list(precision.measure(job, torch.float32, "cpu"))
    assert [record["operator"] for record in found][-1] == "attention_forward" and len(found) == len(job.settings)
    assert all(max(x["ours"]) < 1e-4 for record in found for x in record["tensors"].values())


@pytest.mark.parametrize("target", ["mean", "sum_logits", "per_head"])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 2**-6)], ids=str)
@pytest.mark.parametrize("e4m3", [(None, None), ("fp8", "fp8")], ids=["wide", "e4m3"])
def test_a_sample_is_part_of_the_whole(
    truth: ModuleType, make: Any, monkeypatch: pytest.MonkeyPatch, target: str, e4m3: Any, dtype: Any, rounding: float
) -> None:
    setting = truth.Setting("indexer_kl" if any(e4m3) else "warmup_attention", target, *e4m3)
    whole = truth.Problem(*make(dtype))
    for name, value in (("WHOLE", 10), ("SAMPLED", 7), ("ELEMENTS", 8 * 70 * 16)):
        monkeypatch.setattr(truth, name, value)
    part = truth.Problem(*make(dtype))
    assert str(whole.sample) == "all" and str(part.sample) == "7 queries, 7 keys"
    for wide, rtol in ((True, 1e-10), (False, rounding)):
        expected = part.sample.taken(whole._values(setting, wide=wide))
        got = part._values(setting, wide=wide)
        assert got.keys() == expected.keys()
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name], rtol=rtol, atol=rtol * float(expected[name].abs().max()))
    if dtype == torch.float32:  # on the CPU operators take no other
        for name, value in part.ours(setting).items():
            assert truth.errors(value, part.truth(setting)[name])[1] < 1e-4


def test_the_sample_ends_with_the_last_query_and_begins_with_the_first_key(truth: ModuleType) -> None:
    rows, keys = truth.Sample.of(131072, torch.device("cpu"))
    assert int(rows[-1]) == 131071 and int(keys[0]) == 0
    assert len(rows.unique()) == len(keys.unique()) == truth.SAMPLED


def test_e4m3_is_judged_by_the_numbers_that_rows_stand_for(truth: ModuleType, make: Any) -> None:
    setting = truth.Setting(index_dtype="fp8", teacher_dtype="fp8")
    x, v = make()
    posed = truth.Problem(x, v)
    rounded = truth.stand_in(x, setting)
    expected = reference_indexer_kl(replace(x, q=rounded.q, k=rounded.k), scored=(rounded.index_q, rounded.index_k))
    got = posed.truth(setting)
    torch.testing.assert_close(got["kl"], expected.kl)
    torch.testing.assert_close(got["d_index_q"], expected.d_index_q, rtol=1e-10, atol=1e-14)
    assert truth.errors(posed.ours(setting)["d_index_q"], got["d_index_q"])[0] < 1e-5
    assert truth.errors(posed.ours(setting)["d_index_q"], posed.truth(truth.Setting())["d_index_q"])[0] > 1e-2


@pytest.mark.parametrize("name", ["kl", "d_index_q", "d_index_k", "d_index_weights"])
def test_a_wrong_row_is_seen(truth: ModuleType, make: Any, name: str) -> None:
    posed = truth.Problem(*make())
    got, right = (values(truth.Setting())[name] for values in (posed.ours, posed.truth))
    broken = got.clone()
    broken[40] *= 1.01
    before, after = (truth.errors(x, right) for x in (got, broken))
    assert before[1] < 1e-4 and after[1] == pytest.approx(0.01, rel=0.01)
    assert before[0] < after[0] < after[1]


def test_errors_are_absolute_where_the_truth_is_zero(truth: ModuleType) -> None:
    zeros = torch.zeros(4, 2, dtype=torch.float64)
    assert truth.errors(zeros.float(), zeros) == [0.0, 0.0]
    assert truth.errors(torch.full((4, 2), 0.25), zeros)[0] == 0.25


def test_the_inputs_are_what_their_names_say(inputs: ModuleType, make: Any) -> None:
    def attention(x: Any) -> torch.Tensor:
        x = x.double()
        return reference.target_distribution(x.q, x.k, x.softmax_scale, x.key_start, x.key_end, "per_head")

    problems = {case: make(case=case)[0] for case in inputs.CASES}
    torch.testing.assert_close(
        attention(problems["sink"])[1:, :, 0], torch.full((69, 8), 0.7).double(), rtol=0.01, atol=0
    )
    assert attention(problems["one_hot"]).amax(-1).min() > 1 - 1e-6
    flat = attention(problems["near_uniform"])[-1] * 70
    assert 0.9 < flat.min() < flat.max() < 1.1
    off = problems["relu_off"]
    logits = torch.einsum("tie,se->tis", off.index_q, off.index_k)
    assert (logits[1::2] <= 0).all() and (logits[::2] > 0).any()
    assert problems["tiny_scales"].index_k.abs().max() < 1e-5
    signs = problems["cancelling_weights"]
    assert torch.equal(signs.index_weights[:, ::2], -signs.index_weights[:, 1::2])
    assert (problems["large_channel"].index_k.abs().amax(0).argmax()) == 3
    large = reference.teacher_logits(problems["large_logits"].q, problems["large_logits"].k, 64**-0.5)
    assert 20 < large.std() < 30


def test_index_vectors_are_exact_in_bfloat16_and_not_in_e4m3(inputs: ModuleType) -> None:
    x, _ = inputs.problem(inputs.SIZES["gqa"], "usual", 40, torch.bfloat16, "cpu")
    assert torch.equal(x.index_q.float() * 64, (x.index_q.float() * 64).round())
    assert not torch.equal(x.index_q.float() * 8, (x.index_q.float() * 8).round())


def test_the_page_says_what_the_records_give(page: ModuleType) -> None:
    text = page.DOCUMENT.read_text(encoding="utf-8")
    assert page.rewrite(text, page.section(), page.BEGIN, page.END) == text, "run benchmarks/precision.py --page"


def test_a_page_of_both_devices(page: ModuleType, records: Path, tmp_path: Path) -> None:
    """A GPU's records come first; its long sequences are said to be sampled."""
    lines = page.lines_of(records / "precision.jsonl")
    long = [{**line, "tokens": 8192, "compared": "64 queries, 64 keys"} for line in lines if line["tokens"] == 6]
    deepseek = [{**line, "size": "v32"} for line in lines if line["tokens"] == 6][:2]
    gpu = [{**line, "device": "GPU", "dtype": "bfloat16"} for line in (*lines, *long, *deepseek)]
    (tmp_path / "precision.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (*lines, *gpu)), encoding="utf-8")
    text = page.section(tmp_path)
    cpu, card = text.index("## float32 on the CPU"), text.index("## bfloat16 on GPU")
    assert card < text.index("## Widths of DeepSeek-V3.2") < cpu
    assert " ".join(text.split()).count("From 8,192 tokens on 64 queries, 64 keys are compared.") == 1
    first = lines[0]["tensors"]["kl"]
    assert f"| 6 | {page.number(first['ours'][0])} ({page.number(first['eager'][0])}) |" in text
    page.plot(page.devices(tmp_path), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_the_largest_ratio_is_named(page: ModuleType) -> None:
    def record(tokens: int, ours: float) -> dict[str, Any]:
        tensors = {
            "kl": {"ours": [ours, 0.1], "eager": [1e-6, 0.1], "eps": 1e-7},
            "loss": {"ours": [1.0, 1.0], "eager": [1e-9, 1e-9], "eps": 1e-7},
            "d_index_q": {"ours": [1e-9, 1.0], "eager": [0.0, 1.0], "eps": 1e-6},
        }  # fmt: skip
        setting = {"operator": "indexer_kl", "target": "per_head", "index_dtype": None, "teacher_dtype": "fp8"}
        return {"tokens": tokens, "case": "sink", "tensors": tensors, **setting}

    said = page.conclusion([record(5, 1e-6), None, record(1000, 3e-6)])
    assert said.endswith("is 3.0: kl (per_head, teacher's rows in e4m3; 1,000 tokens; a sink).")
    assert page.conclusion([]) == "" and page.number(0.0) == "0" and page.number(1.74e-3) == "1.7e-3"


def test_no_records_no_tables(page: ModuleType, tmp_path: Path) -> None:
    assert page.section(tmp_path) == "No measurements are recorded yet."
