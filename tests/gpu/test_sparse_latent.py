"""Attention over selected keys in MLA's absorbed form, and its gradients, on the GPU against float64."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flash_indexer import reference
from flash_indexer.ops import Selection, SparseProblem
from flash_indexer.ops.sparse import gpu_body
from flash_indexer.ops.sparse.gpu_body import latent_attention, latent_gradients
from flash_indexer.testing import assert_close

pytestmark = pytest.mark.gpu
D, V = 576, 512
SCALE = D**-0.5
LOG2E = 1.4426950408889634
HEADS = (128, 64, 96, 32, 100, 1)  # 32 and 96 fill no warpgroup, 1 and 100 no 8 rows either
SIZES = (
    (1, 1, 1),
    (1, 64, 64),
    (3, 1, 64),
    (3, 4096, 2048),
    (70, 300, 100),
    (140, 4096, 2048),
    (200, 64, 2048),
)  # T, S, K
GRADIENTS = ("dq", "dk", "p_sum")


class Problem(NamedTuple):
    """Keys in ascending order in the first `count` slots of a row, -1 behind them; d_out is the gradient of out."""

    q: Tensor
    k: Tensor
    indices: Tensor
    count: Tensor
    d_out: Tensor


class Answer(NamedTuple):
    """What both calls return."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    p_sum: Tensor


def make(T: int, S: int, K: int, H: int, seed: int = 0) -> Problem:
    """The first query selects all it may, the second nothing, the third a single key, the others any number."""
    generator = torch.Generator("cuda").manual_seed(seed)
    q, k, d_out = (
        torch.randn(*shape, device="cuda", generator=generator).bfloat16() for shape in ((T, H, D), (S, D), (T, H, V))
    )
    most = min(K, S)
    rng = random.Random(seed)
    counts = [most, 0, 1, *(rng.randint(0, most) for _ in range(T))][:T]
    count = torch.tensor(counts, dtype=torch.int32, device="cuda")
    keys = torch.rand(T, S, device="cuda", generator=generator).argsort(-1)[:, :most]
    absent = torch.arange(most, device="cuda") >= count[:, None]
    keys = keys.masked_fill(absent, S).sort(-1).values
    indices = torch.full((T, K), -1, dtype=torch.int32, device="cuda")
    indices[:, :most] = torch.where(keys == S, -1, keys)
    return Problem(q, k, indices, count, d_out)


