"""Attention over selected keys on the GPU, in gather form: one key head, MLA's absorbed widths.

Shape legend: T queries, S keys, K slots of a query, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import MAX_HEADS, MLA_WIDTHS
from flash_indexer.ops import launch

_LOG2E = 1.4426950408889634
_ROWS = 64  # heads of an item


def latent_attention(
    q: Tensor, k: Tensor, indices: Tensor, count: Tensor, *, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """out[t,h] = sum_{s in S_t} softmax over S_t (scale * q[t,h]·k[s]) k[s, :512], and its logsumexp.

    Args:
        q: bfloat16 [T, H, 576], 1 to 128 heads. k: bfloat16 [S, 576].
        indices: int32 [T, K], distinct keys in the first `count` slots. One outside 0 .. S - 1 is not read, and counts
            as a key of zeros; slots behind `count` are not looked at.
        count: int32 [T], 0 to K.
        softmax_scale: the model's own softmax scale.

    Returns:
        out [T, H, 512] in bfloat16 and lse [T, H] in float32, natural logarithm: zeros and -inf without keys.

    Raises:
        ValueError: for other widths or numbers of heads.
    """
    (T, H, D), S = q.shape, k.shape[0]
    if D != MLA_WIDTHS[0] or k.shape[1] != D:
        raise ValueError(f"q, k: expected width {MLA_WIDTHS[0]}, got {D} and {k.shape[1]}; use the torch body")
    if not 1 <= H <= MAX_HEADS:
        raise ValueError(f"q: expected 1 to {MAX_HEADS} heads, got {H}; split the heads")
    with torch.cuda.device(q.device):
        out = q.new_empty(T, H, MLA_WIDTHS[1])
        lse = torch.empty(T, H, device=q.device)
        if not (S and indices.numel()):
            return out.zero_(), lse.fill_(-torch.inf)
        halves = -(-H // _ROWS)
        items = T * halves
        launch.load("sparse_attention_mla")(
            launch.aligned(q).view(T * H, D), launch.aligned(k), indices.contiguous().view(-1), count,
            out.view(T * H, -1), lse.view(-1), H, halves, items, min(items, launch.processors(q.device)),
            indices.shape[1], S, softmax_scale * _LOG2E,
        )  # fmt: skip
    return out, lse
