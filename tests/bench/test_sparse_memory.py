"""The long layer of the benchmark: runs of absorbed queries are the layer, and its check sees what is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_indexer import reference
from flash_indexer.bench.sparse_memory import Layer, check, line, make, step

LAYER = Layer(48, 20, H=3, K=12, nope=8, rope=4, rank=16, V=8, I=2, E=8)


def expanded(x, layer: Layer) -> tuple[Tensor, Tensor]:
    """The output and the loss of the whole layer by its definition."""
    T, rank, nope = layer.tokens, layer.rank, layer.nope
    k = torch.einsum("sr,hnr->shn", x.latent[:, :rank], x.w_k)
    v = torch.einsum("sr,hrv->shv", x.latent[:, :rank], x.w_v)
    logits = torch.einsum("thn,shn->ths", x.q[..., :nope], k)
    logits = (logits + torch.einsum("thn,sn->ths", x.q[..., nope:], x.latent[:, rank:])) * layer.scale
    scores = torch.einsum("tj,tjs->ts", x.index_weights, torch.einsum("tje,se->tjs", x.index_q, x.index_k).relu())
    end = torch.arange(1, T + 1, dtype=torch.int32)
    unselected = ~reference.selected_keys(scores, 0 * end, end, layer.K, (0, 0))
    a = logits.masked_fill(unselected[:, None], -torch.inf).softmax(-1)
    p = a.mean(1).detach()
    log_index = scores.masked_fill(unselected, -torch.inf).log_softmax(-1).masked_fill(unselected, 0.0)
    return torch.einsum("ths,shv->thv", a, v), (torch.xlogy(p, p) - p * log_index).sum(-1).mean()


@pytest.mark.parametrize("queries", [20, 48])
def test_runs_of_queries_give_the_layers_output_and_gradients(queries):
    layer = Layer(**vars(LAYER) | {"queries": queries})
    x, whole = make(layer, "cpu", torch.float64), make(layer, "cpu", torch.float64)
    out, kl = step(x, layer, True)
    right, loss = expanded(whole, layer)
    torch.autograd.backward([right, loss], [whole.d_out, torch.ones_like(loss)])
    torch.testing.assert_close(out, right.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(kl.mean(), loss.detach(), rtol=1e-10, atol=1e-12)
    for name in x._fields[:-1]:
        torch.testing.assert_close(getattr(x, name).grad, getattr(whole, name).grad, rtol=1e-9, atol=1e-12)
    assert max(check(x, layer, out).values()) < 1e-9


def test_a_wrong_result_has_no_memory():
    x = make(LAYER, "cpu", torch.float64)
    out, _ = step(x, LAYER, True)
    with pytest.raises(RuntimeError, match="no memory is reported: .*'out'"):
        check(x, LAYER, out * 1.1)
    with pytest.raises(RuntimeError, match="no memory is reported: .*'out': nan"):
        check(x, LAYER, out * torch.nan)
    x.q.grad[-1] = -x.q.grad[-1]
    with pytest.raises(RuntimeError, match="no memory is reported: .*'dq'"):
        check(x, LAYER, out)


def test_the_line_says_in_which_order_sums_were_taken():
    record = {"name": "v32", "peak_bytes": 45e9, "size": {"tokens": 131072}, "seconds": 20.0, "deterministic": False}
    assert line(record).endswith(
        "45.0 GB at most, forward and backward of 131,072 tokens, 20.0 s, additions in any order"
    )
    assert line(record | {"deterministic": True}).endswith("the same bits every time")
