"""judge.serving and evaluate(serve=...): against rounding written out in float64, and against sets of keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flash_indexer import reference
from flash_indexer.judge.capture import chunk_scores
from flash_indexer.judge.evaluation import evaluate
from flash_indexer.judge.plots import plot_mass, plot_perplexity
from flash_indexer.judge.report import write_report
from flash_indexer.judge.scores import Evaluation
from flash_indexer.judge.serving import ARITHMETICS, OverlapSums, add_overlaps, overlap_sums, served
from flash_indexer.judge.verdict import summary_lines, verdict
from flash_indexer.models.attach import IndexerHandle, LayerCapture, attach

K = 8
Batches = list[dict[str, Tensor]]
MakeCapture = Callable[..., Any]
Rounded = Callable[[Tensor, str], Tensor]


def scores(c: LayerCapture, rounded: Rounded | None = None, arithmetic: str = "") -> Tensor:
    index_q, index_k = c.index_q.double(), c.index_k.double()
    if rounded is not None:
        index_q, index_k = rounded(index_q, arithmetic), rounded(index_k, arithmetic)
    return reference.indexer_scores(index_q, index_k, c.index_weights.double(), c.key_start, c.key_end)


def top(ranked: Tensor, visible: Tensor, k: int) -> Tensor:
    """bool [T, S]: the k largest of those visible, of equal ones the lowest."""
    keys = ranked.masked_fill(~visible, -torch.inf).argsort(descending=True, stable=True)[:, :k]
    return torch.zeros_like(visible).scatter(1, keys, True) & visible


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_scores_are_those_of_rounded_rows(arithmetic: str, make_capture: MakeCapture, rounded: Rounded) -> None:
    capture = make_capture([33, 1, 20])
    capture = replace(capture, index_q=capture.index_q.float().double(), index_k=capture.index_k.float().double())
    every = slice(0, 54)
    got = chunk_scores(served(capture, arithmetic), every, every, capture.key_start, capture.key_end)
    torch.testing.assert_close(got, scores(capture, rounded, arithmetic), rtol=1e-6, atol=1e-6)
    plain, seen = scores(capture), torch.isfinite(got)
    off = float((got - plain)[seen].norm() / plain[seen].norm())
    assert 1e-4 < off < 0.1, "rounding must show"


def test_a_capture_keeps_its_dtype_and_all_else(make_capture: MakeCapture) -> None:
    capture = make_capture([9])
    half = replace(capture, index_q=capture.index_q.bfloat16(), index_k=capture.index_k.bfloat16())
    for arithmetic in ARITHMETICS:
        found = served(half, arithmetic)
        assert (found.index_q.dtype, found.index_k.dtype) == (torch.bfloat16, torch.bfloat16)
        assert found.index_weights is capture.index_weights and found.q is capture.q
    assert torch.equal(served(half, "bf16").index_q, half.index_q)


@pytest.mark.parametrize("workspace_bytes", [2000, 2**29])
def test_overlap_counts_the_keys_that_both_select(workspace_bytes: int, make_capture: MakeCapture) -> None:
    capture = make_capture([20, 33, 5], [13, 33, 70])
    other = replace(capture, index_q=make_capture([20, 33, 5], [13, 33, 70], seed=1).index_q)
    visible = reference.visible_keys(capture.key_start, capture.key_end, 116)
    count = visible.sum(-1)
    found = overlap_sums(capture, other, ks=(3, 5, 40), min_visible=17, workspace_bytes=workspace_bytes)
    assert list(found) == [3, 5], "no query sees 160 keys"
    for k, least in ((3, 17), (5, 20)):
        both = top(scores(capture), visible, k) & top(scores(other), visible, k)
        row = count >= least
        assert (found[k].queries, found[k].min_visible) == (int(row.sum()), least)
        assert found[k].overlap == pytest.approx(float(both[row].sum()) / k)
        assert 0.1 < found[k].overlap / found[k].queries < 0.9
    same = overlap_sums(capture, capture, ks=(3,))
    assert same[3].overlap == same[3].queries


def test_overlaps_add_up_where_they_count_the_same_queries() -> None:
    total = add_overlaps({4: OverlapSums(2, 16, 1.5)}, {4: OverlapSums(1, 16, 0.5), 2: OverlapSums(1, 8, 1.0)})
    assert list(total.items()) == [(2, OverlapSums(1, 8, 1.0)), (4, OverlapSums(3, 16, 2.0))]
    with pytest.raises(ValueError, match="OverlapSums: min_visible must agree to be added, got 16 and 20; measure"):
        add_overlaps(total, {4: OverlapSums(1, 20, 1.0)})


def test_unusable_arithmetics_are_refused(make_capture: MakeCapture, make_model: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="served: serve must be one of bf16, fp8, fp8_unrotated, got 'int8'"):
        served(make_capture([8]), "int8")
    handle = attach(make_model(), num_heads=4, head_dim=12, rope_dim=4)
    with pytest.raises(ValueError, match="evaluate: serve 'fp8' rotates rows whose width, the index dim E, must be a "):
        evaluate(handle, [], serve="fp8")
    with pytest.raises(ValueError, match="evaluate: batches must hold at least one batch"):
        evaluate(handle, [], serve="fp8_unrotated")


@pytest.mark.parametrize("arithmetic", ["fp8", "fp8_unrotated"])
def test_perplexity_is_that_of_the_keys_that_a_server_selects(
    handle: IndexerHandle, batches: Batches, rounded: Rounded, arithmetic: str
) -> None:
    """Against whole [T, S] matrices: masks of the top k of rounded scores in every layer."""

    def attend(c: LayerCapture) -> Tensor:
        visible = reference.visible_keys(c.key_start, c.key_end, c.k.shape[0])
        chosen = top(scores(c, rounded, arithmetic), visible, K)
        logits = reference.teacher_logits(c.q, c.k, c.softmax_scale).masked_fill(~chosen[:, None], -torch.inf)
        return torch.einsum("ths,shv->thv", logits.softmax(-1), c.v.repeat_interleave(3, 1))

    found = evaluate(handle, batches, ks=(4,), perplexity_ks=(K,), serve=arithmetic)
    total, count = 0.0, 0
    for batch in batches:
        with torch.no_grad(), handle.using(attend):
            logits = handle.model(**batch, use_cache=False).logits[:, :-1]
        targets = batch["input_ids"][:, 1:].masked_fill(batch["position_ids"][:, 1:] == 0, -100)
        total += float(cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += int((targets != -100).sum())
    by_name = {p.selection: p for p in found.perplexities}
    assert by_name["indexer"].loss == pytest.approx(total / count, rel=1e-6)


@pytest.fixture
def judged(handle: IndexerHandle, batches: Batches) -> tuple[Evaluation, Evaluation]:
    """Without and with FP8."""
    options: dict[str, Any] = dict(ks=(4, 8), perplexity_ks=(K,))
    return evaluate(handle, batches, **options), evaluate(handle, batches, serve="fp8", **options)


def test_the_unserved_indexers_are_judged_beside(judged: tuple[Evaluation, Evaluation]) -> None:
    plain, fp8 = judged
    assert (plain.arithmetic, plain.unserved, fp8.arithmetic) == ("float32", None, "fp8")
    unserved = fp8.unserved
    assert unserved is not None and unserved.arithmetic == "float32"
    assert (unserved.mean, unserved.layers) == (plain.mean, plain.layers)
    assert unserved.perplexities == tuple(p for p in plain.perplexities if p.selection == "indexer")
    assert fp8.mean.kl != plain.mean.kl and fp8.mean.kl == pytest.approx(plain.mean.kl, rel=0.1)
    assert [p for p in fp8.perplexities if p.selection != "indexer"] == [
        p for p in plain.perplexities if p.selection != "indexer"
    ]
    assert [(at.layer, at.k) for at in unserved.overlaps] == [(n, k) for n in (None, 0, 1, 2) for k in (4, 8)]
    for k in (4, 8):
        mean, *layers = (at for at in unserved.overlaps if at.k == k)
        mass = next(at for at in fp8.mean.at_k if at.k == k)
        assert (mean.queries, mean.min_visible) == (mass.queries, mass.min_visible)
        assert mean.overlap == pytest.approx(sum(at.overlap for at in layers) / 3) and 0.8 < mean.overlap < 1


@pytest.mark.usefixtures("blank_plots")
def test_reports_say_the_arithmetic_and_its_cost(judged: tuple[Evaluation, Evaluation], tmp_path: Any) -> None:
    plain, fp8 = judged
    assert Evaluation.from_dict(json.loads(json.dumps(fp8.to_dict()))) == fp8
    text = write_report(tmp_path / "fp8", evaluation=fp8, run={}).read_text()
    assert "; index scores in FP8 (e4m3, rotated)." in text and "## What serving costs" in text
    assert json.loads((tmp_path / "fp8" / "report.json").read_text())["evaluation"]["arithmetic"] == "fp8"
    overlap = next(at for at in fp8.unserved.overlaps if at.layer is None and at.k == 8).overlap
    before, now = (x.mean.at_k[1].indexer for x in (plain, fp8))
    said = f"{100 * overlap:.2f}% of the top 8 keys are the same, and their mass changes by {100 * (now - before):+.3f}"
    assert f"| {100 * before:.3f}% | {100 * now:.3f}% |" in text and f"| {100 * overlap:.2f}% |" in text
    was, then = (next(p.perplexity for p in x.perplexities if p.selection == "indexer") for x in (plain, fp8))
    for words in (verdict(fp8), " ".join(summary_lines(fp8))):
        assert "Judged with index scores in FP8 (e4m3, rotated): beside float32, " + said in words
        assert f"(from {was:.3f} to {then:.3f})." in words
    text = write_report(tmp_path / "plain", evaluation=plain, run={}).read_text()
    assert "; index scores in float32." in text and "serving costs" not in text and "Judged with" not in text


def test_plots_name_the_arithmetic(judged: tuple[Evaluation, Evaluation]) -> None:
    for evaluation, words in zip(judged, ("", " in FP8 (e4m3, rotated)"), strict=True):
        (legend,) = plot_mass(evaluation).legends
        assert f"indexer's top k{words}" in [text.get_text() for text in legend.get_texts()]
        bars = [label.get_text() for label in plot_perplexity(evaluation).axes[0].get_yticklabels()]
        indexers = [
            "indexer, 8 keys" + words.replace(" ", "\n", 1),
            *(["indexer, 8 keys\nin float32"] if words else []),
        ]
        assert bars == ["all keys (dense)", *indexers, "oracle, 8 keys", "sink + window, 8 keys"]
