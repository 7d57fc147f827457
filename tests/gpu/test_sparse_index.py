"""The indexer at the selected keys by kernels, on given selections, against float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flash_indexer.ops import Selection
from flash_indexer.ops.sparse import gpu_index, torch_index
from flash_indexer.ops.sparse.problem import Leaves
from flash_indexer.testing import assert_close

pytestmark = pytest.mark.gpu
ROWS = [(1, 1), (5, 3), (70, 64), (33, 513), (200, 2048), (40, 4099), (20, 9000)]  # T, K


def rows(T: int, K: int, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p_sum, scores, count, weight; NaN behind each row's slots."""
    generator = torch.Generator("cuda").manual_seed(K)
    count = torch.randint(K + 1, (T,), device="cuda", generator=generator, dtype=torch.int32)
    count[: min(3, T)] = torch.tensor([K, 0, 1][: min(3, T)], dtype=torch.int32, device="cuda")
    scores = torch.randn(T, K, device="cuda", generator=generator)
    p = (torch.randn(T, K, device="cuda", generator=generator) * 2).exp()
    if kind == "peaked":
        p, scores = p**8, scores * 30
    if kind == "alike":  # KL is near zero
        p = (scores + 1e-3 * p).exp()
    if kind == "zeros":
        p = torch.where(scores > 0, p, 0.0)
        p[:, 0] += 1e-6
    behind = torch.arange(K, device="cuda") >= count[:, None]
    weight = torch.randn(T, device="cuda", generator=generator)
    return p.masked_fill(behind, torch.nan), scores.masked_fill(behind, torch.nan), count, weight


@pytest.mark.parametrize("kind", ["broad", "peaked", "alike", "zeros"])
@pytest.mark.parametrize("T, K", ROWS)
def test_kl_rows_against_float64(T: int, K: int, kind: str) -> None:
    p, scores, count, weight = rows(T, K, kind)
    got = gpu_index.kl_rows(p, scores, count, weight)
    truth = torch_index.kl_rows(p.double(), scores.double(), count, weight.double())
    eager = torch_index.kl_rows(p, scores, count, weight)
    for name, *each in zip(("kl", "entropy", "di"), got, truth, eager, strict=True):
        if kind == "alike":  # differences of what nearly agrees: as exact as their terms
            unit = weight.abs()[:, None] if name == "di" else 1.0 + truth[1]
            assert ((each[0] - each[1]).abs() <= 2e-6 * unit).all()
            continue
        assert_close(name, *(x.reshape(1, -1) if x.ndim == 1 else x for x in each))
    behind = torch.arange(K, device="cuda") >= count[:, None]
    assert (got[2][behind] == 0).all() and (got[0][count == 0] == 0).all()


def test_kl_rows_of_nothing_and_of_what_is_no_distribution() -> None:
    empty = torch.zeros(4, 0, device="cuda")
    kl, entropy, di = gpu_index.kl_rows(
        empty, empty, torch.zeros(4, dtype=torch.int32, device="cuda"), torch.ones(4, device="cuda")
    )
    assert (kl == 0).all() and (entropy == 0).all() and di.shape == (4, 0)
    p, scores, count, weight = rows(6, 40, "broad")
    count[:] = 40
    p, scores = p.nan_to_num(1.0), scores.nan_to_num(0.5)
    p[2] = 0
    scores[4, 7] = torch.nan
    kl, _, di = gpu_index.kl_rows(p, scores, count, weight)
    wrong = torch.tensor([2, 4], device="cuda")
    assert kl[wrong].isnan().all() and di[wrong].isnan().all()
    right = torch.tensor([0, 1, 3, 5], device="cuda")
    assert kl[right].isfinite().all() and di[right].isfinite().all()


class Problem(NamedTuple):
    """di [T, K] of a selection: NaN behind the slots, as -1 is behind the keys."""

    di: Tensor
    leaves: Leaves
    selection: Selection


def make(T: int, S: int, K: int, I: int, E: int, kind: str = "plain") -> Problem:
    generator = torch.Generator("cuda").manual_seed(T + S + K + I + E)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    index_q, index_k, weights = random(T, I, E).bfloat16(), random(S, E).bfloat16(), random(T, I)
    most = min(K, S)
    count = torch.randint(most + 1, (T,), device="cuda", generator=generator, dtype=torch.int32)
    count[: min(3, T)] = torch.tensor([most, 0, 1][: min(3, T)], dtype=torch.int32, device="cuda")
    keys = torch.rand(T, S, device="cuda", generator=generator).argsort(-1)[:, :most]
    behind = torch.arange(most, device="cuda") >= count[:, None]
    keys = keys.masked_fill(behind, S).sort(-1).values
    indices = torch.full((T, K), -1, dtype=torch.int32, device="cuda")
    indices[:, :most] = torch.where(keys == S, -1, keys)
    di = random(T, K) / T
    if kind == "wide":  # magnitudes of di, queries and weights far apart
        di = di * (2 * random(T, K)).exp()
        weights = weights * random(T, 1).exp()
        index_k = (index_k * (random(S, 1) * 2).exp()).bfloat16()
    behind = torch.arange(K, device="cuda") >= count[:, None]
    selection = Selection(indices, count, torch.zeros(T, K, device="cuda"))
    return Problem(di.masked_fill(behind, torch.nan), (index_q, index_k, weights), selection)


