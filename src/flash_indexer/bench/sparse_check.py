"""What the sparse stage's kernels gave, held to the definition in float64, at sampled queries and keys."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.bench.sparse_problem import SparseSize, Tensors

SAMPLES = 6
ROUNDED, EXACT = 2**-6, 1e-4
"""Relative errors that are allowed: of what is rounded to bfloat16 on its way, and of what is float32 throughout."""


class Answer(NamedTuple):
    """What the steps returned; None: the step has no kernel."""

    out: Tensor
    lse: Tensor
    dq: Tensor | None = None
    dk: Tensor | None = None
    p_sum: Tensor | None = None
    kl: Tensor | None = None
    d_index_q: Tensor | None = None


def check(size: SparseSize, x: Tensors, got: Answer) -> dict[str, float]:
    """The largest relative errors by name, over SAMPLES queries and as many keys.

    Raises:
        RuntimeError: where one is larger than ROUNDED or EXACT allows.
    """
    errors: dict[str, float] = {}
    rows = torch.linspace(size.T // 3, size.T - 1, SAMPLES).long().tolist()
    for row in rows:
        for name, (mine, right) in _of_query(size, x, got, row).items():
            errors[name] = _worse(errors.get(name, 0.0), _relative(mine, right))
    if got.dk is not None:
        for key in x.selection.indices[rows[-1], :: max(size.K // SAMPLES, 1)].tolist():
            errors["dk"] = _worse(errors.get("dk", 0.0), _relative(got.dk[key], _of_key(size, x, got, key)))
    allowed = {name: EXACT if name in ("lse", "p_sum", "kl") else ROUNDED for name in errors}
    wrong = {name: error for name, error in errors.items() if not error <= allowed[name]}
    if wrong:
        raise RuntimeError(f"bench: results are wrong, so no speed is reported: relative errors {wrong}")
    return errors


def _of_query(size: SparseSize, x: Tensors, got: Answer, row: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(what was given, what is right) by name."""
    n = int(x.selection.count[row])
    at = x.selection.indices[row, :n].long()
    each = size.H // size.G
    k = x.k[at].double().repeat_interleave(each, 1)
    v = (x.k[..., : size.V] if x.v is None else x.v)[at].double().repeat_interleave(each, 1)
    logits = torch.einsum("hd,shd->hs", x.q[row].double(), k) * size.D**-0.5
    a = logits.softmax(-1)
    pairs = {
        "out": (got.out[row], torch.einsum("hs,shv->hv", a, v)),
        "lse": (got.lse[row], logits.logsumexp(-1)),
    }
    if got.dq is not None:
        d_a = torch.einsum("hv,shv->hs", x.d_out[row].double(), v)
        d_logits = a * (d_a - (a * d_a).sum(-1, keepdim=True))
        pairs["dq"] = (got.dq[row], torch.einsum("hs,shd->hd", d_logits, k) * size.D**-0.5)
    if got.p_sum is not None:
        pairs["p_sum"] = (got.p_sum[row, :n], a.sum(0))
    if got.kl is not None and got.d_index_q is not None:
        p = a.mean(0)
        index_logits = x.index_q[row].double() @ x.index_k[at].double().T
        scores = x.index_weights[row].double() @ index_logits.relu()
        d_scores = (scores.softmax(-1) - p) / size.T
        masked = d_scores * (index_logits > 0) * x.index_weights[row].double()[:, None]
        pairs["kl"] = (got.kl[row], (torch.xlogy(p, p) - p * scores.log_softmax(-1)).sum())
        pairs["d_index_q"] = (got.d_index_q[row], masked @ x.index_k[at].double())
    return pairs


def _of_key(size: SparseSize, x: Tensors, got: Answer, key: int) -> Tensor:
    """The gradient of one key, and of its value where that is a part of it, from the queries that selected it.

    The queries' own sums (lse; delta from out) are those that were given, and are checked by themselves.
    """
    rows = (x.selection.indices == key).any(-1).nonzero()[:, 0]
    each = size.H // size.G
    k = x.k[key].double().repeat_interleave(each, 0)
    v = (x.k[..., : size.V] if x.v is None else x.v)[key].double().repeat_interleave(each, 0)
    q, d_out = x.q[rows].double(), x.d_out[rows].double()
    a = (torch.einsum("thd,hd->th", q, k) * size.D**-0.5 - got.lse[rows].double()).exp()
    delta = (got.out[rows].double() * d_out).sum(-1)
    d_logits = a * (torch.einsum("thv,hv->th", d_out, v) - delta) * size.D**-0.5
    d_k = torch.einsum("th,thd->hd", d_logits, q).view(size.G, each, -1).sum(1)
    if x.v is None:
        d_k[:, : size.V] += torch.einsum("th,thv->hv", a, d_out).view(size.G, each, -1).sum(1)
    return d_k


def _relative(mine: Tensor, right: Tensor) -> float:
    return float((mine.double() - right).norm() / right.norm())


def _worse(a: float, b: float) -> float:
    """The larger; NaN where one is."""
    return a if b <= a else b if a <= b else math.nan
