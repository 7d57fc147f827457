"""judge.selections against a masked softmax in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_indexer import reference
from flash_indexer.judge.selections import SELECTIONS, selected_attention
from flash_indexer.models.capture import LayerCapture

MakeCapture = Callable[..., Any]
TINY = 2000  # bytes: a few query rows a chunk
LAYOUTS = {
    "one document": ([67], None),
    "several, one of length 1": ([1, 41, 1, 90], None),
    "some queries see nothing": ([20, 33, 5], [13, 33, 70]),
    "too short for any k": ([15, 2, 1], None),
}


def dense_attention(c: LayerCapture, chosen: Tensor) -> Tensor:
    """softmax over the chosen keys [T, S] only; zeros where none."""
    logits = reference.teacher_logits(c.q, c.k, c.softmax_scale).masked_fill(~chosen[:, None], -torch.inf)
    values = c.v.repeat_interleave(c.q.shape[1] // c.v.shape[1], dim=1)
    return torch.einsum("ths,shv->thv", logits.softmax(-1).nan_to_num(0.0), values)


@pytest.mark.parametrize("workspace_bytes", [TINY, 2**29])
@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_attention_equals_a_masked_softmax(
    layout: str, select: str, workspace_bytes: int, make_capture: MakeCapture
) -> None:
    capture, k = make_capture(*LAYOUTS[layout]), 9
    bounds = capture.key_start, capture.key_end
    p = reference.target_distribution(capture.q, capture.k, capture.softmax_scale, *bounds)
    scores = reference.indexer_scores(capture.index_q, capture.index_k, capture.index_weights, *bounds)
    chosen = torch.zeros_like(p, dtype=torch.bool)
    for t, (start, end) in enumerate(zip(capture.key_start.tolist(), capture.key_end.tolist(), strict=True)):
        if end - start <= k:
            chosen[t, start:end] = True
        elif select == "window":
            chosen[t, start : start + 4] = chosen[t, end - 5 : end] = True
        else:
            rank = (scores if select == "indexer" else p)[t, start:end]
            chosen[t, start + rank.argsort(descending=True, stable=True)[:k]] = True
    got = selected_attention(capture, select=select, k=k, workspace_bytes=workspace_bytes)
    torch.testing.assert_close(got, dense_attention(capture, chosen), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("select", SELECTIONS)
def test_a_selection_of_all_keys_is_dense_attention(select: str, make_capture: MakeCapture) -> None:
    capture = make_capture([20, 33, 5], [13, 33, 70])
    dense = dense_attention(capture, reference.visible_keys(capture.key_start, capture.key_end, 116))
    torch.testing.assert_close(selected_attention(capture, select=select, k=116), dense, rtol=1e-9, atol=1e-12)
    fewer = selected_attention(capture, select=select, k=69)
    assert not torch.equal(fewer[-1], dense[-1]), "the last query sees 70 keys: one must be missing"
    torch.testing.assert_close(fewer[:-1], dense[:-1], rtol=1e-9, atol=1e-12)


def test_wrong_arguments_are_refused(make_capture: MakeCapture) -> None:
    capture = make_capture([8])
    with pytest.raises(ValueError, match="select must be one of indexer, oracle, window, got 'random'"):
        selected_attention(capture, select="random", k=8)
    with pytest.raises(ValueError, match=r"selected_attention: k must be at least max\(1, sink\) = 4, got 3"):
        selected_attention(capture, select="window", k=3)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_softcap_and_sinks_are_in_the_softmax(
    layout: str, with_sinks: bool, softcap: float | None, make_capture: MakeCapture
) -> None:
    plain, k = make_capture(*LAYOUTS[layout]), 9
    sinks = torch.linspace(-1.0, 2.0, plain.q.shape[1], dtype=torch.float64) if with_sinks else None
    capture = replace(plain, sinks=sinks, softcap=softcap)
    chosen = reference.visible_keys(capture.key_start, capture.key_end, capture.k.shape[0])
    s = torch.arange(capture.k.shape[0])
    first, last = s < capture.key_start[:, None] + 4, s >= capture.key_end[:, None] - (k - 4)
    many = (capture.key_end - capture.key_start > k)[:, None]
    chosen = torch.where(many, chosen & (first | last), chosen)
    logits = reference.teacher_logits(capture.q, capture.k, capture.softmax_scale, softcap)
    logits = logits.masked_fill(~chosen[:, None], -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None].expand(len(logits), -1, 1)], -1)
    a = logits.softmax(-1).nan_to_num(0.0)[..., : capture.k.shape[0]]
    want = torch.einsum("ths,shv->thv", a, capture.v.repeat_interleave(capture.q.shape[1] // capture.v.shape[1], dim=1))
    got = selected_attention(capture, select="window", k=k, workspace_bytes=TINY)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
