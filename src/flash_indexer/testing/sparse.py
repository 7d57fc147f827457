"""The ruler of the sparse stage: its float64 truth, and an honest float32 baseline, of a given selection.

    inputs, v = make_inputs(SHAPES["packed"], seed=0), ...
    selected = selection_mask(selection, S)
    truth, eager = reference_dsa(inputs, v, selected, d_out=d_out), eager_dsa(inputs, v, selected, d_out=d_out)
    assert_close("dk", mine, truth.dk, eager.dk)

Scores of two bodies differ in their last bits, and so may selections: a selection is tested bitwise on given scores,
attention and KL on a given selection. Shape legend as in `flash_indexer.reference`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer import reference
from flash_indexer.ops import Selection
from flash_indexer.testing import Inputs


class SparseResult(NamedTuple):
    """Values and gradients of `dsa_attention`: those of q, k, v under d_out, the indexer's those of d_loss * loss."""

    out: Tensor
    lse: Tensor
    loss: Tensor
    kl: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor | None
    d_index_q: Tensor
    d_index_k: Tensor
    d_index_weights: Tensor
    d_sinks: Tensor | None = None


def make_values(inputs: Inputs, V: int, *, seed: int) -> Tensor:
    """Random v [S, G, V] in k's dtype, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(*inputs.k.shape[:2], V, generator=generator, dtype=torch.float64)
    return v.to(inputs.k.dtype).to(inputs.k.device)


def selection_mask(selection: Selection, num_keys: int) -> Tensor:
    """selected[t,s]: bool [T, S]; slots behind a query's count and indices out of range are none."""
    indices, count, _ = selection
    slots = torch.arange(indices.shape[1], device=indices.device)
    none = (slots >= count[:, None]) | (indices < 0) | (indices >= num_keys)
    mask = torch.zeros(len(indices), num_keys + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(1, indices.long().masked_fill(none, num_keys), True)[:, :num_keys]


def reference_dsa(
    inputs: Inputs,
    v: Tensor | None,
    selected: Tensor,
    *,
    d_out: Tensor,
    value_dim: int | None = None,
    token_weight: Tensor | None = None,
    d_loss: float = 1.0,
    sinks: Tensor | None = None,
) -> SparseResult:
    """The truth: the reference in float64 on the given values, differentiated by autograd.

    Args:
        inputs, v: of any dtype; v None takes the first value_dim columns of k. selected: bool [T, S]. d_out: [T, H, V].
        token_weight: [T], None means 1/n. sinks: [H], None for none.
    """
    x, given = inputs.double(), [y.double() for y in (v, sinks) if y is not None]
    attended = [y.detach().clone().requires_grad_() for y in (x.q, x.k, *given)]
    sunk = None if sinks is None else attended[-1]
    index_q, index_k, index_weights = (y.detach().clone().requires_grad_() for y in _leaves(x))
    values = attended[1][..., :value_dim] if v is None else attended[2]
    out, lse = reference.sparse_attention(attended[0], attended[1], values, selected, x.softmax_scale, sunk)
    weight = None if token_weight is None else token_weight.double()
    loss, kl = reference.sparse_indexer_kl(
        x.q, x.k, index_q, index_k, index_weights, selected, softmax_scale=x.softmax_scale, token_weight=weight,
        sinks=None if sinks is None else sinks.double(),
    )  # fmt: skip
    dq, dk, *rest = torch.autograd.grad(out, attended, d_out.double())
    d_sinks = None if sinks is None else rest.pop()
    index = torch.autograd.grad(d_loss * loss, (index_q, index_k, index_weights))
    dv = rest[0] if rest else None
    made = SparseResult(out.detach(), lse.detach(), loss.detach(), kl, dq, dk, dv, *index)
    return made._replace(d_sinks=d_sinks)


def eager_dsa(
    inputs: Inputs,
    v: Tensor | None,
    selected: Tensor,
    *,
    d_out: Tensor,
    value_dim: int | None = None,
    token_weight: Tensor | None = None,
    d_loss: float = 1.0,
    sinks: Tensor | None = None,
) -> SparseResult:
    """The baseline: whole matrices in float32, products of low-precision inputs exact, every sum in float32.

    What tensor cores multiply is rounded once to q's dtype: a before a·v and dv, dS before dq and dk, and in the
    indexer as in `eager_indexer_kl`. Outputs are rounded once. Arguments as in `reference_dsa`.

    Raises:
        TypeError: for float64 inputs, whose truth is `reference_dsa`.
    """
    if inputs.q.dtype == torch.float64:
        raise TypeError("eager_dsa: inputs must be bfloat16, float16 or float32, got float64")
    low, scale, per_group = inputs.q.dtype, inputs.softmax_scale, inputs.q.shape[1] // inputs.k.shape[1]
    q, k = inputs.q.float(), inputs.k.float()
    value = k[..., :value_dim] if v is None else v.float()
    wide_k, wide_v = (x.repeat_interleave(per_group, dim=1) for x in (k, value))
    logits = reference.teacher_logits(q, k, scale)
    lse = logits.masked_fill(~selected[:, None], -torch.inf).logsumexp(-1)
    lse = lse if sinks is None else torch.logaddexp(lse, sinks.float())
    a = (logits - lse[..., None]).exp().masked_fill(~selected[:, None], 0.0)
    low_a, upstream = a.to(low).float(), d_out.float()
    out = torch.einsum("ths,shv->thv", low_a, wide_v)
    delta = (upstream * out.to(low).float()).sum(-1, keepdim=True)
    ds = (a * (torch.einsum("thv,shv->ths", upstream, wide_v) - delta)).to(low).float()
    dq = scale * torch.einsum("ths,shd->thd", ds, wide_k)
    groups = k.shape[0], k.shape[1], per_group
    dk = scale * torch.einsum("ths,thd->shd", ds, q).reshape(*groups, -1).sum(2)
    dv = torch.einsum("ths,thv->shv", low_a, upstream).reshape(*groups, -1).sum(2)
    if v is None:
        dk[..., :value_dim] += dv
    loss, kl, *index = _eager_index(inputs, a.sum(1), selected, token_weight)
    rounded = [(d_loss * x).to(y.dtype) for x, y in zip(index, _leaves(inputs), strict=True)]
    d_sinks = None
    if sinks is not None:
        d_sinks = -((sinks.float() - lse).exp() * delta[..., 0]).sum(0).to(sinks.dtype)
    narrow = dq.to(low), dk.to(low), None if v is None else dv.to(low)
    return SparseResult(out.to(low), lse, loss, kl, *narrow, *rounded)._replace(d_sinks=d_sinks)


def _leaves(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs.index_q, inputs.index_k, inputs.index_weights


def _eager_index(inputs: Inputs, total: Tensor, selected: Tensor, token_weight: Tensor | None) -> list[Tensor]:
    """loss, kl and the unrounded gradients of the index tensors, from total[t,s] = sum_h a[t,h,s]."""
    index_q, index_k, w = (x.float() for x in _leaves(inputs))
    low, some = inputs.index_q.dtype, selected.any(-1)
    p = total / total.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    logit = torch.einsum("tie,se->tis", index_q, index_k)
    scores = (w[..., None] * logit.relu()).sum(1).masked_fill(~selected, torch.finfo(torch.float32).min)
    log_softmax = scores.log_softmax(-1)
    kl = (torch.xlogy(p, p) - p * log_softmax.masked_fill(p == 0, 0.0)).sum(-1) * some
    weight = some.float() / some.sum().clamp_min(1) if token_weight is None else token_weight.float()
    di = (log_softmax.exp() - p).masked_fill(~selected, 0.0) * weight[:, None]
    masked = di[:, None] * (logit > 0)
    unscaled = torch.einsum("tis,se->tie", masked.to(low).float(), index_k)
    ds = (masked * w[..., None]).to(low).float()
    d_index_q, d_index_k = torch.einsum("tis,se->tie", ds, index_k), torch.einsum("tis,tie->se", ds, index_q)
    return [(weight * kl).sum(), kl, d_index_q, d_index_k, (index_q * unscaled).sum(-1)]
