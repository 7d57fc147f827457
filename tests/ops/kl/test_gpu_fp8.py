"""What is launched for e4m3, the kernels played by torch: they do what the kernels document, on the same arguments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_indexer import causal_intervals, quantize
from flash_indexer.kernels import catalog
from flash_indexer.kernels.sm_90.sizes import SHARED_KEY_SCALES
from flash_indexer.ops import Problem, launch
from flash_indexer.ops.kl import gpu_body, gpu_stages
from flash_indexer.ops.kl.gpu_fp8 import Fp8Index, Fp8Teacher, kernels
from flash_indexer.ops.kl.plan import GradientItems, TileChunk, make_plan
from flash_indexer.ops.kl.plan_sizes import PlanSizes
from flash_indexer.ops.quantization import Quantized, dequantize

T, S, H, G, SCALE = 200, 200, 4, 2, 0.1


def no_gradients() -> GradientItems:
    raise AssertionError("no gradients are asked for here")


def play_quantize(rotation: int, x, values, scale, rows, heads, stride, blocks) -> None:
    rounded = quantize(x, rotation=bool(rotation))
    values.copy_(rounded.values)
    r = torch.arange(rows)
    scale[r % heads * stride + r // heads] = rounded.scale


def play_quantize_keys(narrow: int, rotation: int, x, own, values, scales, S, G, stride, blocks) -> None:
    assert stride % 128 == 0 and stride >= S and blocks == stride // 128 * G and scales.shape == (G * stride,)
    assert narrow == (x.dtype == values.dtype) and not (narrow and rotation), "no such kernel"
    v, s = (x, own) if narrow else quantize(x, rotation=bool(rotation))
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


def play_quantize_index(rotation: int) -> Callable[..., None]:
    def quantize_index(q, q_values, weights, scaled, k, k_values, k_scale, blocks) -> None:
        for x, values in ((q, q_values), (k, k_values)):
            values.copy_((row := quantize(x, rotation=bool(rotation))).values)
            if x is q:
                scaled.copy_(weights * row.scale / 2)
            else:
                k_scale.zero_()[: len(x)] = row.scale
        per_block = 256 // (q.shape[1] // 8)
        assert blocks == -(-len(q) // per_block) + k_scale.numel() // per_block and k_scale.numel() % 128 == 0

    return quantize_index


def play_score_narrow(q, k, weights, k_scale, out, items, H, first_row, count, ctas) -> None:
    assert ctas == min(count, 4) and items.numel() == 4 * count
    x = torch.einsum("thd,sd->ths", q.view(q.shape[0], H, -1).float(), k.float()).relu()
    scores = (2 * x * weights.view(-1, H)[..., None]).sum(1) * k_scale[: k.shape[0]]
    for token, key, first, tiles in items.view(-1, 4).tolist():
        for n in range(tiles):
            block = scores[token - first_row :][:64, key + 128 * n : key + 128 * n + 128]
            out[(first + n) * 128 + token % 128 :][: block.shape[0], : block.shape[1]] = block


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
        if name == "quantize_index":
            return play_quantize_index(static["rotation"])
        if name == "quantize":
            return partial(play_quantize, static["rotation"])
        if name == "quantize_keys":
            return partial(play_quantize_keys, static["narrow"], static["rotation"])
        return {"lse_fp8": play_lse, "score_narrow_fp8": play_score_narrow}[name]

    monkeypatch.setattr(launch, "load", load)
    monkeypatch.setattr(launch, "processors", lambda device: 4)
    return counts


def problem(D: int, dtype: str, handed_over: bool, spread: float) -> tuple[Problem, Tensor, Tensor]:
    """And q, k in e4m3, as they are quantised a row at a time."""
    torch.manual_seed(0)
    q, k = (torch.randn(n, heads, D).bfloat16() for n, heads in ((T, H), (S, G)))
    k[::7] *= spread
    start, end = causal_intervals(torch.tensor([0, T]))
    q_rows, k_rows = (quantize(x, rotation=dtype == "fp8") for x in (q, k))
    if handed_over:
        q, k = q_rows.values, k_rows.values
    unread: Any = torch.zeros(0)
    made = Problem(q, k, unread, unread, unread, None, start, end, unread, SCALE, "mean", 2**29, (False,) * 3)
    made = made._replace(teacher_dtype=dtype)
    if handed_over:
        made = made._replace(q_scale=q_rows.scale, k_scale=k_rows.scale)
    wide = (dequantize(Quantized(*rows), torch.float32) for rows in (q_rows, k_rows))
    return (made, *wide)


@pytest.mark.parametrize("spread", [0.25, 2.0**-9], ids=["near", "apart"])
@pytest.mark.parametrize("handed_over", [False, True])
@pytest.mark.parametrize("dtype", ["fp8", "fp8_unrotated"])
@pytest.mark.parametrize("D", [64, 96, *SHARED_KEY_SCALES])
def test_the_teacher(D: int, dtype: str, handed_over: bool, spread: float, launches: Counter[str]) -> None:
    given, q, k = problem(D, dtype, handed_over, spread)
    teacher = Fp8Teacher(given)
    lse = teacher.lse(given.key_start, given.key_end)
    assert teacher.traffic(slice(0, T)) == 0, "it is quantised"
    assert (teacher.quantised(slice(0, T)).k_scale < 0).any() == (D in SHARED_KEY_SCALES and spread > 0.1)
    x = torch.einsum("thd,shd->ths", q, k.repeat_interleave(H // G, 1)) * SCALE
    seen = torch.arange(S) < given.key_end[:, None]
    torch.testing.assert_close(lse, x.masked_fill(~seen[:, None], -torch.inf).logsumexp(-1), rtol=1e-3, atol=1e-3)
    for begin, tiles in ((0, [(0, 0, 0)]), (128, [(128, 0, 1), (128, 128, 0)])):
        items = partial(torch.tensor([[*tile, 0] for tile in tiles], dtype=torch.int32).view, -1)
        chunk = TileChunk(begin, min(begin + 128, T), len(tiles), S, items, items, no_gradients)
        out = torch.full((len(tiles) * 128, 128), torch.nan)
        teacher.scores(teacher.quantised(slice(chunk.begin, chunk.end)), lse, chunk, out)
        expected = (x - lse[..., None]).exp().sum(1)
        for token, key, tile in tiles:
            block = expected[token : token + 128, key : key + 128]
            torch.testing.assert_close(
                out[tile * 128 :][: block.shape[0], : block.shape[1]], block, rtol=1e-3, atol=1e-5
            )
    shares = D in SHARED_KEY_SCALES
    quantised = {} if handed_over else {"quantize": 1 + (not shares)}  # queries once, for the logsumexp and the scores
    assert launches == {"lse_fp8": 1, "score_fp8": 2} | quantised | ({"quantize_keys": 1} if shares else {})


@pytest.mark.parametrize("lse", [None, torch.zeros(0)], ids=["own", "given"])
@pytest.mark.parametrize("handed_over", [False, True])
@pytest.mark.parametrize("dtype", ["fp8", "fp8_unrotated"])
@pytest.mark.parametrize("D", [64, *SHARED_KEY_SCALES])
def test_every_kernel_of_the_teacher_is_prepared(
    D: int, dtype: str, handed_over: bool, lse: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is loaded is in `kernels`, and what is in `kernels` is in the catalog, so it is compiled beforehand."""
    given = problem(D, dtype, handed_over, 1.0)[0]._replace(index_q=torch.zeros(T, 3, 64), lse=lse)
    prepared = [catalog.kernel(name, **static) for name, static in kernels(given)]
    assert set(prepared) <= set(catalog.every_kernel())
    loaded = []
    monkeypatch.setattr(launch, "processors", lambda device: 4)
    monkeypatch.setattr(
        launch, "load", lambda name, **static: (loaded.append(catalog.kernel(name, **static)), lambda *_: None)[1]
    )
    teacher = Fp8Teacher(given)
    if lse is None:
        teacher.lse(given.key_start, given.key_end)
    teacher.quantised(slice(0, T))
    assert set(loaded) == {kernel for kernel in prepared if kernel[0] != "score_fp8"}
    rotated = {dict(static)["rotation"] for name, static in loaded if name.startswith("quantize")}
    assert rotated == ({int(dtype == "fp8")} if not handed_over else {0} if D in SHARED_KEY_SCALES else set())


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize(("E", "I"), [(128, 4), (64, 5), (32, 3)])
def test_the_indexer(E: int, I: int, rotation: bool, launches: Counter[str]) -> None:
    torch.manual_seed(0)
    leaves = torch.randn(T, I, E).bfloat16(), torch.randn(S, E).bfloat16(), torch.randn(T, I)
    index = Fp8Index(leaves, "fp8" if rotation else "fp8_unrotated")
    q, k = (dequantize(quantize(x, rotation=rotation), torch.float32) for x in leaves[:2])
    expected = torch.einsum("ti,tis->ts", leaves[2], torch.einsum("tie,se->tis", q, k).relu())
    work = make_plan(*causal_intervals(torch.tensor([0, T])), PlanSizes(S, E, 8, False, 2**29, 4), torch.device("cpu"))
    (chunk,) = work.chunks
    out = torch.full((chunk.tiles * 128, 128), torch.nan)
    index.scores(chunk, out)
    for token, key, tile, _ in chunk.score.view(-1, 4).tolist():
        block = expected[token : token + 128, key : key + 128]
        torch.testing.assert_close(out[tile * 128 :][: block.shape[0], : block.shape[1]], block, rtol=1e-4, atol=1e-4)
    assert launches == {"quantize_index": 1, "score_narrow_fp8": 1}


