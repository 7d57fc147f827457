"""The command line, end to end on a tiny model, and what it says when something is wrong."""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

from flash_indexer.cli import app
from flash_indexer.files.native import load_native, read_native
from flash_indexer.models.load import EMBEDDED_MODEL
from flash_indexer.recipe import loop
from flash_indexer.recipe import warmup as training
from flash_indexer.recipe.run_record import WarmupSettings, parse_layers, read_metrics


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(x) for x in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture(scope="module", autouse=True)
def commands_built_once() -> Iterator[None]:
    """CliRunner would make every command and option from the functions' signatures anew, at each call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.testing._get_command", functools.cache(get_command), raising=False)
        yield


def plain(text: str) -> str:
    """Without colours and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


@pytest.fixture
def warmup(checkpoint: Path, texts: Path, tmp_path: Path) -> Any:
    def invoke(*more: object) -> Result:
        return run(
            "warmup", "--out", tmp_path / "run", "--model", checkpoint, "--data", texts, "--sequence-length", 64,
            "--steps", 4, "--num-heads", 4, "--head-dim", 32, "--evaluate-sequences", 2, *more,
        )  # fmt: skip

    return invoke


@pytest.mark.usefixtures("blank_plots")
def test_warmup_evaluate_export(warmup: Any, checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = warmup("--held-out", texts, "--layers", "0-1")
    assert done.exit_code == 0, done.output
    text = plain(done.output)
    assert "step 4/4" in text and "held-out KL over uniform" in text
    assert "evaluating on 2 held-out sequences of 64 tokens" in text
    for named in (out / "checkpoint", out / "report"):
        assert str(named) in text and named.is_dir()
    assert sorted(p.suffix for p in (out / "report").iterdir() if p.suffix != ".png") == [".json", ".md"]
    assert list((out / "report").glob("*.png"))
    assert len(read_metrics(out / "metrics.jsonl")) == 4

    judged = run(
        "evaluate", "--out", out, "--data", texts, "--sequences", 3, "--report", tmp_path / "again", "--perplexity-k", 8
    )
    assert judged.exit_code == 0, judged.output
    assert "held-out KL over uniform" in plain(judged.output) and list((tmp_path / "again").glob("*.md"))

    words = ["--run", out, "--data", texts, "--report", tmp_path / "served", "--perplexity-k", 8]
    served = run("evaluate", *words, "--serve", "fp8")
    assert served.exit_code == 0, served.output
    assert "Judged with index scores in FP8 (e4m3, rotated): beside float32, " in plain(served.output)
    assert json.loads((tmp_path / "served" / "report.json").read_text())["evaluation"]["arithmetic"] == "fp8"

    checked = run("check", "--out", out, "--data", texts)
    assert checked.exit_code == 0, checked.output
    errors = re.findall(r"layer (\d): max .* = (\S+)", checked.output)
    assert [int(layer) for layer, _ in errors] == [0, 1] and all(float(error) < 1e-4 for _, error in errors)

    exported = run("export", "--run", out, tmp_path / "native", "--format", "native")
    assert exported.exit_code == 0, exported.output
    trained, copied = (read_native(path) for path in (out / "checkpoint", tmp_path / "native"))
    assert replace(copied.config, judged=None) == trained.config and copied.config.layers == (0, 1)
    assert all(torch.equal(value, copied.state_dict[name]) for name, value in trained.state_dict.items())
    handle = load_native(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "native")
    assert (handle.layers, handle.indexers["0"].num_heads) == ((0, 1), 4)

    words = ["evaluate", "--out", tmp_path / "native", "--data", texts, "--sequences", 1]
    judged = run(*words, "--sequence-length", 64)
    assert judged.exit_code == 0 and "doesn't say how" not in plain(judged.output), judged.output
    judged = run(*words)
    assert "evaluating sequences of 1024 tokens: a native indexer folder doesn't say how" in plain(judged.output)

    judged = copied.config.judged
    assert judged["arithmetic"] == "float32" and judged["tokens"] == 128 and set(judged["perplexity"]) == {"dense"}
    assert "recorded: judged with index scores in float32" in plain(exported.output)

    refused = run("export", "--out", out, tmp_path / "v32")
    assert refused.exit_code == 1 and not (tmp_path / "v32").exists()
    assert "error" in plain(refused.output) and "Traceback" not in refused.output


@pytest.mark.usefixtures("blank_plots")
def test_a_run_in_fp8_is_recorded_judged_and_resumed_as_such(warmup: Any, texts: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "run", ["--index-dtype", "fp8", "--teacher-dtype", "fp8"]
    done = warmup(*words, "--held-out", texts, "--layers", "1")
    assert done.exit_code == 0 and "Judged with index scores in FP8 (e4m3, rotated)" in plain(done.output)
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert (settings["index_dtype"], settings["teacher_dtype"]) == ("fp8", "fp8")
    assert "--index-dtype fp8 --teacher-dtype fp8" in (out / "report" / "report.md").read_text()
    plainly = warmup("--out", tmp_path / "plain", "--evaluate-sequences", 0, "--layers", "1")
    assert plainly.exit_code == 0, plainly.output
    losses = [read_metrics(tmp_path / name / "metrics.jsonl")[-1]["loss"] for name in ("run", "plain")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)

    for option, value, said in (
        ("--index-dtype", "fp8_unrotated", "fp8"),
        ("--teacher-dtype", "fp8_unrotated", "None"),
    ):
        folder = out if said == "fp8" else tmp_path / "plain"
        other = warmup("--out", folder, "--resume", "--layers", "1", option, value)
        assert other.exit_code == 1
        assert f"{option} must be {said} as when the run began, got {value}" in plain(other.output), other.output
    (tmp_path / "plain" / "run.json").write_text(
        (tmp_path / "plain" / "run.json").read_text().replace('"teacher_dtype": null', '"older": null')
    )
    other = warmup("--out", tmp_path / "plain", "--resume", "--layers", "1", "--teacher-dtype", "fp8")
    assert other.exit_code == 1 and "--teacher-dtype must be None as when" in plain(other.output), other.output
    assert warmup("--resume", "--steps", 5, "--layers", "1", "--evaluate-sequences", 0).exit_code == 0

    judged = run("evaluate", "--run", out, "--data", texts, "--sequences", 1)
    assert "Judged with index scores in FP8 (e4m3, rotated)" in plain(judged.output), judged.output
    assert run("export", "--run", out, tmp_path / "native", "--format", "native").exit_code == 0
    config = read_native(tmp_path / "native").config
    assert (config.index_dtype, config.teacher_dtype, config.judged["arithmetic"]) == ("fp8", "fp8", "fp8")
    handle = load_native(AutoModelForCausalLM.from_pretrained(settings["model"]), tmp_path / "native")
    assert (handle.index_dtype, handle.teacher_dtype) == ("fp8", "fp8")


@pytest.mark.usefixtures("blank_plots")
def test_an_export_says_how_its_indexers_were_judged(warmup: Any, texts: Path, tmp_path: Path) -> None:
    out, native = tmp_path / "run", tmp_path / "native"
    words = ["export", "--run", out, native, "--format", "native", "--overwrite"]
    assert warmup("--evaluate-sequences", 0, "--layers", "1").exit_code == 0
    exported = run(*words)
    assert f"not recorded how the indexers were judged: no report in {out}; `flash-ind" in plain(exported.output)
    judging = ["evaluate", "--run", out, "--data", texts, "--sequences", 1, "--serve", "fp8", "--perplexity-k", 8]
    assert run(*judging).exit_code == 0
    exported = run(*words)
    assert "recorded: judged with index scores in FP8 (e4m3, rotated)" in plain(exported.output), exported.output
    judged = read_native(native).config.judged
    report = json.loads((out / "report" / "report.json").read_text())["evaluation"]
    assert judged["arithmetic"] == "fp8" and judged["kl_over_uniform"] == report["mean"]["kl_over_uniform"]
    dense, sparse = (p["perplexity"] for p in report["perplexities"][:2])
    assert judged["perplexity"] == {"dense": dense, "8": sparse} and judged["tokens"] == 64
    again = run("export", "--run", native, tmp_path / "copy", "--format", "native")
    assert again.exit_code == 0 and read_native(tmp_path / "copy").config.judged == judged

    assert warmup("--resume", "--steps", 5, "--evaluate-sequences", 0, "--layers", "1").exit_code == 0
    exported = run(*words)
    assert exported.exit_code == 0 and read_native(native).config.judged is None
    assert "report.json judges other weights than the indexers have now; `flash-indexer eva" in plain(exported.output)
    (out / "report" / "report.json").write_text("[]")
    exported = run(*words)
    assert exported.exit_code == 0 and "report.json is no report of ours (" in plain(exported.output)


@pytest.mark.usefixtures("blank_plots")
def test_check_says_what_fp8_changes(warmup: Any, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's logits are large: its rows are off by more than 1 with FP8 logits and its own logsumexp."""
    out = tmp_path / "run"
    assert warmup("--evaluate-sequences", 0, "--layers", "1-2").exit_code == 0
    words = ["check", "--run", out, "--data", texts]
    refused = run(*words, "--fp8", "--report", tmp_path / "elsewhere", "--sequence-length", 32)
    assert refused.exit_code == 1 and "Traceback" not in refused.output
    said = r"and the model's own logsumexp, 12 of 12 heads .* \(layer \d, head \d\): give indexer_kl.* lse=None"
    assert "What FP8 changes" in refused.output and re.search(said, plain(refused.output)), refused.output
    assert json.loads((tmp_path / "elsewhere" / "fp8.json").read_text())["run"]["tokens"] == 32

    monkeypatch.setattr("flash_indexer.recipe.checking.LARGEST_ERROR", 10)
    checked = run(*words, "--fp8")
    assert checked.exit_code == 0 and str(out / "fp8" / "fp8.png") in plain(checked.output), checked.output
    content = json.loads((out / "fp8" / "fp8.json").read_text())
    assert [layer["layer"] for layer in content["layers"]] == [1, 2] and (out / "fp8" / "fp8.png").exists()
    assert (content["run"]["data"], content["run"]["tokens"]) == (str(texts), 64)
    for more, message in (
        (["--report", tmp_path / "x"], "check: --report is the folder of what --fp8 measures; add --fp8"),
        (["--sequence-length", 1], "check: --sequence-length must be at least 2, got 1"),
        (["--fp8", "--report", texts / "00.txt" / "x"], "check: --report must be a folder, got"),
    ):
        refused = run(*words, *more)
        assert refused.exit_code == 1 and message in plain(refused.output), refused.output


def test_a_runs_steps_grow_by_the_command_line(warmup: Any, tmp_path: Path) -> None:
    assert warmup("--evaluate-sequences", 0).exit_code == 0
    less = warmup("--resume", "--steps", 3)
    assert less.exit_code == 1 and "--steps of a resumed run must be at least the 4" in plain(less.output)
    more = warmup("--resume", "--steps", 6)
    assert more.exit_code == 0 and "4 steps become 6: from step 5 on" in plain(more.output), more.output
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_run_takes_the_sizes_of_the_indexers_that_it_begins_with(warmup: Any, texts: Path, tmp_path: Path) -> None:
    assert warmup("--evaluate-sequences", 0, "--layers", "0,2", "--target", "sum_logits").exit_code == 0
    words = ["--out", tmp_path / "more", "--evaluate-sequences", 0, "--init-from", tmp_path / "run"]
    refused = warmup(*words, "--num-heads", 2)
    assert refused.exit_code == 1 and "num_heads 4, attached are 2" in plain(refused.output), refused.output
    words = ["--out", tmp_path / "more", "--data", texts, "--sequence-length", 64, "--steps", 1, *words[2:]]
    model = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["model"]
    begun = run("warmup", "--model", model, *words)
    assert begun.exit_code == 0, begun.output
    found = json.loads((tmp_path / "more" / "run.json").read_text())["settings"]
    assert (found["layers"], found["num_heads"], found["target"]) == ([0, 2], 4, "sum_logits")


def test_a_run_that_time_ended_says_how_to_go_on(warmup: Any, tmp_path: Path) -> None:
    done = warmup("--evaluate-sequences", 0)
    assert "time ended it" not in plain(done.output)
    words = ["--out", tmp_path / "timed", "--minutes", 1e-9, "--evaluate-sequences", 0]
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    timed = run("warmup", "--model", settings["model"], "--data", settings["data"], "--sequence-length", 64, *words)
    assert "time ended it: --minutes 1e-09 allowed 1 step of 64 tokens" in plain(timed.output), timed.output
    assert f"To go on: flash-indexer warmup --out {tmp_path}/timed --resume --steps" in plain(timed.output)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_the_code_that_shells_expect(
    warmup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    forward = loop.forward
    monkeypatch.setattr(loop, "forward", lambda *args: (forward(*args), os.kill(os.getpid(), number))[0])
    ended = warmup()
    assert ended.exit_code == code and "Traceback" not in ended.output
    assert f"after step 1 of 4, which is saved in {tmp_path}/run/checkpoint; to go on: flash" in plain(ended.output)
    assert "error" not in plain(ended.output)


def test_an_interrupted_evaluation_says_that_the_training_is_saved(
    warmup: Any, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flash_indexer.recipe.judging.judge_and_report", interrupted)
    ended = warmup("--held-out", texts)
    assert ended.exit_code == 130
    assert f"saved in {tmp_path}/run/checkpoint: run `flash-indexer evaluate --run {tmp_path}/run`" in plain(
        ended.output
    )


def test_a_whole_checkpoint_is_exported_by_default_with_its_topk(
    warmup: Any, mla_checkpoint: Path, tmp_path: Path
) -> None:
    assert warmup("--model", mla_checkpoint, "--evaluate-sequences", 0, "--steps", 1).exit_code == 0
    words = ["export", "--run", tmp_path / "run", tmp_path / "v32"]
    assert run(*words, "--topk", 7).exit_code == 0
    assert json.loads((tmp_path / "v32" / "config.json").read_text())["index_topk"] == 7
    again = run(*words)
    assert again.exit_code == 1 and "pass overwrite=True (--overwrite)" in plain(again.output)
    assert run(*words, "--overwrite").exit_code == 0
    assert json.loads((tmp_path / "v32" / "config.json").read_text())["index_topk"] == 2048
    refused = run(*words[:3], tmp_path / "native", "--format", "native", "--topk", 7)
    assert refused.exit_code == 1 and "--topk belongs to --format deepseek_v32, got 7" in plain(refused.output)


@pytest.mark.usefixtures("blank_plots")
def test_text_of_another_column_and_reports_only_where_nothing_else_lies(
    warmup: Any, texts: Path, tmp_path: Path
) -> None:
    assert warmup("--evaluate-sequences", 0).exit_code == 0
    rows = [json.dumps(dict(body=file.read_text())) for file in sorted(texts.iterdir())]
    (tmp_path / "held_out.jsonl").write_text("\n".join(rows))
    words = ["evaluate", "--run", tmp_path / "run", "--data", tmp_path / "held_out.jsonl", "--sequences", 1]
    assert run(*words).exit_code == 1
    assert run(*words, "--column", "body").exit_code == 0
    checked = run("check", "--run", tmp_path / "run", "--data", tmp_path / "held_out.jsonl", "--column", "body")
    assert checked.exit_code == 0, checked.output
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.safetensors").touch()
    for command in (words, ["warmup", "--out", tmp_path / "models"]):
        refused = run(*command, *(["--column", "body", "--report", tmp_path / "models"] if command is words else []))
        assert refused.exit_code == 1 and "which holds model.safetensors and no" in plain(refused.output), (
            refused.output
        )
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["model.safetensors"]


def test_resume(warmup: Any, tmp_path: Path) -> None:
    assert warmup().exit_code == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["steps"] == 4
    again = warmup()
    assert again.exit_code == 1 and "already holds a run; pass --resume" in plain(again.output)
    assert warmup("--resume").exit_code == 0
    for option, value, said in (("--lr", 0.5, "0.001"), ("--seed", 3, "0"), ("--layers", "0-1", "None")):
        other = warmup("--resume", option, value)
        assert other.exit_code == 1
        assert f"{option} must be {said} as when the run began, got" in plain(other.output)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 4
    resumed = run("warmup", "--out", tmp_path / "run", "--resume", "--evaluate-sequences", 0)
    assert resumed.exit_code == 0, resumed.output


def test_the_same_settings_in_other_words_are_no_conflict(warmup: Any, checkpoint: Path) -> None:
    assert warmup("--dtype", "auto").exit_code == 0
    assert warmup("--resume", "--dtype", "auto", "--model", f"{checkpoint}/").exit_code == 0


def test_held_out_text_that_is_not_there_is_told_before_the_training(warmup: Any, tmp_path: Path) -> None:
    refused = warmup("--evaluate-sequences", 2, "--held-out", "/nowhere/held_out.txt")
    assert refused.exit_code == 1 and "/nowhere/held_out.txt" in plain(refused.output)
    assert not (tmp_path / "run").exists()
    without = warmup("--evaluate-sequences", 2)
    assert without.exit_code == 0 and "no report: for one, give --held-out" in plain(without.output)


def test_unusable_options_of_evaluate(warmup: Any, texts: Path, tmp_path: Path) -> None:
    assert warmup().exit_code == 0
    (tmp_path / "file").write_text("mine")
    for option, value, message in (
        ("--report", tmp_path / "file", "--report must be a folder"),
        ("--sequences", 0, "--sequences must be at least 1"),
        ("--sequence-length", 0, "--sequence-length must be at least 2"),
        ("--perplexity-k", 0, "--perplexity-k must be 1 or more, got 0"),
        ("--min-visible", -1, "--min-visible must be 0 or more, got -1"),
    ):
        refused = run("evaluate", "--out", tmp_path / "run", "--data", texts, option, value)
        assert refused.exit_code == 1 and message in plain(refused.output), refused.output
    assert (tmp_path / "file").read_text() == "mine"


def test_a_runs_checkpoint_comes_before_an_indexer_beside_it(warmup: Any, tmp_path: Path) -> None:
    assert warmup("--seed", 1).exit_code == 0
    assert run("export", "--run", tmp_path / "run", tmp_path / "old", "--format", "native").exit_code == 0
    for file in (tmp_path / "run" / "checkpoint").iterdir():
        if file.name == "indexer.safetensors":
            changed = {name: value + 1 for name, value in load_file(file).items()}
            save_file(changed, file)
    shutil.copytree(tmp_path / "old", tmp_path / "run", dirs_exist_ok=True)
    assert run("export", "--run", tmp_path / "run", tmp_path / "new", "--format", "native").exit_code == 0
    old, new = (load_file(tmp_path / name / "indexer.safetensors") for name in ("old", "new"))
    assert all(torch.equal(new[name], value + 1) for name, value in old.items())


def test_resume_with_the_recorded_layers_is_no_conflict(warmup: Any) -> None:
    assert warmup("--layers", "0,2").exit_code == 0
    assert warmup("--layers", "0,2", "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere/model"], "error .*/nowhere/model"),
        (["--data", "/nowhere/text"], "error .*/nowhere/text"),
        (["--layers", "0,7"], r"error attach: layers must be indices below 3, got \[0, 7\]"),
        (["--layers", "zero"], "error warmup: --layers must be like 0,1,5-9, got 'zero'"),
        (["--target", "median"], "error .*target"),
        (["--index-dtype", "int8"], r'error warmup: index_dtype must be none, "fp8" or "fp8_unrotated", got \'int8\''),
        (
            ["--teacher-dtype", "bf16"],
            r'error warmup: teacher_dtype must be none, "fp8" or "fp8_unrotated", got \'bf16',
        ),
        (["--index-dtype", "fp8", "--head-dim", "24", "--rope-dim", "8"], "error attach: index_dtype=.* power of two"),
        (["--queries", "2"], "error warmup: queries must be above 0 and at most 1"),
        (["--decay", "linear"], "error warmup: decay must be"),
        (["--steps", "0"], "error warmup: steps must be at least 1"),
        (["--sequence-length", "100000"], "error pack: one sequence needs"),
        (["--rope-dim", "33"], "error .*rope_dim"),
        (["--cp", "2"], r"error make_parallel: the number of processes must be a multiple of cp \* tp = 2 \* 1, got 1"),
        (["--tp", "0"], "error warmup: tp must be at least 1, got 0"),
        (["--timeout", "0"], "error warmup: timeout must be positive"),
    ],
)
def test_errors_are_one_message_and_exit_code_1(
    warmup: Any, tmp_path: Path, arguments: list[str], message: str
) -> None:
    found = warmup(*arguments)
    assert found.exit_code == 1
    assert re.search(message, plain(found.output)), found.output
    assert "Traceback" not in found.output and isinstance(found.exception, SystemExit)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_folder_without_a_run(tmp_path: Path, command: str) -> None:
    more = [tmp_path / "written"] if command == "export" else []
    found = run(command, "--out", tmp_path / "none", *more)
    assert found.exit_code == 1 and "Traceback" not in found.output
    assert re.search(f"error .*{tmp_path}/none", plain(found.output)), found.output
    assert not list(tmp_path.iterdir())


def test_a_bug_keeps_its_traceback(warmup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr("flash_indexer.recipe.warmup.warm_up", broken)
    assert isinstance(warmup().exception, AttributeError)


def test_evaluation_holds_one_model_and_says_where_memory_ends(
    warmup: Any, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = []
    train = training.warm_up

    def trained(*args: Any, **options: Any) -> Any:
        handle = train(*args, **options)
        alive.append(weakref.ref(handle.model))
        return handle

    def load(*args: object) -> None:
        gc.collect()
        alive.append(alive[0]() is None)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("flash_indexer.recipe.warmup.warm_up", trained)
    monkeypatch.setattr("flash_indexer.recipe.judging.load_trained", load)
    found = warmup("--fsdp", "--held-out", texts)
    assert alive[1] is True, "the trained model was held while the whole one was loaded"
    assert found.exit_code == 1 and isinstance(found.exception, SystemExit), found.output
    said = plain(found.output)
    assert "ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.)" in said
    assert f"saved in {tmp_path}/run/checkpoint: run `flash-indexer evaluate --run {tmp_path}/run`" in said


def test_error_text_is_not_taken_for_markup(warmup: Any, tmp_path: Path) -> None:
    found = warmup("--data", tmp_path / "[bold]x")
    assert "[bold]x" in plain(found.output)


@pytest.mark.parametrize(
    ("text", "layers"),
    [(None, None), ("3", (3,)), ("0,1,5-7", (0, 1, 5, 6, 7)), ("2-2", (2,)), (" 1, 2 ", (1, 2))],
)
def test_layers(text: str | None, layers: tuple[int, ...] | None) -> None:
    assert parse_layers(text, "warmup") == layers


@pytest.mark.parametrize("text", ["", "a", "1,,2", "1-", "-1", "3-1", "1-2-3"])
def test_layers_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=f"--layers must be like 0,1,5-9, got '{text}'"):
        parse_layers(text, "warmup")


@pytest.mark.parametrize(
    ("words", "code"), [(["--help"], 0), (["warmup", "--help"], 0), (["warmup", "--out", "x", "--lr", "-1"], 1)]
)
def test_help_and_impossible_values_need_no_torch(words: list[str], code: int) -> None:
    program = f"""
import sys
from flash_indexer.cli import main
sys.argv = ["flash-indexer", *{words}]
try:
    main()
except SystemExit as end:
    heavy = sorted({{"torch", "transformers", "datasets"}} & sys.modules.keys())
    print(end.code, heavy, "flash_indexer.recipe.run_record" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == f"{code} [] {code == 1}", done.stdout + done.stderr


def test_the_embedded_model_is_the_default() -> None:
    assert WarmupSettings().model == EMBEDDED_MODEL


@pytest.mark.parametrize("command", [[], ["warmup"], ["evaluate"], ["export"]])
def test_help(command: list[str]) -> None:
    found = run(*command, "--help")
    assert found.exit_code == 0
    wanted = (
        ["--out", *(["--run"] if command != ["warmup"] else [])]
        if command
        else ["warmup", "evaluate", "export", "indexers"]
    )
    assert all(word in plain(found.output) for word in wanted)


def test_a_native_export_of_a_bfloat16_run_loads_its_base_in_bfloat16(warmup: Any, texts: Path, tmp_path: Path) -> None:
    assert warmup("--dtype", "bfloat16", "--evaluate-sequences", 0).exit_code == 0
    native = tmp_path / "native"
    assert run("export", "--run", tmp_path / "run", native, "--format", "native").exit_code == 0
    checked = run("check", "--out", native, "--data", texts)
    assert checked.exit_code == 0, checked.output
