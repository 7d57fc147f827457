"""Attention by kernels: one pass over the keys, with or without values, with or without an indexer beside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import INDEX_WIDTHS, MLA_WIDTHS
from flash_indexer.ops import launch
from flash_indexer.ops.attention.layout import (
    LOG2E,
    TileSizes,
    index_width,
    padded,
    padded_width,
    row_tiles,
    tile_sizes,
)
from flash_indexer.ops.attention.plan import Tiles, attention_items, latent_items
from flash_indexer.ops.worklists import TILE

Index = tuple[Tensor, Tensor, Tensor]
"""index_q, index_k, index_weights."""


class Attention(NamedTuple):
    """Output [T, H, V], and the attention's logsumexp, float32 [T, H]."""

    out: Tensor
    lse: Tensor


class AttentionWithKL(NamedTuple):
    """Output [T, H, V], and float32 [T, H]: logsumexp of the attention and of the indexer, and KL."""

    out: Tensor
    lse: Tensor
    lse_index: Tensor
    kl: Tensor


class Statistics(NamedTuple):
    """float32 [T, H]: logsumexp of the attention and of the indexer, KL, and the attention's entropy."""

    lse: Tensor
    lse_index: Tensor
    kl: Tensor
    entropy: Tensor


def refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Which size the kernels don't take, what they take, and what to do; None: all."""
    H, D, V = q.shape[1], q.shape[2], v.shape[2]
    if MLA_WIDTHS[0] == D:
        if k.shape[1] != 1 or MLA_WIDTHS[1] != V or v.data_ptr() != k.data_ptr() or v.stride() != k.stride():
            return (
                "v must be k[..., :512], one key head, for q of width 576 (MLA's absorbed form) on CUDA, got "
                f"k {list(k.shape)} and v {list(v.shape)}; pass that slice of k itself"
            )
    else:
        for name, letter, width in (("q", "D", D), ("v", "V", V)):
            if not 1 <= width <= 256:
                return (
                    f"{name} must have {letter} of 1 to 256 on CUDA, or D=576 with V=512 (MLA's absorbed form), "
                    f"got {letter}={width}"
                )
    if not 1 <= H // k.shape[1] <= 128:
        return f"q must have 1 to 128 heads for each head of k on CUDA, got {H} for {k.shape[1]}"
    return None


def per_head_refusal(q: Tensor, k: Tensor, index_q: Tensor) -> str | None:
    """As `refusal`, for the gradient kernels of "per_head"."""
    D, E, heads = q.shape[2], index_q.shape[2], q.shape[1] // k.shape[1]
    if D > 256:
        return (
            f'q must have D of 1 to 256 for target="per_head" on CUDA, got D={D}; use the expanded form of MLA '
            "(keys per head, D=192)"
        )
    if E not in INDEX_WIDTHS:
        return (
            f"index_q must have E in {{32, 64, 128}} on CUDA, got E={E}; zero-pad index_q and index_k to the "
            "next of these (the products stay the same)"
        )
    if heads > 64 and (E == 128 or D > 192):
        return (
            'q must have at most 64 heads for each head of k for target="per_head" with E=128 or D > 192 on '
            f"CUDA, got {heads}"
        )
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    softmax_scale: float,
    tiles: TileSizes | None = None,
) -> Attention:
    """out[t,h] = sum_s exp(scale * q[t,h]·k[s,g(h)] - lse[t,h]) v[s,g(h)] and lse, over the visible keys."""
    if q.shape[2] == MLA_WIDTHS[0]:
        return _latent(q, k, v, key_start, key_end, softmax_scale)
    made = _launch(q, k, v, None, key_start, key_end, softmax_scale, tiles)
    return Attention(made.out, made.lse)


