"""The sparse stage of the embedded SmolLM2-135M beside a dense control and the oracle's keys, from text to judgement.

    python benchmarks/record_stage.py --out runs/stage --jobs 3

1. text      train, validation and held-out documents (`stage_text.py`); the model's weights in a Transformers folder,
             which the twenty processes load in a second instead of twenty
2. warm-up   of WARM_UP's indexers, --warm-up-steps of 16 sequences
3. rates     short runs, dense, of each of RATES, and with the indexers' keys of each of INDEXER_RATES at the second of
             RATES; the lowest perplexity on the validation text wins, and all three runs have the same
4. runs      on the same tokens: dense attention (K = the sequence's length), the indexer's keys and the oracle's at
             each --topk
5. judgement all of them on the held-out text, dense and sparse (`stage.py`), and `flash-indexer evaluate` of the
             indexers' runs, on --evaluate-sequences: dense, sparse before and sparse after

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

import torch

from flash_indexer.models.load import load_model

HERE = Path(__file__).parent
RATES = ("3e-5", "1e-4", "3e-4")
INDEXER_RATES = ("3e-4", "1e-3", "3e-3")
WARM_UP = ["--num-heads", "16", "--head-dim", "128", "--lr", "3e-3", "--batch-size", "16"]
SCHEDULE = ["--warmup-steps", "10", "--decay", "cosine"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, help="folder of train, validation and held_out.jsonl; default: made")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--warm-up-steps", type=int, default=700)
    parser.add_argument("--topk", type=int, nargs="+", default=[128, 256], help="rates are chosen at the first")
    parser.add_argument("--steps", type=int, default=60, help="of each of the runs")
    parser.add_argument("--rate-steps", type=int, default=40)
    parser.add_argument("--rates", type=Path, help="folder of another record, whose rates are taken")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="sequences; the host sets the pace, so many cost little"
    )
    parser.add_argument("--sequences", type=int, default=98, help="held-out ones, of 2,048 tokens")
    parser.add_argument("--evaluate-sequences", type=int, default=24, help="of `evaluate`'s own pages, at most as many")
    parser.add_argument("--needles", type=int, default=10, help="documents of the needle test at each depth")
    parser.add_argument("--jobs", type=int, default=3, help="commands at a time")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that commands take in turns")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--until", choices=("warm-up", "rates", "runs", "judgement"), default="judgement")
    stage = Stage(parser.parse_args())
    stage.prepare()
    for name in ("warm-up", "rates", "runs", "judgement"):
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
            steps = json.loads((other / "warm" / "run.json").read_text(encoding="utf-8"))["settings"]["steps"]
            chosen = json.loads((other / "rates.json").read_text(encoding="utf-8")) | dict(warm_up_steps=steps)
            (self.out / "rates.json").write_text(json.dumps(chosen) + "\n", encoding="utf-8")
            return
        steps, length, topk = self.options.rate_steps, self.options.length, self.options.topk[0]
        first = INDEXER_RATES[0]
        dense, sparse = ({lr: f"rate-{lr}" for lr in RATES}, {lr: f"indexer-rate-{lr}" for lr in INDEXER_RATES})
        runs = {name: self.sparse(name, length, "indexer", lr, first, steps) for lr, name in dense.items()}
        runs |= {name: self.sparse(name, topk, "indexer", RATES[1], rate, steps) for rate, name in sparse.items()}
        self.together(runs)
        judged = {"dense": dense, f"indexer {topk}": sparse}
        files = {attention: self.out / f"validation-{attention.replace(' ', '-')}.json" for attention in judged}
        wanted = {
            at: (list(names.values()), self.text / "validation.jsonl", "24", files[at]) for at, names in judged.items()
        }
        self.together({name: words for of_one in wanted.values() for name, words in self.judge_each(*of_one).items()})
        self.together({file.stem: self.judge(*wanted[attention]) for attention, file in files.items()})
        lr, rate = (best(files[attention], names, attention) for attention, names in judged.items())
        (self.out / "rates.json").write_text(json.dumps(dict(lr=lr, indexer_lr=rate)) + "\n", encoding="utf-8")

    def runs(self) -> None:
        chosen, steps = json.loads((self.out / "rates.json").read_text(encoding="utf-8")), self.options.steps
        wanted = [("dense", self.options.length, "indexer")]
        wanted += [(f"{keys}-{topk}", topk, keys) for topk in self.options.topk for keys in ("indexer", "oracle")]
        self.together({
            name: self.sparse(name, topk, keys, chosen["lr"], chosen["indexer_lr"], steps)
            for name, topk, keys in wanted
        })  # fmt: skip

    def judgement(self) -> None:
        names = ["warm", "dense", *(f"{keys}-{k}" for k in self.options.topk for keys in ("indexer", "oracle"))]
        held_out, sequences = self.text / "held_out.jsonl", str(self.options.sequences)
        judged = self.judge_each(names, held_out, sequences, self.out / "held_out.json")
        self.together(judged)
        self.together({"held_out": self.judge(names, held_out, sequences, self.out / "held_out.json")})
        commands = {}
        for topk in self.options.topk:
            words = ["evaluate", "--run", str(self.out / f"indexer-{topk}"), "--data", str(held_out)]
            words += ["--sequences", str(min(self.options.evaluate_sequences, self.options.sequences))]
            words += ["--needles", str(self.options.needles)]
            commands[f"evaluate-{topk}"] = [sys.executable, "-m", "flash_indexer", *words]
        self.together(commands)

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

    def judge_each(self, names: Sequence[str], data: Path, sequences: str, file: Path) -> dict[str, list[str]]:
        """A process for each run, which keeps its losses for `judge`."""
        return {
            f"{file.stem}-{name}": self.judge(
                [name], data, sequences, self.out / "losses" / f"{file.stem}-{name}.json", file
            )
            for name in names
        }

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


def best(file: Path, names: dict[str, str], attention: str) -> str:
    """The rate whose run has the lowest loss with that attention, of those that `file` judges."""
    found = json.loads(file.read_text(encoding="utf-8"))["runs"]
    return min(names, key=lambda rate: found[names[rate]][attention]["nats"])


def command(name: str, out: Path, words: list[str]) -> list[str]:
    return [sys.executable, "-m", "flash_indexer", name, "--out", str(out), "--resume", *words]


if __name__ == "__main__":
    main()
