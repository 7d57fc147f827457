"""Markdown, JSON and plots from what training and evaluation recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from flash_indexer.judge.metrics import VISIBLE_PER_K
from flash_indexer.judge.plots import NAMES, STYLE, plot_loss, plot_mass, plot_perplexity, plot_rows
from flash_indexer.judge.scores import Evaluation, MassAtK
from flash_indexer.judge.selections import SINK
from flash_indexer.judge.verdict import (
    BEGUN_KL_OVER_UNIFORM,
    GOOD_INDEXER_OVER_ORACLE,
    GOOD_KL_OVER_UNIFORM,
    UNLEARNT_KL_OVER_UNIFORM,
    arithmetic_name,
    change,
    headline,
    mass_notes,
    percent,
    queries_behind,
    ties_note,
    verdict,
    worst_ties,
)

LONGER_STEPS, LONGER_TOKENS, LONGER_KL_OVER_UNIFORM = 360, 2048, 0.055
"""The recorded run of docs/smollm2-135m/report.md: its steps, the tokens of each, the last one's KL over uniform."""
_OWN_LINES = frozenset({"command", "warnings", "ended_by"})
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
        run: settings to print, JSON-serialisable. "command" (a string) is printed as what reproduces the run,
            "warnings" (a list of strings) above the results; "ended_by": "time" makes the training part say that
            --minutes ended the run.

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
            "tied_rows": [{**asdict(ties), "share": ties.share} for ties in evaluation.mean.ties],
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
        f"{len(evaluation.layers)} layers{_arithmetic_words(evaluation)}.",
        "",
    ]
    lines += _section("Warnings", [f"- {_setting(warning)}" for warning in content["run"].get("warnings") or ()])
    lines += _section("Attention mass at k", _mass_lines(evaluation))
    lines += _section("Ties", _ties_lines(evaluation))
    lines += _section("Perplexity", _perplexity_lines(evaluation))
    lines += _section("What serving costs", _serving_lines(evaluation))
    lines += _section("Where it looks", _rows_lines(evaluation))
    lines += _section("Training", _training_lines(content["training"], content["plots"], content["run"]))
    lines += _section("Layers", _layer_lines(evaluation))
    lines += _section("Grades", _grade_lines())
    lines += _section("Run", _run_lines(content["run"]))
    return "\n".join(lines).rstrip() + "\n"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""] if lines else []


def _mass_lines(evaluation: Evaluation) -> list[str]:
    masses = evaluation.mean.at_k
    notes = [f"- {note}" for note in mass_notes(evaluation)]
    if not masses:
        return ["No query sees enough keys for any k (four times k at least): evaluate longer sequences.", "", *notes]
    rows = [[str(m.k), f"{m.min_visible:,}", queries_behind(evaluation, m.k), *_mass_cells(m)] for m in masses]
    return [
        "The part of a query's head-summed attention that lies in k keys: the indexer's choice, the best choice "
        f"(oracle), and the first {SINK} keys with the most recent k - {SINK}. Recall: the part of the oracle's "
        f"keys that the indexer chose. A query counts where it sees {VISIBLE_PER_K}k keys or more.",
        "",
        *_table(["k", "keys seen, at least", "measured on", *_MASS_HEAD], rows),
        "",
        *([*notes, ""] if notes else []),
        "![Attention mass at k, layer by layer](mass_at_k.png)",
    ]


def _ties_lines(evaluation: Evaluation) -> list[str]:
    worst = worst_ties(evaluation)
    if worst is None:
        return []
    tied = sum(ties.tied_rows for ties in evaluation.mean.ties)
    if not tied:
        ks = ", ".join(str(ties.k) for ties in evaluation.mean.ties)
        return [f"No query has equal index scores at rank k and k + 1 (k = {ks})."]
    rows = []
    for ties in evaluation.mean.ties:
        layers = [(at.share, score.layer) for score in evaluation.layers for at in score.ties if at.k == ties.k]
        share, layer = max(layers, key=lambda item: item[0])
        cells = [
            str(ties.k),
            f"{ties.queries:,}",
            f"{ties.tied_rows:,}",
            percent(ties.share),
            f"{percent(share)} ({layer})",
            "" if ties.taken_otherwise is None else f"{ties.taken_otherwise:,}",
        ]
        rows.append(cells)
    note = ties_note(evaluation)
    return [
        "Queries whose index scores at rank k and k + 1 are equal, so that a convention decides which key is selected; "
        "and how many of them torch.topk, given the same rows, takes other keys for.",
        "",
        *_table(
            [
                "rank k",
                "queries × layers that see more keys",
                "tied",
                "share",
                "largest share (layer)",
                "torch.topk takes others",
            ],
            rows,
        ),
        *(["", note] if note else []),
    ]


