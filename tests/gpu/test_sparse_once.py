"""Every kernel of the sparse stage on a few small problems, against float64: what sanitizers are run on.

Truths are made on the CPU, where no sanitizer slows them. Each problem has several tiles of queries and of keys, rows
without keys, and a workspace that takes it in parts; a CTA has several tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from sparse_problems import judge, make, step

from flash_indexer import reference, select_keys, sparse_indexer_kl
from flash_indexer.kernels.sm_90.sizes import BUILDERS, SELECT_ORDERED, SELECT_ROW
from flash_indexer.ops import launch
from flash_indexer.ops.sparse import gpu_body, gpu_index
from flash_indexer.testing import Shape, assert_close
from flash_indexer.testing.sparse import selection_mask

DOCUMENTS = {False: ((1, 1), (170, 200), (3, 0), (30, 41)), True: ((1, 1), (100, 130), (3, 0), (30, 41))}  # wide heads
ALL, WORKSPACE = ("select", "sparse_rows"), 2**18
TILES = (
    "bits", "bits_keys", "bits_lists", "bits_numbers", "bits_slots", "bits_attention", "bits_gradients_query",
    "bits_gradients_key", "sparse_index_scores",
)  # fmt: skip
ABSORBED = ("sparse_attention_mla", "sparse_delta", "sparse_gradients_mla")
EXACT = ("sparse_exact_table", "sparse_exact_grid", "sparse_exact_finish")
INDEX_SUMS = ("sparse_index_largest", "sparse_index_table", "sparse_index_finish")
FORMS = {"gathered": ("sparse_index_gradients",), "dense": ("sparse_scatter",)}  # of the index gradients


class Case(NamedTuple):
    """V: below 0 in the absorbed form. half: whether a token's gradients are one CTA's work there."""

    H: int
    G: int
    D: int
    V: int
    I: int
    E: int
    form: str
    kernels: tuple[str, ...]
    deterministic: bool = True
    half: bool = False


CASES = {
    "64 columns": Case(4, 2, 64, 48, 3, 64, "dense", TILES),
    "128 columns": Case(3, 1, 128, 96, 5, 128, "gathered", TILES + INDEX_SUMS),
    "absorbed": Case(70, 1, 576, -512, 3, 64, "gathered", ABSORBED + EXACT + INDEX_SUMS),
    "absorbed, any order": Case(66, 1, 576, -512, 3, 128, "gathered", ABSORBED, deterministic=False),
    "absorbed, few heads": Case(9, 1, 576, -512, 3, 128, "dense", ABSORBED + EXACT, half=True),
    "absorbed, few heads, any order": Case(
        5, 1, 576, -512, 9, 64, "gathered", ABSORBED, deterministic=False, half=True
    ),
}  # fmt: skip


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, int]]]:
    """Kernels that were launched, by name, with the static sizes of the last launch."""
    found: dict[str, dict[str, int]] = {}
    load = launch.load

    def noted(name: str, **static: int) -> object:
        found[name] = static
        return load(name, **static)

    monkeypatch.setattr(launch, "load", noted)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_all_steps(name: str, launched: dict[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.setattr(gpu_index, "dense_is_faster", lambda *_: case.form == "dense")
    monkeypatch.setattr(gpu_body, "_HALF_HEADS", case.H if case.half else 0)
    shape = Shape(DOCUMENTS[case.H * case.D > 2**14], H=case.H, G=case.G, D=case.D, I=case.I, E=case.E)
    x, v, d_out = make(shape, case.V, "cpu")
    options = dict(topk=100, kl="backward", deterministic=case.deterministic, workspace_bytes=WORKSPACE)
    made = step(x, v, d_out, **options)
    if "sparse_index_scores" in case.kernels:
        tensors = (y.cuda() for y in (x.q, x.k, x.index_q, x.index_k, x.index_weights))
        alone = sparse_indexer_kl(*tensors, made[0].selection, softmax_scale=x.softmax_scale, workspace_bytes=WORKSPACE)
        torch.testing.assert_close(alone.kl, made[0].kl, rtol=1e-4, atol=1e-5)
    judge(x, v, d_out, made)
    assert set(ALL + case.kernels + FORMS[case.form]) <= set(launched)
    if v is None:
        assert launched["sparse_gradients_mla"] == dict(exact=int(case.deterministic), half=int(case.half))


@pytest.mark.gpu
@pytest.mark.parametrize("topk", [64, SELECT_ORDERED + 4])
def test_selection_of_long_rows(topk: int) -> None:
    S, generator = SELECT_ROW + 300, torch.Generator().manual_seed(0)
    index_q, index_k = (torch.randn(n, E, generator=generator).bfloat16() for n, E in ((3 * 2, 64), (S, 64)))
    index_q, weights = index_q.view(3, 2, 64), torch.randn(3, 2, generator=generator)
    ends = torch.tensor([100, SELECT_ROW + 1, S], dtype=torch.int32)
    tensors = (y.cuda() for y in (index_q, index_k, weights))
    got = select_keys(*tensors, key_start=0 * ends.cuda(), key_end=ends.cuda(), topk=topk)
    scores = reference.indexer_scores(index_q.double(), index_k.double(), weights.double(), 0 * ends, ends)
    expected = reference.selected_keys(scores, 0 * ends, ends, topk)
    mask = selection_mask(got, S).cpu()
    assert int((mask != expected).sum()) <= 2 and got.count.tolist() == [min(topk, 100), topk, topk]
    at = scores.gather(1, got.indices.cpu().clamp_min(0).long())[:, : min(topk, 100)]
    assert_close("scores", got.scores.cpu()[:, : min(topk, 100)], at, at.float())


def test_the_cases_have_every_kernel_of_the_stage() -> None:
    of_the_stage = {name for name in BUILDERS if name.startswith(("select", "sparse_", "bits"))}
    assert of_the_stage == {*ALL, *(name for c in CASES.values() for name in c.kernels + FORMS[c.form])}
    absorbed = [case for case in CASES.values() if case.V < 0]
    assert {(case.half, case.deterministic) for case in absorbed} == {(a, b) for a in (0, 1) for b in (0, 1)}
    gathered = [case for case in CASES.values() if case.form == "gathered"]
    assert {(case.E, case.deterministic) for case in gathered} == {(E, order) for E in (64, 128) for order in (0, 1)}
    assert {case.E for case in CASES.values() if case.form == "dense"} == {64, 128}
