"""Attention sinks: a logit of each head that takes part in the softmax and has no value.

    lse'[t,h]  = log(exp(lse[t,h]) + exp(sinks[h]))
    out'[t,h]  = exp(lse[t,h] - lse'[t,h]) * out[t,h]
    d sinks[h] = - sum_t exp(sinks[h] - lse'[t,h]) * (d_out[t,h]·out'[t,h])

A backward that knows no sinks gives the gradients of q, k and v with them, where lse' and out' take the places of lse
and out: its probabilities are then exp(logit - lse'), and d_out·out' is what the softmax subtracts, since a sink, whose
value is zero, adds nothing to it. So no kernel has to know of them.

Source: gpt-oss (2025), whose attention has one learned logit a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def share_beside_sinks(lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """exp(lse - lse'), the keys' share of each softmax, and lse': lse [T, H] and sinks [H] to [T, H] each."""
    whole = torch.logaddexp(lse, sinks.to(lse.dtype))
    return (lse - whole).exp(), whole


def sink_gradient(d_out: Tensor, out: Tensor, lse: Tensor, sinks: Tensor, workspace_bytes: int) -> Tensor:
    """d sinks [H], rounded once to their dtype.

    Args:
        d_out, out: [T, H, V]. lse: [T, H]. out and lse are those with sinks.
        workspace_bytes: bound on the memory for d_out * out; one query at least is processed.
    """
    T, H, V = out.shape
    total = torch.zeros(H, dtype=lse.dtype, device=lse.device)
    step = max(1, workspace_bytes // max(1, 3 * H * V * lse.element_size()))
    for begin in range(0, T, step):
        rows = slice(begin, begin + step)
        inner = (d_out[rows].to(lse.dtype) * out[rows].to(lse.dtype)).sum(-1)
        total -= ((sinks.to(lse.dtype) - lse[rows]).exp() * inner).sum(0)
    return total.to(sinks.dtype)
