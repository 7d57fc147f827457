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
from flash_indexer.ops.blockwise import cap_logits, compute_dtype

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
    q, v = capture.q, capture.v
    out = v.new_zeros(*q.shape[:2], v.shape[-1])
    for rows, keys, start, end in chunks(capture, workspace_bytes):
        if select == "window":
            selection = window_selection(start, end, k, sink)
        elif select == "oracle":
            selection = top_keys(chunk_teacher(capture, rows, keys, start, end), start, end, k)
        else:
            selection = top_keys(chunk_scores(capture, rows, keys, start, end), start, end, k)
        if capture.softcap is None:
            attended, lse = sparse_attention(
                q[rows], capture.k[keys], v[keys], selection,
                softmax_scale=capture.softmax_scale, workspace_bytes=workspace_bytes,
            )  # fmt: skip
        else:
            attended, lse = _capped_attention(capture, rows, keys, selection)
        out[rows], _ = with_sinks(attended, lse, capture.sinks)
    return out


def _capped_attention(capture: LayerCapture, rows: slice, keys: slice, selection: Selection) -> tuple[Tensor, Tensor]:
    """out [R, H, V] and lse [R, H] of logits with a softcap over the selected keys alone, head by head."""
    q, k, v = capture.q[rows], capture.k[keys], capture.v[keys]
    chosen = torch.zeros(q.shape[0], k.shape[0] + 1, dtype=torch.bool, device=q.device)
    chosen.scatter_(1, selection.indices.long() % (k.shape[0] + 1), True)  # -1 is the column that is cut off
    outs, lses = [], []
    for h in range(q.shape[1]):
        g = h * k.shape[1] // q.shape[1]
        logits = cap_logits(
            q[:, h].to(compute_dtype(q)) @ k[:, g].to(compute_dtype(q)).T * capture.softmax_scale, capture.softcap
        )
        logits = logits.masked_fill(~chosen[:, :-1], -torch.inf)
        lses.append(logits.logsumexp(-1))
        p = (logits - lses[-1][:, None]).exp().nan_to_num(0.0)
        outs.append((p @ v[:, g].to(p.dtype)).to(v.dtype))
    return torch.stack(outs, 1), torch.stack(lses, 1)


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
