"""What the sparse stage's kernels gave, held to the definition in float64, at sampled queries and keys."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.bench.sparse_problem import SparseSize, Tensors
from flash_indexer.ops import Selection

SAMPLES = 6
ROUNDED, EXACT = 2**-6, 1e-4
"""Relative errors that are allowed: of what is rounded to bfloat16 on its way, and of what is float32 throughout."""
_EXACT = ("lse", "p_sum", "kl", "scores", "topk")


class Answer(NamedTuple):
    """What the steps returned; None: the step has no kernel, or was not asked.

    selection: what `select_keys` found, of which the scores are checked, and that no other keys have larger ones.
    """

    out: Tensor | None = None
    lse: Tensor | None = None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    p_sum: Tensor | None = None
    kl: Tensor | None = None
    d_index_q: Tensor | None = None
    d_index_k: Tensor | None = None
    d_index_weights: Tensor | None = None
    selection: Selection | None = None


def check(size: SparseSize, x: Tensors, got: Answer) -> dict[str, float]:
    """The largest relative errors by name, over SAMPLES queries and as many keys.

    Raises:
        RuntimeError: where one is larger than ROUNDED or EXACT allows.
    """
    errors: dict[str, float] = {}
    rows = torch.linspace(size.T // 3, size.T - 1, SAMPLES).long().tolist()
    keys = x.selection.indices[rows[-1], :: max(size.K // SAMPLES, 1)].tolist()
    pairs = [pair for row in rows for pair in (*_of_query(size, x, got, row), *_selected(x, got.selection, row))]
    pairs += [pair for key in keys for pair in (*_of_key(size, x, got, key), *_of_index_key(size, x, got, key))]
    for name, mine, right in pairs:
        errors[name] = _worse(errors.get(name, 0.0), _relative(mine, right))
    allowed = {name: EXACT if name in _EXACT else ROUNDED for name in errors}
    wrong = {name: error for name, error in errors.items() if not error <= allowed[name]}
    if wrong:
        raise RuntimeError(f"bench: results are wrong, so no speed is reported: relative errors {wrong}")
    return errors


Pairs = list[tuple[str, Tensor, Tensor]]
"""Name, what was given, what is right."""


def _of_query(size: SparseSize, x: Tensors, got: Answer, row: int) -> Pairs:
    n = int(x.selection.count[row])
    at = x.selection.indices[row, :n].long()
    each = size.H // size.G
    k = x.k[at].double().repeat_interleave(each, 1)
    v = x.values[at][..., : size.V].double().repeat_interleave(each, 1)
    logits = torch.einsum("hd,shd->hs", x.q[row].double(), k) * size.D**-0.5
    a = logits.softmax(-1)
    d_a = torch.einsum("hv,shv->hs", x.d_out[row].double(), v)
    d_logits = a * (d_a - (a * d_a).sum(-1, keepdim=True))
    p = a.mean(0)
    index_q, weights = x.index_q[row].double(), x.index_weights[row].double()
    index_logits = index_q @ x.index_k[at].double().T
    scores = weights @ index_logits.relu()
    unweighted = ((scores.softmax(-1) - p) / size.T * (index_logits > 0)) @ x.index_k[at].double()
    right = {
        "out": (got.out, torch.einsum("hs,shv->hv", a, v)),
        "lse": (got.lse, logits.logsumexp(-1)),
        "dq": (got.dq, torch.einsum("hs,shd->hd", d_logits, k) * size.D**-0.5),
        "p_sum": (got.p_sum, torch.nn.functional.pad(a.sum(0), (0, x.selection.indices.shape[1] - n))),
        "kl": (got.kl, (torch.xlogy(p, p) - p * scores.log_softmax(-1)).sum()),
        "d_index_q": (got.d_index_q, weights[:, None] * unweighted),
        "d_index_weights": (got.d_index_weights, (index_q * unweighted).sum(-1)),
    }
    return [(name, mine[row], value) for name, (mine, value) in right.items() if mine is not None]


def _selected(x: Tensors, found: Selection | None, row: int) -> Pairs:
    """The scores at the keys that were found, and these, sorted, beside the largest of all."""
    if found is None:
        return []
    visible = slice(int(x.key_start[row]), int(x.key_end[row]))
    scores = x.index_weights[row].double() @ (x.index_q[row].double() @ x.index_k[visible].double().T).relu()
    n = int(found.count[row])
    mine = scores[found.indices[row, :n].long() - visible.start]
    best = scores.topk(min(found.indices.shape[1], len(scores))).values
    return [("scores", found.scores[row, :n], mine), ("topk", mine.sort(descending=True).values, best)]


def _of_key(size: SparseSize, x: Tensors, got: Answer, key: int) -> Pairs:
    """The gradient of one key, and of its value, from the queries that selected it.

    The queries' own sums (lse; delta from out) are those that were given, and are checked by themselves.
    """
    if got.dk is None or got.out is None or got.lse is None:
        return []
    rows = (x.selection.indices == key).any(-1).nonzero()[:, 0]
    each = size.H // size.G
    k = x.k[key].double().repeat_interleave(each, 0)
    v = x.values[key][..., : size.V].double().repeat_interleave(each, 0)
    q, d_out = x.q[rows].double(), x.d_out[rows].double()
    a = (torch.einsum("thd,hd->th", q, k) * size.D**-0.5 - got.lse[rows].double()).exp()
    delta = (got.out[rows].double() * d_out).sum(-1)
    d_logits = a * (torch.einsum("thv,hv->th", d_out, v) - delta) * size.D**-0.5
    d_k = torch.einsum("th,thd->hd", d_logits, q).view(size.G, each, -1).sum(1)
    d_v = torch.einsum("th,thv->hv", a, d_out).view(size.G, each, -1).sum(1)
    if got.dv is not None:
        return [("dk", got.dk[key], d_k), ("dv", got.dv[key], d_v)]
    d_k[:, : size.V] += d_v
    return [("dk", got.dk[key], d_k)]


def _of_index_key(size: SparseSize, x: Tensors, got: Answer, key: int) -> Pairs:
    """The gradient of one index key, from the queries that selected it; the target is the one that was given."""
    if got.d_index_k is None or got.p_sum is None:
        return []
    at = x.selection.indices == key
    rows = at.any(-1).nonzero()[:, 0]
    scores, p_sum = x.selection.scores[rows].double(), got.p_sum[rows].double()
    di = (scores.softmax(-1) - p_sum / p_sum.sum(-1, keepdim=True))[at[rows]] / size.T
    index_q, weights = x.index_q[rows].double(), x.index_weights[rows].double()
    seen = torch.einsum("tje,e->tj", index_q, x.index_k[key].double()) > 0
    return [("d_index_k", got.d_index_k[key], torch.einsum("t,tj,tje->e", di, weights * seen, index_q))]


def _relative(mine: Tensor, right: Tensor) -> float:
    return float((mine.double() - right).norm() / right.norm())


def _worse(a: float, b: float) -> float:
    """The larger; NaN where one is."""
    return a if b <= a else b if a <= b else math.nan
