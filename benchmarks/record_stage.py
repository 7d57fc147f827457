"""The sparse stage of the embedded SmolLM2-135M beside a dense control and the oracle's keys, from text to judgement.

    python benchmarks/record_stage.py --out runs/stage --jobs 3

1. text      train, validation and held-out documents (`stage_text.py`); the model's weights in a Transformers folder,
             which the twenty processes load in a second instead of twenty
2. warm-up   of WARM_UP's indexers, --warm-up-steps of 16 sequences
3. rates     at each of RATES a run with dense attention (K = the sequence's length), one with the indexer's keys and
             one with the oracle's at the first K, on the same tokens. By the validation text: the rate of the lowest
             perplexity with the indexer's keys, of those at which these cost at most ENOUGH times what the oracle's do
4. runs      at that rate, the indexer's and the oracle's keys at each --topk. The indexer's run is made at each of
             INDEXER_RATES, for its indexers drift with the model: the one that is best on the validation text counts
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
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from flash_indexer.models.load import load_model

HERE = Path(__file__).parent
RATES = ("3e-5", "1e-4", "3e-4")
ENOUGH = 1.2
INDEXER_RATES = ("1e-4", "3e-4")
STEPS = ("warm-up", "rates", "runs", "held-out", "judgement")
WARM_UP = ["--num-heads", "32", "--head-dim", "128", "--lr", "6e-3", "--batch-size", "16"]
VALIDATION_SEQUENCES = "96"
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
        k, indexer_lr = self.options.topk[0], INDEXER_RATES[0]
        runs = {lr: {"dense": f"dense-{lr}", f"oracle-{k}": f"oracle-{k}-{lr}",
                     f"indexer-{k}": f"indexer-{k}-{lr}-at-{indexer_lr}"} for lr in RATES}  # fmt: skip
        self.together({name: words for lr in RATES for name, words in self.three(k, lr, indexer_lr).items()})
        files = {lr: self.out / f"validation-{lr}.json" for lr in RATES}
        for lr, named in runs.items():
            self.judge_all(named, "validation", files[lr])
        self.write_rates(lr=fastest_that_follows(files, k), tried=list(RATES))

    def three(self, k: int, lr: str, indexer_lr: str) -> dict[str, list[str]]:
        """The commands of a rate's runs at K keys, by their folders."""
        return {
            f"dense-{lr}": self.sparse(f"dense-{lr}", self.options.length, "indexer", lr, INDEXER_RATES[0]),
            f"oracle-{k}-{lr}": self.sparse(f"oracle-{k}-{lr}", k, "oracle", lr, INDEXER_RATES[0]),
            (name := f"indexer-{k}-{lr}-at-{indexer_lr}"): self.sparse(name, k, "indexer", lr, indexer_lr),
        }

    def runs(self) -> None:
        rates = read_rates(self.out)
        lr = rates["lr"]
        commands: dict[str, list[str]] = {}
        for k in self.options.topk:
            for rate in INDEXER_RATES:
                commands |= self.three(k, lr, rate)
        self.together(commands)
        names = {k: {rate: f"indexer-{k}-{lr}-at-{rate}" for rate in INDEXER_RATES} for k in self.options.topk}
        file = self.out / "validation-indexers.json"
        self.judge_all({name: name for runs in names.values() for name in runs.values()}, "validation", file)
        chosen = {str(k): best(file, runs, f"indexer {k}") for k, runs in names.items()}
        counting = {"dense": f"dense-{lr}"} | {f"oracle-{k}": f"oracle-{k}-{lr}" for k in self.options.topk}
        counting |= {f"indexer-{k}": runs[chosen[str(k)]] for k, runs in names.items()}
        for name, folder in counting.items():
            if not (self.out / name).exists():
                (self.out / name).symlink_to(folder)
        self.write_rates(**(rates | dict(indexer_lr=chosen)))

    def held_out(self) -> None:
        names = ["warm", "dense", *(f"{keys}-{k}" for k in self.options.topk for keys in ("indexer", "oracle"))]
        self.judge_all({name: name for name in names}, "held_out", self.out / "held_out.json")

    def judgement(self) -> None:
        commands = {}
        for topk in self.options.topk:
            words = ["evaluate", "--run", str(self.out / f"indexer-{topk}")]
            words += ["--data", str(self.text / "held_out.jsonl")]
            words += ["--sequences", str(min(self.options.evaluate_sequences, self.options.sequences))]
            words += ["--needles", str(self.options.needles)]
            commands[f"evaluate-{topk}"] = [sys.executable, "-m", "flash_indexer", *words]
        self.together(commands)

    def write_rates(self, **rates: Any) -> None:
        (self.out / "rates.json").write_text(json.dumps(rates) + "\n", encoding="utf-8")

    def common(self) -> list[str]:
        data = ["--data", str(self.text / "train.jsonl")]
        return [*data, "--sequence-length", str(self.options.length), "--dtype", self.options.dtype]

    def sparse(self, name: str, topk: int, keys: str, lr: str, indexer_lr: str) -> list[str]:
        steps = str(self.options.steps)
        words = [
            "--init-from", str(self.out / "warm"), *self.common(), "--topk", str(topk), "--keys", keys, "--lr", lr,
            "--indexer-lr", indexer_lr, "--batch-size", str(self.options.batch_size), "--steps", steps, *SCHEDULE,
            "--save-every", steps,
        ]  # fmt: skip
        return command("sparse", self.out / name, words)

    def judge_all(self, runs: Mapping[str, str], text: str, file: Path) -> None:
        """Into `file`, of that text: a process for each run, which keeps its losses, then one that compares them.

        runs: the folder of each, by the name under which it is compared.
        """
        data, kept = self.text / f"{text}.jsonl", self.out / "losses" / file.stem
        sequences = str(self.options.sequences) if text == "held_out" else VALIDATION_SEQUENCES
        self.together({
            f"{file.stem}-{name}": self.judge({name: folder}, data, sequences, kept / f"{name}.json", kept)
            for name, folder in runs.items()
        })  # fmt: skip
        self.together({file.stem: self.judge(runs, data, sequences, file, kept)})

    def judge(self, runs: Mapping[str, str], data: Path, sequences: str, file: Path, kept: Path) -> list[str]:
        kept.mkdir(parents=True, exist_ok=True)
        named = [word for name, folder in runs.items() for word in ("--run", f"{name}={self.out / folder}")]
        topk = ["--topk", *map(str, self.options.topk)]
        words = [*named, "--data", str(data), "--sequences", sequences, "--length", str(self.options.length)]
        words += [*topk, "--keep", str(kept), "--out", str(file)]
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
    """The model's rate and those it was chosen of, and the indexers' at each K where they have been chosen."""
    rates: dict[str, Any] = json.loads((record / "rates.json").read_text(encoding="utf-8"))
    return rates


def best(file: Path, names: dict[str, str], attention: str) -> str:
    """The rate whose run has the lowest loss with that attention, of those that `file` judges."""
    found = json.loads(file.read_text(encoding="utf-8"))["runs"]
    return min(names, key=lambda rate: found[names[rate]][attention]["nats"])


def fastest_that_follows(files: Mapping[str, Path], k: int) -> str:
    """The rate of the lowest loss with the indexer's keys, of those at which these cost at most ENOUGH times what the
    oracle's cost over the dense run; where there is none, that of the lowest ratio. files: a judgement of each rate."""
    found = {
        rate: json.loads(file.read_text(encoding="utf-8"))["runs"][f"indexer-{k}"][f"indexer {k}"]
        for rate, file in files.items()
    }
    ratios = {rate: row["over_oracle"]["ratio"] or 1.0 for rate, row in found.items()}
    following = [rate for rate in found if ratios[rate] <= ENOUGH]
    return min(following, key=lambda rate: found[rate]["nats"]) if following else min(ratios, key=ratios.__getitem__)


def command(name: str, out: Path, words: list[str]) -> list[str]:
    return [sys.executable, "-m", "flash_indexer", name, "--out", str(out), "--resume", *words]


if __name__ == "__main__":
    main()
