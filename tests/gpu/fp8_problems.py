"""The baseline of the ruler in e4m3: Hopper's tensor cores keep 14 bits of a sum, so float32 sums are no fair measure.

Each step of 32 products is added at the exponent of its largest term, or of the sum so far, and what lies more than 13
bits below is cut off (DeepSeek-V3 technical report, 2024, section 3.5.2). Everything else is as in `eager_indexer_kl`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_indexer import quantize, reference
from flash_indexer.ops.quantization import Quantized, dequantize
from flash_indexer.testing import Inputs, Result

STEP, BITS, ORDERS = 32, 13, 8


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of e4m3 numbers in float32, [M, K] and [N, K], as the tensor cores sum it."""
    total = torch.zeros(a.shape[0], b.shape[0], device=a.device)
    for k in range(0, a.shape[1], STEP):
        terms = a[:, None, k : k + STEP] * b[None, :, k : k + STEP]
        top = torch.maximum(terms.abs().amax(-1), total.abs())
        unit = torch.ldexp(torch.ones_like(top), torch.frexp(top).exponent - 1 - BITS)
        total = ((terms / unit[..., None]).trunc().sum(-1) + (total / unit).trunc()) * unit
    return total


def products(q: Quantized, k: Quantized) -> Tensor:
    """q[t,h]·k[s,g(h)] with the scales: [T, H, S]."""
    heads = q.shape[1] // k.shape[1]
    found = [product(q.values[:, h].float(), k.values[:, h // heads].float()) for h in range(q.shape[1])]
    scales = q.scale[:, :, None] * k.scale.repeat_interleave(heads, 1).T
    return torch.stack(found, 1) * scales


def truth(
    x: Inputs, index_dtype: str | None, teacher_dtype: str | None, weight: Tensor | None, d_loss: float
) -> Result:
    """In float64, of the rounded tensors; gradients straight through at the scores."""
    q, k = (rounded(t, teacher_dtype == "fp8") if teacher_dtype else t.double() for t in (x.q, x.k))
    leaves = [t.double().requires_grad_() for t in (x.index_q, x.index_k, x.index_weights)]
    options = dict(
        softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end,
        token_weight=None if weight is None else weight.double(),
    )  # fmt: skip
    if index_dtype:
        low = tuple(rounded(t, index_dtype == "fp8") for t in (x.index_q, x.index_k))
        loss, kl = reference.rounded_indexer_kl(q, k, tuple(leaves), low, **options)
    else:
        loss, kl = reference.indexer_kl(q, k, *leaves, **options)
    p = reference.target_distribution(q, k, x.softmax_scale, x.key_start, x.key_end)
    gradients = torch.autograd.grad(d_loss * loss, leaves)
    return Result(loss.detach(), kl, torch.special.entr(p).sum(-1), *gradients)


def rounded(x: Tensor, rotation: bool = False) -> Tensor:
    """In float64; on the CPU, where nothing but torch converts."""
    return dequantize(quantize(x.cpu(), rotation=rotation), torch.float64).to(x.device)


def worst_eager(x: Inputs, right: Result, **options) -> Result:
    """Each element from that one of a few evaluations which errs most there.

    They differ in the order of the columns, and in a factor that the scores have while they are rounded: products of
    few bits are exact in any order.
    """
    generator, worst = torch.Generator().manual_seed(0), None
    for n in range(ORDERS):
        orders = [
            torch.arange(w) if n == 0 else torch.randperm(w, generator=generator)
            for w in (x.q.shape[-1], x.index_q.shape[-1])
        ]
        other = eager(x, *(order.to(x.q.device) for order in orders), 1 + n / ORDERS, **options)
        if worst is None:
            worst = other
        errors = [[(a.double() - t).abs() for a, t in zip(r, right, strict=True)] for r in (worst, other)]
        worst = Result(*(torch.where(m >= e, a, b) for m, e, a, b in zip(*errors, worst, other, strict=True)))
    return worst


def eager(x: Inputs, d: Tensor, e: Tensor, factor: float, *, index_dtype, teacher_dtype, lse, weight, d_loss) -> Result:
    """One evaluation, with the columns of q, k and of rounded index_q, index_k in these orders, scores by factor."""
    start, end, low = x.key_start, x.key_end, torch.bfloat16
    visible, seen = reference.visible_keys(start, end, x.k.shape[0]), end > start
    if teacher_dtype:
        q, k = (on_cpu(y, teacher_dtype == "fp8") for y in (x.q, x.k))
        q, k = (Quantized(y.values[..., d], y.scale) for y in (q, k))
        logits = products(q, k) * x.softmax_scale
    else:
        logits = reference.teacher_logits(x.q.float(), x.k.float(), x.softmax_scale)
    hidden = logits.masked_fill(~visible[:, None], -torch.inf)
    total = (hidden - (hidden.logsumexp(-1) if lse is None else lse)[..., None]).exp()
    total = total.masked_fill(~visible[:, None], 0.0).sum(1)
    p = total / total.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    index_q, index_k = x.index_q.float(), x.index_k.float()
    logit = torch.einsum("tie,se->tis", index_q, index_k)
    if index_dtype:
        iq, ik = (on_cpu(y, index_dtype == "fp8") for y in (x.index_q, x.index_k[:, None]))
        formed = products(*(Quantized(y.values[..., e], y.scale) for y in (iq, ik)))
    else:
        formed = logit
    w = x.index_weights
    scores = ((factor * w)[..., None] * formed.relu()).sum(1) / factor
    log_softmax = scores.masked_fill(~visible, torch.finfo(torch.float32).min).log_softmax(-1)
    kl = (torch.xlogy(p, p) - p * log_softmax.masked_fill(p == 0, 0.0)).sum(-1) * seen
    weight = seen.float() / seen.sum().clamp_min(1) if weight is None else weight
    di = (log_softmax.exp() - p).masked_fill(~visible, 0.0) * weight[:, None]
    masked = di[:, None] * (logit > 0)
    unscaled = torch.einsum("tis,se->tie", masked.to(low).float(), index_k)
    ds = (masked * w[..., None]).to(low).float()
    d_index_q = d_loss * torch.einsum("tis,se->tie", ds, index_k)
    d_index_k = d_loss * torch.einsum("tis,tie->se", ds, index_q)
    d_weights = d_loss * (index_q * unscaled).sum(-1)
    entropy = torch.special.entr(p).sum(-1)
    return Result((weight * kl).sum(), kl, entropy, d_index_q.to(low), d_index_k.to(low), d_weights)


def on_cpu(x: Tensor, rotation: bool = False) -> Quantized:
    """Quantised there, and brought back."""
    values, scale = quantize(x.cpu(), rotation=rotation)
    return Quantized(values.to(x.device), scale.to(x.device))