def _grade_lines() -> list[str]:
    rows = [
        [f"{UNLEARNT_KL_OVER_UNIFORM:g} or more", "next to nothing is learnt: untrained indexers begin at about 1"],
        [f"{BEGUN_KL_OVER_UNIFORM:g} or more", "begun: most of the uniform prediction's error is still there"],
        [f"above {GOOD_KL_OVER_UNIFORM:g}", "much is learnt, and there is more to learn"],
        [
            f"up to {GOOD_KL_OVER_UNIFORM:g}",
            f"good, if its keys hold {GOOD_INDEXER_OVER_ORACLE:.0%} of the attention that the best keys hold as well",
        ],
    ]
    return [
        "By KL over uniform, the part of the uniform prediction's KL that the indexer still has. Whatever it is, an "
        "indexer whose keys hold no more attention than sink + window, which need no training, has not learnt enough.",
        "",
        *_table(["KL / uniform", "grade"], rows),
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


def _arithmetic_words(evaluation: Evaluation) -> str:
    """Records of versions that could not tell the arithmetic lack it."""
    return f"; index scores in {arithmetic_name(evaluation.arithmetic)}" if evaluation.arithmetic else ""


def _serving_lines(evaluation: Evaluation) -> list[str]:
    """The served indexers beside the same ones in the model's arithmetic."""
    unserved = evaluation.unserved
    if unserved is None:
        return []
    served, before = arithmetic_name(evaluation.arithmetic), unserved.arithmetic
    lines = [
        f"Everything else in this report is of index scores in {served}, as servers form them; this table has the "
        f"same indexers on the same text in {before} beside them. Same keys: the part of the k keys that both select, "
        "over the queries that count at k.",
    ]
    masses = {mass.k: mass for mass in unserved.mean.at_k}
    rows = []
    for mass in evaluation.mean.at_k:
        shares = {at.layer: at.overlap for at in unserved.overlaps if at.k == mass.k}
        mean, (worst, layer) = shares.pop(None), min((share, layer) for layer, share in shares.items())
        rows.append(
            [
                str(mass.k),
                f"{100 * masses[mass.k].indexer:.3f}%",
                f"{100 * mass.indexer:.3f}%",
                f"{100 * (mass.indexer - masses[mass.k].indexer):+.3f} points",
                f"{100 * mean:.2f}%",
                f"{100 * worst:.2f}% ({layer})",
            ]
        )
    if rows:
        head = ["k", f"mass, {before}", f"mass, {served}", "change", "same keys", "fewest (layer)"]
        lines += ["", *_table(head, rows)]
    sparse = {p.k: p for p in evaluation.perplexities if p.selection == "indexer"}
    rows = [
        [str(p.k), f"{p.perplexity:.4f}", f"{sparse[p.k].perplexity:.4f}", change(sparse[p.k].perplexity, p.perplexity)]
        for p in unserved.perplexities
    ]
    if rows:
        lines += ["", *_table(["keys a query", f"perplexity, {before}", f"perplexity, {served}", "change"], rows)]
    return lines


def _rows_lines(evaluation: Evaluation) -> list[str]:
    block = evaluation.row_block
    return [
        f"Layer {block.layer} (the one of median KL over uniform): the last {len(block.teacher)} queries of a "
        f"document and the {block.num_keys:,} keys that they see.",
        "",
        "![Head-summed attention beside the indexer's prediction](attention_rows.png)",
    ]


def _training_lines(training: Mapping[str, Any] | None, plots: Sequence[str], run: Mapping[str, Any]) -> list[str]:
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
    lines = [text + "."]
    if run.get("ended_by") == "time":
        minutes = f" (--minutes {run['minutes']:g})" if "minutes" in run else ""
        lines += [
            "",
            f"The time budget{minutes} ended this run, not its learning: more steps bring KL over uniform further "
            f"down. The recorded run on SmolLM2-135M reached {LONGER_KL_OVER_UNIFORM} after {LONGER_STEPS} steps of "
            f"{LONGER_TOKENS:,} tokens. `flash-indexer warmup --resume --steps N`, with this run's --out, goes on to "
            "step N.",
        ]
    return [*lines, *(["", "![KL over uniform by step](loss.png)"] if "loss.png" in plots else [])]


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
    rows = [[name, _setting(value)] for name, value in run.items() if name not in _OWN_LINES]
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
