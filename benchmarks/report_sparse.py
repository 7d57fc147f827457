"""Tables of docs/performance.md: the sparse stage's steps, what runs beside them, and the memory of a long layer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from report_records import Record, latest, marked, table

MLA = {
    "v32": "DeepSeek-V3.2: H=128, 576/512, the last 8,192 of 16,384 positions, random keys",
    "v32_causal": "the same, 8,192 of 8,192: 12.5% of the slots empty",
    "v32_clustered": "half of the keys recent, the rest in runs that neighbours share",
    "v32_128k": "the last 8,192 of 131,072 positions",
    "v32_64_heads": "H=64, the last 8,192 of 16,384",
}
GROUPED = {
    "gqa32": "H=32 G=8 D=128 I=16 E=64, 8,192 of 8,192, random keys",
    "gqa32_clustered": "the same, half of the keys recent, the rest in runs that neighbours share",
    "smollm2": "H=9 G=3 D=64 I=8 E=64, 8,192 of 8,192, random keys",
    "smollm2_clustered": "the same, clustered",
}
LATE = {
    "gqa32_late_16k": "H=32 G=8 D=128, 16,384 keys",
    "gqa32_late_128k": "the same, 131,072 keys",
    "mqa64_late_16k": "H=64 G=1 D=128, 16,384 keys",
    "mqa64_late_128k": "the same, 131,072 keys",
}
LONG, FIRST = "v32_layer_128k", "sparse_first_call"
DENSE = {"cudnn": "cuDNN, dense", "fa2": "FlashAttention-2, dense", "flex": "FlexAttention with the same bits"}
STEPS = {  # and the columns' names
    "select": "select", "forward": "forward", "backward": "backward", "any_order": "any order", "learn": "learn",
    "learn_any_order": "learn, any order", "layer": "layer", "layer_any_order": "layer, any order",
}  # fmt: skip
LIKE = {  # our step, and what of cuDNN's kernels for selected keys does the same
    "select": ("dsa_scores", "dsa_topk"), "any_order": ("dsa_backward", "dsa_target"),
    "learn": ("dsa_index_scores", "dsa_index_gradients"),
    "learn_any_order": ("dsa_index_scores", "dsa_index_gradients"),
}  # fmt: skip


def sparse(results: Path) -> list[str]:
    """The sparse stage's part of the page; nothing without records."""
    records = latest(results / "sparse.jsonl")
    steps = _recorded(STEPS, records)
    rows = [
        [marked(title, records[name], records), *(_time(records[name], step) for step in steps)]
        for name, title in (MLA | GROUPED).items()
        if name in records
    ]
    if not rows:
        return []
    return [
        "",
        "## The sparse stage",
        "",
        "K=2,048 keys a query (`flash-indexer bench --suite sparse`). *Select*: index scores of all visible keys and",
        "the exact top-k. *Backward*: gradients of q, k and v with the head-summed target, the same bits every time;",
        "*any order*: with `deterministic=False`. *Learn*: KL and the index tensors' gradients. *Layer*: all of it by",
        '`dsa_attention(kl="backward")`; of the smallest sizes that is the host\'s time, in which other work on the',
        "machine's processors shows, as in first calls. *torch*: at the commit of the record no kernel took it, and it",
        "was not timed.",
        "",
        *table(" | ".join(["size", *(STEPS[step] for step in steps)]), rows),
        *_beside_cudnn(records),
        *_beside_dense(records),
        *_beside_gathering(records),
        *_memory(records),
        *_first_call(records),
    ]


def _recorded(steps: Iterable[str], records: dict[str, Record]) -> list[str]:
    """Without `learn_any_order` where no record has it yet."""
    known = any("learn_any_order" in record for record in records.values())
    return [step for step in steps if known or step != "learn_any_order"]


