"""Tables of docs/performance.md: steps of the warm-up and of the sparse stage beside what a user would run without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from report_records import Record, lines_of, table

MODELS = {
    "gqa": "Qwen3-8B's layer shapes, 4 layers",
    "mla": "DeepSeek-V3.2's attention, 1 layer",
}
TENTH = 0.1


def warmup_answers(results: Path) -> list[list[str]]:
    """A row of README's table: the longest sequences."""
    found = _warmup_steps(results)
    longest = {queries: record for (_, queries), record in sorted(found.items())}
    if 1.0 not in longest:
        return []
    part = f"; {longest[0.25]['over_plain']:.2f} x with `--queries 0.25`" if 0.25 in longest else ""
    return [["What does a step of the warm-up cost, beside the model's own forward?",
             f"{longest[1.0]['over_plain']:.2f} x its time{part}",
             f"Qwen3-8B's layer shapes, 4 layers, {longest[1.0]['length'] // 1024}K tokens"]]  # fmt: skip


def _warmup_steps(results: Path) -> dict[tuple[int, float], Record]:
    """The last record of each length and part of the queries, one document a sequence, by the command."""
    records = lines_of(results / "warmup_step.jsonl")
    return {(x["length"], x["queries"]): x for x in records if x.get("overhead") and not x["documents"]}


def warmup_steps(results: Path) -> list[str]:
    """The table of `bench_step.py`; nothing without records."""
    found = _warmup_steps(results)
    if not found:
        return []
    rows = [
        [
            f"{length:,} tokens, --queries {queries:g}",
            f"{record['plain']['p50']:,.0f} ms",
            f"{record['step']['p50']:,.0f} ms",
            f"{record['over_plain']:.2f} x",
            f"{record['overhead']['ours']:,.0f} ms",
            f"{record['overhead']['model']:,.0f} ms",
            f"{record['overhead']['of_step']:.1%}",
            f"{_waiting(record):,.0f} of {record['overhead']['ms']:,.0f} ms",
        ]
        for (length, queries), record in sorted(found.items(), key=lambda item: (item[0][0], -item[0][1]))
    ]
    return [
        "",
        "Steps of the command beside the plain forward (`benchmarks/bench_step.py`): Qwen3-8B's layer shapes, 4 layers",
        "of random weights, 16 index heads of 128, one document a sequence; medians of the host's time. *Ours*: time",
        "in which a kernel of ours runs, the model's attention included. *Rest of the forward*: the plain one's device",
        "time without its attention. *Neither*: what is left of the step, copies, casts, the indexers' projections and",
        "optimizer, the log, waiting; the plain forward waits, too.",
        "",
        *table(
            "one sequence a step | plain forward | step | ratio | ours | rest of the forward | neither | "
            "of it the plain forward's own",
            rows,
        ),
        *_more_than_a_tenth(found),
    ]


def _more_than_a_tenth(found: Mapping[tuple[int, float], Record]) -> list[str]:
    """Which steps are to more than a tenth neither the model's nor ours, and why."""
    named = [
        f"--queries {queries:g} at {length:,} tokens"
        for (length, queries), record in sorted(found.items(), key=lambda item: (item[0][0], -item[0][1]))
        if record["overhead"]["of_step"] > TENTH
    ]
    if not named:
        return []
    return [
        "",
        f"More than a tenth is neither with {', '.join(named)}: as many launches",
        "as with all queries, for less work, so that the device waits for the host.",
    ]


def _waiting(record: Record) -> float:
    """Milliseconds of the plain forward in which the device has no work."""
    found = record["overhead"]
    waiting: float = record["plain"]["p50"] - found["model"] - found["plain_attention"]
    return waiting


def answers(results: Path) -> list[list[str]]:
    """Rows of README's table: of each model the longest step that has a dense one beside it."""
    longest = {model: record for (model, _, one_order), record in sorted(_latest(results).items())
               if one_order and record.get("fastest")}  # fmt: skip
    return [
        [
            f"What does a training step of the sparse stage cost, beside the dense one ({record['fastest']})?",
            f"{record['over_dense']:.2f} x its time",
            f"{MODELS[model]}, {record['length'] // 1024}K tokens, K={record['topk']:,}",
        ]
        for model, record in longest.items()
    ]


def _latest(results: Path) -> dict[tuple[str, int, bool], Record]:
    return {(x["model"], x["length"], x["deterministic"]): x for x in lines_of(results / "sparse_step.jsonl")}


def steps(results: Path) -> list[str]:
    """The last record of each model, length and order of sums; nothing without records."""
    found = _latest(results)
    if not found:
        return []
    one = next(iter(found.values()))
    return [
        "",
        "A whole training step (`benchmarks/bench_sparse_step.py`): forward, backward and AdamW of all parameters in",
        "bfloat16, one sequence, random weights, no output layer and no loss behind it,",
        f"K={one['topk']:,} keys a query and the indexers' loss; medians of",
        "the host's time. Beside it the same model's dense step, with the fastest of torch's attentions that were",
        "timed. *Attention*: its part of the device's time, selection and the indexers' loss and gradients included.",
        "",
        *table("step | dense | sparse | ratio | attention, dense | attention, sparse | memory, dense | memory, sparse",
               [_row(found[key]) for key in sorted(found, key=lambda key: (*key[:2], not key[2]))]),
        *_tokens(list(found.values())),
    ]  # fmt: skip


def _row(record: Record) -> list[str]:
    order = "" if record["deterministic"] else ", sums in any order"
    dense, sparse = record["dense"].get(record.get("fastest")), record["sparse"]
    return [
        f"{MODELS[record['model']]}, {record['length']:,} tokens{order}",
        "" if dense is None else f"{dense['ms']['p50']:,.0f} ms, {record['fastest']}",
        f"{sparse['ms']['p50']:,.0f} ms",
        "" if dense is None else f"{record['over_dense']:.2f} x",
        "" if dense is None else _attention(dense),
        _attention(sparse),
        "" if dense is None else f"{dense['peak_gb']:.1f} GB",
        f"{sparse['peak_gb']:.1f} GB",
    ]


def _attention(step: Record) -> str:
    ms = step["kernels"].get("attention")
    return "" if ms is None else f"{ms:,.0f} ms"


def _tokens(records: list[Record]) -> list[str]:
    lines = [
        f"A token of generation behind {x['length']:,} in the cache, {MODELS[x['model']]}: dense "
        f"{x['dense_token']['p50']:.1f} ms, sparse {x['sparse_token']['p50']:.1f} ms."
        for x in records
        if "dense_token" in x and "sparse_token" in x
    ]
    return ["", *lines] if lines else []
