"""The report's plots, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from flash_indexer.judge.scores import Evaluation, MassAtK, Perplexity, RowBlock
from flash_indexer.judge.verdict import arithmetic_name, change, percent, queries_of_layers, rests_on_few

_INDEXER, _ORACLE, _WINDOW, _DENSE = "#0072B2", "#222222", "#D55E00", "#8C8C8C"
_LEAST_RANGE = 1.1  # of a loss axis: its top over its bottom
NAMES = {"dense": "all keys (dense)", "indexer": "indexer", "oracle": "oracle", "window": "sink + window"}
_COLOURS = {"dense": _DENSE, "indexer": _INDEXER, "oracle": _ORACLE, "window": _WINDOW}
STYLE: dict[Any, Any] = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 140,
}


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def plot_loss(steps: Sequence[Mapping[str, Any]], held_out: float | None) -> Figure:
    """A layer's line is over its own uniform KL where the rows have it; the bold one is mean over mean."""
    figure = _figure(9, 5)
    ax = figure.add_subplot()
    rows = [row for row in steps if row.get("kl_over_uniform")]
    x = [row["step"] for row in rows]
    means = [[row["loss"] / row["kl_over_uniform"]] * len(row.get("kl") or ()) for row in rows]
    uniform = [row.get("uniform_kl") or mean for row, mean in zip(rows, means, strict=True)]
    layers = [
        [a / b if b else 1.0 for a, b in zip(row.get("kl") or (), u, strict=True)]
        for row, u in zip(rows, uniform, strict=True)
    ]
    if layers[0] and len({len(row) for row in layers}) == 1:
        lines = ax.plot(x, layers, color=_INDEXER, alpha=0.2, linewidth=0.9)
        lines[0].set_label("one layer")
    marker = "o" if len(x) == 1 else None
    mean = [row["kl_over_uniform"] for row in rows]
    ax.plot(x, mean, color=_INDEXER, linewidth=2.6, marker=marker, label="all layers")
    ax.axhline(1.0, color=_WINDOW, linewidth=1.5, linestyle="--", label="uniform prediction")
    if held_out:
        style: dict[str, Any] = dict(color=_ORACLE, marker="D", markersize=8, linestyle="none", clip_on=False)
        ax.plot([x[-1]], [held_out], label=f"held-out text, at the end: {held_out:.3f}", **style)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high < _LEAST_RANGE * low:
        low, high = low / _LEAST_RANGE**0.5, high * _LEAST_RANGE**0.5
    ax.set_ylim(low, high)
    wide = high / low > 5  # then two of 1, 2, 5, 10, ... at least are in sight
    steps_of_decades = FixedLocator([b * 10.0**e for e in range(-5, 3) for b in (1, 2, 5)])
    ax.yaxis.set_major_locator(steps_of_decades if wide else MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    if len(x) == 1:
        ax.set_xlim(x[0] - 1, x[0] + 1)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set(xlabel="optimizer step", ylabel="KL / uniform prediction's KL (log scale)")
    ax.set_title("How far the indexer is from the model's attention, in training")
    figure.legend(loc="outside lower center", ncols=4, fontsize=11)
    return figure


def plot_mass(evaluation: Evaluation) -> Figure:
    """Mass at k of indexer, oracle and sink + window over the layers, one panel for each k."""
    masses = evaluation.mean.at_k
    columns = min(2, len(masses))
    figure = _figure(6 * columns + (3 if columns == 1 else 0), 3.9 * -(-len(masses) // columns) + 0.7)
    axes: list[Axes] = []
    for position, mass in enumerate(masses):
        ax = figure.add_subplot(-(-len(masses) // columns), columns, position + 1)
        axes.append(ax)
        _draw_mass(ax, evaluation, mass)
    bottom = min(ax.get_ylim()[0] for ax in axes)
    for ax in axes:
        ax.set_ylim(max(0.0, 10 * (bottom // 10)), 101)
    handles, labels = axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=3)
    bold = FontProperties(weight="bold", size=14)
    legend.set_title("How much of the attention lies in k keys, layer by layer", bold)
    return figure


def _draw_mass(ax: Axes, evaluation: Evaluation, mean: MassAtK) -> None:
    scores = [(score.layer or 0, at) for score in evaluation.layers for at in score.at_k if at.k == mean.k]
    x = [layer for layer, _ in scores]
    indexer = f"indexer's top k{_served_words(evaluation)}"
    labels = {"oracle": "oracle: the best k keys", "indexer": indexer, "window": "sink + window"}
    for (name, label), marker in zip(labels.items(), "so^", strict=True):
        y = [100 * getattr(at, name) for _, at in scores]
        ax.plot(x, y, color=_COLOURS[name], marker=marker, markersize=5, linewidth=2, label=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="layer", ylabel="attention mass (%)")
    ax.set_title(f"k = {mean.k}: indexer at {percent(mean.indexer_over_oracle)} of the oracle", fontsize=12)
    if rests_on_few(evaluation, mean.k):
        counts = sorted({min(queries := queries_of_layers(evaluation, mean.k)), max(queries)})
        number = " to ".join(f"{count:,}" for count in counts)
        text = f"only {number} {'query' if counts == [1] else 'queries'} a layer: too few to judge"
        box = dict(facecolor="white", edgecolor=_WINDOW, boxstyle="round,pad=0.4")
        ax.text(0.5, 0.06, text, transform=ax.transAxes, ha="center", va="bottom", fontsize=11, bbox=box)


def plot_rows(block: RowBlock) -> Figure:
    """A block of query rows: the model's head-summed attention above the indexer's prediction."""
    figure = _figure(11, 6.2)
    largest = max(max(row) for row in (*block.teacher, *block.indexer))
    norm = LogNorm(largest * 1e-4, largest, clip=True)
    last = block.first_query + len(block.teacher)
    extent = (0, block.keys_per_column * len(block.teacher[0]), last, block.first_query)
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    titles = ("The model's attention, summed over heads", "The indexer's prediction of it")
    for ax, values, title in zip(axes, (block.teacher, block.indexer), titles, strict=True):
        seen = np.ma.masked_equal(values, 0.0)
        image = ax.imshow(seen, norm=norm, extent=extent, aspect="auto", cmap="viridis")
        ax.set_facecolor("#D9D9D9")
        ax.grid(False)
        ax.set_xlim(0, block.num_keys)
        ax.set(title=f"{title} (layer {block.layer})", ylabel="query (position)")
    axes[1].set_xlabel("key (position in the document); grey: not seen by the query")
    pooled = "" if block.keys_per_column == 1 else f",\nlargest of {block.keys_per_column} keys"
    figure.colorbar(image, ax=axes, label=f"probability (log scale){pooled}", pad=0.01)
    return figure


def plot_perplexity(evaluation: Evaluation) -> Figure:
    """Perplexity by choice of keys, as bars; where the indexers were judged as served, the unserved ones' beside."""
    served, before = _served_words(evaluation), {}
    if evaluation.unserved is not None:
        before = {p.k: p for p in evaluation.unserved.perplexities}
    shown: list[Perplexity] = []
    words: list[str] = []
    for p in evaluation.perplexities:
        indexer = p.selection == "indexer"
        shown.append(p)
        words.append(served.replace(" ", "\n", 1) if indexer else "")
        if evaluation.unserved is not None and indexer and p.k in before:
            shown.append(before[p.k])
            words.append(f"\nin {evaluation.unserved.arithmetic}")
    figure = _figure(9, 1.6 + 0.55 * len(shown))
    ax = figure.add_subplot()
    dense = shown[0].perplexity
    values = [p.perplexity for p in shown]
    keys = ["" if p.k is None else f", {p.k} keys" for p in shown]
    names = [NAMES[p.selection] + k + text for p, k, text in zip(shown, keys, words, strict=True)]
    bars = ax.barh(names, values, color=[_COLOURS[p.selection] for p in shown], height=0.66)
    changes = ["" if p.k is None else f"  ({change(p.perplexity, dense)})" for p in shown]
    labels = [f"{value:.2f}{text}" for value, text in zip(values, changes, strict=True)]
    ax.bar_label(bars, labels, padding=5)
    ax.axvline(dense, color=_DENSE, linewidth=1.2, linestyle="--")
    ax.set_xlim(0, 1.3 * max(values))
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.set(xlabel="perplexity on held-out text (lower is better)")
    ax.set_title("Perplexity when each query may attend only to the chosen keys")
    return figure


def _served_words(evaluation: Evaluation) -> str:
    return "" if evaluation.unserved is None else f" in {arithmetic_name(evaluation.arithmetic)}"
