"""judge.fp8_check against the definition in float64 on rounded tensors; table, plot and JSON of what it found."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from flash_indexer import reference
from flash_indexer.judge import fp8_check as checking
from flash_indexer.judge.fp8_check import (
    GRADIENTS,
    VARIANTS,
    Gradient,
    LayerFP8,
    SelectionAtK,
    Variant,
    fp8_check,
    layer_fp8,
)
from flash_indexer.judge.fp8_report import fp8_summary, fp8_table, plot_fp8, write_fp8_report
from flash_indexer.models.attach import IndexerHandle, LayerCapture, attach

MakeCapture = Callable[..., Any]
Rounded = Callable[[Tensor, str], Tensor]


@pytest.fixture
def capture(make_capture: MakeCapture) -> LayerCapture:
    """As many index heads as teacher heads, so that every target can be measured; numbers that float32 holds."""
    found = make_capture([1, 41, 22])
    index_q, index_k = torch.randn(64, 6, 4, dtype=torch.float64), torch.randn(64, 4, dtype=torch.float64)
    tensors = dict(q=found.q, k=found.k, index_q=index_q, index_k=index_k, index_weights=torch.randn(64, 6).double())
    tensors = {name: x.float().double() for name, x in tensors.items()}
    bounds = found.key_start, found.key_end
    lse = reference.teacher_lse(tensors["q"], tensors["k"], found.softmax_scale, *bounds)
    return LayerCapture(
        5, v=found.v, lse=lse, out=found.q, softmax_scale=found.softmax_scale, key_start=bounds[0], key_end=bounds[1],
        **tensors,
    )  # fmt: skip


def probabilities(c: LayerCapture) -> Tensor:
    """a[t,h,s] with the capture's own lse."""
    visible = reference.visible_keys(c.key_start, c.key_end, c.k.shape[0])
    logits = reference.teacher_logits(c.q, c.k, c.softmax_scale) - c.lse[..., None]
    return logits.exp().masked_fill(~visible[:, None], 0.0)


def kl_and_gradients(
    c: LayerCapture, target: str, low: tuple[Tensor, Tensor] | None = None
) -> tuple[float, list[Tensor]]:
    """By autograd through whole matrices, with the capture's own lse; low: the index rows whose scores count."""
    leaves = [x.clone().requires_grad_() for x in (c.index_q, c.index_k, c.index_weights)]
    bounds = c.key_start, c.key_end
    if target == "sum_logits":
        p = reference.target_distribution(c.q, c.k, c.softmax_scale, *bounds, target)
    else:
        p = probabilities(c)
        p = p if target == "per_head" else p.sum(1)
        p = p / p.sum(-1, keepdim=True)
    scores = reference.indexer_scores(*leaves, *bounds, target)
    if low is not None:
        rounded = reference.indexer_scores(*low, leaves[2], *bounds, target)
        scores = scores + (rounded - scores).nan_to_num().detach()
    log_i = scores.log_softmax(-1).masked_fill(p == 0, 0.0)
    kl = (torch.xlogy(p, p) - p * log_i).sum(-1).mean()
    kl.backward()
    return float(kl.detach()), [x.grad for x in leaves]


