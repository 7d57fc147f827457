"""Markdown, JSON and plots from what training and evaluation recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from flash_indexer.evaluation import Evaluation, LayerScore, MassAtK, RowBlock
from flash_indexer.metrics import SINK

HEADLINE_K = 128
GOOD_KL_OVER_UNIFORM = 0.12
GOOD_INDEXER_OVER_ORACLE = 0.95

_INDEXER, _ORACLE, _WINDOW, _DENSE = "#0072B2", "#222222", "#D55E00", "#8C8C8C"
_NAMES = {"dense": "all keys (dense)", "indexer": "indexer", "oracle": "oracle", "window": "sink + window"}
_COLOURS = {"dense": _DENSE, "indexer": _INDEXER, "oracle": _ORACLE, "window": _WINDOW}
_MASS_HEAD = ("indexer", "oracle", "sink + window", "indexer / oracle", "recall")
_STYLE: dict[Any, Any] = {
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


def write_report(
    directory: str | Path,
    *,
    evaluation: Evaluation,
    metrics_log: Sequence[Mapping[str, Any]] = (),
    run: Mapping[str, Any],
) -> Path:
    """Writes report.md, report.json and PNG plots into `directory`.

    Args:
        directory: created where missing; files of these names are replaced.
        evaluation: the judgement on held-out text.
        metrics_log: training's rows: step, loss (mean KL, nats), kl_over_uniform, seconds, tokens, and kl (one
            value a layer). Rows without a step and a loss are passed over; without any, the report has no
            training part.
        run: settings to print, JSON-serialisable. "command" (a string) is printed as what reproduces the run.

    Returns:
        The path of report.md.

    Raises:
        ValueError: where `evaluation` or `run` holds a number that is not finite.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    steps = [row for row in metrics_log if row.get("step") is not None and row.get("loss") is not None]
    plots: dict[str, Figure] = {}
    with rc_context(_STYLE):
        if any(row.get("kl_over_uniform") for row in steps):
            plots["loss.png"] = _plot_loss(steps, evaluation.mean.kl_over_uniform)
        if evaluation.mean.at_k:
            plots["mass_at_k.png"] = _plot_mass(evaluation)
        plots["attention_rows.png"] = _plot_rows(evaluation.row_block)
        plots["perplexity.png"] = _plot_perplexity(evaluation)
        content = {
            "verdict": verdict(evaluation),
            "run": dict(run),
            "training": _training_summary(steps),
            "plots": list(plots),
            "evaluation": evaluation.to_dict(),
        }
        try:
            text = _json(content, 3)
        except ValueError as error:
            raise ValueError(f"write_report: evaluation and run must hold finite numbers: {error}") from error
        for name, figure in plots.items():
            figure.savefig(folder / name)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    path = folder / "report.md"
    path.write_text(_markdown(evaluation, content), encoding="utf-8")
    return path


def verdict(evaluation: Evaluation) -> str:
    """One to four sentences that say how good the indexers are, best read first."""
    mean, mass = evaluation.mean, headline(evaluation.mean)
    ratio = mean.kl_over_uniform
    sentences = [_grade(ratio, mass)]
    if ratio is not None:
        sentences.append(
            f"Its KL to the model's attention is {ratio:.3f} of the uniform prediction's "
            f"({mean.kl:.3f} of {mean.uniform_kl:.3f} nats)."
        )
    if mass is not None:
        sentences.append(
            f"Its top {mass.k} keys hold {_percent(mass.indexer)} of the attention, which is "
            f"{_percent(mass.indexer_over_oracle)} of what the best {mass.k} keys hold "
            f"(sink + window: {_percent(mass.window_over_oracle)}), "
            f"over queries that see at least {mass.min_visible:,} keys."
        )
    sparse = {p.selection: p for p in evaluation.perplexities if p.k == _headline_sparse_k(evaluation)}
    if "indexer" in sparse:
        dense = evaluation.perplexities[0].perplexity
        whose = {"indexer": "the indexer's", "oracle": "the oracle's", "window": "sink + window"}
        values = {name: sparse[name].perplexity for name in whose}
        changes = ", ".join(f"{values[n]:.2f} ({_change(values[n], dense)}) with {whose[n]}" for n in whose)
        sentences.append(
            f"Perplexity is {dense:.2f} with all keys; with {sparse['indexer'].k} keys a query it is {changes}."
        )
    return " ".join(sentences)


