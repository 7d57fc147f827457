"""What a part of the queries costs and gives: held-out KL / uniform and attention mass against the training's time.

    python benchmarks/queries.py --commit $(git rev-parse HEAD)      # 7 trainings of the embedded model
    python benchmarks/queries.py --plot                              # docs/queries.png and its table, from the records

Each fraction is trained twice, with its own learning-rate schedule each time: for as many steps as all queries, and for
as many as take the same time. Time is steps times the median step, so that neither checkpoints nor what else the
machine did counts. Indexers saved on the way are judged on held-out text afterwards. Appends a line for each training
to benchmarks/results/queries.jsonl.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console

from flash_indexer.files.native import read_native
from flash_indexer.judge.evaluation import evaluate
from flash_indexer.judge.plots import STYLE
from flash_indexer.models.attach import IndexerHandle
from flash_indexer.recipe import loop
from flash_indexer.recipe.held_out import held_out_batches
from flash_indexer.recipe.run_record import METRICS_FILE, WarmupSettings, read_metrics, read_run
from flash_indexer.recipe.warmup import warm_up
from report import RESULTS, ROOT, Record, lines_of, table

FRACTIONS = (1.0, 1 / 2, 1 / 4, 1 / 8)
COLOURS = dict(zip(FRACTIONS, ("#222222", "#0072B2", "#D55E00", "#009E73"), strict=True))
SKIPPED = 2  # steps before the clock counts
PLOT = ROOT / "docs" / "queries.png"


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    file = arguments.out / "queries.jsonl"
    if not arguments.plot:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for record in measure(arguments):
            with file.open("a", encoding="utf-8") as results:
                results.write(json.dumps(record) + "\n")
            print({name: value for name, value in record.items() if name != "curve"} | record["curve"][-1], flush=True)
    records = newest(lines_of(file))
    plot(records, arguments.picture)
    print("\n".join(summary(records)))


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=WarmupSettings.model)
    parser.add_argument("--data", help="training text; default: the standard library's")
    parser.add_argument("--held-out", help="text to judge on; default: the standard library's other half")
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument(
        "--batch-size", type=int, default=1, help="many tokens a step, so that the device sets the pace"
    )
    parser.add_argument("--warmup-steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=WarmupSettings.lr)
    parser.add_argument("--points", type=int, default=8, help="indexers that are judged, of each training")
    parser.add_argument("--sequences", type=int, default=10, help="held-out sequences")
    parser.add_argument("--k", type=int, default=128, help="keys whose attention mass is taken")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PLOT)
    parser.add_argument("--plot", action="store_true", help="draw what is recorded, train nothing")
    return parser.parse_args(words)


def measure(arguments: argparse.Namespace) -> Any:
    """A record of each training: all queries, then each fraction for as many steps, and for the same time."""
    step = 0.0
    for fraction in FRACTIONS:
        same_steps = train(arguments, fraction, arguments.steps)
        yield same_steps | {"compared": "steps"}
        if fraction == 1:
            step = same_steps["seconds_per_step"]
            continue
        longer = round(arguments.steps * step / same_steps["seconds_per_step"])
        yield train(arguments, fraction, longer) | {"compared": "time"}


def train(arguments: argparse.Namespace, fraction: float, steps: int) -> Record:
    """One training and what held-out text says of the indexers saved on its way."""
    every = max(steps // arguments.points, 1)
    settings = WarmupSettings(
        model=arguments.model, data=arguments.data, sequence_length=arguments.sequence_length, steps=steps,
        batch_size=arguments.batch_size, warmup_steps=arguments.warmup_steps, lr=arguments.lr,
        save_every=every, queries=fraction,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        handle, saved = keep_checkpoints(settings, Path(folder))
        metrics, run = read_metrics(Path(folder) / "run" / METRICS_FILE), read_run(Path(folder) / "run")
        seconds = median_step([row["seconds"] for row in metrics])
        batches = held_out_batches(run, arguments.held_out, arguments.sequences)
        curve = [
            {"step": step, "seconds": round(step * seconds, 3), **judged(handle, path, batches, arguments.k)}
            for step, path in saved
        ]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "commit": arguments.commit, "device": device, "torch": torch.__version__, "model": Path(arguments.model).name,
        "sequence_length": arguments.sequence_length, "batch_size": arguments.batch_size, "lr": arguments.lr,
        "queries": fraction, "steps": steps, "seconds_per_step": seconds, "k": arguments.k, "curve": curve,
    }  # fmt: skip


def keep_checkpoints(settings: WarmupSettings, folder: Path) -> tuple[IndexerHandle, list[tuple[int, Path]]]:
    """Trains in `folder`/run; the handle, and a copy of every checkpoint with its step."""
    saved: list[tuple[int, Path]] = []
    original = loop.save_checkpoint

    def save(path: Path, handle: IndexerHandle, optimizer: Any, step: int, **names: Any) -> None:
        original(path, handle, optimizer, step, **names)
        saved.append((step, folder / str(step)))
        shutil.copytree(path, saved[-1][1])

    loop.save_checkpoint = save
    try:
        return warm_up(settings, folder / "run", console=Console()), saved
    finally:
        loop.save_checkpoint = original


def judged(handle: IndexerHandle, path: Path, batches: list[Any], k: int) -> Record:
    """KL over uniform, and the attention mass in the indexer's and in the best k keys."""
    handle.load_state_dict(read_native(path).state_dict)
    mean = evaluate(handle, batches, ks=(k,), perplexity_ks=()).mean
    mass = {at.k: at for at in mean.at_k}.get(k)
    return {
        "kl_over_uniform": mean.kl_over_uniform,
        "mass": None if mass is None else mass.indexer,
        "best_mass": None if mass is None else mass.oracle,
    }


