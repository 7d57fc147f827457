"""The scripts under examples/, run as a person runs them, on a tiny model."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_indexer import causal_intervals, reference
from flash_indexer.files.native import load_native, read_native, save_native
from flash_indexer.intervals import key_blocks
from flash_indexer.models.attach import attach
from flash_indexer.models.load import load_model
from flash_indexer.models.sparse import SparseHandle
from flash_indexer.recipe.run_record import read_metrics

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = """
import os, runpy, sys
os.environ.update(environment)
sys.argv = arguments
sys.stdout = open(printed, "a")
runpy.run_path(arguments[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("name", "processes"), [("python_loop", 1), ("trainer", 1), ("trainer", 2), ("fsdp2", 1), ("fsdp2", 2)]
)
def test_an_example_trains_and_leaves_an_indexer(
    tmp_path: Path, runs: Any, checkpoint: Path, texts: Path, name: str, processes: int
) -> None:
    out, printed = tmp_path / "out", tmp_path / "printed"
    arguments = [f"{ROOT}/examples/{name}.py", "--model", str(checkpoint), "--data", str(texts), "--out", str(out)]
    arguments += ["--steps", "12", "--sequence-length", "64"]
    code = dict(codes=[EXAMPLE] * processes, arguments=arguments, printed=str(printed))
    runs.finish(runs.ranks(processes, None, out, **code))
    assert read_native(out).config.layers == (0, 1, 2)
    assert "step 12: KL 0." in printed.read_text() or "'train_loss':" in printed.read_text(), printed.read_text()


def test_the_sparse_example_trains_and_generates(tmp_path: Path, runs: Any, checkpoint: Path, texts: Path) -> None:
    model, _ = load_model(checkpoint, dtype=torch.float32)
    save_native(attach(model, num_heads=2, head_dim=32), tmp_path / "warm", base_name=str(checkpoint))
    out, printed = tmp_path / "out", tmp_path / "printed"
    arguments = [f"{ROOT}/examples/sparse_loop.py", "--model", str(checkpoint), "--indexers", str(tmp_path / "warm")]
    arguments += ["--data", str(texts), "--out", str(out), "--topk", "8", "--steps", "6", "--sequence-length", "64"]
    runs.finish(runs.ranks(1, None, out, codes=[EXAMPLE], arguments=arguments, printed=str(printed)))
    text = printed.read_text()
    assert "step 6: loss " in text and "generated: w" in text, text
    assert read_native(out).config.layers == (0, 1, 2) and (out / "model" / "config.json").is_file()


def test_the_sparse_example_with_a_trainer_leaves_a_sparse_model(
    tmp_path: Path, runs: Any, checkpoint: Path, texts: Path
) -> None:
    model, _ = load_model(checkpoint, dtype=torch.float32)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    first = save_native(attach(model, num_heads=2, head_dim=32), tmp_path / "warm", base_name=str(checkpoint))
    out, printed = tmp_path / "out", tmp_path / "printed"
    arguments = [f"{ROOT}/examples/sparse_trainer.py", "--model", str(checkpoint), "--indexers", str(first)]
    arguments += ["--data", str(texts), "--out", str(out), "--topk", "8", "--steps", "12", "--sequence-length", "64"]
    runs.finish(runs.ranks(1, None, out, codes=[EXAMPLE], arguments=arguments, printed=str(printed)))
    assert "'kl': " in printed.read_text() and "'train_loss':" in printed.read_text(), printed.read_text()
    trained, tokenizer = load_model(out, dtype=torch.float32)
    assert not any(torch.equal(x, before[name]) for name, x in trained.named_parameters())
    one, other = (read_native(path).state_dict for path in (first, out))
    assert one.keys() == other.keys() and not any(torch.equal(one[name], other[name]) for name in one)
    sparse, ids = load_native(trained, out, topk=8), torch.arange(20)[None]
    assert isinstance(sparse, SparseHandle) and len(tokenizer) == 61
    assert trained.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False).shape[1] > 20


FEW = ["--indexers", "x", "--topk", "64", "--sequence-length", "64"]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("sparse_loop", FEW, "--topk must be below .* 64, got 64"),
        ("sparse_trainer", FEW, "--topk must be below .* 64, got 64"),
        ("fsdp2", [], "start this with torchrun"),
    ],
)
def test_an_example_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, options: list[str], said: str
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    path = f"{ROOT}/examples/{name}.py"
    monkeypatch.setattr(sys, "argv", [path, "--model", "x", "--data", "x", "--out", str(tmp_path / "out"), *options])
    with pytest.raises(SystemExit, match=said):
        runpy.run_path(path, run_name="__main__")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("compressed_keys", []),
        ("key_blocks", []),
        ("key_blocks", ["--scores", "highest-key"]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, list) else x,
)
@pytest.mark.slow
def test_indexers_of_pooled_keys_learn(tmp_path: Path, runs: Any, name: str, options: list[str]) -> None:
    printed = tmp_path / "printed"
    arguments = [f"{ROOT}/examples/{name}.py", "--steps", "76", "--tokens", "400", *options]
    runs.finish(runs.ranks(1, None, tmp_path, codes=[EXAMPLE], arguments=arguments, printed=str(printed)))
    text = printed.read_text()
    (line,) = re.findall(r"^step 76: KL ([\d.]+), of the uniform prediction ([\d.]+)$", text, re.MULTILINE)
    kl, uniform = (float(number) for number in line)
    assert kl < 0.5 * uniform, text
    if name == "compressed_keys":
        (found,) = re.findall(r"selects 16 compressed keys, (\d+) of the (\d+) of its topic", text)
        assert int(found[0]) >= 0.7 * int(found[1]) > 0, text