def dense(x: Problem, dtype: torch.dtype, *, turn: float = 1.0, twice: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients by whole matrices: in float64, or in float32 with dS rounded as tensor cores read it.

    turn: a factor that dS has when it is rounded. twice: di is rounded before, as in dense tiles.
    """
    index_q, index_k, w = (y.to(dtype) for y in x.leaves)
    T, S = len(index_q), len(index_k)
    none = (x.selection.indices < 0) | (x.selection.indices >= S)
    di = torch.zeros(T, S + 1, dtype=dtype, device="cuda")
    di.scatter_(1, x.selection.indices.long().masked_fill(none, S), x.di.to(dtype).masked_fill(none, 0.0))
    if twice:
        di = (di * turn).bfloat16().float() / turn
    masked = di[:, None, :S] * (torch.einsum("tie,se->tis", index_q, index_k) > 0)
    ds = masked * w[..., None]
    if dtype == torch.float32:
        masked, ds = ((y * turn).bfloat16().float() / turn for y in (masked, ds))
    unscaled = torch.einsum("tis,se->tie", masked, index_k)
    d_index_k = torch.einsum("tis,tie->se", ds, index_q)
    d_index_q = unscaled * w[..., None]
    return d_index_q if dtype == torch.float64 else d_index_q.bfloat16(), d_index_k, (index_q * unscaled).sum(-1)


def worst_of_eight(x: Problem, truth: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Each element from that evaluation which errs most there: one may be right by luck where terms are few."""
    worst = dense(x, torch.float32)
    for turn in (1.0, 1.19, 1.41, 1.68):
        for twice in (False, True):
            other = dense(x, torch.float32, turn=turn, twice=twice)
            errors = [[(a.double() - t).abs() for a, t in zip(r, truth, strict=True)] for r in (worst, other)]
            worst = tuple(torch.where(m >= n, a, b) for m, n, a, b in zip(*errors, worst, other, strict=True))
    return worst


def run(x: Problem, needs: tuple[bool, bool, bool] = (True, True, True)) -> tuple[Tensor | None, ...]:
    d_index_k = torch.zeros(x.leaves[1].shape, device="cuda")
    d_index_q, d_weights = gpu_index.index_gradients(*x, needs, d_index_k, True, 2**29)
    return d_index_q, d_index_k, d_weights


@pytest.fixture(params=["gathered", "dense"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of the gradients, whichever would be chosen."""
    monkeypatch.setattr(gpu_index, "dense_is_faster", lambda *_: request.param == "dense")
    return str(request.param)


SIZES = [(1, 1, 1), (5, 3, 64), (70, 300, 128), (140, 1000, 200), (300, 900, 513), (64, 2500, 2048)]  # T, S, K


@pytest.mark.parametrize("kind", ["plain", "wide"])
@pytest.mark.parametrize("I, E", [(64, 128), (50, 128), (8, 64), (1, 64)])
@pytest.mark.parametrize("T, S, K", SIZES)
def test_gradients_against_float64(T: int, S: int, K: int, I: int, E: int, kind: str, form: str) -> None:
    x = make(T, S, K, I, E, kind)
    got, truth = run(x), dense(x, torch.float64)
    eager = worst_of_eight(x, truth)
    for name, *each in zip(("d_index_q", "d_index_k", "d_index_weights"), got, truth, eager, strict=True):
        assert_close(name, *(y.flatten(0, -2) for y in each))
    nothing = x.selection.count == 0
    assert (got[0][nothing] == 0).all() and (got[2][nothing] == 0).all()


@pytest.mark.parametrize("kind", ["plain", "wide"])
@pytest.mark.parametrize("I, E", [(64, 128), (50, 128), (8, 64), (1, 64)])
@pytest.mark.parametrize("T, S, K", SIZES)
def test_additions_in_any_order_against_float64(
    T: int, S: int, K: int, I: int, E: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """deterministic=False, gathered: d_index_k is added to, within its rounding; all else is the same bits."""
    monkeypatch.setattr(gpu_index, "dense_is_faster", lambda *_: False)
    x = make(T, S, K, I, E, kind)
    truth, expected, sums = dense(x, torch.float64), run(x), torch.zeros(S, E, device="cuda")
    d_index_q, d_weights = gpu_index.index_gradients(*x, (True, True, True), sums, False, 2**29)
    assert torch.equal(d_index_q, expected[0]) and torch.equal(d_weights, expected[2])
    assert_close("d_index_k", sums, truth[1], worst_of_eight(x, truth)[1])
    again = sums.clone()
    gpu_index.index_gradients(*x, (False, True, False), again, False, 2**29)
    torch.testing.assert_close(again, 2 * sums, rtol=1e-4, atol=1e-5 * float(sums.abs().max()))
    none, _ = gpu_index.index_gradients(*x, (True, False, False), None, False, 2**29)
    assert torch.equal(none, expected[0])


@pytest.mark.parametrize("I, E", [(64, 128), (33, 128), (8, 64), (1, 64)])
@pytest.mark.parametrize("T, S, K", SIZES)
def test_scores_against_float64(T: int, S: int, K: int, I: int, E: int) -> None:
    x = make(T, S, K, I, E)
    got = gpu_index.index_scores(x.leaves, x.selection, 2**29)
    index_q, index_k, w = (y.double() for y in x.leaves)
    scores = (w[..., None] * torch.einsum("tie,se->tis", index_q, index_k).relu()).sum(1)
    behind = torch.arange(K, device="cuda") >= x.selection.count[:, None]
    truth = scores.gather(1, x.selection.indices.long().clamp_min(0))
    assert (got[behind] == -torch.inf).all()
    error = (got.double() - truth).masked_fill(behind, 0.0).abs().max()
    assert error <= 2e-6 * I**0.5 * E**0.5 * scores.abs().max()


def test_the_same_bits_every_time_and_gathered_in_any_order(form: str) -> None:
    x = make(600, 900, 400, 64, 128, "wide")
    first = run(x)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, run(x), strict=True))
    if form != "gathered":
        return
    order = torch.randperm(600, device="cuda")
    leaves = x.leaves[0][order], x.leaves[1], x.leaves[2][order]
    other = run(Problem(x.di[order], leaves, Selection(*(y[order] for y in x.selection))))
    assert torch.equal(first[1], other[1]) and torch.equal(first[0][order], other[0])


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_what_is_not_wanted_changes_nothing(needs: tuple[bool, bool, bool], form: str) -> None:
    x = make(70, 300, 128, 20, 64)
    whole, part = run(x), run(x, needs)
    assert (part[0] is not None, part[2] is not None) == (bool(needs[0]), bool(needs[2]))
    assert all(torch.equal(part[n], whole[n]) for n in (0, 2) if needs[n])
    assert torch.equal(part[1], whole[1]) if needs[1] else (part[1] == 0).all()


def test_it_adds_and_unselected_keys_have_no_part(form: str) -> None:
    x = make(40, 900, 100, 64, 128)
    used = torch.zeros(901, dtype=torch.bool, device="cuda")
    used[x.selection.indices.long()] = True
    used = used[:900]
    index_k = x.leaves[1].masked_fill(~used[:, None], torch.nan)
    poisoned = x._replace(leaves=(x.leaves[0], index_k, x.leaves[2]))
    clean, got = run(x), run(poisoned)
    assert all(torch.equal(a, b) for a, b in zip(clean, got, strict=True))
    sums = torch.full_like(clean[1], 3.0)
    gpu_index.index_gradients(*x, (False, True, False), sums, True, 2**29)
    torch.testing.assert_close(sums, clean[1] + 3.0)


@pytest.mark.parametrize("key", [-1, 900, 2**31 - 1, -(2**31)])
def test_a_key_that_is_none_is_neither_read_nor_added_to(key: int, form: str) -> None:
    x = make(40, 900, 100, 64, 128)
    x.selection.indices[0, 5] = key
    x.di[0, 5] = 3.0
    got, expected = run(x), dense(x, torch.float64)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


def test_nan_reaches_what_it_is_part_of_and_nothing_else(form: str) -> None:
    x = make(40, 900, 100, 64, 128)
    x.di[0, 7] = torch.nan
    d_index_q, d_index_k, d_weights = run(x)
    key = int(x.selection.indices[0, 7])
    assert d_index_q[0].isnan().any() and d_weights[0].isnan().any() and d_index_k[key].isnan().all()
    others = torch.arange(900, device="cuda") != key
    assert d_index_q[1:].isfinite().all() and d_weights[1:].isfinite().all() and d_index_k[others].isfinite().all()


def test_a_small_workspace_takes_rows_in_chunks(form: str) -> None:
    x = make(700, 900, 200, 8, 64)
    whole, sums = run(x), torch.zeros_like(x.leaves[1], dtype=torch.float32)
    parts = gpu_index.index_gradients(*x, (True, True, True), sums, True, 2**17)
    assert torch.equal(parts[0], whole[0]) and torch.equal(parts[1], whole[2])
    torch.testing.assert_close(sums, whole[1], rtol=1e-4, atol=1e-6 * float(whole[1].abs().max()))
