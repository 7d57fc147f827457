"""docs/smollm2-135m/sparse.md and its plots, of what `record_stage.py` left in a folder.

    python benchmarks/stage_page.py --record runs/stage --out docs/smollm2-135m

What a run costs is exp(nats - nats of the dense run) - 1 on the same held-out tokens, with its error bar; before the
training it is taken over the untouched model. The judgements that the page is made of are copied beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from flash_indexer.judge.comparison_report import NUMBERS, PAGE, PLOT
from flash_indexer.judge.plots import STYLE

MOST_OVER_ORACLE, MOST_OF_BEFORE = 1.2, 1 / 3
CHOICE = (
    "the one of the lowest perplexity on validation text at which the indexer's keys cost at most 1.2 times what the "
    "oracle's do there"
)
RECORD, HELD_OUT, RATES = "sparse_record", "held_out.json", "rates.json"
SMOOTH = 20
COLOURS = {"dense": "#8C8C8C", "indexer": "#0072B2", "oracle": "#222222"}


class Cost(NamedTuple):
    """A perplexity's relative cost, and its standard error where it was kept."""

    cost: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.cost:+z.2%}" + ("" if self.error is None else f" ± {self.error:.2%}")


class AtK(NamedTuple):
    """What attending to K keys costs, before the stage over the untouched model, after it over the dense run."""

    topk: int
    before: Cost
    oracle_before: Cost
    after: Cost
    oracle_after: Cost
    crossed: Cost
    """The dense run's model with its own indexers' keys: what training on few keys buys is the difference to this."""
    ratio_error: float | None
    """Standard error of `over_oracle`; None in records without one."""

    @property
    def over_oracle(self) -> float:
        return self.after.cost / self.oracle_after.cost if self.oracle_after.cost > 0 else math.inf

    @property
    def of_before(self) -> float:
        return self.after.cost / self.before.cost if self.before.cost > 0 else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="unknown", help="that the record was made at")
    parser.add_argument(
        "--judged-earlier", metavar="WHICH", help="of a record without pages by `evaluate`: of which those in OUT are"
    )
    arguments = parser.parse_args()
    record, out = arguments.record, arguments.out
    found = json.loads((record / HELD_OUT).read_text(encoding="utf-8"))
    (out / RECORD).mkdir(parents=True, exist_ok=True)
    for file in (record / HELD_OUT, record / RATES, *sorted(record.glob("validation-*.json"))):
        shutil.copy(file, out / RECORD / file.name)
    text = page(found, record, out, arguments.commit, arguments.judged_earlier)
    (out / "sparse.md").write_text(text, encoding="utf-8")


def cost_of(row: dict[str, Any]) -> Cost:
    """Of a judgement's difference to another, in nats."""
    return Cost(row["cost"], None if row["error"] is None else row["error"] * (1 + row["cost"]))


def costs(found: dict[str, Any]) -> list[AtK]:
    """Of every K that the record holds."""
    runs = found["runs"]

    def cost(run: str, attention: str, over: str) -> Cost:
        return cost_of(runs[run][attention]["over_dense_of"][over])

    return [
        AtK(
            k,
            cost("warm", f"indexer {k}", "warm"),
            cost("warm", f"oracle {k}", "warm"),
            cost(f"indexer-{k}", f"indexer {k}", "dense"),
            cost(f"oracle-{k}", f"oracle {k}", "dense"),
            cost("dense", f"indexer {k}", "dense"),
            runs[f"indexer-{k}"][f"indexer {k}"].get("over_oracle", {}).get("error"),
        )
        for k in sorted(int(name.removeprefix("indexer-")) for name in runs if name.startswith("indexer-"))
    ]


def verdict(found: dict[str, Any]) -> list[str]:
    """Whether the control is one, and at each K whether both bars are met."""
    runs = found["runs"]
    untouched, dense = (runs[name]["dense"]["perplexity"] for name in ("warm", "dense"))
    control = "no worse" if dense <= untouched else "WORSE, so that it is no control"
    lines = [f"The dense run's perplexity is {dense:.3f}, the untouched model's {untouched:.3f}: {control}."]
    for at in costs(found):
        met = [at.over_oracle <= MOST_OVER_ORACLE, at.of_before < MOST_OF_BEFORE]
        ratio = f"{at.over_oracle:z.2f}" + ("" if at.ratio_error is None else f" ± {at.ratio_error:.2f}")
        lines.append(
            f"K={at.topk}: the indexer's keys cost {at.after} over the dense run, the oracle's {at.oracle_after}: "
            f"{ratio} times as much (bar {MOST_OVER_ORACLE}: {_met(met[0])}). Before the stage they cost "
            f"{at.before}; {at.of_before:z.2f} of that is left (bar a third: {_met(met[1])})."
        )
    return lines


