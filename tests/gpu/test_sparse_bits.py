"""Attention over selected keys in dense tiles with bits, and its gradients, on the GPU against float64."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flash_indexer import reference, sparse_attention
from flash_indexer.kernels.sm_90.sizes import BITS_ALL_KEYS, BITS_MAX_KEYS
from flash_indexer.ops import Selection
from flash_indexer.ops.sparse import gpu_bits, torch_attention
from flash_indexer.ops.sparse.problem import KeySums, Needs, SparseProblem, new_key_sums
from flash_indexer.testing import assert_close
from flash_indexer.testing.sparse import selection_mask

pytestmark = pytest.mark.gpu
LOG2E = 1.4426950408889634
LAYOUTS = ("causal", "packed", "window", "mass last", "scattered", "runs", "few", "fewer keys")
SEEDS = 20  # of each layout
WIDTHS = ((64, 64), (128, 128), (64, 64), (128, 128), (96, 96), (80, 128), (128, 40), (16, 33))
HEADS = ((1, 1), (9, 3), (8, 2), (16, 4), (4, 4), (7, 1), (12, 3), (96, 96), (128, 8), (32, 8))
EVERYTHING = Needs(True, True, True, True)
WORKSPACES = (2**29, 2**29, 1)
FIXED = dict(T=300, S=420, K=64, H=8, G=2, D=128, V=128)  # of tests of one thing


class Answer(NamedTuple):
    """What both calls return."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    p_sum: Tensor


def make(seed: int, layout: str, **fixed: int) -> tuple[SparseProblem, Tensor]:
    """A problem of random sizes, and the gradient of out. Some queries select nothing, few a single key."""
    rng, generator = random.Random(f"{seed} {layout}"), torch.Generator("cuda").manual_seed(seed)
    (D, V), (H, G) = WIDTHS[seed % len(WIDTHS)], HEADS[rng.randrange(len(HEADS))]
    T = rng.choice((1, 2, 63, 64, 127, 128, 129, rng.randint(130, 400))) if H <= 16 else rng.randint(1, 140)
    S = max(T + rng.choice((0, 1, -50, 300)), 2) if layout == "fewer keys" else T + rng.choice((0, 0, 33, 200))
    K = rng.choice((2, 16, 64, 100, 256, 2048))
    sizes = dict(T=T, S=S, K=K, H=H, G=G, D=D, V=V) | fixed
    T, S, K, H, G, D, V = (sizes[name] for name in "TSKHGDV")
    q, d_out, k, v = (
        torch.randn(*shape, device="cuda", generator=generator).bfloat16()
        for shape in ((T, H, D), (T, H, V), (S, G, D), (S, G, V))
    )
    scores = torch.rand(T, S, device="cuda", generator=generator)
    if layout == "mass last":  # an indexer whose order is the attention's backwards
        scores = -reference.teacher_logits(q.float(), k.float(), D**-0.5).softmax(-1).sum(1)
    if layout == "runs":
        scores = scores[:, ::16].repeat_interleave(16, 1)[:, :S] + 1e-6 * scores
    here, place = torch.arange(S, device="cuda"), torch.arange(T, device="cuda")[:, None] + S - T
    visible = here <= place
    if layout == "packed":
        ends = sorted(rng.sample(range(1, S + 1), min(S, 4)))
        document = torch.bucketize(here, torch.tensor(ends, device="cuda"), right=True)
        visible &= document == document[place.clamp_min(0)]
    if layout == "window":
        visible &= here > place - rng.choice((2, 64, 130))
    if layout == "scattered":
        visible = torch.ones_like(visible)
    visible[torch.rand(T, device="cuda", generator=generator) < (0.7 if layout == "few" else 0.02)] = False
    indices, count = select(scores.masked_fill(~visible, -torch.inf), K)
    selection = Selection(indices, count, torch.zeros(indices.shape, device="cuda"))
    workspace = WORKSPACES[seed % len(WORKSPACES)]
    return SparseProblem(q, k, v, selection, D**-0.5, V, True, workspace), d_out


