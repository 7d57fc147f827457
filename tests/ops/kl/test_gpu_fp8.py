"""What is launched for e4m3, the kernels played by torch: they do what the kernels document, on the same arguments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_indexer import causal_intervals, quantize
from flash_indexer.kernels.sm_90.sizes import ROTATED_QUERIES, SHARED_KEY_SCALES
from flash_indexer.ops import Problem, launch
from flash_indexer.ops.kl import gpu_body, gpu_stages
from flash_indexer.ops.kl.gpu_fp8 import Fp8Teacher
from flash_indexer.ops.kl.plan import GradientItems, TileChunk
from flash_indexer.ops.quantization import Quantized, dequantize

T, S, H, G, SCALE = 200, 200, 4, 2, 0.1


def no_gradients() -> GradientItems:
    raise AssertionError("no gradients are asked for here")


def play_quantize(x, values, scale, out, rows, heads, stride, blocks) -> None:
    rounded = quantize(x)
    values.copy_(rounded.values)
    r = torch.arange(rows)
    scale[r % heads * stride + r // heads] = rounded.scale


def play_quantize_keys(x, own, values, scales, S, G, stride, blocks) -> None:
    assert stride % 128 == 0 and stride >= S and blocks == stride // 128 * G and scales.shape == (G * stride,)
    v, s = (x, own) if x.dtype == values.dtype else quantize(x)
    v, s, table = v.view(S, G, -1), s.view(S, G), scales.view(G, stride)
    for g in range(G):
        for first in range(0, stride, 128):
            keys = slice(first, min(first + 128, S))
            common = s[keys, g].max()
            if bool((common <= 16 * s[keys, g]).all()):
                table[g, first : first + 128] = -common
                shifted = (v[keys, g].float() * (s[keys, g] / common)[:, None]).to(values.dtype)
            else:
                table[g, first : first + 128] = 0
                table[g, keys], shifted = s[keys, g], v[keys, g]
            values.view(S, G, -1)[keys, g] = shifted


def signed_once(k_scale: Tensor) -> None:
    """128 keys have their scales, or one with a minus sign."""
    tiles = k_scale.view(-1, 128)
    assert ((tiles >= 0).all(1) | ((tiles < 0) & (tiles == tiles[:, :1])).all(1)).all()


def logits(q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, H: int, HG: int, keys: int) -> Tensor:
    rows, G = q.shape[0], H // HG
    wide = k.view(k.shape[0], G, -1).float() * k_scale.view(G, keys)[:, : k.shape[0]].T[..., None]
    wide = wide.repeat_interleave(HG, 1)
    return torch.einsum("thd,shd->ths", q.view(rows, H, -1).float() * q_scale.view(rows, H, 1), wide)


def play_score(D: int) -> Callable[..., None]:
    def score(q, k, low, q_scale, k_scale, out, items, H, HG, scale, first_row, count, ctas, keys) -> None:
        if D in SHARED_KEY_SCALES:
            signed_once(k_scale)
        else:
            assert (k_scale >= 0).all()
        x = logits(q, k, q_scale, k_scale.abs(), H, HG, keys)
        p = (x * scale - low.view(-1, H)[..., None]).exp().sum(1)
        for token, key, tile, _ in items.view(-1, 4).tolist():
            block = p[token - first_row :][:128, key : key + 128]
            out[tile * 128 :][: block.shape[0], : block.shape[1]] = block

    return score


def play_lse(q, k, q_scale, k_scale, key_start, key_end, lse, H, HG, scale, grid, keys) -> None:
    assert (k_scale >= 0).all(), "this kernel knows no minus sign"
    s = torch.arange(k.shape[0])
    seen = (s >= key_start[:, None]) & (s < key_end[:, None])
    x = logits(q, k, q_scale, k_scale, H, HG, keys) * scale
    lse.copy_(x.masked_fill(~seen[:, None], -torch.inf).logsumexp(-1).view(-1))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was launched; all are played."""
    counts: Counter[str] = Counter()

    def load(name: str, **static: int) -> Callable[..., None]:
        counts[name] += 1
        if name == "score_fp8":
            return play_score(static["D"])
        return {"quantize": play_quantize, "quantize_keys": play_quantize_keys, "lse_fp8": play_lse}[name]

    monkeypatch.setattr(launch, "load", load)
    monkeypatch.setattr(launch, "processors", lambda device: 4)
    return counts