def page(found: dict[str, Any], record: Path, out: Path, commit: str, judged_earlier: str | None = None) -> str:
    """The page; writes its plots beside it."""
    rates = json.loads((record / RATES).read_text(encoding="utf-8"))
    of_indexers = ", ".join(f"{rate} at K={k}" for k, rate in rates["indexer_lr"].items())
    chosen = "tried" in rates
    by = f"of {', '.join(rates['tried'])} {CHOICE}" if chosen else "from an earlier comparison on validation text"
    tokens = found["runs"]["dense"]["dense"]["tokens"]
    plot_losses(record, [f"indexer-{at.topk}" for at in costs(found)]).savefig(out / "sparse_loss.png", dpi=140)
    plot_costs(costs(found)).savefig(out / "sparse_costs.png", dpi=140)
    judged = [out / f"sparse_k{at.topk}" for at in costs(found)]
    for at, folder in zip(costs(found), judged, strict=True):
        if judged_earlier is None:
            copy_judgement(record / f"indexer-{at.topk}" / "report", folder)
    these = (
        "the indexers' runs"
        if judged_earlier is None
        else f"the indexers' runs of an earlier record ({judged_earlier})"
    )
    is_paired = all(at.after.error is not None for at in costs(found))
    errors = "" if is_paired else "; those between runs were not kept in this record"
    links = ", ".join(f"[K={at.topk}]({folder.name}/{PAGE})" for at, folder in zip(costs(found), judged, strict=True))
    table = [
        "| K | before: indexer | before: oracle | dense run, its indexers' keys | after: indexer | after: oracle |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {at.topk} | {at.before} | {at.oracle_before} | {at.crossed} | {at.after} | {at.oracle_after} |"
            for at in costs(found)
        ),
    ]
    return "\n".join([
        "# The sparse stage on SmolLM2-135M: report", "",
        *(f"- {line}" for line in verdict(found)), "",
        "## What few keys cost", "",
        f"Perplexity on {tokens:,} held-out tokens, in {found['sequences']} sequences. Before: the untouched model "
        "with the warm-up's indexers, over its own dense attention. Behind that: over the dense run, which trained on "
        f"the same tokens at the same rates. Error bars are paired, over sequences{errors}.", "", *table, "",
        "![What few keys cost, before and after](sparse_costs.png)", "",
        f"What `flash-indexer evaluate` says of {these} on fewer sequences, with needles: {links}.", "",
        "## Training", "",
        *training(record), "",
        "This warm-up is larger and longer than the [recorded run of `warmup`](report.md), with whose indexers 128 "
        "keys cost several times as much: behind small warm-ups, and in longer runs at high rates, the indexer's keys "
        "cost more over the oracle's than here ([journal](../journal.md)).", "",
        f"Rates: {rates['lr']} for the model, {by}; for the indexers, chosen on validation text, {of_indexers}.", "",
        *validated(record, rates), "![Loss by step](sparse_loss.png)", "",
        "## To reproduce", "", f"Recorded at commit {commit[:7]}.", "",
        "```bash", *recording(found, record, None if chosen else rates["lr"]),
        "python benchmarks/stage_page.py --record runs/stage --out docs/smollm2-135m", "```", "",
    ])  # fmt: skip


