"""Which ties an export warns of: those that the run's report counted at its own last rank, of its own weights."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flash_indexer.cli import app
from flash_indexer.recipe.sparse import train_sparsely
from flash_indexer.recipe.sparse_record import SparseRunSettings
from flash_indexer.recipe.warmup import warm_up

pytestmark = pytest.mark.usefixtures("blank_plots")


def said(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


TAKEN = "taken_otherwise"


def exported(run: Path, *options: object) -> tuple[str, list[str]]:
    """What the command says, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = said("export", "--run", run, run.parent / "v32", "--overwrite", *options)
    return output, [text for one in caught if (text := str(one.message)).startswith("export: ")]


@pytest.fixture
def few_heads(tmp_path: Path, mla_checkpoint: Path, tiny_settings: Callable[..., Any]) -> Path:
    """A warm-up of one index head, whose scores tie, on a model that leaves as deepseek_v32."""
    settings = tiny_settings(model=str(mla_checkpoint), rope_dim=None, num_heads=1, steps=1)
    warm_up(settings, tmp_path / "run", console=Console(file=io.StringIO()))
    return tmp_path / "run"


def test_ties_are_those_of_the_exported_rank_and_weights(few_heads: Path, texts: Path) -> None:
    output, warned = exported(few_heads, "--topk", 8)
    command = f"`flash-indexer evaluate --run {few_heads} --perplexity-k 8` counts them, on documents of more than 8"
    assert f"ties at rank 8 not counted: no report in {few_heads}; {command} tokens" in output
    assert len(warned) == 1 and "the ties of 1 index head were not counted" in warned[0]

    said("evaluate", "--run", few_heads, "--data", texts, "--sequences", 2, "--perplexity-k", 8)
    report = json.loads((few_heads / "report" / "report.json").read_text())
    (share,) = (tie["share"] for tie in report["tied_rows"] if tie["k"] == 8)
    layers = {x["layer"]: x["ties"][0]["tied_rows"] / x["ties"][0]["queries"] for x in report["evaluation"]["layers"]}
    most = ", ".join(f"{n} ({layers[n]:.1%})" for n in sorted(layers, key=lambda n: -layers[n]))
    output, warned = exported(few_heads, "--topk", 8)
    assert share > 0.01
    assert f"ties at rank 8: {share:.1%} of the queries that see more keys, most in layers {most}; torch.topk" in output
    tied, otherwise = (sum(x["ties"][0][name] for x in report["evaluation"]["layers"]) for name in ("tied_rows", TAKEN))
    each = ", ".join(f"{x['layer']} ({x['ties'][0][TAKEN]:,})" for x in report["evaluation"]["layers"])
    assert f"takes other keys for {otherwise:,} of these {tied:,} queries: of layers {each}\n" in output
    assert len(warned) == 1 and f"{share:.1%} of the queries have equal scores at rank 8 and behind it" in warned[0]

    for options, k in ((["--topk", 9], 9), ([], 2048)):
        output, warned = exported(few_heads, *options)
        assert f"ties at rank {k} not counted: the report in {few_heads} counts them at these ranks: 8; `fl" in output
        assert f"--perplexity-k {k}`" in output and "were not counted" in warned[0] and len(warned) == 1

    file = few_heads / "checkpoint" / "indexer.safetensors"
    save_file({name: value * 2 for name, value in load_file(file).items()}, file)
    output, warned = exported(few_heads, "--topk", 8)
    assert "ties at rank 8 not counted: " in output and "judges other weights than the indexers have now" in output
    assert len(warned) == 1 and "were not counted" in warned[0]


def test_of_a_sparse_run_those_at_its_k_are_counted(tmp_path: Path, few_heads: Path, texts: Path) -> None:
    settings = SparseRunSettings(
        init_from=str(few_heads), data=str(texts), topk=6, sequence_length=32, steps=1, indexers_alone=True
    )
    train_sparsely(settings, tmp_path / "sparse", console=Console(file=io.StringIO()))
    said("evaluate", "--run", tmp_path / "sparse", "--data", texts, "--sequences", 2)
    tied = json.loads((tmp_path / "sparse" / "report" / "comparison.json").read_text())["mean"]["tied"]
    output, warned = exported(tmp_path / "sparse")
    assert f"ties at rank 6: {tied:.1%} of the queries that see more keys, most in layers" in output
    assert len(warned) == 1 and f"{tied:.1%} of the queries have equal scores at rank 6" in warned[0]
    output, warned = exported(tmp_path / "sparse", "--topk", 7)
    assert "ties at rank 7 not counted: " in output and len(warned) == 1 and "were not counted" in warned[0]