@pytest.mark.parametrize("target", ["mean", "per_head", "sum_logits"])
def test_a_layer_is_that_of_the_definition_on_rounded_tensors(
    target: str, capture: LayerCapture, rounded: Rounded
) -> None:
    found = layer_fp8(capture, target, (4, 8))
    kl, before = kl_and_gradients(capture, target)
    assert (found.layer, list(found.variants)) == (5, list(VARIANTS))
    assert found.kl == pytest.approx(kl, rel=1e-9)
    H4 = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64) / 2
    bounds = capture.key_start, capture.key_end
    teachers = {None: capture}
    for kind in ("fp8", "fp8_unrotated"):
        q, k = (rounded(x, kind) for x in (capture.q, capture.k))
        teachers[kind] = replace(capture, q=q, k=k)
    for name, (arithmetic, teacher_dtype, model_lse) in VARIANTS.items():
        variant = teachers[teacher_dtype]
        if not model_lse:
            lse = reference.teacher_lse(variant.q, variant.k, capture.softmax_scale, *bounds)
            variant = replace(variant, lse=lse)
        low = None
        if arithmetic is not None:
            low = rounded(capture.index_q, arithmetic), rounded(capture.index_k, arithmetic)
        if target == "per_head" and low is not None:  # straight through at the rows
            kl, gradients = kl_and_gradients(replace(variant, index_q=low[0], index_k=low[1]), target)
            if arithmetic == "fp8":
                gradients[:2] = [x @ H4 for x in gradients[:2]]
        else:
            kl, gradients = kl_and_gradients(variant, target, low)
        assert found.variants[name].kl == pytest.approx(kl, rel=1e-6), name
        assert found.change(name) == pytest.approx(kl / found.kl - 1, abs=1e-6)
        assert 1e-6 < abs(kl / found.kl - 1) < 0.1, "the rounding must show"
        for leaf, a, b in zip(GRADIENTS, gradients, before, strict=True):
            got = found.variants[name].gradients[leaf]
            cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
            assert got.cosine == pytest.approx(float(cosine), rel=1e-6), (name, leaf)
            assert got.length == pytest.approx(float(a.norm() / b.norm()), rel=1e-6), (name, leaf)
            assert 0.9 < got.cosine < 1 - 1e-7
    errors = (probabilities(teachers["fp8"]).sum(-1) - 1).abs().amax(0)
    torch.testing.assert_close(torch.tensor(found.row_errors).double(), errors, rtol=1e-4, atol=1e-6)
    assert found.row_error == max(found.row_errors) > 1e-3


def test_selections_are_compared_with_both_fp8s_and_ties_counted(capture: LayerCapture, rounded: Rounded) -> None:
    few = replace(
        capture, index_q=capture.index_q[:, :1], index_weights=capture.index_weights[:, :1], index_k=capture.index_k
    )
    found = layer_fp8(few, "mean", (4, 8, 16))
    assert [at.k for at in found.selections] == [4, 8], "no query sees 64 keys"
    bounds = capture.key_start, capture.key_end
    visible = reference.visible_keys(*bounds, 64)
    ranked = {}
    for name in ("", "fp8", "fp8_unrotated"):
        operands = [rounded(x, name) if name else x for x in (few.index_q, few.index_k)]
        ranked[name] = reference.indexer_scores(*operands, few.index_weights, *bounds)
    for at in found.selections:
        row = visible.sum(-1) >= 4 * at.k
        assert at.queries == int(row.sum())
        keys = {n: x[row].argsort(descending=True, stable=True)[:, : at.k].tolist() for n, x in ranked.items()}
        for name, share in (("fp8", at.overlap), ("fp8_unrotated", at.overlap_unrotated)):
            both = [len(set(a) & set(b)) for a, b in zip(keys[""], keys[name], strict=True)]
            assert share == pytest.approx(sum(both) / at.k / at.queries), name
        more = visible.sum(-1) > at.k
        values = {name: x[more].sort(descending=True).values for name, x in ranked.items()}
        tied = {name: int((x[:, at.k - 1] == x[:, at.k]).sum()) for name, x in values.items()}
        assert (at.tie_queries, at.tied_rows, at.tied_rows_before) == (int(more.sum()), tied["fp8"], tied[""])
        assert at.tied_rows > 0, "one index head must tie"


def test_each_attached_layer_is_measured_on_real_captures(handle: IndexerHandle, batches: Any) -> None:
    layers = fp8_check(handle, batches[0], ks=(4, 8))
    assert [layer.layer for layer in layers] == [0, 1, 2]
    for layer in layers:
        assert len(layer.row_errors) == 6 and 1e-3 < layer.row_error < 3
        for name in VARIANTS:
            assert abs(layer.change(name)) < 0.05, name
            assert 0.9 < layer.variants[name].least_cosine < 1 and layer.variants[name].worst_length != 1
    assert not any(p.grad is not None for p in handle.indexers.parameters())


def test_what_is_not_finite_and_what_can_not_be_rotated_is_refused(
    handle: IndexerHandle, batches: Any, make_model: Callable[[], Any]
) -> None:
    with torch.no_grad():
        handle.indexers["1"].weights_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="fp8_check: the KL of layer 1 is nan; its indexer's weights"):
        fp8_check(handle, batches[0])
    odd = attach(make_model(), num_heads=4, head_dim=12, rope_dim=4)
    with pytest.raises(ValueError, match="fp8_check: serve 'fp8' rotates rows whose width, the index dim E"):
        fp8_check(odd, batches[0])


