"""What `fp8_check` measured, for people: a table, a plot, and JSON beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.table import Table

from flash_indexer.judge.fp8_check import LARGEST_ERROR, LayerFP8, SelectionAtK
from flash_indexer.judge.plots import STYLE
from flash_indexer.judge.verdict import HEADLINE_K

JSON_FILE, PLOT_FILE = "fp8.json", "fp8.png"
_COLOURS = {
    "index": "#0072B2", "index_unrotated": "#D55E00", "teacher": "#009E73", "teacher_unrotated": "#E69F00",
    "teacher_model_lse": "#CC79A7", "both": "#222222",
}  # fmt: skip
_GREY = "#8C8C8C"
_MARKERS = dict(zip(_COLOURS, "o^sDvo", strict=True))
_NAMES = {
    "index": "index, rotated",
    "index_unrotated": "index, not rotated",
    "teacher": "teacher, rotated",
    "teacher_unrotated": "teacher, not rotated",
    "teacher_model_lse": "teacher, rotated; the model's own logsumexp",
    "both": "index and teacher, rotated",
}


def write_fp8_report(folder: str | Path, layers: Sequence[LayerFP8], *, run: Mapping[str, Any]) -> Path:
    """Writes fp8.json and fp8.png into `folder`, which is created where missing; returns the plot's path.

    Args:
        layers: what `fp8_check` gave.
        run: settings and the text's sizes, JSON-serialisable, written beside the measurements.

    Raises:
        ValueError: for no layer.
    """
    if not layers:
        raise ValueError("write_fp8_report: layers must hold a layer at least, got none")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"run": dict(run), "largest_row_error": LARGEST_ERROR, "layers": [layer.to_dict() for layer in layers]}
    text = json.dumps(_finite(content), indent=1, allow_nan=False)
    (folder / JSON_FILE).write_text(text + "\n", encoding="utf-8")
    with rc_context(STYLE):
        plot_fp8(layers).savefig(folder / PLOT_FILE)
    return folder / PLOT_FILE


def _finite(plain: Any) -> Any:
    """The same with null for NaN and infinity, which JSON has no words for."""
    if isinstance(plain, Mapping):
        return {name: _finite(value) for name, value in plain.items()}
    if isinstance(plain, list):
        return [_finite(value) for value in plain]
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def headline_k(layers: Sequence[LayerFP8]) -> int | None:
    """The measured k nearest to 128; None where no query sees enough keys for any."""
    return min((at.k for at in layers[0].selections), key=lambda k: abs(k - HEADLINE_K), default=None)


def fp8_table(layers: Sequence[LayerFP8]) -> Table:
    """One row a layer, 80 columns wide: changes of KL, the worst gradient, the selection, the teacher's row sums."""
    k = headline_k(layers)
    table = Table(title="What FP8 changes", title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    heads = ["layer", "KL\n(nats)", "KL:\nindex", "\nteacher", "\nboth", "cosine:\nindex", "\nboth", "length:\nboth"]
    heads += [] if k is None else [f"top {k}:\nsame", "\nties"]
    for head in [*heads, "max\n|Σa - 1|"]:
        table.add_column(head, justify="right", no_wrap=True)
    for layer in layers:
        at = _at(layer, k)
        sums = f"{layer.row_error:.2g}"
        cells = [
            str(layer.layer),
            f"{layer.kl:.3f}",
            *(f"{100 * layer.change(name):+.2f}%" for name in ("index", "teacher", "both")),
            *(f"{layer.variants[name].least_cosine:.4f}" for name in ("index", "both")),
            f"{layer.variants['both'].worst_length:.3f}",
            *([] if at is None else [f"{100 * at.overlap:.2f}%", f"{100 * at.tied_rows / at.tie_queries:.1f}%"]),
            sums if layer.row_error <= LARGEST_ERROR else f"[red]{sums}[/red]",
        ]
        table.add_row(*cells)
    return table


def fp8_summary(layers: Sequence[LayerFP8]) -> str:
    """What the layers have in common, in three sentences: KL, gradients, selected keys."""
    kl = sum(layer.kl for layer in layers)
    names = {"index": "the index", "teacher": "the teacher", "both": "both"}
    changes = {n: sum(layer.variants[n].kl for layer in layers) / kl - 1 if kl else 0.0 for n in names}
    said = ", ".join(f"{100 * changes[name]:+.2f}% with {what} in FP8" for name, what in names.items())
    parts = [f"KL, summed over layers, changes by {said}."]
    names |= {"teacher_unrotated": "the teacher not rotated"}
    worst = {name: min(layers, key=lambda layer: layer.variants[name].least_cosine) for name in names}
    said = ", ".join(
        f"{layer.variants[name].least_cosine:.4f} with {names[name]} (layer {layer.layer})"
        for name, layer in worst.items()
    )
    parts.append(f"The least cosine of a gradient to that without FP8 is {said}.")
    if (k := headline_k(layers)) is not None:
        found = [(at, layer.layer) for layer in layers if (at := _at(layer, k)) is not None]
        least, layer = min((at.overlap, layer) for at, layer in found)
        mean, unrotated = (
            sum(getattr(at, name) for at, _ in found) / len(found) for name in ("overlap", "overlap_unrotated")
        )
        parts.append(
            f"Of the top {k} keys, {100 * mean:.2f}% are the same in FP8 (the fewest in layer {layer}: "
            f"{100 * least:.2f}%), without the rotation {100 * unrotated:.2f}%."
        )
    return " ".join(parts)


def plot_fp8(layers: Sequence[LayerFP8]) -> Figure:
    """Six panels over the layers: KL, the gradients' direction and length, selection, ties, the teacher's row sums."""
    figure = Figure(figsize=(18, 9), layout="constrained")
    kl, gradients, lengths, selection, ties, sums = figure.subplots(2, 3).flat
    x = [layer.layer for layer in layers]
    for name, colour in _COLOURS.items():
        style: dict[str, Any] = dict(color=colour, marker=_MARKERS[name], markersize=4.5, linewidth=1.8)
        style["linestyle"] = "--" if name == "both" else "-"
        label = _NAMES[name]
        kl.plot(x, [100 * layer.change(name) for layer in layers], label=label, **style)
        gradients.plot(x, [1 - layer.variants[name].least_cosine for layer in layers], label=label, **style)
        lengths.plot(x, [layer.variants[name].worst_length for layer in layers], label=label, **style)
    kl.axhline(0, color=_GREY, linewidth=1)
    lengths.axhline(1, color=_GREY, linewidth=1)
    lengths.set(title="Gradients: the length farthest from 1", ylabel="length beside that without FP8")
    kl.set(title="KL beside that without FP8", ylabel="change (%)")
    _logarithmic(gradients)
    gradients.set(title="Gradients: the least cosine of the three", ylabel="1 - cosine (log scale)")
    _draw_selection(selection, ties, layers)
    sums.plot(x, [layer.row_error for layer in layers], color=_COLOURS["teacher_model_lse"], marker="v", markersize=4.5)
    sums.axhline(
        LARGEST_ERROR, color=_COLOURS["index_unrotated"], linestyle="--", label="above this line: use lse=None"
    )
    _logarithmic(sums)
    sums.set(title="Teacher in FP8 with the model's own logsumexp", ylabel="max |Σ a - 1| of a head (log scale)")
    sums.legend(fontsize=11)
    for ax in figure.axes:
        ax.set_xlabel("layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = kl.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, title="what is in FP8 (e4m3)")
    return figure


def _logarithmic(ax: Axes) -> None:
    """Zero and less, where nothing changes, have no place on the axis: they are left out."""
    ax.set_yscale("log", nonpositive="mask")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_selection(selection: Axes, ties: Axes, layers: Sequence[LayerFP8]) -> None:
    k = headline_k(layers)
    selection.set(ylabel="keys that both select (%)")
    ties.set(ylabel="queries with equal scores there (%)")
    if k is None:
        for ax, what in ((selection, "Selected keys"), (ties, "Ties")):
            ax.set_title(f"{what}: no query sees enough")
        return
    found = [(layer.layer, at) for layer in layers if (at := _at(layer, k)) is not None]
    x = [layer for layer, _ in found]
    for name, share in (("index", "overlap"), ("index_unrotated", "overlap_unrotated")):
        y = [100 * getattr(at, share) for _, at in found]
        selection.plot(x, y, color=_COLOURS[name], marker=_MARKERS[name], markersize=4.5, linewidth=1.8)
    selection.set_title(f"Top {k} keys of FP8 scores that are the same without")
    colours = {"without FP8": _GREY, "FP8, rotated": _COLOURS["index"]}
    for label, rows in (("without FP8", "tied_rows_before"), ("FP8, rotated", "tied_rows")):
        y = [100 * getattr(at, rows) / at.tie_queries for _, at in found]
        ties.plot(x, y, color=colours[label], marker="o", markersize=4.5, linewidth=1.8, label=label)
    ties.set_ylim(bottom=0)
    ties.set_title(f"Ties at rank {k} and {k + 1}")
    ties.legend(fontsize=11)


def _at(layer: LayerFP8, k: int | None) -> SelectionAtK | None:
    return next((at for at in layer.selections if at.k == k), None)
