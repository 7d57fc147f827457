"""judge.report: the files it writes, and that their numbers are the evaluation's."""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flash_indexer.judge.report import write_report
from flash_indexer.judge.scores import Evaluation, LayerScore, RowBlock, TiesAtK
from flash_indexer.judge.verdict import verdict

MakeEvaluation = Callable[[], Evaluation]
LAYERS, STEPS = 3, 20
RUN = {"model": "tiny", "lr": 1e-3, "layers": None, "note": "a|b", "command": "flash-indexer warmup --out runs/x"}
PLOTS = ("loss.png", "mass_at_k.png", "attention_rows.png", "perplexity.png")


def make_log() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"event": "start"}]
    for step in range(1, STEPS + 1):
        kl = [2.5 * (0.1 + layer / 10 + math.exp(-step / 5)) for layer in range(LAYERS)]
        mean = sum(kl) / LAYERS
        rows.append(dict(step=step, loss=mean, kl_over_uniform=mean / 2.5, mass=None, lr=1e-3, seconds=2.0 * step,
                         tokens=1024 * step, kl=kl))  # fmt: skip
    return rows


def pixels(path: Path) -> tuple[int, int, int]:
    """Width, height and the number of different bytes-per-row patterns of a PNG: a blank image has one or two."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    assert (depth, colour) == (8, 6)
    stream, at = b"", 8
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        stream += data[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += 12 + length
    raw = zlib.decompress(stream)
    stride = 4 * width + 1
    return width, height, len({raw[y * stride : (y + 1) * stride] for y in range(height)})


def table(text: str, first_cell: str) -> dict[str, list[str]]:
    """The Markdown table whose head begins with first_cell, as rows by their first cell."""
    lines = text[text.index(f"| {first_cell} |") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {row[0]: row[1:] for row in rows}


def percent(x: float) -> str:
    return f"{100 * x:.1f}%"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_evaluation: MakeEvaluation) -> Path:
    """A whole report; tests only read it."""
    folder = tmp_path_factory.mktemp("report") / "new" / "report"
    path = write_report(folder, evaluation=make_evaluation(), metrics_log=make_log(), run=RUN)
    assert path == folder / "report.md"
    return folder


def test_files_are_written(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert {p.name for p in folder.iterdir()} == {"report.md", "report.json", *PLOTS}
    assert set(re.findall(r"!\[.+?\]\((.+?)\)", text)) == set(PLOTS)
    for name in PLOTS:
        width, height, patterns = pixels(folder / name)
        assert width >= 1000 and height >= 400 and patterns > 50, name


def test_json_holds_the_evaluation_and_the_run(folder: Path, make_evaluation: MakeEvaluation) -> None:
    evaluation = make_evaluation()
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert Evaluation.from_dict(content["evaluation"]) == evaluation
    assert content["run"] == RUN
    assert content["verdict"] == verdict(evaluation)
    assert content["plots"] == list(PLOTS)
    last = make_log()[-1]
    assert content["training"]["steps"] == STEPS
    assert content["training"]["tokens"] == last["tokens"]
    assert content["training"]["last_kl_over_uniform"] == last["kl_over_uniform"]


def test_markdown_has_the_numbers_of_the_json(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    found = content["evaluation"]
    for at in found["mean"]["at_k"]:
        shares = [percent(at[name]) for name in ("indexer", "oracle", "window", "indexer_over_oracle", "recall")]
        assert table(text, "k")[str(at["k"])] == [
            f"{at['min_visible']:,}", f"{at['queries'] // LAYERS:,} queries in each of {LAYERS} layers", *shares
        ]  # fmt: skip
    by_layer = table(text, "layer")
    assert len(by_layer) == LAYERS + 1
    for score in (*found["layers"], found["mean"]):
        at = score["at_k"][1]
        shares = [percent(at[name]) for name in ("indexer", "oracle", "window", "indexer_over_oracle", "recall")]
        numbers = [f"{score[name]:.4f}" for name in ("kl", "uniform_kl", "kl_over_uniform")]
        assert by_layer["**all**" if score["layer"] is None else str(score["layer"])] == [*numbers, *shares]
    dense = found["perplexities"][0]["perplexity"]
    by_selection = table(text, "keys chosen by")
    for name, entry in zip(
        ("all keys (dense)", "indexer", "oracle", "sink + window"), found["perplexities"], strict=True
    ):
        k, perplexity, change, fraction = by_selection[name]
        assert k == ("all" if entry["k"] is None else str(entry["k"]))
        assert perplexity == f"{entry['perplexity']:.3f}"
        assert change == ("" if entry["k"] is None else f"{100 * (entry['perplexity'] / dense - 1):+.1f}%")
        assert fraction == percent(entry["sparse_fraction"])


def test_the_verdict_comes_first_in_words(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    first = text.splitlines()[2]
    assert first.startswith("**The indexer predicts the model's attention well.** ")
    for part in ("0.089 of the uniform", "top 128 keys", "96.2% of what the best 128", "77.8%", "6.69", "7.03 (+5.1%)"):
        assert part in first, part


@pytest.mark.usefixtures("blank_plots")
def test_evaluation_alone_makes_a_report(tmp_path: Path, make_evaluation: MakeEvaluation) -> None:
    text = write_report(tmp_path, evaluation=make_evaluation(), run={}).read_text(encoding="utf-8")
    assert "## Training" not in text and "## Run" not in text and "loss.png" not in text
    assert not (tmp_path / "loss.png").exists()
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["training"] is None


def test_sparse_evaluations_are_reported(tmp_path: Path, make_evaluation: MakeEvaluation) -> None:
    """No k with enough queries, no sparse perplexity, no uniform KL, one layer, one key: nothing to divide by."""
    good = make_evaluation()
    bare = LayerScore(0, 5, 0.0, 0.0, None, ())
    evaluation = replace(
        good, mean=replace(bare, layer=None), layers=(bare,), perplexities=good.perplexities[:1],
        row_block=RowBlock(0, 0, 1, 1, ((1.0,),), ((1.0,),)),
    )  # fmt: skip
    log = [{"step": 1, "loss": 0.5, "kl_over_uniform": None}]
    text = write_report(tmp_path, evaluation=evaluation, metrics_log=log, run=RUN).read_text(encoding="utf-8")
    assert "Too little text to judge" in text and "evaluate longer sequences" in text
    assert not (tmp_path / "mass_at_k.png").exists() and not (tmp_path / "loss.png").exists()


def test_a_layer_that_lacks_the_headline_k_has_empty_cells(tmp_path: Path, make_evaluation: MakeEvaluation) -> None:
    good = make_evaluation()
    layers = (replace(good.layers[0], at_k=good.layers[0].at_k[:1]), *good.layers[1:])
    text = write_report(tmp_path, evaluation=replace(good, layers=layers), run={}).read_text(encoding="utf-8")
    rows = table(text, "layer")
    assert rows["0"][3:] == [""] * 5 and rows["1"][3] == percent(good.layers[1].at_k[1].indexer)


def test_run_settings_and_command_are_printed(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "| lr | 0.001 |" in text and "| note | a\\|b |" in text and "| layers | null |" in text
    assert "```bash\nflash-indexer warmup --out runs/x\n```" in text


def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, make_evaluation: MakeEvaluation) -> None:
    with pytest.raises(ValueError, match="write_report: evaluation and run must hold finite numbers"):
        write_report(tmp_path, evaluation=make_evaluation(), run={"lr": math.nan})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("blank_plots")
def test_what_is_silent_otherwise_is_said(tmp_path: Path, make_evaluation: MakeEvaluation) -> None:
    """A raised --min-visible, a k that no query qualifies for, few queries, ties above 1%, warnings, the time's end."""
    good = make_evaluation()
    layers = tuple(
        replace(
            score, at_k=(score.at_k[0], replace(score.at_k[1], queries=12)),
            ties=(TiesAtK(64, 5000, 10), TiesAtK(128, 2000, 700 * (score.layer == 2))),
        )
        for score in good.layers
    )  # fmt: skip
    mean = replace(good.mean, ties=(TiesAtK(64, 15000, 30), TiesAtK(128, 6000, 700, 500)))
    evaluation = replace(good, mean=mean, layers=layers, ks=(64, 128, 256), min_visible=300, most_visible=700)
    run = {**RUN, "minutes": 3.0, "ended_by": "time", "warnings": ["--sequence-length 8192 is above 2048"]}
    path = write_report(tmp_path, evaluation=evaluation, metrics_log=make_log(), run=run)
    text = path.read_text(encoding="utf-8")
    assert "--min-visible 300 is raised to 4k: 512 for k = 128" in text
    assert "k = 256 is not measured: it needs queries that see 1,024 keys, and none sees more than 700" in text
    assert "k = 128 rests on 12 queries in each of 3 layers: too few to tell indexers apart" in text
    assert table(text, "rank k")["64"] == ["15,000", "30", "0.2%", "0.2% (0)", ""]
    assert table(text, "rank k")["128"] == ["6,000", "700", "11.7%", "35.0% (2)", "500"]
    assert "In layer 2, 35.0% of the queries that see more than 128 keys have equal index scores" in text
    assert "Transformers' indexer selects whichever torch.topk takes" in text
    assert "## Warnings\n\n- --sequence-length 8192 is above 2048\n" in text
    assert "The time budget (--minutes 3) ended this run, not its learning" in text
    assert "--resume --steps N" in text and "| ended_by |" not in text and "| warnings |" not in text
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    counted = {"k": 128, "queries": 6000, "tied_rows": 700, "taken_otherwise": 500}
    assert content["tied_rows"][1] == counted | {"share": 700 / 6000}
    counted = {"k": 128, "queries": 2000, "tied_rows": 700, "taken_otherwise": None}
    assert content["evaluation"]["layers"][2]["ties"][1] == counted
    assert content["run"] == run
    assert Evaluation.from_dict(content["evaluation"]) == evaluation


