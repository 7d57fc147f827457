"""Tables of docs/performance.md: the attention alone, with the per-head KL, and over selected keys."""

from __future__ import annotations

from pathlib import Path

from report_records import latest, lines_of, table

ATTENTION = {
    "gqa32": "H=32 G=8 D=128, 8 documents of 4,096",
    "mqa64": "H=64 G=1 D=128, 16 documents of 2,048",
    "mla": "MLA 576/512, absorbed, H=128, 8,192 tokens",
}
SPARSE = {
    "v32": "DeepSeek-V3.2: H=128, 576/512, the last 8,192 of 16,384 positions, random keys",
    "v32_causal": "the same, 8,192 of 8,192: 12.5% of the slots empty",
    "v32_clustered": "half of the keys recent, the rest in runs that neighbours share",
    "v32_128k": "the last 8,192 of 131,072 positions",
    "v32_64_heads": "H=64, the last 8,192 of 16,384",
    "gqa32": "H=32 G=8 D=128 I=16 E=64, 8,192 of 8,192",
    "smollm2": "H=9 G=3 D=64 I=8 E=64, 8,192 of 8,192",
}
PEERS = {"cudnn": "cuDNN, dense", "fa2": "FlashAttention-2, dense", "flex": "FlexAttention with the same bits"}
SPARSE_STEPS = ("select", "forward", "backward", "any_order", "learn", "layer")


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


def sparse(results: Path) -> list[str]:
    """The table of the sparse stage's steps, and of dense attention beside those whose heads let it."""
    records = latest(results / "sparse.jsonl")
    rows, beside = [], []
    for name, title in SPARSE.items():
        if name in records:
            record = records[name]
            times = [f"{record[step]['p50']:.2f} ms" if step in record else "torch" for step in SPARSE_STEPS]
            rows.append([title, *times])
            names = {peer.removesuffix("_forward") for peer in record["peers"] if f"{peer[:-8]}_backward" in record}
            both = [(peer, sum(record[f"{peer}_{way}"]["p50"] for way in ("forward", "backward"))) for peer in names]
            text = ", ".join(f"{PEERS[peer]} {ms:.2f} ms" for peer, ms in sorted(both, key=lambda pair: pair[1]))
            beside += [f"{title}: forward and backward of {text}."] if text else []
    if not rows:
        return []
    return [
        "",
        "## The sparse stage",
        "",
        "K=2,048 keys a query (`flash-indexer bench --suite sparse`). *Select*: index scores of all visible keys and",
        "the exact top-k. *Backward*: gradients of q, k and v with the head-summed target, the same bits every time;",
        "*any order*: with `deterministic=False`. *Learn*: KL and the index tensors' gradients. *Layer*: all of it by",
        '`dsa_attention(kl="backward")`. *torch*: the step has no kernel at that size, and was not timed.',
        "",
        *table("size | select | forward | backward | any order | learn | layer", rows),
        *(["", "In the same rounds:", "", *(f"- {text}" for text in beside)] if beside else []),
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
