"""`flash-indexer warmup` on a GPU: seconds a step with the kernels and with the torch body, and the same loss.

    python benchmarks/bench_warmup.py --commit $(git rev-parse HEAD)
    python benchmarks/bench_warmup.py --target per_head      each index head from its own attention head

The model has SmolLM2-135M's exact sizes and random weights (30 layers, H=9, G=3, D=64; index heads 8 of 64, or 9), so
that nothing has to be downloaded. Both runs are the command itself, with the same seed and data; in the second the
blockwise torch body computes the loss, and the model's attention is the same. Appends one line to
benchmarks/results/warmup.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from flash_indexer import IndexerKL, cli, indexer_kl
from flash_indexer.bench.timing import environment
from flash_indexer.models import teacher
from flash_indexer.ops import bodies
from flash_indexer.ops.bodies import TORCH

VOCABULARY, HEADS = 49152, 9
SKIPPED = 2  # steps before the clock counts: kernels load, allocators fill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--sequence-length", type=int, default=8192)
    parser.add_argument("--target", choices=("mean", "per_head"), default="mean")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_warmup: needs a CUDA GPU of compute capability 9.0, got none")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_model(path / "model")
        write_texts(path / "texts.jsonl", arguments.steps * arguments.sequence_length)
        runs = {}
        for name in ("kernels", "torch body"):
            print(f"bench_warmup: {name}", flush=True)
            runs[name] = warm_up(path, name, arguments.steps, arguments.sequence_length, arguments.target)
    record = {
        **environment(arguments.commit),
        "name": arguments.target,
        "model": "random weights, SmolLM2-135M's sizes",
        "sequence_length": arguments.sequence_length,
        "steps": arguments.steps,
        "seconds_per_step": {name: median_step(rows) for name, rows in runs.items()},
        "loss": {name: [row["loss"] for row in rows] for name, rows in runs.items()},
        "largest_relative_difference": max(
            abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(*runs.values(), strict=True)
        ),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "warmup.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "loss"}, indent=1))
    print({name: [round(loss, 6) for loss in losses] for name, losses in record["loss"].items()})


def warm_up(path: Path, name: str, steps: int, sequence_length: int, target: str) -> list[dict[str, float]]:
    """Runs the command; the rows of its metrics file."""
    out = path / name.replace(" ", "_")
    command = [
        "warmup", "--out", str(out), "--model", str(path / "model"), "--data", str(path / "texts.jsonl"),
        "--sequence-length", str(sequence_length), "--steps", str(steps), "--evaluate-sequences", "0",
        "--warmup-steps", "2", "--target", target, "--num-heads", str(HEADS if target == "per_head" else 8),
    ]  # fmt: skip
    with mock.patch.object(teacher, "indexer_kl", torch_loss if name == "torch body" else indexer_kl):
        cli.app(command, standalone_mode=False)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def torch_loss(*tensors: Any, **options: Any) -> IndexerKL:
    """`indexer_kl` by the torch body."""
    with bodies.use(TORCH):
        return indexer_kl(*tensors, **options)


def median_step(rows: list[dict[str, float]]) -> float:
    """The rows' clock runs on through the run."""
    times = [row["seconds"] for row in rows]
    return round(statistics.median(b - a for a, b in pairwise(times[SKIPPED:])), 4)


def write_model(path: Path, **changes: int) -> None:
    """Random weights, spread so that attention is far from uniform."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=HEADS,
        num_key_value_heads=3, max_position_embeddings=8192, bos_token_id=None, eos_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(LlamaConfig(**(sizes | changes)))
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    write_tokenizer(path, VOCABULARY)


def write_tokenizer(path: Path, vocabulary: int) -> None:
    """Words w1, w2, ... and the separator <eos>, 0."""
    words = Tokenizer(WordLevel({"<eos>": 0} | {f"w{n}": n for n in range(1, vocabulary)}, unk_token="<eos>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(path)


def write_texts(path: Path, tokens: int) -> None:
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while tokens > 0:
            length = rng.randint(500, 6000)
            text = " ".join(f"w{int(VOCABULARY ** rng.random())}" for _ in range(length))
            file.write(json.dumps({"text": text}) + "\n")
            tokens -= length


if __name__ == "__main__":
    main()