def headline(score: LayerScore) -> MassAtK | None:
    """The mass at the measured k nearest to 128; None where none was measured."""
    return min(score.at_k, key=lambda mass: abs(mass.k - HEADLINE_K), default=None)


def _grade(ratio: float | None, mass: MassAtK | None) -> str:
    if mass is not None and mass.indexer <= mass.window:
        return "The indexer has not learnt enough: it is no better than sink + window."
    close = mass is None or mass.indexer_over_oracle >= GOOD_INDEXER_OVER_ORACLE
    if ratio is not None and ratio <= GOOD_KL_OVER_UNIFORM and close:
        return "The indexer predicts the model's attention well."
    if mass is not None:
        return "The indexer finds more of the attention than sink + window does, but there is more to learn."
    return "There is more to learn." if ratio else "Too little text to judge: every query sees one key."


def _headline_sparse_k(evaluation: Evaluation) -> int | None:
    ks = {p.k for p in evaluation.perplexities if p.k is not None}
    return min(ks, key=lambda k: abs(k - HEADLINE_K), default=None)


def _training_summary(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not steps:
        return None
    last = steps[-1]
    return {
        "steps": last["step"],
        "tokens": last.get("tokens"),
        "seconds": last.get("seconds"),
        "first_kl_over_uniform": steps[0].get("kl_over_uniform"),
        "last_kl_over_uniform": last.get("kl_over_uniform"),
    }


def _markdown(evaluation: Evaluation, content: Mapping[str, Any]) -> str:
    first, _, rest = content["verdict"].partition(". ")
    lines = ["# Lightning indexer: report", "", f"**{first.rstrip('.')}.** {rest}".rstrip(), ""]
    lines += [
        f"Measured on {evaluation.tokens:,} held-out tokens, sequences: {evaluation.sequences:,}; mean over "
        f"{len(evaluation.layers)} layers.",
        "",
    ]
    lines += _section("Attention mass at k", _mass_lines(evaluation))
    lines += _section("Perplexity", _perplexity_lines(evaluation))
    lines += _section("Where it looks", _rows_lines(evaluation))
    lines += _section("Training", _training_lines(content["training"], content["plots"]))
    lines += _section("Layers", _layer_lines(evaluation))
    lines += _section("Run", _run_lines(content["run"]))
    return "\n".join(lines).rstrip() + "\n"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""] if lines else []


def _mass_lines(evaluation: Evaluation) -> list[str]:
    masses = evaluation.mean.at_k
    if not masses:
        return ["No query sees enough keys for any k (four times k at least): evaluate longer sequences."]
    rows = [[str(m.k), f"{m.min_visible:,}", f"{m.queries:,}", *_mass_cells(m)] for m in masses]
    return [
        "The part of a query's head-summed attention that lies in k keys: the indexer's choice, the best choice "
        f"(oracle), and the first {SINK} keys with the most recent k - {SINK}. Recall: the part of the oracle's "
        "keys that the indexer chose.",
        "",
        *_table(["k", "keys seen, at least", "queries × layers", *_MASS_HEAD], rows),
        "",
        "![Attention mass at k, layer by layer](mass_at_k.png)",
    ]


def _mass_cells(mass: MassAtK) -> list[str]:
    shown = (mass.indexer, mass.oracle, mass.window, mass.indexer_over_oracle, mass.recall)
    return [_percent(x) for x in shown]


