"""judge.metrics against dense float64 formulas, one query at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_indexer import reference
from flash_indexer.judge.metrics import MetricSums, block_sums, layer_sums, ranked_keys
from flash_indexer.models.capture import LayerCapture

MakeCapture = Callable[..., Any]
KS = (4, 7, 16)
TINY = 2000  # bytes: a few query rows a chunk


def target_and_scores(c: LayerCapture) -> tuple[Tensor, Tensor]:
    p = reference.target_distribution(c.q, c.k, c.softmax_scale, c.key_start, c.key_end)
    return p, reference.indexer_scores(c.index_q, c.index_k, c.index_weights, c.key_start, c.key_end)


def dense_sums(c: LayerCapture, ks: tuple[int, ...], min_visible: int, sink: int) -> dict[str, object]:
    """The specification, one query at a time over its visible keys only."""
    p_all, i_all = target_and_scores(c)
    kl = uniform = 0.0
    queries = 0
    at_k: dict[int, list[float]] = {}
    for t, (start, end) in enumerate(zip(c.key_start.tolist(), c.key_end.tolist(), strict=True)):
        n = end - start
        if n == 0:
            continue
        p, i = p_all[t, start:end], i_all[t, start:end]
        queries += 1
        kl += float((p * (p.log() - i.log_softmax(0))).sum())
        uniform += float((p * (p * n).log()).sum())
        for k in ks:
            if n >= max(4 * k, min_visible):
                chosen = set(sorted(range(n), key=lambda s: -float(i[s]))[:k])
                oracle = set(sorted(range(n), key=lambda s: -float(p[s]))[:k])
                window = set(range(sink)) | set(range(n - (k - sink), n))
                row = [1.0, *(float(sum(p[s] for s in keys)) for keys in (chosen, oracle, window))]
                row.append(len(chosen & oracle) / k)
                at_k[k] = [a + b for a, b in zip(at_k.get(k, [0.0] * 5), row, strict=True)]
    return {"queries": queries, "kl": kl, "uniform_kl": uniform, "at_k": at_k}


def assert_same(got: MetricSums, expected: dict[str, object]) -> None:
    at_k = expected["at_k"]
    assert isinstance(at_k, dict)
    assert got.queries == expected["queries"]
    assert got.kl == pytest.approx(expected["kl"], rel=1e-10)
    assert got.uniform_kl == pytest.approx(expected["uniform_kl"], rel=1e-10)
    assert list(got.at_k) == sorted(at_k)
    for k, row in at_k.items():
        sums = got.at_k[k]
        values = [sums.queries, sums.indexer, sums.oracle, sums.window, sums.recall]
        assert values == pytest.approx(row, rel=1e-10), k


LAYOUTS = {
    "one document": ([67], None),
    "several, one of length 1": ([1, 41, 1, 90], None),
    "some queries see nothing": ([20, 33, 5], [13, 33, 70]),
    "too short for any k": ([15, 2, 1], None),
}


@pytest.mark.parametrize("workspace_bytes", [TINY, 2**29])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_sums_equal_dense_formulas(layout: str, workspace_bytes: int, make_capture: MakeCapture) -> None:
    capture = make_capture(*LAYOUTS[layout])
    for min_visible in (0, 40):
        got = layer_sums(capture, ks=KS, min_visible=min_visible, sink=2, workspace_bytes=workspace_bytes)
        assert_same(got, dense_sums(capture, KS, min_visible, sink=2))
    assert (layout == "too short for any k") == (not got.at_k)


def test_the_layouts_hold_what_they_promise(make_capture: MakeCapture) -> None:
    nothing = make_capture(*LAYOUTS["some queries see nothing"])
    visible = nothing.key_end - nothing.key_start
    assert (visible == 0).sum() == 7 and (visible == 1).sum() >= 1 and nothing.k.shape[0] != nothing.q.shape[0]


def test_parts_add_up_to_the_whole(make_capture: MakeCapture) -> None:
    capture = make_capture([30, 61, 17])
    whole = layer_sums(capture, ks=KS, sink=2)
    parts = MetricSums()
    for begin, end in ((0, 30), (30, 58), (58, 108)):
        rows = slice(begin, end)
        names = ("q", "lse", "index_q", "index_weights", "key_start", "key_end")
        part = replace(capture, **{name: getattr(capture, name)[rows] for name in names})
        parts += layer_sums(part, ks=KS, sink=2)
    expected = dense_sums(capture, KS, 0, sink=2)
    assert_same(whole, expected)
    assert_same(parts, expected)


def test_sums_over_different_queries_are_not_added(make_capture: MakeCapture) -> None:
    capture = make_capture([40])
    with pytest.raises(ValueError, match="min_visible must agree to be added, got 16 and 30"):
        layer_sums(capture, ks=(4,)) + layer_sums(capture, ks=(4,), min_visible=30)


def test_k_counts_only_queries_with_four_times_as_many_keys(make_capture: MakeCapture) -> None:
    capture = make_capture([32])
    sums = layer_sums(capture, ks=(4, 8, 9))
    assert {k: s.queries for k, s in sums.at_k.items()} == {4: 32 - 15, 8: 1}
    sums = layer_sums(capture, ks=(4, 8), min_visible=30)
    assert {k: (s.queries, s.min_visible) for k, s in sums.at_k.items()} == {4: (3, 30), 8: (1, 32)}


def test_window_is_the_first_visible_keys_and_the_most_recent() -> None:
    """Two documents of 20; the last query of the second; p = 2**-s tells which keys were taken."""
    p = torch.zeros(1, 40, dtype=torch.float64)
    p[0, 20:] = 2.0 ** -torch.arange(20, dtype=torch.float64)
    scores = torch.full((1, 40), -torch.inf, dtype=torch.float64)
    scores[0, 20:] = torch.arange(20).double()  # the indexer prefers the most recent
    sums = block_sums(p, scores, torch.tensor([20]), torch.tensor([40]), ks=(5,), sink=2).at_k[5]
    total = float(p.sum())
    assert sums.window == pytest.approx(sum(2.0**-s for s in (0, 1, 17, 18, 19)) / total)
    assert sums.indexer == pytest.approx(sum(2.0**-s for s in (15, 16, 17, 18, 19)) / total)
    assert sums.oracle == pytest.approx(sum(2.0**-s for s in range(5)) / total)
    assert sums.recall == 0


def test_of_equal_scores_the_earlier_key_is_ranked_first() -> None:
    """Also of zeros of either sign; and the first of the ranked keys are the top keys of any smaller k."""
    scores = torch.tensor([[3.0, 1.0, 7.0, 1.0, 1.0, 5.0], [2.0] * 6, [-0.0, 0.0, 4.0, 4.0, -0.0, 0.0]])
    bounds = torch.zeros(3), torch.full((3,), 6)
    assert ranked_keys(scores, *bounds, 4).tolist() == [[2, 5, 0, 1], [0, 1, 2, 3], [2, 3, 0, 1]]
    assert ranked_keys(scores, *bounds, 9).tolist()[2] == [2, 3, 0, 1, 4, 5]
    few = ranked_keys(scores, torch.tensor([3, 0, 2]), torch.tensor([5, 2, 2]), 4)
    assert few.tolist() == [[3, 4, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("workspace_bytes", [TINY, 2**29])
def test_a_constant_indexer_is_the_uniform_prediction(workspace_bytes: int, make_capture: MakeCapture) -> None:
    """All scores tie: KL is uniform's, and the top k are the first k keys, in chunks of any size."""
    capture = make_capture([9, 60])
    capture = replace(capture, index_weights=torch.zeros_like(capture.index_weights))
    sums = layer_sums(capture, ks=(4, 8), workspace_bytes=workspace_bytes)
    assert sums.kl == pytest.approx(sums.uniform_kl, rel=1e-10)
    p, _ = target_and_scores(capture)
    rows = range(9 + 31, 69)
    assert sums.at_k[8].indexer == pytest.approx(sum(float(p[t, 9:17].sum()) for t in rows), rel=1e-10)


