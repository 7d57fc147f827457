"""What the sparse stage's runs cost on held-out text, beside one another: dense, the indexer's keys, the oracle's.

    python benchmarks/stage.py --run warm=runs/warm --run dense=runs/dense --run indexer=runs/indexer \\
        --run oracle=runs/oracle --data text/held_out.jsonl --sequences 98 --topk 128 256 --out held_out.json

Every run's model is loaded once and judged with dense attention, and at each K with the keys of its indexers and with
those of largest attention, on the same sequences. Writes means of nats a token, and of every judgement the difference
to each run's dense attention, sequence by sequence, with its standard error
(`flash_indexer.judge.comparison`). Where there are runs named dense and oracle-K: how many times as much the indexer's
keys cost over the first as the second's do.

With --keep, the losses of each run lie in a folder, summed over each sequence, and are read from there the next time:
runs can be judged by a process each, and compared by one more, on any machine.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from flash_indexer.judge.batches import batch_tensors, token_losses
from flash_indexer.judge.comparison import paired_sums
from flash_indexer.models.oracle import KEYS
from flash_indexer.models.sparse import sparse_handle
from flash_indexer.recipe.held_out import held_out_batches
from flash_indexer.recipe.judging import load_trained

DENSE = "dense"


class SequenceLosses(NamedTuple):
    """The sum of -log probability (nats, float64) and the number of predicted tokens of each sequence: [sequences]."""

    nats: Tensor
    tokens: Tensor

    @property
    def mean(self) -> float:
        """Nats a token."""
        return float(self.nats.sum() / self.tokens.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True, help="NAME=FOLDER of a warm-up or a sparse run")
    parser.add_argument("--data", required=True, help="held-out text")
    parser.add_argument("--sequences", type=int, default=98)
    parser.add_argument("--length", type=int, help="tokens of a sequence; default: the run's")
    parser.add_argument("--rows", type=int, default=8, help="sequences of a batch")
    parser.add_argument("--topk", type=int, nargs="+", default=[128])
    parser.add_argument("--keep", type=Path, help="folder of the runs' losses, NAME.losses.json")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found: dict[str, dict[str, SequenceLosses]] = {}
    for word in arguments.run:
        name, _, folder = word.partition("=")
        started = time.perf_counter()
        found[name] = kept(name, Path(folder), arguments)
        shown = {which: round(math.exp(x.mean), 4) for which, x in found[name].items()}
        print(name, shown, f"{time.perf_counter() - started:.1f} s", flush=True)
        arguments.out.write_text(json.dumps(record(found, arguments), indent=1) + "\n", encoding="utf-8")


def kept(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, SequenceLosses]:
    """`judged`, read where it was kept, or kept."""
    if arguments.keep is None:
        return judged(folder, arguments)
    file = arguments.keep / f"{name}.losses.json"
    if not file.exists():
        arguments.keep.mkdir(parents=True, exist_ok=True)
        found = {
            which: {field: x.tolist() for field, x in own._asdict().items()}
            for which, own in judged(folder, arguments).items()
        }
        file.with_suffix(".part").write_text(json.dumps(found) + "\n", encoding="utf-8")
        file.with_suffix(".part").replace(file)
    return {
        which: SequenceLosses(*(torch.tensor(own[field], dtype=torch.float64) for field in SequenceLosses._fields))
        for which, own in json.loads(file.read_text(encoding="utf-8")).items()
    }


def judged(folder: Path, arguments: argparse.Namespace) -> dict[str, SequenceLosses]:
    """Losses by the attention with which they were computed: "dense", "indexer 128", "oracle 128", ..."""
    dense, _, run = load_trained(folder, None, Console(file=io.StringIO()))
    device = next(dense.model.parameters()).device
    run |= {} if arguments.length is None else dict(sequence_length=arguments.length)
    packed = batched(held_out_batches(run, arguments.data, arguments.sequences), arguments.rows)
    batches = [batch_tensors(batch, device) for batch in packed]
    dense.model.train(False)
    handle = sparse_handle(dense, arguments.topk[0])
    handle.indexers.train(False)
    found: dict[str, SequenceLosses] = {}
    for topk in arguments.topk:
        handle.topk = topk
        for keys in KEYS:
            handle.keys = keys
            found[f"{keys} {topk}"] = losses(handle.model, batches)
    handle.remove()
    return {DENSE: losses(handle.model, batches)} | found


def batched(batches: list[dict[str, Tensor]], rows: int) -> list[dict[str, Tensor]]:
    """Batches of one sequence each, `rows` together."""
    return [
        {name: torch.cat([batch[name] for batch in batches[n : n + rows]]) for name in batches[0]}
        for n in range(0, len(batches), rows)
    ]


def losses(model: torch.nn.Module, batches: list[tuple[Tensor, Tensor]]) -> SequenceLosses:
    """Of all sequences of all batches."""
    parts: list[SequenceLosses] = []
    for ids, positions in batches:
        found, zeros = token_losses(model, ids, positions), torch.zeros(len(ids), dtype=torch.float64)
        tokens = torch.bincount(found.sequence, minlength=len(ids)).double()
        parts.append(SequenceLosses(zeros.index_add(0, found.sequence, found.nats.double()), tokens))
    return SequenceLosses(*(torch.cat(x) for x in zip(*parts, strict=True)))


def record(found: dict[str, dict[str, SequenceLosses]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Of every run and attention: nats, perplexity and tokens, and the difference to each run's dense attention."""
    content: dict[str, Any] = dict(data=Path(arguments.data).name, sequences=arguments.sequences, runs={})
    for name, by_attention in found.items():
        content["runs"][name] = {}
        for which, x in by_attention.items():
            row: dict[str, Any] = dict(
                tokens=int(x.tokens.sum()), nats=x.mean, perplexity=math.exp(x.mean), over_dense_of={}
            )
            for other, base in found.items():
                difference, error = paired_sums(x.nats - base[DENSE].nats, x.tokens)
                row["over_dense_of"][other] = dict(nats=difference, error=error, cost=math.expm1(difference))
            keys, _, topk = which.partition(" ")
            if keys == "indexer" and DENSE in found and f"oracle-{topk}" in found:
                row["over_oracle"] = ratio(x, found[f"oracle-{topk}"][f"oracle {topk}"], found[DENSE][DENSE])
            content["runs"][name][which] = row
    return content


def ratio(x: SequenceLosses, oracle: SequenceLosses, dense: SequenceLosses) -> dict[str, float | None]:
    """(x - dense) / (oracle - dense) of mean losses, and its standard error, linear in both differences.

    None where the oracle's keys cost nothing, as where K covers the sequence.
    """
    indexer_cost, oracle_cost = x.nats - dense.nats, oracle.nats - dense.nats
    of_oracle, _ = paired_sums(oracle_cost, x.tokens)
    if of_oracle == 0:
        return dict(ratio=None, error=None)
    value = paired_sums(indexer_cost, x.tokens)[0] / of_oracle
    _, error = paired_sums(indexer_cost - value * oracle_cost, x.tokens)
    return dict(ratio=value, error=None if error is None else abs(error / of_oracle))


if __name__ == "__main__":
    main()