def validated(record: Path, rates: dict[str, Any]) -> list[str]:
    """The table of the rates that were tried, by validation text, and an empty line; nothing where none were."""
    rows = []
    for rate in rates.get("tried", []):
        runs = json.loads((record / f"validation-{rate}.json").read_text(encoding="utf-8"))["runs"]
        name = next(name for name in runs if name.startswith("indexer-"))
        k = name.removeprefix("indexer-")
        rows.append((rate, k, runs["dense"]["dense"], runs[name][f"indexer {k}"], runs[f"oracle-{k}"][f"oracle {k}"]))
    if not rows:
        return []
    lines = [
        f"| rate | dense run's perplexity | K={rows[0][1]}: indexer's keys | oracle's keys | times as much |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for rate, _, dense, indexer, oracle in rows:
        each = [cost_of(row["over_dense_of"]["dense"]) for row in (indexer, oracle)]
        over = indexer["over_oracle"]
        times = "" if over["ratio"] is None else f"{over['ratio']:.2f} ± {over['error']:.2f}"
        lines.append(f"| {rate} | {dense['perplexity']:.3f} | {each[0]} | {each[1]} | {times} |")
    tokens = rows[0][2]["tokens"]
    return [f"On {tokens:,} tokens of validation text, over the dense run at the same rate:", "", *lines, ""]


def trained(record: Path, name: str) -> tuple[dict[str, Any], float]:
    """The settings of a run, its sequences a step among them, and its seconds."""
    run = json.loads((record / name / "run.json").read_text(encoding="utf-8"))
    last = (record / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return run["settings"] | {"sequences": run["sequences_per_step"]}, json.loads(last)["seconds"]


def recording(found: dict[str, Any], record: Path, lr: str | None) -> list[str]:
    """The commands that make such a record; lr: the model's rate, None where they choose it."""
    (warm, _), (dense, _) = (trained(record, name) for name in ("warm", "dense"))
    commands = (record / "commands.txt").read_text(encoding="utf-8").splitlines()
    judged = re.search(r"--sequences (\d+) --needles (\d+)", next((x for x in commands if " evaluate " in x), ""))
    words = {
        "length": dense["sequence_length"], "warm-up-steps": warm["steps"], "steps": dense["steps"],
        "batch-size": dense["sequences"], "topk": " ".join(str(at.topk) for at in costs(found)),
        "sequences": found["sequences"],
    }  # fmt: skip
    if judged is not None:
        words |= {"evaluate-sequences": judged[1], "needles": judged[2]}
    options = " ".join(f"--{name} {value}" for name, value in words.items())
    if lr is None:
        return [f"python benchmarks/record_stage.py --out runs/stage {options}"]
    return [
        f"mkdir -p runs/rates && echo '{json.dumps({'lr': lr})}' > runs/rates/rates.json",
        f"python benchmarks/record_stage.py --out runs/stage --rates runs/rates {options}",
    ]


def training(record: Path) -> list[str]:
    """What the warm-up and each run trained on, for how long."""
    (warm, warm_time), (dense, dense_time) = (trained(record, name) for name in ("warm", "dense"))
    tokens = dense["steps"] * dense["sequences"] * dense["sequence_length"]
    return [
        f"Warm-up: {warm['num_heads']} index heads of {warm['head_dim']}, {warm['steps']:,} steps of "
        f"{warm['sequences']} sequences of {warm['sequence_length']:,} tokens, learning rate {warm['lr']:g}, "
        f"{warm_time:,.0f} s. Each run: all parameters, {dense['steps']} steps of {dense['sequences']} such sequences, "
        f"the same {tokens:,} tokens in all runs; the dense one took {dense_time:,.0f} s. All of it beside other runs "
        "on the same GPU."
    ]


def copy_judgement(report: Path, out: Path) -> None:
    """Into the folder `out`: the page of `flash-indexer evaluate`, its plot and its numbers; paths as below."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (PLOT, NUMBERS):
        shutil.copy(report / name, out / name)
    text = (report / PAGE).read_text(encoding="utf-8")
    text = re.sub(r"--run \S*/", "--run runs/stage/", re.sub(r"--data \S*/", "--data runs/stage/text/", text))
    (out / PAGE).write_text(text, encoding="utf-8")


def plot_losses(record: Path, sparse: list[str]) -> Figure:
    """Nats a token that the runs on few keys lose more than the dense one on the same tokens; further K are dashed."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 5), layout="constrained")
        ax = figure.add_subplot(
            xlabel="step", ylabel=f"nats a token above the dense run,\nmean of the last {SMOOTH} steps"
        )
        dense, first = losses(record / "dense"), sparse[0].removeprefix("indexer") if sparse else ""
        ax.axhline(0.0, color=COLOURS["dense"], label="dense")
        for name in [*sparse, *(name.replace("indexer", "oracle") for name in sparse)]:
            above = [x - y for x, y in zip(losses(record / name), dense, strict=True)]
            style = "-" if name.endswith(first) else "--"
            colour = COLOURS[name.partition("-")[0]]
            ax.plot(range(1, len(above) + 1), smooth(above), style, color=colour, label=name, linewidth=1.6)
        ax.legend()
    return figure


def losses(run: Path) -> list[float]:
    """Nats a token of every step."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [float(json.loads(line)["loss"]) for line in lines]


def smooth(losses: list[float]) -> list[float]:
    """The mean of the last SMOOTH values, of fewer at the start."""
    return [sum(losses[max(0, n - SMOOTH) : n]) / min(n, SMOOTH) for n in range(1, len(losses) + 1)]


def plot_costs(found: list[AtK]) -> Figure:
    """Bars: the indexer's and the oracle's keys, before (pale) and after, at each K."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        ax = figure.add_subplot(ylabel="perplexity over dense attention")
        for number, at in enumerate(found):
            each = (("indexer", at.before), ("oracle", at.oracle_before))
            each += (("indexer", at.after), ("oracle", at.oracle_after))
            for place, (keys, cost) in enumerate(each):
                x, is_after = number + (place - 1.5) * 0.2, place > 1
                label = None if number else f"{keys}'s keys, {'after' if is_after else 'before'}"
                ax.bar(
                    x, cost.cost, 0.18, yerr=cost.error, color=COLOURS[keys], alpha=1.0 if is_after else 0.35,
                    label=label, ecolor="#777777",
                )  # fmt: skip
                top = max(cost.cost, 0.0) + (cost.error or 0.0)
                ax.annotate(f"{cost.cost:+z.2%}", (x, top), ha="center", va="bottom", fontsize=9)
        ax.set_xticks(range(len(found)), [f"K={at.topk}" for at in found])
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.legend()
    return figure


def _met(met: bool) -> str:
    return "met" if met else "missed"


if __name__ == "__main__":
    main()