@pytest.mark.parametrize("highest_key", [False, True])
def test_the_loss_of_blocks_of_keys_is_its_definition(highest_key: bool) -> None:
    example = runpy.run_path(f"{ROOT}/examples/key_blocks.py")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    cu_seqlens = torch.tensor([0, 11, 14, 50])
    blocks, visible = key_blocks(cu_seqlens, 4), causal_intervals(cu_seqlens)
    q, k = draw(50, 4, 8), draw(50, 2, 8)
    keys = draw(50 if highest_key else len(blocks.tokens), 8)
    index = draw(50, 3, 8), keys, draw(50, 3)
    lse = reference.teacher_lse(q, k, 0.5, *visible)
    kl, entropy, gradients = example["block_kl"](q, k, lse, index, blocks, visible, softmax_scale=0.5, rows=7)

    leaves = [x.clone().requires_grad_() for x in index]
    p = reference.target_distribution(q, k, 0.5, *visible)[:, blocks.tokens].amax(-1)
    complete = reference.visible_keys(blocks.start, blocks.end, len(blocks.tokens))
    p = p * complete / (p * complete).sum(-1, keepdim=True).clamp_min(1e-300)
    per_key = leaves[2][:, :, None] * torch.einsum("tie,se->tis", leaves[0], leaves[1]).relu()
    scores = per_key.sum(1)[:, blocks.tokens].amax(-1) if highest_key else per_key.sum(1)
    want = reference.divergence(p, scores.masked_fill(~complete, -torch.inf), complete.any(1))
    torch.testing.assert_close(kl, want.detach())
    torch.testing.assert_close(entropy, torch.special.entr(p).sum(-1))
    mean = want.sum() / complete.any(1).sum()
    for got, wanted in zip(gradients, torch.autograd.grad(mean, leaves), strict=True):
        torch.testing.assert_close(got, wanted)


def test_an_odd_number_of_processes_is_refused_by_the_launcher(tmp_path: Path) -> None:
    command = ["bash", f"{ROOT}/examples/launch.sh", "3", "model", "data", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "PROCESSES must be even" in done.stderr and "got 3" in done.stderr


@pytest.mark.slow
def test_torchrun_and_accelerate_launch_the_command_line(tmp_path: Path, checkpoint: Path, texts: Path) -> None:
    folder = Path(sys.executable).parent
    environment = os.environ | dict(PATH=f"{folder}:{os.environ['PATH']}", OMP_NUM_THREADS="1")
    options = ["--steps", "6", "--sequence-length", "32", "--num-heads", "2", "--head-dim", "32", "--batch-size", "2"]
    command = ["bash", f"{ROOT}/examples/launch.sh", "2", str(checkpoint), str(texts), str(tmp_path), *options]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    again = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr[-3000:]
    assert done.stdout.count("step 6/6") == 2, done.stdout  # one process speaks
    for name, sequences in (("context-parallel", 2), ("data-parallel", 4)):
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        assert [row["tokens"] for row in rows] == [step * sequences * 32 for step in range(1, 7)]
        assert f"indexer  {tmp_path / name / 'checkpoint'}" in done.stdout, done.stdout


@pytest.mark.slow
def test_readme_s_command_starts_a_run_again_that_lost_a_process(tmp_path: Path, checkpoint: Path, texts: Path) -> None:
    """As printed, but for the number of processes, the folder, and options in place of its dots."""
    out = tmp_path / "run"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (printed,) = (
        x for x in re.findall(r"^```bash\n(.*?)^```", readme, re.MULTILINE | re.DOTALL) if "--max-restarts" in x
    )
    variable, program, *words = shlex.split(printed.replace("\\\n", " "))
    assert program == "torchrun" and "c10d" in words and words[-1] == "..."
    changes = {"8": "2", "runs/mine": str(out)}
    options = f"--model {checkpoint} --data {texts} --timeout 20 --sequence-length 32 --steps 150 --num-heads 2"
    options += " --head-dim 32 --save-every 5 --evaluate-sequences 0"
    command = [sys.executable, "-m", "torch.distributed.run", *(changes.get(word, word) for word in words[:-1])]
    environment = os.environ | dict([variable.split("=")]) | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen([*command, *options.split()], env=environment, stdout=said, stderr=said)
        try:
            while not (out / "checkpoint").exists():
                assert process.poll() is None, (tmp_path / "said").read_text()
                time.sleep(0.02)
            ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(ranks[-1]), signal.SIGKILL)
            assert process.wait(180) == 0, (tmp_path / "said").read_text()
        finally:
            process.kill()
    assert "failed (exitcode: -9)" in (tmp_path / "said").read_text()
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == list(range(1, 151))