def select(scores: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Indices [T, K] and count of the largest that are not -inf, ascending."""
    T, S = scores.shape
    best, keys = scores.topk(min(K, S), -1)
    keys = torch.where(best == -torch.inf, S, keys).sort(-1).values
    indices = torch.full((T, K), -1, dtype=torch.int32, device="cuda")
    indices[:, : keys.shape[1]] = torch.where(keys == S, -1, keys)
    return indices, (keys < S).sum(-1).int()


def softmax(problem: SparseProblem, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [T, H, S] and lse, zeros and -inf in rows without keys."""
    mask = selection_mask(problem.selection, len(k))
    logits = reference.teacher_logits(q, k, problem.softmax_scale).masked_fill(~mask[:, None], -torch.inf)
    lse = logits.logsumexp(-1)
    return (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp(), lse


def at_slots(problem: SparseProblem, p: Tensor) -> Tensor:
    """Sums over heads [T, S] at the selected keys, zero behind them."""
    indices = problem.selection.indices
    return p.sum(1).gather(1, indices.clamp_min(0).long()).masked_fill(indices < 0, 0.0)


def by_head(x: Tensor, H: int) -> Tensor:
    return x.repeat_interleave(H // x.shape[1], 1)


def truth_of(problem: SparseProblem, d_out: Tensor) -> Answer:
    """By autograd in float64."""
    q, k, v = (x.double().requires_grad_() for x in (problem.q, problem.k, problem.values))
    p, lse = softmax(problem, q, k)
    out = torch.einsum("ths,shv->thv", p, by_head(v, q.shape[1]))
    gradients = torch.autograd.grad(out, (q, k, v), d_out.double())
    return Answer(*(x.detach() for x in (out, lse, *gradients, at_slots(problem, p))))


def eager_of(problem: SparseProblem, d_out: Tensor, truth: Answer, turn: float) -> Answer:
    """In float32 with probabilities and dS rounded to bfloat16 for their products, as kernels of attention do.

    truth: of which out and lse, rounded, are what the gradients are taken at. turn: a factor that dS has when it is
    rounded.
    """
    q, k, v, up, scale = *(x.float() for x in (problem.q, problem.k, problem.values, d_out)), problem.softmax_scale
    H, (S, G, _) = q.shape[1], k.shape
    mask = selection_mask(problem.selection, S)[:, None]
    wide_k, wide_v = by_head(k, H), by_head(v, H)
    given = truth.lse.float().masked_fill(truth.lse == -torch.inf, torch.inf)
    exponents = reference.teacher_logits(q, k, scale) * LOG2E - (given * LOG2E)[..., None]
    p = exponents.exp2().masked_fill(~mask, 0.0)
    delta = (truth.out.bfloat16().float() * up).sum(-1, keepdim=True)
    ds = ((p * (torch.einsum("thv,shv->ths", up, wide_v) - delta)) * turn).bfloat16().float() / turn
    low = (p * turn).bfloat16().float() / turn
    dk = scale * torch.einsum("ths,thd->shd", ds, q).view(S, G, H // G, -1).sum(2)
    dv = torch.einsum("ths,thv->shv", low, up).view(S, G, H // G, -1).sum(2)
    out = torch.einsum("ths,shv->thv", low, wide_v).bfloat16()
    dq = (scale * torch.einsum("ths,shd->thd", ds, wide_k)).bfloat16()
    return Answer(out, softmax(problem, q, k)[1], dq, dk, dv, at_slots(problem, p))


def worst_of_four(problem: SparseProblem, d_out: Tensor, truth: Answer) -> Answer:
    """Each element from that evaluation which errs most there: a single one may be right by luck where rows are few."""
    worst = eager_of(problem, d_out, truth, 1.0)
    for turn in (1.19, 1.41, 1.68):
        other = eager_of(problem, d_out, truth, turn)
        errors = [[(a.double() - t).abs().nan_to_num() for a, t in zip(r, truth, strict=True)] for r in (worst, other)]
        worst = Answer(*(torch.where(m >= n, a, b) for m, n, a, b in zip(*errors, worst, other, strict=True)))
    return worst


def run(problem: SparseProblem, d_out: Tensor, truth: Answer | None = None) -> Answer:
    """truth: the gradients are taken at its out and lse, not at the kernels' own."""
    out, lse = forward = gpu_bits.forward(problem)
    if truth is not None:
        out, lse = truth.out.bfloat16(), truth.lse.float()
    sums = new_key_sums(problem, EVERYTHING)
    dq, p_sum = gpu_bits.backward(problem, d_out, out, lse, EVERYTHING, sums)
    return Answer(*forward, dq, sums.dk, sums.dv, p_sum)


def in_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("forward", "backward", "target"):
        monkeypatch.setattr(torch_attention, name, lambda *_, name=name: pytest.fail(f"torch ran {name}"))


def whole(x: Tensor) -> Tensor:
    """Rows of one number or two are judged together."""
    return x if not len(x) or x[0].numel() >= 64 else x.reshape(1, -1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_against_float64(seed: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, d_out = make(seed, layout)
    truth = truth_of(problem, d_out)
    eager = worst_of_four(problem, d_out, truth)
    in_no_torch(monkeypatch)
    got, count = run(problem, d_out, truth), problem.selection.count
    several = count > 1  # of a single key dS is zero: what stands in dq and dk is the rounding of its terms
    keys = selection_mask(problem.selection, len(problem.k))[several].any(0)
    some = dict(dq=several, dk=keys)
    for name, *each in zip(Answer._fields, got, truth, eager, strict=True):
        assert_close(name, *(whole(x[some[name]] if name in some else x) for x in each))
    terms = problem.softmax_scale * d_out.double().norm(dim=-1).amax() * problem.values.double().norm(dim=-1).amax()
    assert (got.dq.double().norm(dim=-1) <= 1e-2 * terms * problem.k.double().norm(dim=-1).amax())[~several].all()
    nothing = count == 0
    assert (got.out[nothing] == 0).all() and (got.lse[nothing] == -torch.inf).all()
    assert (got.dq[nothing] == 0).all() and (got.p_sum[problem.selection.indices < 0] == 0).all()


@pytest.mark.parametrize("layout", ["causal", "few", "scattered"])
@pytest.mark.parametrize("S", [16384, 16385, 40_000, BITS_ALL_KEYS, BITS_MAX_KEYS])
def test_more_keys_than_bits_are_made_at_once(S: int, layout: str) -> None:
    fewer = dict(T=10, H=2, G=1, D=64, V=64) if S > BITS_ALL_KEYS else dict(T=40 if S > 50_000 else 150)
    problem, d_out = make(0, layout, **(FIXED | dict(S=S, K=300) | fewer))
    truth = truth_of(problem, d_out)
    eager, got = worst_of_four(problem, d_out, truth), run(problem, d_out, truth)
    several = problem.selection.count > 1
    keys = selection_mask(problem.selection, S)[several].any(0)
    some = dict(dq=several, dk=keys)
    for name, *each in zip(Answer._fields, got, truth, eager, strict=True):
        assert_close(name, *(whole(x[some[name]] if name in some else x) for x in each))


@pytest.mark.parametrize("seed", range(6))
def test_the_target_alone(seed: int) -> None:
    problem, d_out = make(seed, "causal", **(FIXED | dict(D=WIDTHS[seed][0], V=WIDTHS[seed][1])))
    out, lse = gpu_bits.forward(problem)
    _, p_sum = gpu_bits.backward(problem, d_out, out, lse, Needs(False, False, False, True), KeySums(None, None))
    assert torch.equal(gpu_bits.target(problem, lse), p_sum)
    assert torch.equal(gpu_bits.target(problem, None), p_sum)
    rows = slice(0, len(lse) // 2)
    assert torch.equal(gpu_bits.target(problem.rows(rows), lse[rows]), p_sum[rows])


@pytest.mark.parametrize("values", ["own", "columns of k"])
def test_every_subset_of_gradients(values: str) -> None:
    problem, d_out = make(3, "causal", **FIXED)
    if values != "own":
        problem = problem._replace(v=None, value_dim=64)
        d_out = d_out[..., :64].contiguous()
    out, lse = gpu_bits.forward(problem)
    all_sums = new_key_sums(problem, EVERYTHING)
    dq, p_sum = gpu_bits.backward(problem, d_out, out, lse, EVERYTHING, all_sums)
    for needs in (Needs(*some) for some in itertools.product((False, True), repeat=4)):
        sums = new_key_sums(problem, needs)
        got = gpu_bits.backward(problem, d_out, out, lse, needs, sums)
        assert got[0] is None if not needs.q else torch.equal(got[0], dq)
        assert got[1] is None if not needs.p_sum else torch.equal(got[1], p_sum)
        assert sums.dk is None if not needs.k else torch.equal(sums.dk, all_sums.dk)
        assert sums.dv is None if not (needs.v and problem.v is not None) else torch.equal(sums.dv, all_sums.dv)


def test_values_that_are_columns_of_the_keys() -> None:
    problem, d_out = make(1, "causal", **FIXED)
    own = problem._replace(v=problem.k[..., :48].contiguous(), value_dim=48)
    shared, d_out = problem._replace(v=None, value_dim=48), d_out[..., :48].contiguous()
    expected, sums = run(own, d_out), new_key_sums(shared, EVERYTHING)
    out, lse = gpu_bits.forward(shared)
    dq, _ = gpu_bits.backward(shared, d_out, out, lse, EVERYTHING, sums)
    assert torch.equal(out, expected.out) and torch.equal(dq, expected.dq)
    dk = expected.dk.clone()
    dk[..., :48] += expected.dv
    torch.testing.assert_close(sums.dk, dk, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["causal", "runs"])
def test_the_same_bits_a_hundred_times_and_in_any_part(layout: str) -> None:
    problem, d_out = make(7, layout, **FIXED)
    first = run(problem, d_out)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(run(problem, d_out), first, strict=True))
    rows = slice(len(d_out) // 3, len(d_out))
    part = run(problem.rows(rows), d_out[rows].contiguous())
    assert all(torch.equal(getattr(part, name), getattr(first, name)[rows]) for name in ("out", "lse", "dq", "p_sum"))


@pytest.fixture
def poisoned_empty():
    """torch.empty and its kind are filled with NaN (integers: the largest)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(8, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", ["causal", "few", "packed"])
@pytest.mark.parametrize("seed", [2, 5])
def test_uninitialised_memory_is_never_read(seed: int, layout: str, request: pytest.FixtureRequest) -> None:
    problem, d_out = make(seed, layout, **FIXED)
    clean = run(problem, d_out)
    request.getfixturevalue("poisoned_empty")
    assert all(torch.equal(a, b) for a, b in zip(run(problem, d_out), clean, strict=True))


def test_memory_beside_the_inputs_is_never_read() -> None:
    problem, d_out = make(7, "causal", **FIXED)
    clean = run(problem, d_out)

    def amid_nan(x: Tensor) -> Tensor:
        wide = torch.full((len(x) + 512, *x.shape[1:]), torch.nan, dtype=x.dtype, device=x.device)
        wide[256:-256] = x
        return wide[256:-256]

    q, k, v, d_out = (amid_nan(x) for x in (problem.q, problem.k, problem.v, d_out))
    assert all(torch.equal(a, b) for a, b in zip(run(problem._replace(q=q, k=k, v=v), d_out), clean, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("seed", [2, 3, 5])
def test_what_nobody_selected_has_no_part(seed: int, value: float) -> None:
    problem, d_out = make(seed, "few", **(FIXED | dict(D=WIDTHS[seed][0], V=WIDTHS[seed][1], T=20)))
    used = selection_mask(problem.selection, len(problem.k)).any(0)
    assert not used.all()
    clean = run(problem, d_out)
    k, v = (x.masked_fill(~used[:, None, None], value) for x in (problem.k, problem.v))
    for poisoned in (problem._replace(k=k), problem._replace(v=v), problem._replace(k=k, v=v)):
        got = run(poisoned, d_out)
        for name in Answer._fields:
            assert torch.equal(getattr(got, name), getattr(clean, name)), name


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("name", ["k", "v"])
def test_nan_in_a_key_shows_in_the_queries_that_selected_it(name: str, seed: int) -> None:
    problem, d_out = make(seed, "causal", **(FIXED | dict(D=WIDTHS[seed][0], V=WIDTHS[seed][1])))
    clean = run(problem, d_out)
    key = int(problem.selection.indices[problem.selection.count.argmax(), 1])
    x = getattr(problem, name).clone()
    x[key, 0, -1] = torch.nan
    got, who = run(problem._replace(**{name: x}), d_out), selection_mask(problem.selection, len(problem.k))[:, key]
    assert got.out[who].isnan().all() and got.lse[who].isnan().all() and got.dq[who].isnan().all()
    for result in ("out", "lse", "dq", "p_sum"):
        assert torch.equal(getattr(got, result)[~who], getattr(clean, result)[~who]), result


def test_a_query_of_which_a_score_is_nan() -> None:
    problem, d_out = make(3, "causal", **FIXED)
    clean = run(problem, d_out)
    t = int(problem.selection.count.argmax())
    problem.selection.scores[t, 0] = torch.nan
    got = run(problem, d_out)
    others = torch.arange(len(d_out), device="cuda") != t
    assert got.out[t].isnan().all() and got.lse[t].isnan().all() and got.dq[t].isnan().all()
    for name in ("out", "lse", "dq", "p_sum"):
        assert torch.equal(getattr(got, name)[others], getattr(clean, name)[others]), name
    unselected = ~selection_mask(problem.selection, len(problem.k))[t]
    assert torch.equal(got.dk[unselected], clean.dk[unselected]) and got.dk[~unselected].isnan().all()
    assert torch.equal(got.dv[unselected], clean.dv[unselected]) and got.dv[~unselected].isnan().all()


@pytest.mark.parametrize("key", [-1, 10_000, 2**31 - 1, -(2**31)])
def test_a_key_that_is_none_is_skipped(key: int) -> None:
    problem, d_out = make(7, "causal", **FIXED)
    t = int(problem.selection.count.argmax())
    indices, count, scores = (x.clone() for x in problem.selection)
    expected = indices.clone()
    slot, last = 1, int(count[t]) - 1
    indices[t, slot] = key
    expected[t, slot:last] = problem.selection.indices[t, slot + 1 : last + 1]
    expected[t, last] = -1
    fewer = count.clone()
    fewer[t] -= 1
    got = run(problem._replace(selection=Selection(indices, count, scores)), d_out)
    right = run(problem._replace(selection=Selection(expected, fewer, scores)), d_out)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(getattr(got, name), getattr(right, name)), name
    assert got.p_sum[t, slot] == 0


def test_large_logits_stay_finite_and_nan_stays_in_its_row() -> None:
    problem, _ = make(3, "causal", **FIXED)
    large, odd = problem.selection.count.topk(2).indices.tolist()
    q = problem.q.clone()
    q[large] *= 300
    q[odd, 0] = torch.nan
    out, lse = gpu_bits.forward(problem._replace(q=q))
    assert out[large].isfinite().all() and lse[large].isfinite().all()
    assert out[odd, 0].isnan().all() and lse[odd, 0].isnan()
    others = torch.ones(q.shape[:2], dtype=torch.bool, device="cuda")
    others[odd, 0] = False
    assert out[others].isfinite().all() and not lse[others].isnan().any()


def test_sums_are_added_to() -> None:
    problem, d_out = make(7, "causal", **FIXED)
    first, out_lse = run(problem, d_out), gpu_bits.forward(problem)
    sums = new_key_sums(problem, EVERYTHING)
    halves = slice(0, 128), slice(128, len(d_out))
    for rows in halves:
        out, lse = (x[rows] for x in out_lse)
        gpu_bits.backward(problem.rows(rows), d_out[rows], out, lse, EVERYTHING, sums)
    for got, expected in zip(sums, (first.dk, first.dv), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_operator_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, d_out = make(3, "causal", **FIXED)
    calls = []
    for name in ("forward", "backward"):
        step = getattr(gpu_bits, name)
        monkeypatch.setattr(gpu_bits, name, lambda *a, name=name, step=step: calls.append(name) or step(*a))
    q, k, v = (x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v))
    made = sparse_attention(q, k, v, problem.selection, softmax_scale=problem.softmax_scale)
    made.out.backward(d_out)
    assert calls == ["forward", "backward"]
    expected = run(problem, d_out)
    assert torch.equal(made.out, expected.out) and torch.equal(q.grad, expected.dq)
    assert torch.equal(k.grad, expected.dk.bfloat16()) and torch.equal(v.grad, expected.dv.bfloat16())