def attention_with_kl(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Index,
    key_start: Tensor,
    key_end: Tensor,
    softmax_scale: float,
    tiles: TileSizes | None = None,
) -> AttentionWithKL:
    """Attention, and KL[t,h] of softmax_s(w ReLU(index_q·index_k)) to it."""
    return _launch(q, k, v, index, key_start, key_end, softmax_scale, tiles)


def statistics(
    q: Tensor,
    k: Tensor,
    index: Index,
    key_start: Tensor,
    key_end: Tensor,
    softmax_scale: float,
    tiles: TileSizes | None = None,
) -> Statistics:
    """`attention_with_kl` without values: in place of the output the entropy -sum_s p log p of the attention p."""
    made = _launch(q, k, None, index, key_start, key_end, softmax_scale, tiles)
    return Statistics(made.lse, made.lse_index, made.kl, entropy=made.out)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    index: Index | None,
    key_start: Tensor,
    key_end: Tensor,
    softmax_scale: float,
    tiles: TileSizes | None,
) -> AttentionWithKL:
    """The kernel `attention`. Without values out is the entropy [T, H]; without an indexer lse_index and kl are lse."""
    (T, H, _), (S, G, _) = q.shape, k.shape
    width, heads = 0 if v is None else v.shape[2], H // G
    with torch.cuda.device(q.device):
        lse = torch.empty(T, H, device=q.device)
        if T == 0 or S == 0:
            out = torch.zeros_like(lse) if v is None else q.new_zeros(T, H, width)
            return AttentionWithKL(out, lse.fill_(-torch.inf), lse, torch.zeros_like(lse))
        q, k = (launch.aligned(padded(x)) for x in (q, k))
        v = k if v is None else launch.aligned(padded(v))  # without values: not read
        shape = dict(
            D=q.shape[2], V=padded_width(width), E=0 if index is None else index_width(index[0].shape[2], heads),
            HG=heads,
        )  # fmt: skip
        static, ctas = tile_sizes("attention", shape, q.device, tiles), launch.processors(q.device)
        items = attention_items(key_start, key_end, S, Tiles(G, TILE // heads, static["BN"], ctas))
        out = q.new_empty(T, H, shape["V"]) if width else torch.empty_like(lse)
        if index is None:  # not read
            index_q, index_k, weights, lse_index, kl = q, k.view(S, -1), lse, lse, lse
        else:
            (index_q, index_k), weights = (padded(x, shape["E"]) for x in index[:2]), index[2]
            lse_index, kl = torch.empty_like(lse), torch.empty_like(lse)
        count = items.numel() // 8
        launch.load("attention", **shape, **static)(
            row_tiles(q, heads, TILE), k.view(S, -1), v.view(S, -1), row_tiles(index_q, heads, TILE), index_k,
            weights.view(-1), key_start, key_end, items, row_tiles(out, heads, TILE) if width else out.view(-1),
            lse.view(-1), lse_index.view(-1), kl.view(-1), H, T, count, min(count, ctas), softmax_scale * LOG2E,
        )  # fmt: skip
    return AttentionWithKL(out if width in (0, out.shape[-1]) else out[..., :width].contiguous(), lse, lse_index, kl)


def _latent(q: Tensor, k: Tensor, v: Tensor, key_start: Tensor, key_end: Tensor, softmax_scale: float) -> Attention:
    """The kernel `attention_mla`: v is k[..., :512]."""
    (T, H, D), S = q.shape, k.shape[0]
    with torch.cuda.device(q.device):
        out, lse = q.new_zeros(T, H, v.shape[2]), torch.full((T, H), -torch.inf, device=q.device)
        if T and S:
            ctas = launch.processors(q.device)
            items = latent_items(key_start, key_end, S, H, ctas)
            count = items.numel() // 8
            launch.load("attention_mla")(
                launch.aligned(q).view(-1, D), launch.aligned(k).view(S, D), key_start, key_end, items,
                out.view(T * H, -1), lse.view(-1), H, count, min(count, ctas), softmax_scale * LOG2E,
            )  # fmt: skip
    return Attention(out, lse)
