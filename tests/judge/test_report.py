"""judge.report: the files it writes, and that their numbers are the evaluation's."""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flash_indexer.judge.report import verdict, write_report
from flash_indexer.judge.scores import Evaluation, LayerScore, MassAtK, Perplexity, RowBlock

LAYERS, STEPS = 3, 20
RUN = {"model": "tiny", "lr": 1e-3, "layers": None, "note": "a|b", "command": "flash-indexer warmup --out runs/x"}
PLOTS = ("loss.png", "mass_at_k.png", "attention_rows.png", "perplexity.png")


def mass(k: int, indexer: float, oracle: float, window: float) -> MassAtK:
    return MassAtK(k, 4 * k, 1000 * k, indexer, oracle, window, indexer / oracle, window / oracle, indexer * 0.9)


def layer_score(layer: int | None, kl: float, at_k: tuple[MassAtK, ...]) -> LayerScore:
    return LayerScore(layer, 4000, kl, 2.5, kl / 2.5, at_k)


def make_evaluation() -> Evaluation:
    scores = [
        layer_score(n, 0.21 + 0.0137 * n, tuple(mass(k, 0.7 + 0.013 * n, 0.8, 0.6) for k in (64, 128)))
        for n in (0, 1, 2)
    ]
    rows = tuple(tuple(0.001 * (row + column + 1) * (column <= 8 + row) for column in range(12)) for row in range(4))
    losses = {("dense", None): 1.9, ("indexer", 128): 1.95, ("oracle", 128): 1.91, ("window", 128): 2.3}
    return Evaluation(
        sequences=7,
        tokens=14336,
        predicted=14000,
        mean=layer_score(None, 0.2237, (mass(64, 0.713, 0.8, 0.6), mass(128, 0.7791, 0.81, 0.63))),
        layers=tuple(scores),
        perplexities=tuple(Perplexity(s, k, x, math.exp(x), 0.93 if k else 0.0) for (s, k), x in losses.items()),
        row_block=RowBlock(1, 92, 96, 8, rows, rows),
    )


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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


def test_json_holds_the_evaluation_and_the_run(folder: Path) -> None:
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
        assert table(text, "k")[str(at["k"])] == [f"{at['min_visible']:,}", f"{at['queries']:,}", *shares]
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


def test_the_verdict_is_honest() -> None:
    good = make_evaluation()

    def with_mean(kl: float, indexer: float) -> Evaluation:
        return replace(good, mean=layer_score(None, kl, (mass(128, indexer, 0.8, 0.6),)))

    well, more, bad = "predicts the model's attention well", "there is more to learn", "no better than sink + window"
    assert well in verdict(with_mean(0.12 * 2.5, 0.77))
    assert more in verdict(with_mean(0.13 * 2.5, 0.77))
    assert more in verdict(with_mean(0.12 * 2.5, 0.75))
    assert bad in verdict(with_mean(0.12 * 2.5, 0.6))


def test_a_perplexity_far_off_is_given_as_a_multiple() -> None:
    good = make_evaluation()
    far = replace(good.perplexities[1], perplexity=100 * good.perplexities[0].perplexity)
    text = verdict(replace(good, perplexities=(good.perplexities[0], far, *good.perplexities[2:])))
    assert "668.59 (×100.0) with the indexer's" in text


def test_evaluation_alone_makes_a_report(tmp_path: Path) -> None:
    text = write_report(tmp_path, evaluation=make_evaluation(), run={}).read_text(encoding="utf-8")
    assert "## Training" not in text and "## Run" not in text and "loss.png" not in text
    assert not (tmp_path / "loss.png").exists()
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["training"] is None


def test_sparse_evaluations_are_reported(tmp_path: Path) -> None:
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


def test_a_layer_that_lacks_the_headline_k_has_empty_cells(tmp_path: Path) -> None:
    good = make_evaluation()
    layers = (replace(good.layers[0], at_k=good.layers[0].at_k[:1]), *good.layers[1:])
    text = write_report(tmp_path, evaluation=replace(good, layers=layers), run={}).read_text(encoding="utf-8")
    rows = table(text, "layer")
    assert rows["0"][3:] == [""] * 5 and rows["1"][3] == percent(good.layers[1].at_k[1].indexer)


def test_run_settings_and_command_are_printed(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "| lr | 0.001 |" in text and "| note | a\\|b |" in text and "| layers | null |" in text
    assert "```bash\nflash-indexer warmup --out runs/x\n```" in text


def test_a_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="write_report: evaluation and run must hold finite numbers"):
        write_report(tmp_path, evaluation=make_evaluation(), run={"lr": math.nan})
    assert list(tmp_path.iterdir()) == []