def crowded(T: int, S: int, K: int, H: int) -> Problem:
    """Every slot full, drawn key tile by key tile rather than from all S, which takes little memory."""
    generator = torch.Generator("cuda").manual_seed(3)
    q, k, d_out = (
        torch.randn(*shape, device="cuda", generator=generator).bfloat16() for shape in ((T, H, D), (S, D), (T, H, V))
    )
    first = torch.arange(K, device="cuda") * (S // K)
    indices = first + torch.randint(0, S // K, (T, K), device="cuda", generator=generator)
    count = torch.full((T,), K, dtype=torch.int32, device="cuda")
    return Problem(q, k, indices.int(), count, d_out)


def selected(x: Problem) -> Tensor:
    """bool [T, S]."""
    mask = torch.zeros(len(x.q), len(x.k) + 1, dtype=torch.bool, device="cuda")
    return mask.scatter_(1, torch.where(x.indices < 0, len(x.k), x.indices).long(), True)[:, :-1]


def softmax(q: Tensor, k: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [T, H, S] and lse, zeros and -inf in rows without keys."""
    logits = reference.teacher_logits(q, k[:, None], SCALE).masked_fill(~mask[:, None], -torch.inf)
    lse = logits.logsumexp(-1)
    p = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return p, lse


def at_slots(x: Problem, p: Tensor) -> Tensor:
    """Sums over heads [T, S] at the selected keys, zero behind them."""
    return p.sum(1).gather(1, x.indices.clamp_min(0).long()).masked_fill(x.indices < 0, 0.0)


def truth_of(x: Problem) -> Answer:
    """By autograd in float64."""
    q, k = (y.double().requires_grad_() for y in (x.q, x.k))
    p, lse = softmax(q, k, selected(x))
    out = p @ k[:, :V]
    dq, dk = torch.autograd.grad(out, (q, k), x.d_out.double())
    return Answer(*(y.detach() for y in (out, lse, dq, dk, at_slots(x, p))))


def eager_of(x: Problem, truth: Answer, *, turn: float = 1.0, shift: int = 0) -> Answer:
    """In float32 with probabilities and dS rounded to bfloat16 for their products, as kernels of attention do.

    truth: of which out and lse, rounded, are what the gradients are taken at. turn: a factor that dS has when it is
    rounded. shift: features by which the sums of logits begin later.
    """
    q, k, d_out, mask = x.q.float(), x.k.float(), x.d_out.float(), selected(x)
    turned = q.roll(shift, -1), k.roll(shift, -1)
    _, lse = softmax(*turned, mask)
    given = truth.lse.float().masked_fill(x.count[:, None] == 0, torch.inf)
    exponents = reference.teacher_logits(turned[0], turned[1][:, None], SCALE) * LOG2E - (given * LOG2E)[..., None]
    p = exponents.exp2().masked_fill(~mask[:, None], 0.0)
    delta = (truth.out.bfloat16().float() * d_out).sum(-1, keepdim=True)
    ds = ((p * (d_out @ k[:, :V].T - delta) * SCALE * turn).bfloat16().float()) / turn
    low = p.bfloat16().float()
    dk = torch.einsum("ths,thd->sd", ds, q)
    dk[:, :V] += torch.einsum("ths,thv->sv", low, d_out)
    return Answer((low @ k[:, :V]).bfloat16(), lse, (ds @ k).bfloat16(), dk, at_slots(x, p))


def worst_of_four(x: Problem, truth: Answer) -> Answer:
    """Each element from that evaluation which errs most there: a single one may be right by luck where rows are few."""
    worst = eager_of(x, truth)
    for turn, shift in ((1.19, 100), (1.41, 233), (1.68, 391)):
        other = eager_of(x, truth, turn=turn, shift=shift)
        errors = [[(a.double() - t).abs().nan_to_num() for a, t in zip(r, truth, strict=True)] for r in (worst, other)]
        worst = Answer(*(torch.where(m >= n, a, b) for m, n, a, b in zip(*errors, worst, other, strict=True)))
    return worst


def run(x: Problem, truth: Answer | None = None, *, deterministic: bool = True) -> Answer:
    """truth: the gradients are taken at its out and lse, not at the kernel's own."""
    forward = latent_attention(x.q, x.k, x.indices, x.count, softmax_scale=SCALE)
    out, lse = forward if truth is None else (truth.out.bfloat16(), truth.lse.float())
    gradients = latent_gradients(
        x.q, x.k, x.indices, x.count, out, lse, x.d_out, softmax_scale=SCALE, deterministic=deterministic
    )
    return Answer(*forward, *gradients)


def whole(y: Tensor) -> Tensor:
    """Rows of one number or two are judged together."""
    return y if not len(y) or y[0].numel() >= 64 else y.reshape(1, -1)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "T{}-S{}-K{}".format(*size))
@pytest.mark.parametrize("H", HEADS)
def test_against_float64(H: int, size: tuple[int, int, int]) -> None:
    x = make(*size, H)
    truth = truth_of(x)
    eager, got = worst_of_four(x, truth), run(x, truth)
    any_order = run(x, truth, deterministic=False)
    assert_close("dk, added in any order", any_order.dk, truth.dk, eager.dk)
    assert all(torch.equal(a, b) for a, b in zip(any_order[:3] + any_order[4:], got[:3] + got[4:], strict=True))
    several = x.count > 1  # of a single key dS is zero: what stands in dq is the rounding of its terms
    for name, *each in zip(Answer._fields, got, truth, eager, strict=True):
        assert_close(name, *(whole(y[several] if name == "dq" else y) for y in each))
    terms = SCALE * x.d_out.double().norm(dim=-1) * x.k.double().norm(dim=-1).max() ** 2
    assert (got.dq.double().norm(dim=-1) <= 1e-4 * terms)[~several].all()
    nothing = x.count == 0
    assert (got.out[nothing] == 0).all() and (got.lse[nothing] == -torch.inf).all()
    assert (got.dq[nothing] == 0).all() and (got.p_sum[x.indices < 0] == 0).all()


@pytest.mark.parametrize("H", [1, 128])
def test_a_single_key(H: int) -> None:
    x = make(1, 1, 1, H)
    got = run(x)
    assert torch.equal(got.out, x.k[0, :V].expand_as(got.out))
    logits = reference.teacher_logits(x.q.double(), x.k[:, None].double(), SCALE)[..., 0]
    torch.testing.assert_close(got.lse.double(), logits, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got.p_sum, torch.full_like(got.p_sum, H), rtol=1e-5, atol=0)
    torch.testing.assert_close(got.dk[:, :V].double(), x.d_out.double().sum(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
def test_what_nobody_selected_has_no_part(poison: float) -> None:
    x = make(40, 900, 100, 128)
    used = selected(x).any(0)
    poisoned = x._replace(k=x.k.masked_fill(~used[:, None], poison))
    for name, a, b in zip(Answer._fields, run(poisoned), run(x), strict=True):
        assert torch.equal(a, b), name
    got = run(poisoned, deterministic=False)
    assert got.dk.isfinite().all() and (got.dk[~used] == 0).all()


@pytest.mark.parametrize("key", [-1, 900, 2**31 - 1, -(2**31)])
def test_a_key_that_is_none_is_neither_read_nor_added_to(key: int) -> None:
    x = make(40, 900, 100, 128)
    indices = x.indices.clone()
    indices[0, 5] = key
    got = run(x._replace(indices=indices))
    with_zeros = torch.cat([x.k, torch.zeros_like(x.k[:1])])
    indices[0, 5] = 900
    expected = run(x._replace(indices=indices, k=with_zeros))
    for name in ("out", "lse", "dq", "p_sum"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize("H", [128, 48])
@pytest.mark.parametrize(("T", "S"), [(2048, 16384), (2048, 131072)])
def test_a_hundred_runs_give_the_same_bits(T: int, S: int, H: int) -> None:
    """131,072 rows of sums don't fit the L2 cache: loads, copies and arrivals then wait for additions to memory."""
    x = crowded(T, S, 2048, H)
    first = run(x)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(run(x), first, strict=True))
    for _ in range(10):
        again = run(x, deterministic=False)
        assert all(torch.equal(a, b) for a, b in zip(again[:3] + again[4:], first[:3] + first[4:], strict=True))
        assert (again.dk - first.dk).norm() <= 2e-4 * first.dk.norm()


def test_the_keys_gradients_of_runs_of_queries_add_up() -> None:
    """Sums of integers: those of two runs of queries are in the units of either, and add up to the whole's."""
    x = make(300, 4096, 2048, 128)
    whole_run = run(x)
    dk = torch.zeros_like(whole_run.dk)
    for rows in (slice(0, 101), slice(101, 300)):
        part = Problem(*(y if y is x.k else y[rows].contiguous() for y in x))
        out, lse = whole_run.out[rows], whole_run.lse[rows]
        latent_gradients(part.q, part.k, part.indices, part.count, out, lse, part.d_out, softmax_scale=SCALE, dk=dk)
    assert (dk - whole_run.dk).norm() <= 1e-4 * whole_run.dk.norm()


def test_more_queries_than_integers_hold_terms_of() -> None:
    """The sums are taken for 8,192 queries at a time; here all select the same keys, and none of one key overflows."""
    x = crowded(8192 + 100, 64, 64, 2)
    got, expected = run(x), run(x, deterministic=False)
    assert (got.dk - expected.dk).norm() <= 1e-4 * expected.dk.norm()
    assert torch.equal(got.dq, expected.dq) and torch.equal(got.p_sum, expected.p_sum)


def test_terms_of_very_different_sizes() -> None:
    """Of 2^-8 to 2^8 times the usual, and probabilities of one: most terms of some keys pass into the high sums."""
    x = make(200, 900, 100, 128)
    generator = torch.Generator("cuda").manual_seed(1)
    exponents = torch.randint(-8, 9, (len(x.q), 1, 1), device="cuda", generator=generator)
    x = x._replace(d_out=(x.d_out * 2.0**exponents).bfloat16(), q=x.q * 8)
    got, expected = run(x).dk, run(x, deterministic=False).dk
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    rows = expected.norm(dim=-1)
    assert ((got - expected).norm(dim=-1) <= 2e-2 * rows + 2e-6 * rows.max()).all()


def test_nan_in_a_query_is_in_the_gradients_of_its_keys_alone() -> None:
    x = make(40, 900, 100, 128)
    d_out = x.d_out.clone()
    d_out[9, 3, 5] = torch.nan
    got = run(x._replace(d_out=d_out)).dk
    touched = selected(x)[9]
    assert got[touched].isnan().all() and got[~touched].isfinite().all() and bool(touched.any())


def test_all_is_reproducible_in_any_part() -> None:
    x = make(300, 4096, 2048, 128)
    first = run(x)
    rows = slice(101, 250)
    part = run(Problem(*(y if y is x.k else y[rows].contiguous() for y in x)))
    assert all(torch.equal(getattr(part, name), getattr(first, name)[rows]) for name in ("out", "lse", "dq", "p_sum"))


def test_large_logits_stay_finite_and_nan_stays_in_its_row() -> None:
    x = make(40, 900, 100, 128)
    q = x.q.clone()
    q[7] *= 300
    q[9, 3] = torch.nan
    got = run(x._replace(q=q))
    assert got.out[7].isfinite().all() and got.lse[7].isfinite().all()
    assert got.out[9, 3].isnan().all() and got.lse[9, 3].isnan()
    others = torch.ones(40, 128, dtype=torch.bool, device="cuda")
    others[9, 3] = False
    assert got.out[others].isfinite().all() and not got.lse[others].isnan().any()


def test_a_query_whose_scores_are_nan_has_nan_and_no_other() -> None:
    x = make(70, 300, 100, 4)
    scores = torch.zeros(x.indices.shape, device="cuda")
    scores[[9, 40]] = torch.nan
    problem = SparseProblem(
        x.q, x.k[:, None], None, Selection(x.indices, x.count, scores), SCALE, V, True, workspace_bytes=2**29
    )
    out, lse = gpu_body.forward(problem)
    wrong = torch.zeros(70, dtype=torch.bool, device="cuda")
    wrong[[9, 40]] = True
    assert out[wrong].isnan().all() and lse[wrong].isnan().all()
    assert out[~wrong].isfinite().all() and not lse[~wrong].isnan().any()
