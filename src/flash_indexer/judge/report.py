"""Markdown, JSON and plots from what training and evaluation recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from flash_indexer.judge.plots import NAMES, STYLE, change, percent, plot_loss, plot_mass, plot_perplexity, plot_rows
from flash_indexer.judge.scores import Evaluation, LayerScore, MassAtK
from flash_indexer.judge.selections import SINK

HEADLINE_K = 128
GOOD_KL_OVER_UNIFORM = 0.12
GOOD_INDEXER_OVER_ORACLE = 0.95
_MASS_HEAD = ("indexer", "oracle", "sink + window", "indexer / oracle", "recall")


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
    with rc_context(STYLE):
        if any(row.get("kl_over_uniform") for row in steps):
            plots["loss.png"] = plot_loss(steps, evaluation.mean.kl_over_uniform)
        if evaluation.mean.at_k:
            plots["mass_at_k.png"] = plot_mass(evaluation)
        plots["attention_rows.png"] = plot_rows(evaluation.row_block)
        plots["perplexity.png"] = plot_perplexity(evaluation)
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
            f"Its top {mass.k} keys hold {percent(mass.indexer)} of the attention, which is "
            f"{percent(mass.indexer_over_oracle)} of what the best {mass.k} keys hold "
            f"(sink + window: {percent(mass.window_over_oracle)}), "
            f"over queries that see at least {mass.min_visible:,} keys."
        )
    sparse = {p.selection: p for p in evaluation.perplexities if p.k == _headline_sparse_k(evaluation)}
    if "indexer" in sparse:
        dense = evaluation.perplexities[0].perplexity
        whose = {"indexer": "the indexer's", "oracle": "the oracle's", "window": "sink + window"}
        values = {name: sparse[name].perplexity for name in whose}
        changes = ", ".join(f"{values[n]:.2f} ({change(values[n], dense)}) with {whose[n]}" for n in whose)
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
    return [percent(x) for x in shown]


def _perplexity_lines(evaluation: Evaluation) -> list[str]:
    dense = evaluation.perplexities[0].perplexity
    rows = [
        [
            NAMES[p.selection],
            "all" if p.k is None else str(p.k),
            f"{p.perplexity:.3f}",
            "" if p.k is None else change(p.perplexity, dense),
            percent(p.sparse_fraction),
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


def _json(value: Any, depth: int) -> str:
    """JSON with one entry a line down to `depth`, and compact below: the row block has thousands of numbers."""
    if depth and isinstance(value, dict) and value:
        entries = [f"{json.dumps(name)}: {_json(x, depth - 1)}" for name, x in value.items()]
        return "{\n" + ",\n".join(entries) + "\n}"
    if depth and isinstance(value, list) and value:
        return "[\n" + ",\n".join(_json(x, depth - 1) for x in value) + "\n]"
    return json.dumps(value, allow_nan=False)