def _perplexity_lines(evaluation: Evaluation) -> list[str]:
    dense = evaluation.perplexities[0].perplexity
    rows = [
        [
            _NAMES[p.selection],
            "all" if p.k is None else str(p.k),
            f"{p.perplexity:.3f}",
            "" if p.k is None else _change(p.perplexity, dense),
            _percent(p.sparse_fraction),
        ]
        for p in evaluation.perplexities
    ]
    return [
        f"Over {evaluation.predicted:,} predicted tokens, when each query may attend only to k keys.",
        "",
        *_table(["keys chosen by", "k", "perplexity", "change", "queries that see more than k"], rows),
        "",
        "![Perplexity by choice of keys](perplexity.png)",
    ]


def _rows_lines(evaluation: Evaluation) -> list[str]:
    block = evaluation.row_block
    return [
        f"Layer {block.layer} (the one of median KL over uniform): the last {len(block.teacher)} queries of a "
        f"document and the {block.num_keys:,} keys that they see.",
        "",
        "![Head-summed attention beside the indexer's prediction](attention_rows.png)",
    ]


def _training_lines(training: Mapping[str, Any] | None, plots: Sequence[str]) -> list[str]:
    if training is None:
        return []
    text = f"{training['steps']:,} steps"
    if training["tokens"] is not None:
        text += f", {training['tokens']:,} tokens"
    if training["seconds"] is not None:
        text += f", {training['seconds']:,.0f} s"
    if training["first_kl_over_uniform"] and training["last_kl_over_uniform"]:
        text += (
            f"; KL over uniform from {training['first_kl_over_uniform']:.3f} at the first recorded step to "
            f"{training['last_kl_over_uniform']:.3f} at the last"
        )
    return [text + ".", *(["", "![KL over uniform by step](loss.png)"] if "loss.png" in plots else [])]


def _layer_lines(evaluation: Evaluation) -> list[str]:
    mass = headline(evaluation.mean)
    head = ["layer", "KL (nats)", "uniform's KL (nats)", "KL / uniform"]
    if mass is not None:
        head += [f"mass@{mass.k}: {_MASS_HEAD[0]}", *_MASS_HEAD[1:]]
    rows = []
    for score in (*evaluation.layers, evaluation.mean):
        name = "**all**" if score.layer is None else str(score.layer)
        ratio = "" if score.kl_over_uniform is None else f"{score.kl_over_uniform:.4f}"
        cells = next((_mass_cells(at) for at in score.at_k if mass and at.k == mass.k), [""] * (len(head) - 4))
        rows.append([name, f"{score.kl:.4f}", f"{score.uniform_kl:.4f}", ratio, *cells])
    return _table(head, rows)


def _run_lines(run: Mapping[str, Any]) -> list[str]:
    rows = [[name, _setting(value)] for name, value in run.items() if name != "command"]
    lines = _table(["setting", "value"], rows) if rows else []
    if "command" in run:
        lines += ["", "To reproduce:", "", "```bash", str(run["command"]), "```"]
    return lines