def test_tied_targets_count_as_hits_as_far_as_they_have_room() -> None:
    """p is 0.5 at one key and equal elsewhere: any choice with that key is a top k; unseen keys are none."""
    p = torch.full((2, 20), 0.5 / 15, dtype=torch.float64)
    p[:, 16:] = 0
    p[:, 3] = 0.5
    scores = torch.zeros(2, 20, dtype=torch.float64)
    scores[0, [3, 10, 11, 12]] = 1.0
    scores[1, [8, 10, 11, 12]] = 1.0
    scores[:, 16:] = -torch.inf
    bounds = torch.tensor([0, 0]), torch.tensor([16, 16])
    first, second = (
        block_sums(p[t : t + 1], scores[t : t + 1], *(b[t : t + 1] for b in bounds), ks=(4,)) for t in (0, 1)
    )
    assert first.at_k[4].recall == pytest.approx(1.0)
    assert second.at_k[4].recall == pytest.approx(0.75)


def test_the_oracle_is_never_beaten_and_recall_of_a_perfect_indexer_is_one(make_capture: MakeCapture) -> None:
    capture = make_capture([80], seed=3)
    p, scores = target_and_scores(capture)
    for t in range(80):
        bounds = capture.key_start[t : t + 1], capture.key_end[t : t + 1]
        for k, sums in block_sums(p[t : t + 1], scores[t : t + 1], *bounds, ks=KS).at_k.items():
            assert sums.oracle >= max(sums.indexer, sums.window) - 1e-12, (t, k)
    perfect = p.log().masked_fill(scores == -torch.inf, -torch.inf)
    sums = block_sums(p, perfect, capture.key_start, capture.key_end, ks=(16,))
    assert sums.kl == pytest.approx(0, abs=1e-9)
    assert sums.at_k[16].recall == sums.at_k[16].queries
    assert sums.at_k[16].indexer == pytest.approx(sums.at_k[16].oracle)


