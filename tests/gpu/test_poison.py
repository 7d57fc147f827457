"""Memory that nobody wrote, and memory beside the inputs, holds NaN: the result keeps its bits. NaN in inputs shows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flash_indexer.testing import Inputs, KernelClass, Result

pytestmark = pytest.mark.gpu
CASES = {
    "smollm2": (KernelClass(64, 64, 8), dict(H=9, G=3, I=8), "mean"),
    "deepseek": (KernelClass(576, 128, 64), dict(H=16, G=1, I=64), "mean"),
    "e4m3": (KernelClass(192, 64, 8), dict(H=6, G=3, I=7), "mean"),
    "e4m3, deepseek": (KernelClass(576, 128, 64), dict(H=16, G=1, I=64), "mean"),
    "padded heads": (KernelClass(128, 32, 64), dict(H=8, G=4, I=37), "mean"),
    "per_head": (KernelClass(128, 64, 8), dict(H=12, G=3, I=12), "per_head"),
    "per_head, rows to spare": (KernelClass(80, 32, 8), dict(H=10, G=2, I=10), "per_head"),
    "sum_logits": (KernelClass(192, 128, 64), dict(H=3, G=3, I=33), "sum_logits"),
}
LAYOUTS = ("documents", "window", "cached_prefix", "fewer_keys", "arbitrary", "short")


@pytest.fixture
def poisoned_empty():
    """torch.empty and its kind are filled with NaN (integers: the largest)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    probe = torch.empty(8, device="cuda")
    assert probe.isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_same_bits(got: Result, expected: Result) -> None:
    for name, a, b in zip(Result._fields, got, expected, strict=True):
        assert b.isfinite().all(), f"{name} without poison"
        assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} elements differ"


@pytest.fixture
def clean(problem, measure, case, layout):
    """The inputs, and the result without poison."""
    sizes, fixed, _ = CASES[case]
    x = problem(f"{case}-{layout}", sizes, layout, **fixed)
    return x, measure(x, **options(case, x))


def options(case: str, x: Inputs) -> dict[str, object]:
    target = CASES[case][2]
    lse = x.lse if case == "deepseek" else None
    rounded = dict(index_dtype="fp8", teacher_dtype="fp8") if case.startswith("e4m3") else {}
    return dict(target=target, lse=lse, token_weight=x.token_weight, workspace_bytes=3 * 2**20, **rounded)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_uninitialised_memory_is_never_read(case, layout, clean, poisoned_empty, measure):
    x, expected = clean
    assert_same_bits(measure(x, **options(case, x)), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_nothing_beside_the_inputs_is_read(case, layout, clean, measure):
    x, expected = clean
    names = ("q", "k", "index_q", "index_k", "index_weights", "lse", "token_weight")
    x = replace(x, **{name: in_the_middle(getattr(x, name)) for name in names})
    assert_same_bits(measure(x, **options(case, x)), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_unseen_keys_do_not_matter(case, layout, clean, measure):
    """Finite ones, however large: a tile's products meet them with a factor of zero."""
    x, expected = clean
    seen = torch.zeros(x.k.shape[0], dtype=torch.bool)
    for start, end in zip(x.key_start.tolist(), x.key_end.tolist(), strict=True):
        seen[start:end] = True
    k, index_k = x.k.clone(), x.index_k.clone()
    k[~seen.to(k.device)], index_k[~seen.to(k.device)] = 1e30, -1e30
    assert_same_bits(measure(replace(x, k=k, index_k=index_k), **options(case, x)), expected)


@pytest.mark.parametrize("tensor", ["q", "index_q", "index_weights"])
@pytest.mark.parametrize("case", ["smollm2", "deepseek", "padded heads", "sum_logits"])
def test_nan_of_a_query_is_shown_there_and_nowhere_else(case, tensor, problem, measure):
    sizes, fixed, _ = CASES[case]
    x = problem(f"{case}-nan", sizes, "documents", **fixed)
    row = int((x.key_end - x.key_start).argmax())
    hit = getattr(x, tensor).clone()
    hit[row] = torch.nan
    expected, got = (measure(y, **options(case, x)) for y in (x, replace(x, **{tensor: hit})))
    assert got.loss.isnan() and got.kl[row].isnan() and got.entropy[row].isnan() == (tensor == "q")
    assert got.d_index_weights[row].isnan().all() and got.d_index_k.isnan().any()
    others = torch.arange(len(got.kl), device="cuda") != row
    for name in ("kl", "entropy", "d_index_q", "d_index_weights"):
        assert torch.equal(getattr(got, name)[others], getattr(expected, name)[others]), name


@pytest.mark.parametrize("tensor", ["k", "index_k"])
@pytest.mark.parametrize("case", ["smollm2", "deepseek", "padded heads", "sum_logits"])
def test_nan_of_a_key_is_shown_where_it_is_seen(case, tensor, problem, measure):
    sizes, fixed, _ = CASES[case]
    x = problem(f"{case}-nan", sizes, "documents", **fixed)
    key = int(x.key_end.max()) - 3
    hit = getattr(x, tensor).clone()
    hit[key] = torch.nan
    got = measure(replace(x, **{tensor: hit}), **options(case, x))
    sees = (x.key_start <= key) & (key < x.key_end)
    assert sees.any() and not sees.all() and torch.equal(got.kl.isnan(), sees)


@pytest.mark.parametrize("case", ["smollm2", "deepseek", "padded heads"])
def test_a_teacher_without_mass_is_nan_there_and_nowhere_else(case, problem, measure):
    """An lse that is not this attention's: every p of the row underflows, and there is no distribution to learn."""
    sizes, fixed, _ = CASES[case]
    x = problem(f"{case}-mass", sizes, "documents", **fixed)
    row = int((x.key_end - x.key_start).argmax())
    lse = x.lse.clone()
    lse[row] = 2000.0
    expected, got = (measure(x, **options(case, x) | dict(lse=y)) for y in (x.lse, lse))
    assert got.loss.isnan() and got.kl[row].isnan() and got.entropy[row].isnan() and got.d_index_k.isnan().any()
    others = torch.arange(len(got.kl), device="cuda") != row
    for name in ("kl", "entropy", "d_index_q", "d_index_weights"):
        assert torch.equal(getattr(got, name)[others], getattr(expected, name)[others]), name


@pytest.mark.parametrize("case", ["smollm2", "sum_logits"])
def test_nan_of_a_key_that_the_teacher_gives_nothing(case, problem, measure):
    """Key 4 is the only one of its thread that row 4 sees."""
    sizes, fixed, _ = CASES[case]
    x = problem(f"{case}-nothing", sizes, "causal", **fixed)
    q, k, index_k = x.q.clone(), x.k.clone(), x.index_k.clone()
    q[4], k[4], index_k[4] = q[4, :1], -100 * q[4, :1], torch.nan
    k[:4] = 0
    got = measure(replace(x, q=q, k=k, index_k=index_k), target=CASES[case][2])
    assert torch.equal(got.kl.isnan(), torch.arange(len(got.kl), device="cuda") >= 4)


def in_the_middle(x: torch.Tensor, rows: int = 128) -> torch.Tensor:
    """x as a contiguous view into a larger tensor of NaN."""
    around = x.new_full((x.shape[0] + 2 * rows, *x.shape[1:]), torch.nan)
    around[rows : rows + x.shape[0]] = x
    return around[rows : rows + x.shape[0]]