def _setting(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _percent(x: float) -> str:
    return f"{100 * x:.1f}%"


def _change(x: float, base: float) -> str:
    return f"{100 * (x / base - 1):+.1f}%" if x < 3 * base else f"×{x / base:.1f}"


def _json(value: Any, depth: int) -> str:
    """JSON with one entry a line down to `depth`, and compact below: the row block has thousands of numbers."""
    if depth and isinstance(value, dict) and value:
        entries = [f"{json.dumps(name)}: {_json(x, depth - 1)}" for name, x in value.items()]
        return "{\n" + ",\n".join(entries) + "\n}"
    if depth and isinstance(value, list) and value:
        return "[\n" + ",\n".join(_json(x, depth - 1) for x in value) + "\n]"
    return json.dumps(value, allow_nan=False)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _plot_loss(steps: Sequence[Mapping[str, Any]], held_out: float | None) -> Figure:
    """A layer's line is its KL over the mean uniform KL, so that the bold line is the mean of them."""
    figure = _figure(9, 5)
    ax = figure.add_subplot()
    rows = [row for row in steps if row.get("kl_over_uniform")]
    x = [row["step"] for row in rows]
    layers = [[kl * row["kl_over_uniform"] / row["loss"] for kl in row.get("kl") or ()] for row in rows]
    if layers[0] and len({len(row) for row in layers}) == 1:
        lines = ax.plot(x, layers, color=_INDEXER, alpha=0.2, linewidth=0.9)
        lines[0].set_label("one layer")
    marker = "o" if len(x) == 1 else None
    mean = [row["kl_over_uniform"] for row in rows]
    ax.plot(x, mean, color=_INDEXER, linewidth=2.6, marker=marker, label="mean over layers")
    ax.axhline(1.0, color=_WINDOW, linewidth=1.5, linestyle="--", label="uniform prediction")
    if held_out:
        style: dict[str, Any] = dict(color=_ORACLE, marker="D", markersize=8, linestyle="none", clip_on=False)
        ax.plot([x[-1]], [held_out], label=f"held-out text, at the end: {held_out:.3f}", **style)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(FixedLocator([b * 10.0**e for e in range(-5, 3) for b in (1, 2, 5)]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel="optimizer step", ylabel="KL / uniform prediction's KL (log scale)")
    ax.set_title("How far the indexer is from the model's attention, in training")
    ax.legend(loc="best", fontsize=11)
    return figure


def _plot_mass(evaluation: Evaluation) -> Figure:
    masses = evaluation.mean.at_k
    columns = min(2, len(masses))
    figure = _figure(6 * columns + (3 if columns == 1 else 0), 3.9 * -(-len(masses) // columns) + 0.7)
    axes: list[Axes] = []
    for position, mass in enumerate(masses):
        ax = figure.add_subplot(-(-len(masses) // columns), columns, position + 1)
        axes.append(ax)
        _draw_mass(ax, evaluation.layers, mass)
    bottom = min(ax.get_ylim()[0] for ax in axes)
    for ax in axes:
        ax.set_ylim(max(0.0, 10 * (bottom // 10)), 101)
    handles, labels = axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=3)
    bold = FontProperties(weight="bold", size=14)
    legend.set_title("How much of the attention lies in k keys, layer by layer", bold)
    return figure


def _draw_mass(ax: Axes, layers: Sequence[LayerScore], mean: MassAtK) -> None:
    scores = [(score.layer or 0, at) for score in layers for at in score.at_k if at.k == mean.k]
    x = [layer for layer, _ in scores]
    labels = {"oracle": "oracle: the best k keys", "indexer": "indexer's top k", "window": "sink + window"}
    for (name, label), marker in zip(labels.items(), "so^", strict=True):
        y = [100 * getattr(at, name) for _, at in scores]
        ax.plot(x, y, color=_COLOURS[name], marker=marker, markersize=5, linewidth=2, label=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="layer", ylabel="attention mass (%)")
    ax.set_title(f"k = {mean.k}: indexer at {_percent(mean.indexer_over_oracle)} of the oracle", fontsize=12)


def _plot_rows(block: RowBlock) -> Figure:
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


def _plot_perplexity(evaluation: Evaluation) -> Figure:
    shown = evaluation.perplexities
    figure = _figure(9, 1.6 + 0.55 * len(shown))
    ax = figure.add_subplot()
    dense = shown[0].perplexity
    values = [p.perplexity for p in shown]
    names = [_NAMES[p.selection] + ("" if p.k is None else f", {p.k} keys") for p in shown]
    bars = ax.barh(names, values, color=[_COLOURS[p.selection] for p in shown], height=0.66)
    changes = ["" if p.k is None else f"  ({_change(p.perplexity, dense)})" for p in shown]
    labels = [f"{value:.2f}{change}" for value, change in zip(values, changes, strict=True)]
    ax.bar_label(bars, labels, padding=5)
    ax.axvline(dense, color=_DENSE, linewidth=1.2, linestyle="--")
    ax.set_xlim(0, 1.3 * max(values))
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.set(xlabel="perplexity on held-out text (lower is better)")
    ax.set_title("Perplexity when each query may attend only to the chosen keys")
    return figure