def test_float32_follows_float64(make_capture: MakeCapture) -> None:
    capture = make_capture([1, 130])
    single = replace(
        capture,
        **{n: getattr(capture, n).float() for n in ("q", "k", "v", "lse", "index_q", "index_k", "index_weights")},
    )
    got, expected = layer_sums(single, ks=(8, 32)), layer_sums(capture, ks=(8, 32))
    assert got.kl == pytest.approx(expected.kl, rel=1e-4)
    assert got.uniform_kl == pytest.approx(expected.uniform_kl, rel=1e-4)
    for k in (8, 32):
        assert got.at_k[k].indexer == pytest.approx(expected.at_k[k].indexer, rel=1e-4)


def test_a_nan_weight_is_not_hidden(make_capture: MakeCapture) -> None:
    capture = make_capture([40])
    capture.index_weights[5, 1] = torch.nan
    assert layer_sums(capture, ks=(4,)).kl != layer_sums(capture, ks=(4,)).kl


def test_a_k_below_the_sink_is_refused(make_capture: MakeCapture) -> None:
    with pytest.raises(ValueError, match=r"layer_sums: k must be at least max\(1, sink\) = 1, got 0"):
        layer_sums(make_capture([8]), ks=(2, 0), sink=0)


def test_rows_of_which_topk_takes_other_keys_are_counted() -> None:
    """Scores of three values, so that most rows tie; rows that see from 1 to 40 keys of a second document."""
    draw = torch.Generator().manual_seed(0)
    start, end = torch.full((40,), 5), torch.arange(6, 46)
    scores = torch.randint(3, (40, 45), generator=draw).double()
    seen = (torch.arange(45) >= 5) & (torch.arange(45) < end[:, None])
    scores = scores.masked_fill(~seen, -torch.inf)
    found = block_sums(torch.rand(40, 45).double() * seen, scores, start, end, ks=(8, 16)).ties
    for k, tie in found.items():
        otherwise = 0
        for row, last in zip(scores, end.tolist(), strict=True):
            ranked = row[5:last].sort(descending=True, stable=True)
            if last - 5 > k and ranked.values[k - 1] == ranked.values[k]:
                earliest = set((ranked.indices[:k] + 5).tolist())
                otherwise += earliest != set(scores[end == last].topk(k).indices[0].tolist())
        assert tie.queries == 40 - k and 0 < tie.taken_otherwise == otherwise <= tie.tied_rows
    distinct = torch.rand(40, 45, generator=draw).double().masked_fill(~seen, -torch.inf)
    again = block_sums(torch.rand(40, 45).double() * seen, distinct, start, end, ks=(8,)).ties[8]
    assert (again.tied_rows, again.taken_otherwise) == (0, 0)


@pytest.mark.parametrize("workspace_bytes", [TINY, 2**29])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ties_at_rank_k_are_counted(layout: str, workspace_bytes: int, make_capture: MakeCapture) -> None:
    """One index head with positive weights: every score is 0 or above, and about half are exact zeros."""
    capture = make_capture(*LAYOUTS[layout])
    one = replace(capture, index_q=capture.index_q[:, :1], index_weights=capture.index_weights[:, :1].abs())
    _, scores = target_and_scores(one)
    expected: dict[int, list[int]] = {}
    for row, start, end in zip(scores.tolist(), one.key_start.tolist(), one.key_end.tolist(), strict=True):
        ranked = sorted(row[start:end], reverse=True)
        for k in KS:
            if len(ranked) > k:
                counts = expected.setdefault(k, [0, 0])
                counts[0] += 1
                counts[1] += ranked[k - 1] == ranked[k]
    ties = layer_sums(one, ks=KS, workspace_bytes=workspace_bytes).ties
    assert {k: [t.queries, t.tied_rows] for k, t in ties.items()} == dict(sorted(expected.items()))
    if layout == "one document":
        assert ties[16].queries == 67 - 16 and 0 < ties[16].tied_rows < ties[16].queries
        assert 0 <= ties[16].taken_otherwise <= ties[16].tied_rows
    many = layer_sums(capture, ks=KS, workspace_bytes=workspace_bytes).ties
    assert [t.queries for t in many.values()] == [t.queries for t in ties.values()]