def index_of(I: int, E: int) -> Fp8Index:
    index = object.__new__(Fp8Index)
    index.rows = SimpleNamespace(q=torch.empty(1, I, E))
    return index


def test_index_scores_leave_multiprocessors_to_much_traffic() -> None:
    """DeepSeek-V3.2 expanded, 8,192 tokens: 1.2 GB; and more of them to more."""
    chunk: Any = SimpleNamespace(tiles=2080, narrow=torch.empty(4 * 1430))
    shares = [index_of(64, 128).share(chunk, traffic, 132) for traffic in (0, 10**6, 6 * 10**8, 12 * 10**8, 18 * 10**8)]
    assert shares[:2] == [132, 132]
    assert 66 <= shares[4] < shares[3] < shares[2] < 132
    assert shares[3] == 96, "15 rounds of items for each, and few are idle in the last"
    assert index_of(8, 64).share(chunk, 20 * 10**6, 132) == 132, "SmolLM2: nothing to gain"


@pytest.mark.parametrize("share", [3, 4])
def test_a_chunk_is_scored_once(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the teacher is quantised on another stream, or after its scores."""
    done: list[str] = []

    @contextmanager
    def beside(stream: object) -> Iterator[None]:
        assert stream is side
        done.append("beside")
        yield
        done.append("here")

    side: Any = SimpleNamespace(wait_stream=lambda _: done.append("fork"))
    here = SimpleNamespace(wait_stream=lambda stream: done.append("join"))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    monkeypatch.setattr(torch.cuda, "stream", beside)
    monkeypatch.setattr(launch, "side_stream", lambda _: side)
    monkeypatch.setattr(launch, "processors", lambda _: 4)
    monkeypatch.setattr(gpu_body, "kl_rows", lambda *_: done.append("rows"))
    none, tile = torch.zeros(0), torch.zeros(128, 128)
    chunk = SimpleNamespace(begin=0, end=128, tiles=1, keys=128)
    stages = object.__new__(gpu_stages.GpuStages)
    stages.plan = SimpleNamespace(shards=[SimpleNamespace(own=chunk, teacher=chunk)], own=None)
    stages.q, stages.lse, stages.leaves, stages.wait_for_keys, stages.row_inputs = none, none, (none,) * 3, None, None
    stages.scored, stages.logits, stages.needs = -1, False, (False,) * 3
    stages.scores, stages.index_scores, stages.di = [tile], tile.clone(), tile.clone()
    stages.sums = SimpleNamespace(kl=none, entropy=none)
    held = SimpleNamespace(record_stream=lambda stream: done.append("held") if stream is here else None)
    stages.fp8_teacher = SimpleNamespace(
        traffic=lambda rows: 7,
        scores=lambda *_: done.append("teacher"),
        quantised=lambda rows: (done.append("quantise"), [held])[1],
    )
    stages.fp8_index = SimpleNamespace(
        share=lambda own, traffic, processors: share if (own, traffic, processors) == (chunk, 7, 4) else 0,
        scores=lambda chunk, out, processors=4: done.append(f"scores by {processors}"),
    )
    stages.index(0, stages.teacher(0))
    forked = ["fork", "scores by 3", "beside", "quantise", "here", "join", "held", "teacher", "rows"]
    assert done == (forked if share == 3 else ["quantise", "teacher", "scores by 4", "rows"])


def test_gradients_are_formed_of_the_rows_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the scores are of e4m3."""
    given: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(gpu_body, "kl_rows", lambda *_: None)
    monkeypatch.setattr(gpu_body, "index_gradients", lambda di, leaves, *_: given.append(leaves))
    none = torch.zeros(0)
    stages = object.__new__(gpu_stages.GpuStages)
    stages.plan = SimpleNamespace(shards=[SimpleNamespace(own=SimpleNamespace(begin=0, end=128))], own=None)
    stages.index_scores = stages.di = stages.q = none
    stages.fp8_index = SimpleNamespace(scores=lambda *_: given.append("scores"))
    stages.leaves, stages.row_inputs, stages.logits, stages.needs = (none,) * 3, None, False, (True,) * 3
    stages.scored, stages.out, stages.sums = -1, None, SimpleNamespace(kl=none, entropy=none)
    stages.index(0, none)
    assert given == ["scores", stages.leaves]