@pytest.mark.usefixtures("blank_plots")
def test_nothing_to_tell_is_not_told(tmp_path: Path, make_evaluation: MakeEvaluation) -> None:
    good = make_evaluation()
    ties = (TiesAtK(64, 5000, 0), TiesAtK(128, 4000, 0))
    scores = tuple(replace(score, ties=ties) for score in good.layers)
    evaluation = replace(good, layers=scores, mean=replace(good.mean, ties=ties), ks=(64, 128), min_visible=256)
    run = {**RUN, "ended_by": "steps", "warnings": []}
    text = write_report(tmp_path, evaluation=evaluation, metrics_log=make_log(), run=run).read_text(encoding="utf-8")
    assert "No query has equal index scores at rank k and k + 1 (k = 64, 128)." in text
    for absent in ("## Warnings", "time budget", "not measured", "rests on", "torch.topk"):
        assert absent not in text, absent
    raised = "--min-visible 256 is raised to 4k: 512 for k = 128 "  # 256 is 4 x 64 itself
    assert raised in text


def test_records_from_before_ties_were_counted_are_read() -> None:
    file = Path(__file__).resolve().parents[2] / "docs" / "smollm2-135m" / "report.json"
    plain = json.loads(file.read_text(encoding="utf-8"))["evaluation"]
    for name in ("ks", "min_visible", "most_visible"):
        plain.pop(name, None)
    for score in (plain["mean"], *plain["layers"]):
        score.pop("ties", None)
    evaluation = Evaluation.from_dict(plain)
    assert (evaluation.ks, evaluation.mean.ties, len(evaluation.layers)) == ((), (), 30)
    assert verdict(evaluation).startswith("The indexer predicts the model's attention well.")
