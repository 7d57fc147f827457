"""What is wrong is told under the name of the command that was called, whichever one a check was written for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from flash_indexer.cli import app
from flash_indexer.files.native import save_native
from flash_indexer.models.attach import attach
from flash_indexer.models.load import load_model, model_fingerprint
from flash_indexer.recipe.comparing import compare_and_report


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(x) for x in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A run's folder with indexers in it, and no record yet."""
    out = tmp_path_factory.mktemp("trained")
    model, _ = load_model(checkpoint, dtype=torch.float32)
    handle = attach(model, num_heads=4, head_dim=32)
    save_native(handle, out / "checkpoint", base_name=str(checkpoint), base_fingerprint=model_fingerprint(handle.model))
    return out


def refused(*arguments: object) -> str:
    found = run(*arguments)
    assert found.exit_code == 1 and isinstance(found.exception, SystemExit), found.output
    return next(line for line in found.output.splitlines() if line.startswith("error"))


@pytest.mark.parametrize("record", [dict(settings={}), dict(stage="sparse", settings={})], ids=["warm-up", "sparse"])
@pytest.mark.parametrize("command", ["evaluate", "check", "export"])
def test_a_damaged_record(trained: Path, tmp_path: Path, command: str, record: dict[str, object]) -> None:
    (trained / "run.json").write_text(json.dumps(record))
    more = [tmp_path / "written"] if command == "export" else []
    said = refused(command, "--run", trained, *more)
    assert said.startswith(f"error {command}: {trained}/run.json is "), said
    assert said.endswith("choose another folder")


@pytest.mark.parametrize("record", [dict(settings={}), dict(stage="sparse", settings={})], ids=["warm-up", "sparse"])
@pytest.mark.parametrize("command", ["warmup", "sparse"])
def test_a_damaged_record_of_a_run_that_is_to_go_on(trained: Path, command: str, record: dict[str, object]) -> None:
    (trained / "run.json").write_text(json.dumps(record))
    assert refused(command, "--out", trained, "--resume").startswith(f"error {command}: {trained}/run.json is ")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--layers", "3-1"),
        ("--steps", "0"),
        ("--cp", "0"),
        ("--timeout", "0"),
        ("--sequence-length", "1"),
        ("--seed", -1),
    ],
)
@pytest.mark.parametrize("command", ["warmup", "sparse"])
def test_an_option_that_both_trainings_have(
    trained: Path, texts: Path, tmp_path: Path, command: str, option: str, value: object
) -> None:
    words = ["--init-from", trained / "checkpoint", "--data", texts, "--out", tmp_path / "run"]
    assert refused(command, *words, option, value).startswith(f"error {command}: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "others"), [("warmup", "run.json"), ("sparse", "run.json"), ("evaluate", "report.json")]
)
def test_a_folder_of_something_else(trained: Path, tmp_path: Path, command: str, others: str) -> None:
    (tmp_path / "letter").touch()
    option = (
        ["--run", trained, "--report"] if command == "evaluate" else ["--init-from", trained / "checkpoint", "--out"]
    )
    said = refused(command, *option, tmp_path)
    assert said.startswith(f"error {command}: --") and f"which holds letter and no {others}" in said


def test_the_indexers_that_a_sparse_run_began_with_are_gone(tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=r"^evaluate: init_from in the run's run.json must name"):
        compare_and_report(
            tmp_path, dict(init_from=str(tmp_path / "gone"), topk=4), [], tmp_path, console=Console(quiet=True)
        )