def _beside_cudnn(records: dict[str, Record]) -> list[str]:
    rows, absent, steps = [], {}, _recorded(LIKE, records)
    together = tuple(step for step in steps if step != "learn" or "learn_any_order" not in steps)
    all_names = tuple(peer for step in together for peer in LIKE[step])
    for name, title in MLA.items():
        record = records.get(name, {})
        absent |= {peer: reason for peer, reason in record.get("notes", {}).items() if peer.startswith("dsa_")}
        if not any(peer in record for peer in all_names):
            continue
        each = [_over(record, (step,), LIKE[step]) for step in steps]
        rows.append([marked(title, record, records), *each, _over(record, together, all_names, apart=False)])
    if not rows:
        return []
    return [
        "",
        "Over the time of cuDNN's kernels for selected keys, in the same rounds: index scores and deterministic top-k;",
        "backward and target, both in any order; index scores and gradients at the selected keys, without the KL; and",
        "all of these, in any order where it was timed. Its forward over selected keys needs a later GPU.",
        "",
        *table(" | ".join(["size", *(STEPS[step] for step in steps), "together"]), rows),
        *([""] if absent else []),
        *(f"- `{peer}` was not timed: {reason}" for peer, reason in absent.items()),
    ]


def _over(record: Record, steps: tuple[str, ...], names: tuple[str, ...], *, apart: bool = True) -> str:
    """The ratio of our steps' time to theirs, and theirs, one by one or the sum; nothing where one is missing."""
    if not all(x in record for x in (*steps, *names)):
        return ""
    theirs = [record[peer]["p50"] for peer in names]
    ratio = sum(record[step]["p50"] for step in steps) / sum(theirs)
    return f"{ratio:.2f} x ({' + '.join(f'{ms:.2f}' for ms in (theirs if apart else [sum(theirs)]))} ms)"


def _beside_dense(records: dict[str, Record]) -> list[str]:
    lines = []
    for name, title in GROUPED.items():
        record = records.get(name, {"peers": []})
        names = {peer.removesuffix("_forward") for peer in record["peers"] if f"{peer[:-8]}_backward" in record}
        both = [(peer, sum(record[f"{peer}_{way}"]["p50"] for way in ("forward", "backward"))) for peer in names]
        text = ", ".join(f"{DENSE[peer]} {ms:.2f} ms" for peer, ms in sorted(both, key=lambda pair: pair[1]))
        if not text:
            continue
        if "backward" in record:
            alone, target = (record["forward"]["p50"] + record[way]["p50"] for way in ("backward_alone", "backward"))
            text += f"; ours {alone:.2f} ms, with the target {target:.2f} ms"
        lines.append(f"- {title}: {text}.")
    return ["", "Forward and backward, in the same rounds:", "", *lines] if lines else []


def _beside_gathering(records: dict[str, Record]) -> list[str]:
    rows = []
    for name, title in LATE.items():
        record = records.get(name, {})
        if "backward" in record and "torch_backward" in record:
            ours, torch = (
                record[f"{prefix}forward"]["p50"] + record[f"{prefix}backward"]["p50"] for prefix in ("", "torch_")
            )
            rows.append([title, f"{ours:.2f} ms", f"{torch:.2f} ms", f"{ours / torch:.2f} x"])
    if not rows:
        return []
    return [
        "",
        "The last 512 queries of a long sequence, forward and backward with the target: dense tiles with bits, which",
        "grow with the keys, beside the torch body, which gathers where the selected keys are few among many.",
        "",
        *table("heads and keys | tiles with bits | torch | ratio", rows),
    ]


def _memory(records: dict[str, Record]) -> list[str]:
    if LONG not in records:
        return []
    record = records[LONG]
    order = "the same bits every time" if record["deterministic"] else "with `deterministic=False`"
    return [
        "",
        f"One layer of DeepSeek-V3.2, {record['size']['tokens']:,} tokens, forward and backward, {order}: at most",
        f"{record['peak_bytes'] / 1e9:.1f} GB are allocated, {record['tensor_bytes'] / 1e9:.1f} GB of them the inputs. "
        f"{record['size']['queries']:,} queries at a time are absorbed,",
        f"and once more in the backward (`bench/sparse_memory.py`); it takes {record['seconds']:.1f} s.",
    ]


def _first_call(records: dict[str, Record]) -> list[str]:
    if FIRST not in records:
        return []
    calls = records[FIRST]["first_call"]
    times = ", ".join(f"{call['first_s']:.2f} s at the heads of `{name}`" for name, call in calls.items())
    return ["", f"The first call of a process that finds the kernels compiled, forward and backward: {times}."]


def _time(record: Record, step: str) -> str:
    return f"{record[step]['p50']:.2f} ms" if step in record else "torch"
