"""Attention when each query may attend to k keys only: the indexer's, the best, or a sink and a window.

    indexer   the k keys of largest index score
    oracle    the k keys of largest head-summed attention
    window    the first `sink` visible keys and the k - sink most recent ones

Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1; sink and window: StreamingLLM (2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_indexer.judge.capture import WORKSPACE, chunk_scores, chunk_teacher, chunks
from flash_indexer.models.capture import LayerCapture
from flash_indexer.models.packing import with_sinks
from flash_indexer.ops import Selection, sparse_attention, top_keys

SELECTIONS = ("indexer", "oracle", "window")
SINK = 4


@torch.no_grad()
def selected_attention(
    capture: LayerCapture,
    *,
    select: str,
    k: int,
    sink: int = SINK,
    workspace_bytes: int = WORKSPACE,
) -> Tensor:
    """out[t,h] = sum over t's selected keys s of softmax_s(scale * q[t,h]·k[s,g(h)]) v[s,g(h)].

    Args:
        capture: one layer's tensors.
        select: "indexer", "oracle" or "window": whose k keys; one choice for all heads.
        k: keys a query; a query that sees at most k attends to all of them, one that sees none gives zeros.
        sink: first keys of the document that sink + window keeps.
        workspace_bytes: bound on the memory for [R, C] tiles; query rows are processed in chunks that fit.

    Returns:
        [T, H, V], v's dtype.

    Raises:
        ValueError: for another `select`, or a k below `sink` (or 1).
    """
    if select not in SELECTIONS:
        raise ValueError(f"selected_attention: select must be one of {', '.join(SELECTIONS)}, got {select!r}")
    check_ks("selected_attention", [k], sink)
    if capture.softcap is not None:
        raise ValueError(
            f"selected_attention: attention must have no softcap, got {capture.softcap} in layer {capture.layer}; "
            "measure no perplexity of this model: perplexity_ks=()"
        )
    q, v = capture.q, capture.v
    out = v.new_zeros(*q.shape[:2], v.shape[-1])
    for rows, keys, start, end in chunks(capture, workspace_bytes):
        if select == "window":
            selection = window_selection(start, end, k, sink)
        elif select == "oracle":
            selection = top_keys(chunk_teacher(capture, rows, keys, start, end), start, end, k)
        else:
            selection = top_keys(chunk_scores(capture, rows, keys, start, end), start, end, k)
        attended, lse = sparse_attention(
            q[rows], capture.k[keys], v[keys], selection,
            softmax_scale=capture.softmax_scale, workspace_bytes=workspace_bytes,
        )  # fmt: skip
        out[rows], _ = with_sinks(attended, lse, capture.sinks)
    return out


def window_selection(key_start: Tensor, key_end: Tensor, k: int, sink: int) -> Selection:
    """The first `sink` visible keys and the k - sink most recent; all of at most k that are visible. Scores are 0."""
    steps = torch.arange(k, device=key_start.device)
    first, count = key_start[:, None], (key_end - key_start).clamp(0, k)
    keys = torch.where(steps < sink, first + steps, torch.maximum(key_end[:, None] - k, first) + steps)
    absent = steps >= count[:, None]
    scores = torch.zeros(keys.shape, device=keys.device).masked_fill_(absent, -torch.inf)
    return Selection(keys.masked_fill_(absent, -1).int(), count.int(), scores)


def check_ks(op: str, ks: Sequence[int], sink: int) -> None:
    """Raises ValueError for a k below max(1, sink), naming the function `op`."""
    for k in ks:
        if k < max(1, sink):
            least = max(1, sink)
            raise ValueError(f"{op}: k must be at least max(1, sink) = {least}, got {k}; choose a larger k")
