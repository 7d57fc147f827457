"""The kernels of the bit form in torch, as their docstrings say: `ops.sparse.gpu_bits` then runs without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TILE = 128


def load(name: str, **static: int) -> Callable[..., None]:
    """In the place of `ops.launch.load`."""
    kernels: dict[str, Callable[..., None]] = {
        "bits": bits, "bits_keys": keys, "bits_lists": lists, "bits_numbers": numbers, "bits_slots": slots,
        "bits_attention": attention, "bits_gradients_query": query, "bits_gradients_key": key, "score": score,
    }  # fmt: skip
    return lambda *arguments: kernels[name](static, *arguments)


def words_of(mask: Tensor) -> Tensor:
    """Bits along the last dimension as int32."""
    return (mask.unflatten(-1, (-1, 32)).long() << torch.arange(32)).sum(-1).to(torch.int32)


def bits_of(words: Tensor) -> Tensor:
    return ((words.long()[..., None] >> torch.arange(32)) & 1).bool().flatten(-2)


def bits(_: Any, idx: Tensor, count: Tensor, scores: Tensor, odd: Tensor, *rest: Any) -> None:
    words_out, turned, flags, bad, T, K, S, rows, words = rest
    mask = torch.zeros(rows, words * 32, dtype=torch.bool)
    for t in range(T):
        chosen = idx.view(T, K)[t, : int(count[t])].long()
        mask[t, chosen[(chosen >= 0) & (chosen < S)]] = True
    words_out.copy_(words_of(mask).T.reshape(-1))
    turned.copy_(words_of(mask.T).T.reshape(-1))
    flags.copy_(mask.view(rows // 32, 32, -1, 64).any(3).any(1).int().reshape(-1))
    is_bad = scores.view(T, K)[:, 0].isnan() | (mask[:T] & bits_of(odd)).any(1)
    bad.copy_(torch.where(is_bad, torch.nan, 0.0))


def keys(static: dict[str, int], k: Tensor, v: Tensor, *rest: Any) -> None:
    k_to, v_to, odd, S, G, k_stride, k_columns, v_stride, v_columns = rest
    is_odd = torch.zeros(odd.numel() * 32, dtype=torch.bool)
    for x, stride, columns in ((k, k_stride, k_columns), (v, v_stride, v_columns)):
        is_odd[:S] |= ~x.view(S, G, stride)[..., :columns].isfinite().flatten(1).all(1)
    for x, to, stride, columns in ((k, k_to, k_stride, k_columns), (v, v_to, v_stride, v_columns)):
        wide = torch.zeros(S, G, static["W"], dtype=x.dtype)
        wide[..., :columns] = x.view(S, G, stride)[..., :columns]
        wide[is_odd[:S]] = 0
        to.copy_(wide.view(to.shape))
    odd.copy_(words_of(is_odd))


def lists(_: Any, flags: Tensor, found: Tensor, count: int, tiles: int, *axes: int) -> None:
    na, step_a, end_a, nb, step_b, end_b = axes
    out = found.view(count, tiles + 1)
    for a in range(count):
        some = [
            b
            for b in range(tiles)
            if any(
                flags[i * step_a + j * step_b]
                for i in range(a * na, min(a * na + na, end_a))
                for j in range(b * nb, min(b * nb + nb, end_b))
            )
        ]
        out[a, 0] = len(some)
        out[a, 1 : 1 + len(some)] = torch.tensor(some, dtype=torch.int32)


def numbers(_: Any, out: Tensor, g: Tensor, lse: Tensor, to: Tensor, T: int, H: int, rows: int) -> None:
    pairs = torch.zeros(H, rows, 2)
    pairs[:, :T, 0] = lse.view(T, H).T
    pairs[:, :T, 1] = (out.float() * g.float()).sum(-1).view(T, H).T
    to.copy_(pairs.reshape(-1))


def listed(words: Tensor, found: Tensor, rows: int, row_tiles: int, tiles: int, N: int) -> Tensor:
    """Bits [rows, keys] of the tiles in the list alone."""
    mask, visited = bits_of(words.view(-1, rows).T), torch.zeros(rows, tiles * N, dtype=torch.bool)
    for a, row in enumerate(found.view(row_tiles, tiles + 1).tolist()):
        for b in row[1 : 1 + row[0]]:
            visited[a * TILE : a * TILE + TILE, b * N : b * N + N] = True
    return mask & visited[:, : mask.shape[1]]


def products(q: Tensor, k: Tensor, H: int, HG: int) -> Tensor:
    """[T, H, S] of q [T, H·D] and k [S, G·D]."""
    wide = k.float().unflatten(1, (H // HG, -1)).repeat_interleave(HG, 1)
    return torch.einsum("thd,shd->ths", q.float().unflatten(1, (H, -1)), wide)


def attention(
    static: dict[str, int], q: Tensor, k: Tensor, v: Tensor, words: Tensor, found: Tensor, *rest: Any
) -> None:
    bad, out, lse, H, HG, rows, row_tiles, tiles, scale = rest
    T, S = len(q), len(k)
    mask = listed(words, found, rows, row_tiles, tiles, static["N"])[:T, None, :S]
    logits = (products(q, k, H, HG) * (scale * 0.6931471805599453)).masked_fill(~mask, -torch.inf)
    total = logits.logsumexp(-1)
    p = (logits - total.masked_fill(total == -torch.inf, 0.0)[..., None]).exp()
    wide = v.float().unflatten(1, (H // HG, -1)).repeat_interleave(HG, 1)
    out.copy_(torch.einsum("ths,shd->thd", p, wide).flatten(1) + bad[:, None])
    lse.copy_((total + bad[:, None]).flatten())


def probabilities(operands: tuple[Tensor, ...], mask: Tensor, H: int, HG: int, rows: int, scale: float) -> Any:
    """a and dS [T, H, S]."""
    q, g, k, v, pairs = operands
    lse, delta = pairs.view(H, rows, 2)[:, : len(q)].permute(2, 1, 0)
    a = (products(q, k, H, HG) * scale - lse[..., None]).exp().masked_fill(~mask[: len(q), None, : len(k)], 0.0)
    return a, torch.where(a == 0, 0.0, a * (products(g, v, H, HG) - delta[..., None]))


def query(static: dict[str, int], *arguments: Any) -> None:
    operands, (words, found, dq, H, HG, rows, row_tiles, tiles, scale) = arguments[:5], arguments[5:]
    mask = listed(words, found, rows, row_tiles, tiles, static["N"])
    ds = probabilities(operands, mask, H, HG, rows, scale)[1]
    wide = operands[2].float().unflatten(1, (H // HG, -1)).repeat_interleave(HG, 1)
    dq.copy_((scale * torch.einsum("ths,shd->thd", ds, wide)).flatten(1))


def key(static: dict[str, int], *arguments: Any) -> None:
    operands, rest = arguments[:5], arguments[5:]
    turned, found, dk, dv, H, HG, rows, columns, key_tiles, tiles, parts, scale = rest
    q, g, k, N, D = *operands[:3], static["N"], static["D"]
    T, S, G = len(q), len(k), H // HG
    mask = listed(turned, found, columns, key_tiles, tiles, N).T
    a, ds = probabilities(operands, mask, H, HG, rows, scale)
    by_tile = found.view(key_tiles, tiles + 1).tolist()
    for total, weights, x, factor in ((dk, ds, q, scale), (dv, a, g, 1.0)):
        for kt in range(key_tiles):
            here = slice(kt * TILE, min(kt * TILE + TILE, S))
            steps = [(h, b) for h in range(HG) for b in by_tile[kt][1 : 1 + by_tile[kt][0]]]
            for group in range(G):
                for part in range(parts):
                    for h, b in steps[len(steps) * part // parts : len(steps) * (part + 1) // parts]:
                        head, t = group * HG + h, slice(b * N, min(b * N + N, T))
                        term = weights[t, head, here].T @ x.float().unflatten(1, (H, D))[t, head]
                        total.view(parts, S, G, D)[part, here, group] += factor * term


def score(_: Any, q: Tensor, k: Tensor, lse: Tensor, out: Tensor, items: Tensor, *rest: Any) -> None:
    H, HG, scale, count = (*rest[:3], rest[4])
    sums = (products(q, k, H, HG) * scale - lse.view(len(q), H, 1)).exp().sum(1)
    wide = torch.full((len(q) + TILE, len(k) + TILE), torch.nan)
    wide[: len(q), : len(k)] = sums
    for t, s, n, _ in items.view(count, 4).tolist():
        out[n * TILE : n * TILE + TILE] = wide[t : t + TILE, s : s + TILE]


def slots(_: Any, scores: Tensor, place: Tensor, idx: Tensor, count: Tensor, p_sum: Tensor, *rest: Any) -> None:
    K, S, tiles, parts = rest
    assert parts * 1024 >= K > (parts - 1) * 1024
    for t in range(len(count)):
        for slot in range(K):
            s = int(idx.view(-1, K)[t, slot]) if slot < int(count[t]) else -1
            n = int(place.view(-1, tiles)[t // TILE, s // TILE]) if 0 <= s < S else 0
            p_sum[t * K + slot] = scores[n * TILE + t % TILE, s % TILE] if 0 <= s < S else 0.0
