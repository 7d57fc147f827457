"""The sparse stage of the embedded SmolLM2-135M beside a dense control and the oracle's keys, from text to judgement.

    python benchmarks/record_stage.py --out runs/stage --jobs 3

1. text      train, validation and held-out documents (`stage_text.py`); the model's weights in a Transformers folder,
             which the twenty processes load in a second instead of twenty
2. warm-up   of WARM_UP's indexers, --warm-up-steps of 16 sequences
3. rates     short dense runs of each of RATES: all runs have that of the lowest perplexity on the validation text
4. runs      on the same tokens: dense attention (K = the sequence's length), the indexer's keys and the oracle's at
             each --topk. The indexer's run is made at each of INDEXER_RATES, for its indexers drift with the model: the
             one that is best on the validation text counts
5. held-out  all of them on the held-out text, dense and sparse (`stage.py`)
6. judgement `flash-indexer evaluate` of the indexers' runs, on --evaluate-sequences: dense, sparse before and after

Called again it goes on where it was. Every command is in OUT/commands.txt, what it printed in OUT/logs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from flash_indexer.models.load import load_model

HERE = Path(__file__).parent
RATES = ("3e-5", "1e-4")  # at 3e-4 a model changes faster than its indexers learn: docs/journal.md
INDEXER_RATES = ("1e-4", "3e-4")
STEPS = ("warm-up", "rates", "runs", "held-out", "judgement")
WARM_UP = ["--num-heads", "32", "--head-dim", "128", "--lr", "6e-3", "--batch-size", "16"]
VALIDATION_SEQUENCES = "24"
SCHEDULE = ["--warmup-steps", "10", "--decay", "cosine"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, help="folder of train, validation and held_out.jsonl; default: made")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--warm-up-steps", type=int, default=1200)
    parser.add_argument("--topk", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--steps", type=int, default=60, help="of each of the runs")
    parser.add_argument("--rate-steps", type=int, default=40)
    parser.add_argument("--rates", type=Path, help="folder of another record, whose rate of the model is taken")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="sequences; the host sets the pace, so many cost little"
    )
    parser.add_argument("--sequences", type=int, default=240, help="held-out ones, of 2,048 tokens")
    parser.add_argument("--evaluate-sequences", type=int, default=24, help="of `evaluate`'s own pages, at most as many")
    parser.add_argument("--needles", type=int, default=10, help="documents of the needle test at each depth")
    parser.add_argument("--jobs", type=int, default=3, help="commands at a time")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that commands take in turns")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--until", choices=STEPS, default=STEPS[-1])
    stage = Stage(parser.parse_args())
    stage.prepare()
    for name in STEPS:
        getattr(stage, name.replace("-", "_"))()
        if name == stage.options.until:
            break


class Stage:
    """The steps, in order; each is left out where its result is there."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out, self.text = options, options.out, options.text or options.out / "text"
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        self.places: SimpleQueue[int] = SimpleQueue()
        for place in range(options.jobs):
            self.places.put(place % options.gpus)
        named = Path(options.model)
        self.model = named if named.is_dir() else self.out / "model"

    def prepare(self) -> None:
        """The text, and the model in a folder of its own."""
        if not (self.text / "train.jsonl").exists():
            self.together({"text": [sys.executable, str(HERE / "stage_text.py"), "--out", str(self.text)]})
        if not self.model.exists():
            model, tokenizer = load_model(self.options.model, dtype=torch.float32)
            part = self.model.with_suffix(".part")
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            part.rename(self.model)

    def warm_up(self) -> None:
        words = [
            "--model", str(self.model), *self.common(), *WARM_UP, "--steps", str(self.options.warm_up_steps),
            "--evaluate-sequences", "0", "--save-every", str(self.options.warm_up_steps),
        ]  # fmt: skip
        self.together({"warm": command("warmup", self.out / "warm", words)})

    def rates(self) -> None:
        if (self.out / "rates.json").exists():
            return
        if (other := self.options.rates) is not None:
            self.write_rates(lr=str(read_rates(other)["lr"]))
            return
        names, file = {lr: f"rate-{lr}" for lr in RATES}, self.out / "validation-dense.json"
        steps, length, first = self.options.rate_steps, self.options.length, INDEXER_RATES[0]
        self.together({name: self.sparse(name, length, "indexer", lr, first, steps) for lr, name in names.items()})
        self.judge_all(list(names.values()), "validation", file)
        self.write_rates(lr=best(file, names, "dense"))

    def runs(self) -> None:
        lr, steps, length = read_rates(self.out)["lr"], self.options.steps, self.options.length
        names = {k: {rate: f"indexer-{k}-at-{rate}" for rate in INDEXER_RATES} for k in self.options.topk}
        trained = {"dense": self.sparse("dense", length, "indexer", lr, INDEXER_RATES[0], steps)}
        for k in self.options.topk:
            trained[f"oracle-{k}"] = self.sparse(f"oracle-{k}", k, "oracle", lr, INDEXER_RATES[0], steps)
            trained |= {name: self.sparse(name, k, "indexer", lr, rate, steps) for rate, name in names[k].items()}
        self.together(trained)
        file = self.out / "validation-indexers.json"
        self.judge_all([name for runs in names.values() for name in runs.values()], "validation", file)
        chosen = {str(k): best(file, runs, f"indexer {k}") for k, runs in names.items()}
        for k, runs in names.items():
            if not (run := self.out / f"indexer-{k}").exists():
                run.symlink_to(runs[chosen[str(k)]])
        self.write_rates(lr=lr, indexer_lr=chosen)

    def held_out(self) -> None:
        names = ["warm", "dense", *(f"{keys}-{k}" for k in self.options.topk for keys in ("indexer", "oracle"))]
        self.judge_all(names, "held_out", self.out / "held_out.json")

    def judgement(self) -> None:
        commands = {}
        for topk in self.options.topk:
            words = ["evaluate", "--run", str(self.out / f"indexer-{topk}")]
            words += ["--data", str(self.text / "held_out.jsonl")]
            words += ["--sequences", str(min(self.options.evaluate_sequences, self.options.sequences))]
            words += ["--needles", str(self.options.needles)]
            commands[f"evaluate-{topk}"] = [sys.executable, "-m", "flash_indexer", *words]
        self.together(commands)

    def write_rates(self, **rates: str | dict[str, str]) -> None:
        (self.out / "rates.json").write_text(json.dumps(rates) + "\n", encoding="utf-8")

    def common(self) -> list[str]:
        data = ["--data", str(self.text / "train.jsonl")]
        return [*data, "--sequence-length", str(self.options.length), "--dtype", self.options.dtype]

    def sparse(self, name: str, topk: int, keys: str, lr: str, indexer_lr: str, steps: int) -> list[str]:
        words = [
            "--init-from", str(self.out / "warm"), *self.common(), "--topk", str(topk), "--keys", keys, "--lr", lr,
            "--indexer-lr", indexer_lr, "--batch-size", str(self.options.batch_size), "--steps", str(steps), *SCHEDULE,
            "--save-every", str(steps),
        ]  # fmt: skip
        return command("sparse", self.out / name, words)

    def judge_all(self, names: Sequence[str], text: str, file: Path) -> None:
        """Into `file`, of that text: a process for each run, which keeps its losses, then one that compares them."""
        data, each = self.text / f"{text}.jsonl", self.out / "losses"
        sequences = str(self.options.sequences) if text == "held_out" else VALIDATION_SEQUENCES
        self.together({
            f"{file.stem}-{name}": self.judge([name], data, sequences, each / f"{file.stem}-{name}.json", file)
            for name in names
        })  # fmt: skip
        self.together({file.stem: self.judge(names, data, sequences, file)})

    def judge(
        self, names: Sequence[str], data: Path, sequences: str, file: Path, keep: Path | None = None
    ) -> list[str]:
        runs = [word for name in names for word in ("--run", f"{name}={self.out / name}")]
        topk = ["--topk", *map(str, self.options.topk)]
        losses = str(self.out / "losses" / (keep or file).stem)
        words = [*runs, "--data", str(data), "--sequences", sequences, "--length", str(self.options.length)]
        words += [*topk, "--keep", losses, "--out", str(file)]
        return [sys.executable, str(HERE / "stage.py"), *words]

    def together(self, commands: dict[str, list[str]]) -> None:
        """Runs those that have not been done, so many at a time; raises SystemExit for one that fails."""
        with ThreadPoolExecutor(self.options.jobs) as pool:
            codes = dict(zip(commands, pool.map(self.one, commands, commands.values()), strict=True))
        if failed := [name for name, code in codes.items() if code]:
            raise SystemExit(f"record_stage: {', '.join(failed)} failed; see {self.out / 'logs'}, then call it again")

    def one(self, name: str, words: list[str]) -> int:
        done = self.out / "logs" / f"{name}.done"
        if done.exists():
            return 0
        with (self.out / "commands.txt").open("a", encoding="utf-8") as file:
            file.write(shlex.join(words) + "\n")
        gpu = self.places.get()
        which = {"CUDA_VISIBLE_DEVICES": str(gpu)} if self.options.gpus > 1 else {}
        try:
            with (self.out / "logs" / f"{name}.log").open("a", encoding="utf-8") as log:
                code = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, env=os.environ | which).returncode
        finally:
            self.places.put(gpu)
        print(f"{name}: {'done' if code == 0 else f'exit code {code}'}", flush=True)
        if code == 0:
            done.touch()
        return code


def read_rates(record: Path) -> dict[str, Any]:
    """The model's rate, and the indexers' at each K where they have been chosen."""
    rates: dict[str, Any] = json.loads((record / "rates.json").read_text(encoding="utf-8"))
    return rates


def best(file: Path, names: dict[str, str], attention: str) -> str:
    """The rate whose run has the lowest loss with that attention, of those that `file` judges."""
    found = json.loads(file.read_text(encoding="utf-8"))["runs"]
    return min(names, key=lambda rate: found[names[rate]][attention]["nats"])


def command(name: str, out: Path, words: list[str]) -> list[str]:
    return [sys.executable, "-m", "flash_indexer", name, "--out", str(out), "--resume", *words]


if __name__ == "__main__":
    main()
