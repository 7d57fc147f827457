"""What a person reads of a sparse stage's comparison: a page, a plot and the lines that a command prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from flash_indexer.judge.comparison import AFTER, BEFORE, CONTROL, DENSE, Comparison, LayerChange, Loss
from flash_indexer.judge.plots import STYLE
from flash_indexer.judge.verdict import change

PAGE, PLOT, NUMBERS = "comparison.md", "comparison.png", "comparison.json"
COLOURS = {DENSE: "#8C8C8C", BEFORE: "#D55E00", AFTER: "#0072B2", CONTROL: "#222222"}
LOSSES = (
    "| attention | place | tokens | perplexity | nats above the untouched model, dense |",
    "| --- | --- | ---: | ---: | ---: |",
)
LAYERS = (
    "| layer | mass at K before | after | best | KL before | after | selection changed | tied at rank K |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)
NEEDLES = (
    "| attention | where the fact stands | documents | nats a token of the answer | found |",
    "| --- | ---: | ---: | ---: | ---: |",
)
ERRORS = (
    "Errors are standard errors of the paired difference over sequences. `dense after`: the trained model with dense "
    "attention."
)
COUNTED = (
    "Mass: attention that the K selected keys hold in the dense model, over queries that see four times as many keys. "
    "KL: over the selected keys. Changed, tied: of the queries that see more than K keys."
)


def write_comparison(folder: Path, found: Comparison, command: str | None = None) -> Path:
    """Writes the page, the plot and the numbers into `folder`; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NUMBERS).write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    with rc_context(STYLE):
        plot_by_position(found).savefig(folder / PLOT)
    page = folder / PAGE
    page.write_text(_page(found, command), encoding="utf-8")
    return page


def comparison_lines(found: Comparison) -> list[str]:
    """The numbers that say most."""
    base = found.overall(DENSE)
    lines = [f"on {base.tokens:,} held-out tokens, {found.topk} keys a query; the untouched model, dense: "
             f"perplexity {base.perplexity:.3f}"]  # fmt: skip
    for variant in (BEFORE, AFTER, CONTROL):
        loss = found.overall(variant)
        lines.append(f"{variant}: {loss.perplexity:.3f}, {change(loss.perplexity, base.perplexity)} ({_paired(loss)})")
    mean = found.mean
    lines.append(f"KL over the selected keys: {mean.kl_before:.4f} before, {mean.kl_after:.4f} after")
    if mean.changed is not None:
        lines.append(
            f"queries whose selection changed: {_percent(mean.changed)}; tied at rank K: {_percent(mean.tied)}"
        )
    for variant, scores in found.needles.items():
        parts = ", ".join(f"{_percent(x.found)} at {x.depth:g}" for x in scores)
        lines.append(f"needles found, {variant}: {parts} of the document")
    return lines


def plot_by_position(found: Comparison) -> Figure:
    """Nats above the untouched dense model's, by place in the document, with error bars."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    ax = figure.add_subplot()
    ax.axhline(0.0, color=COLOURS[DENSE], label="the untouched model, dense")
    for variant in (BEFORE, AFTER, CONTROL):
        parts = [loss for loss in found.losses if loss.variant == variant and loss.end is not None]
        ax.errorbar(
            range(len(parts)), [loss.difference for loss in parts], yerr=[loss.error or 0.0 for loss in parts],
            marker="o", capsize=3, color=COLOURS[variant], label=variant,
        )  # fmt: skip
    parts = [loss for loss in found.losses if loss.variant == DENSE and loss.end is not None]
    ax.set_xticks(range(len(parts)), [_range(loss) for loss in parts])
    ax.set_xlabel("place in the document")
    ax.set_ylabel("nats a token above dense")
    ax.set_title(f"What {found.topk} keys a query cost")
    ax.legend()
    return figure


def _page(found: Comparison, command: str | None) -> str:
    lines = ["# Dense, sparse before, sparse after", "", *(f"- {line}" for line in comparison_lines(found)), ""]
    if command is not None:
        lines += ["```bash", command, "```", ""]
    lines += [f"![Nats above dense by place in the document]({PLOT})", "", *LOSSES]
    lines += [f"| {x.variant} | {_range(x)} | {x.tokens:,} | {x.perplexity:.3f} | {_paired(x)} |" for x in found.losses]
    lines += [
        "",
        ERRORS,
        "",
        *_needles(found),
        *LAYERS,
        *(_row(x) for x in (*found.layers, found.mean)),
        "",
        COUNTED,
        "",
    ]
    return "\n".join(lines)


def _needles(found: Comparison) -> list[str]:
    """A table of the needle test, where there was one."""
    if not found.needles:
        return []
    rows = [
        f"| {variant} | {x.depth:g} | {x.documents} | {x.nats:.3f} | {_percent(x.found)} |"
        for variant, scores in found.needles.items() for x in scores
    ]  # fmt: skip
    return [*NEEDLES, *rows, ""]


def _row(x: LayerChange) -> str:
    masses = " | ".join(_percent(mass) for mass in (x.mass_before, x.mass_after, x.mass_oracle))
    name = "mean" if x.layer is None else str(x.layer)
    return f"| {name} | {masses} | {x.kl_before:.4f} | {x.kl_after:.4f} | {_percent(x.changed)} | {_percent(x.tied)} |"


def _range(loss: Loss) -> str:
    return "all" if loss.end is None else f"{loss.begin:,}–{loss.end - 1:,}"


def _paired(loss: Loss) -> str:
    return f"{loss.difference:+.4f}" + ("" if loss.error is None else f" ± {loss.error:.4f}")


def _percent(value: Any) -> str:
    return "none" if value is None else f"{100 * value:.1f}%"
