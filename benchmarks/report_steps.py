"""A table of docs/performance.md: a training step of the sparse stage beside the same model's dense one."""

from __future__ import annotations

from pathlib import Path

from report_records import Record, lines_of, table

MODELS = {
    "gqa": "Qwen3-8B's layer shapes, 4 layers",
    "mla": "DeepSeek-V3.2's attention, 1 layer",
}


def steps(results: Path) -> list[str]:
    """The last record of each model, length and order of sums; nothing without records."""
    found = {(x["model"], x["length"], x["deterministic"]): x for x in lines_of(results / "sparse_step.jsonl")}
    if not found:
        return []
    one = next(iter(found.values()))
    return [
        "",
        "A whole training step (`benchmarks/bench_sparse_step.py`): forward, backward and AdamW of all parameters in",
        f"bfloat16, one sequence, random weights, K={one['topk']:,} keys a query and the indexers' loss; medians of",
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