def median_step(clock: list[float]) -> float:
    """Seconds a step; the rows' clock runs on through the run."""
    later = clock[SKIPPED:] if len(clock) > SKIPPED + 1 else clock
    return statistics.median(b - a for a, b in pairwise(later)) if len(later) > 1 else later[0]


def newest(records: list[Record]) -> list[Record]:
    """The last record of each training, all queries first."""
    last = {(record["queries"], record["compared"]): record for record in records}
    return [last[key] for key in sorted(last, key=lambda key: (-key[0], key[1]))]


def summary(records: list[Record]) -> list[str]:
    """A table of where each training ended."""
    rows = []
    for record in records:
        end = record["curve"][-1]
        mass = "" if end["mass"] is None else f"{end['mass']:.1%}"
        rows.append([
            f"{record['queries']:.4g}", f"{record['steps']:,}", f"{record['seconds_per_step']:.2f} s",
            f"{end['seconds']:,.0f} s", f"{end['kl_over_uniform']:.4f}", mass,
        ])  # fmt: skip
    k = records[0]["k"]
    return table(f"queries | steps | a step | training | held-out KL / uniform | mass@{k}", rows)


def plot(records: list[Record], path: Path) -> None:
    """Two curves for each training against its time: held-out KL / uniform, and mass at k."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for record in records:
            curve, same_time = record["curve"], record["compared"] == "time"
            style: dict[str, Any] = dict(
                color=COLOURS.get(record["queries"], "#8C8C8C"), linestyle="-" if same_time else "--", marker="o",
                markersize=4, label=f"{record['queries']:.4g} of the queries, {record['steps']} steps",
            )  # fmt: skip
            if record["queries"] == 1:
                style |= dict(linestyle="-", linewidth=2.6, label=f"all queries, {record['steps']} steps")
            seconds = [point["seconds"] for point in curve]
            left.plot(seconds, [point["kl_over_uniform"] for point in curve], **style)
            if curve[-1]["mass"] is not None:
                right.plot(seconds, [100 * point["mass"] for point in curve], **style)
        left.set(xlabel="seconds of training", title="Held-out KL / uniform", yscale="log")
        right.set(xlabel="seconds of training", title=f"Held-out mass@{records[0]['k']}, %")
        left.legend(fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": ""})


if __name__ == "__main__":
    main()
