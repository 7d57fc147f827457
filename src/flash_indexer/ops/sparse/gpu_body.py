"""Attention over selected keys on the GPU, in gather form: one key head, MLA's absorbed widths.

Shape legend: T queries, S keys, K slots of a query, H heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import MAX_HEADS, MLA_WIDTHS
from flash_indexer.ops import launch

_LOG2E = 1.4426950408889634
_ROWS = 64  # heads of an item


class LatentGradients(NamedTuple):
    """dq: bfloat16 [T, H, 576]. dk: float32 [S, 576], the values' gradient in its first 512 columns. p_sum: float32
    [T, K], the sums of the attention's probabilities over heads, zero behind the last key.
    """

    dq: Tensor
    dk: Tensor
    p_sum: Tensor


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
    _check(q, k)
    (T, H, D), S = q.shape, k.shape[0]
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


def latent_gradients(
    q: Tensor,
    k: Tensor,
    indices: Tensor,
    count: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    *,
    softmax_scale: float,
) -> LatentGradients:
    """dq, dk and p_sum[t,s] = sum_h exp(scale * q[t,h]·k[s] - lse[t,h]) at the selected keys, from one pass.

    Additions to dk come in any order: its last bits differ from run to run. dq and p_sum are the same in every run.

    Args:
        q, k, indices, count, softmax_scale: as of `latent_attention`; a key outside 0 .. S - 1 gets no gradient.
        out, lse: its results. d_out: the gradient of out, bfloat16 [T, H, 512].

    Raises:
        ValueError: for other widths or numbers of heads.
    """
    _check(q, k)
    (T, H, D), S = q.shape, k.shape[0]
    with torch.cuda.device(q.device):
        dq, dk = torch.empty_like(q), torch.zeros(S, D, device=q.device)
        p_sum = torch.zeros(indices.shape, device=q.device)
        if not (S and indices.numel()):
            return LatentGradients(dq.zero_(), dk, p_sum)
        rows, d_out = T * H, launch.aligned(d_out).view(T * H, -1)
        delta = torch.empty(rows, device=q.device)
        launch.load("sparse_delta")(launch.aligned(out).view(rows, -1), d_out, delta)
        launch.load("sparse_gradients_mla")(
            launch.aligned(q).view(rows, D), launch.aligned(k), d_out, indices.contiguous().view(-1), count,
            lse.contiguous().view(-1), delta, dq.view(rows, D), dk.view(-1), p_sum.view(-1), T, H, S, indices.shape[1],
            min(T, launch.processors(q.device) // 2), softmax_scale,
        )  # fmt: skip
    return LatentGradients(dq, dk, p_sum)


def _check(q: Tensor, k: Tensor) -> None:
    width = MLA_WIDTHS[0]
    if q.shape[2] != width or k.shape[1] != width:
        raise ValueError(f"q, k: expected width {width}, got {q.shape[2]} and {k.shape[1]}; use the torch body")
    if not 1 <= q.shape[1] <= MAX_HEADS:
        raise ValueError(f"q: expected 1 to {MAX_HEADS} heads, got {q.shape[1]}; split the heads")
    if k.numel() >= 2**31:
        raise ValueError(f"k: expected fewer than {2**31 // width} keys, got {k.shape[0]}; split the keys")
