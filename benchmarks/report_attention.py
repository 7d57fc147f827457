"""Tables of docs/performance.md: the attention alone, and with the per-head KL."""

from __future__ import annotations

from pathlib import Path

from report_records import latest, lines_of, table

ATTENTION = {
    "gqa32": "H=32 G=8 D=128, 8 documents of 4,096",
    "mqa64": "H=64 G=1 D=128, 16 documents of 2,048",
    "mla": "MLA 576/512, absorbed, H=128, 8,192 tokens",
}


def per_head(results: Path) -> list[str]:
    """The table of `warmup_attention`, the last record of each number of tokens."""
    records = {record["tokens"]: record for record in lines_of(results / "warmup_attention.jsonl")}
    if not records:
        return []
    rows = []
    for tokens, record in sorted(records.items()):
        ratio = {name: f", {value:.2f} x" for name, value in record["ratios"].items()}
        once = f"{record['ours_once']['p50']:.2f} ms" if "ours_once" in record else "not measured"
        rows.append(
            [
                f"{tokens:,}",
                f"{record['ours_forward']['p50']:.2f} ms{ratio.get('forward', '')}",
                f"{record['ours_backward']['p50']:.2f} ms{ratio.get('backward', '')}",
                f"{record['both']:.2f} ms",
                f"{once}{ratio.get('once', '')}",
                f"{record['ours_attention']['p50']:.2f} ms{ratio.get('attention', '')}",
            ]
        )
    return [
        "",
        "## Attention and the per-head KL in one pass",
        "",
        '`warmup_attention(target="per_head")`: 64 query heads on one key head, D=V=128, E=64, documents of 2,028 to',
        "2,048 tokens. Each time stands beside its ratio to that of FlashAttention-2 in the same rounds, whose forward",
        "computes no KL and whose backward gives the gradients of q, k and v (attention alone: to cuDNN's forward).",
        "*Backward, atomic* is `deterministic=False`. `flash-indexer bench --suite mqa64` prints the same table.",
        "",
        *table("tokens | output + KL | backward | both | backward, atomic | attention alone", rows),
    ]


def attention(results: Path) -> list[str]:
    """A table of the attention forward alone."""
    records = latest(results / "attention.jsonl")
    rows = []
    for name, title in ATTENTION.items():
        if name in records:
            record = records[name]
            ratio = f"{record['over_cudnn']:.2f} x" if record["over_cudnn"] else "takes no such width"
            rows.append([title, f"{record['ours']['p50']:.2f} ms", f"{record['tflops']:.0f} TFLOP/s", ratio])
    if not rows:
        return []
    return [
        "",
        "## The attention forward alone",
        "",
        "With its logsumexp, causal (`flash-indexer bench --suite attention`).",
        "",
        *table("size | time | rate | over cuDNN's time", rows),
    ]