def problem(D: int, handed_over: bool, spread: float) -> tuple[Problem, Tensor, Tensor]:
    """And q, k in e4m3, as they are quantised a row at a time."""
    torch.manual_seed(0)
    q, k = (torch.randn(n, heads, D).bfloat16() for n, heads in ((T, H), (S, G)))
    k[::7] *= spread
    start, end = causal_intervals(torch.tensor([0, T]))
    q_rows, k_rows = quantize(q), quantize(k)
    if handed_over:
        q, k = q_rows.values, k_rows.values
    unread: Any = torch.zeros(0)
    made = Problem(q, k, unread, unread, unread, None, start, end, unread, SCALE, "mean", 2**29, (False,) * 3)
    if handed_over:
        made = made._replace(q_scale=q_rows.scale, k_scale=k_rows.scale)
    wide = (dequantize(Quantized(*rows), torch.float32) for rows in (q_rows, k_rows))
    return (made, *wide)


@pytest.mark.parametrize("spread", [0.25, 2.0**-9], ids=["near", "apart"])
@pytest.mark.parametrize("handed_over", [False, True])
@pytest.mark.parametrize("D", [64, *SHARED_KEY_SCALES])
def test_the_teacher(D: int, handed_over: bool, spread: float, launches: Counter[str]) -> None:
    given, q, k = problem(D, handed_over, spread)
    teacher = Fp8Teacher(given)
    assert (teacher.k_scale < 0).any() == (D in SHARED_KEY_SCALES and spread > 0.1)
    lse = teacher.lse(given.key_start, given.key_end)
    x = torch.einsum("thd,shd->ths", q, k.repeat_interleave(H // G, 1)) * SCALE
    seen = torch.arange(S) < given.key_end[:, None]
    torch.testing.assert_close(lse, x.masked_fill(~seen[:, None], -torch.inf).logsumexp(-1), rtol=1e-3, atol=1e-3)
    for begin, tiles in ((0, [(0, 0, 0)]), (128, [(128, 0, 1), (128, 128, 0)])):
        items = partial(torch.tensor([[*tile, 0] for tile in tiles], dtype=torch.int32).view, -1)
        chunk = TileChunk(begin, min(begin + 128, T), len(tiles), S, items, items, no_gradients)
        out = torch.full((len(tiles) * 128, 128), torch.nan)
        teacher.scores(lse, chunk, out)
        expected = (x - lse[..., None]).exp().sum(1)
        for token, key, tile in tiles:
            block = expected[token : token + 128, key : key + 128]
            torch.testing.assert_close(
                out[tile * 128 :][: block.shape[0], : block.shape[1]], block, rtol=1e-3, atol=1e-5
            )
    shares = D in SHARED_KEY_SCALES
    quantised = {} if handed_over else {"quantize": 1 + (not shares)}  # queries once, for the logsumexp and the scores
    assert launches == {"lse_fp8": 1, "score_fp8": 2} | quantised | ({"quantize_keys": 1} if shares else {})


@pytest.mark.parametrize(("E", "heads"), [(128, 64), (128, 33), (128, 32), (64, 64), (32, 3)])
def test_d_index_q_is_rotated_once(E: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel that makes it, where that one can, or after it."""
    by_kernel = gpu_body.rotates(E, heads)
    assert by_kernel == ((E, 64 if heads > 32 else heads) in ROTATED_QUERIES)
    for masks in (False, True):
        kernel = gpu_body.query_gradient(E, 64, by_kernel, masks)
        choices = ({"rotation": 1} if by_kernel else {}) | ({"masks": 1} if masks else {})
        assert kernel == ("gradients_query", {"E": E, "IP": 64} | choices)
    after: list[Tensor] = []
    monkeypatch.setattr(gpu_stages, "rotate_rows", after.append)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    for name in ("index_gradients", "kl_rows"):
        monkeypatch.setattr(gpu_body, name, lambda *_: None)
    d_index_q, none = torch.zeros(200, heads, E), torch.zeros(0)
    stages = object.__new__(gpu_stages.GpuStages)
    chunk = SimpleNamespace(begin=0, end=128)
    stages.plan = SimpleNamespace(shards=[SimpleNamespace(own=chunk)], own=None)
    stages.index_scores = stages.di = stages.q = none
    stages.fp8_index = SimpleNamespace(leaves=(none,) * 3, scores=lambda *_: None)
    stages.leaves, stages.row_inputs, stages.logits, stages.needs, stages.rotated = None, None, False, (True,) * 3, True
    stages.sums = SimpleNamespace(kl=none, entropy=none, d_index_q=d_index_q, d_index_k=None)
    stages.out = gpu_body.IndexGradients(d_index_q, None, none, by_kernel)
    stages.index(0, none)
    assert [x.shape[0] for x in after] == ([] if by_kernel else [128])