def test_gradients_of_zeros() -> None:
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    assert checking._compared(zero, zero) == Gradient(1.0, 1.0)
    assert checking._compared(one, zero) == Gradient(0.0, math.inf)
    assert checking._compared(zero, one) == Gradient(0.0, 0.0)
    assert checking._compared(-2 * one, one) == Gradient(pytest.approx(-1), pytest.approx(2))


def made_up(layer: int) -> LayerFP8:
    variants = {
        name: Variant(1 + 0.01 * (n + 1), {g: Gradient(0.999 - 0.001 * n, 1.02) for g in GRADIENTS})
        for n, name in enumerate(VARIANTS)
    }
    at = SelectionAtK(128, 500, 0.991, 0.972 - 0.001 * layer, 900, 3, 1)
    return LayerFP8(layer, 1.0, variants, (replace(at, k=64), at), (0.001, 0.02 if layer == 2 else 0.002))


def test_table_plot_and_json_have_the_measurements(tmp_path: Path) -> None:
    layers = [made_up(n) for n in (0, 2, 3)]
    console = Console(width=80, file=io.StringIO())
    console.print(fp8_table(layers))
    text = console.file.getvalue()
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert "…" not in text, "in a terminal of 80 columns"
    shown = ["1.000", "+1.00%", "+3.00%", "+6.00%", "0.9990", "0.9940", "1.020", "99.10%", "0.3%", "0.02"]
    assert rows["2"] == shown and rows["3"] == [*shown[:-1], "0.002"]
    assert fp8_table(layers).columns[-1]._cells[1] == "[red]0.02[/red]"
    summary = fp8_summary(layers)
    for words in (
        "changes by +1.00% with the index in FP8, +3.00% with the teacher in FP8, +6.00% with both in FP8. The",
        "is 0.9990 with the index (layer 0), 0.9970 with the teacher (layer 0), 0.9940 with both (layer 0), 0.9960 "
        "with the teacher not rotated (layer 0).",
        "Of the top 128 keys, 99.10% are the same in FP8 (the fewest in layer 0: 99.10%), without the rotation 97.03%.",
    ):
        assert words in summary, summary

    path = write_fp8_report(tmp_path / "new" / "fp8", layers, run={"model": "tiny"})
    assert path == tmp_path / "new" / "fp8" / "fp8.png" and path.stat().st_size > 20_000
    content = json.loads((path.parent / "fp8.json").read_text())
    assert content["run"] == {"model": "tiny"} and len(content["layers"]) == 3
    assert content["layers"][1] == layers[1].to_dict()
    assert content["layers"][1]["variants"]["both"]["gradients"]["index_k"] == dict(cosine=0.994, length=1.02)

    kl, gradients, lengths, selection, ties, sums = plot_fp8(layers).axes
    lines = {line.get_label(): line for line in kl.lines}
    assert lines["index, not rotated"].get_ydata() == pytest.approx([2.0] * 3)
    assert list(lines["teacher, rotated"].get_xdata()) == [0, 2, 3]
    assert lines["teacher, not rotated"].get_ydata() == pytest.approx([4.0] * 3)
    assert gradients.lines[5].get_ydata() == pytest.approx([0.006] * 3)
    assert lengths.lines[5].get_ydata() == pytest.approx([1.02] * 3)
    assert "Top 128 keys" in selection.get_title(loc="left") or "Top 128 keys" in selection.get_title()
    assert [line.get_ydata()[0] for line in ties.lines] == pytest.approx([100 / 900, 100 * 3 / 900])
    assert selection.lines[1].get_ydata() == pytest.approx([97.2, 97.0, 96.9])
    assert sums.lines[0].get_ydata() == pytest.approx([0.002, 0.02, 0.002])


def test_short_text_has_no_selection_to_compare_and_none_is_refused() -> None:
    layers = [replace(made_up(n), selections=()) for n in (0, 1)]
    assert "same" not in " ".join(str(column.header) for column in fp8_table(layers).columns)
    assert "keys" not in fp8_summary(layers)
    plot_fp8(layers).draw_without_rendering()
    with pytest.raises(ValueError, match="write_fp8_report: layers must hold a layer at least, got none"):
        write_fp8_report("unused", [], run={})


def test_a_layer_whose_kl_is_zero_has_no_change() -> None:
    exact = replace(made_up(0), kl=0.0)
    assert exact.change("index") == math.inf
    variants = {name: replace(v, kl=0.0) for name, v in exact.variants.items()}
    assert replace(exact, variants=variants).change("index") == 0.0
