"""What benchmarks/precision.py compares: an operator's values, the same in float64, and the eager formula's.

Up to WHOLE tokens all rows; beyond, a sample of queries, and of keys for d_index_k, which is summed over all queries.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_indexer import indexer_kl, reference, warmup_attention
from flash_indexer.ops import attention_forward
from flash_indexer.ops.kl.arithmetic import FP8
from flash_indexer.ops.quantization import dequantize, quantize, rotate
from flash_indexer.testing import Inputs, eager_attention, eager_indexer_kl, reference_indexer_kl

WHOLE = 2048
SAMPLED = 64
ELEMENTS = 2**28  # of a block of logits: 2 GiB in float64, of which a handful exist at a time
SMALL_ROW = 0.01  # a row's error is told in units of its own rms, or of this part of the whole tensor's
Values = dict[str, Tensor]


class Setting(NamedTuple):
    """An operator and the options that change its arithmetic."""

    operator: str = "indexer_kl"
    target: str = "mean"
    index_dtype: str | None = None
    teacher_dtype: str | None = None

    @property
    def is_wide(self) -> bool:
        return self.index_dtype is None and self.teacher_dtype is None


class Sample(NamedTuple):
    """Queries and keys that are compared; None means all."""

    rows: Tensor | None
    keys: Tensor | None

    @classmethod
    def of(cls, tokens: int, device: torch.device) -> Sample:
        """Spread evenly over the sequence: the last query is among them, and the first key."""
        if tokens <= WHOLE:
            return cls(None, None)
        places = torch.arange(SAMPLED + 1, device=device) * (tokens - 1) // SAMPLED
        return cls(places[1:], places[:-1])

    def __str__(self) -> str:
        return "all" if self.rows is None or self.keys is None else f"{len(self.rows)} queries, {len(self.keys)} keys"

    def taken(self, values: Values) -> Values:
        """Of whole tensors; the loss is left out where queries are."""
        if self.rows is None:
            return values
        places = {name: self.keys if name == "d_index_k" else self.rows for name in values if name != "loss"}
        return {name: values[name][place] for name, place in places.items()}


class Problem:
    """One problem: `ours` by the operators, `truth` in float64 and `eager`, each the sampled part of all values."""

    def __init__(self, x: Inputs, v: Tensor) -> None:
        self.x, self.v = x, v
        self.sample = Sample.of(len(x.q), x.q.device)
        self._known: dict[tuple[Setting, bool], Values] = {}

    def inputs(self, target: str) -> Inputs:
        """With "sum_logits" under a scale at which a sum over heads spreads as one head's logits do."""
        factor = self.x.q.shape[1] ** -0.5 if target == "sum_logits" else 1.0
        return replace(self.x, softmax_scale=self.x.softmax_scale * factor)

    def ours(self, setting: Setting) -> Values:
        """The operator's values, and its gradients under the loss's mean over queries."""
        x = self.inputs(setting.target)
        common: dict[str, Any] = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end)
        if setting.operator == "attention_forward":
            out = attention_forward(x.q, x.k, self.v, **common)
            return self.sample.taken(dict(zip(("out", "lse"), out, strict=True)))
        leaves = [leaf.detach().clone().requires_grad_() for leaf in (x.index_q, x.index_k, x.index_weights)]
        if setting.operator == "warmup_attention":
            result: Any = warmup_attention(x.q, x.k, self.v, *leaves, **common, target=setting.target)
        else:
            result = indexer_kl(
                x.q, x.k, *leaves, **common, lse=given_lse(x, setting), target=setting.target,
                index_dtype=setting.index_dtype, teacher_dtype=setting.teacher_dtype,
            )  # fmt: skip
        gradients = torch.autograd.grad(result.loss, leaves)
        names = ("d_index_q", "d_index_k", "d_index_weights")
        values = result._asdict() | dict(zip(names, gradients, strict=True))
        return self.sample.taken({name: value.detach() for name, value in values.items()})

    def truth(self, setting: Setting) -> Values:
        """In float64, of the numbers that rows in e4m3 stand for."""
        return self._values(setting, wide=True)

    def eager(self, setting: Setting) -> Values:
        """The eager formula in the inputs' dtype, of the same numbers."""
        return self._values(setting, wide=False)

    def _values(self, setting: Setting, *, wide: bool) -> Values:
        if setting.operator == "attention_forward":
            return self._kept(setting, wide)
        loss = self._kept(setting._replace(operator="indexer_kl"), wide)
        if setting.operator == "indexer_kl":
            return loss
        return loss | self._kept(Setting("attention_forward", setting.target), wide)

    def _kept(self, setting: Setting, wide: bool) -> Values:
        """Each computed once: settings share them."""
        if (setting, wide) not in self._known:
            find = self._attention if setting.operator == "attention_forward" else self._loss
            self._known[setting, wide] = find(setting, wide)
        return self._known[setting, wide]

    def _attention(self, setting: Setting, wide: bool) -> Values:
        x = self.inputs(setting.target)
        x = x if self.sample.rows is None else rows_of(x, self.sample.rows)
        if not wide:
            return dict(zip(("out", "lse"), eager_attention(x, self.v), strict=True))
        x = x.double()
        out = reference.attention(x.q, x.k, self.v.double(), x.softmax_scale, x.key_start, x.key_end)
        return dict(zip(("out", "lse"), out, strict=True))

    def _loss(self, setting: Setting, wide: bool) -> Values:
        """Gradients go straight through at the scores; with "per_head" at the rows, and are rotated back."""
        original = self.inputs(setting.target)
        low = stand_in(original, setting)
        through = setting.index_dtype is not None and setting.target != "per_head"
        x = replace(low, index_q=original.index_q, index_k=original.index_k) if through else low
        part, scored = (y if self.sample.rows is None else rows_of(y, self.sample.rows) for y in (x, low))
        options: dict[str, Any] = dict(
            target=setting.target, token_weight=torch.full_like(part.token_weight, 1 / len(x.q), dtype=torch.float64),
            scored=(scored.index_q, scored.index_k) if through else None,
        )  # fmt: skip
        if wide:
            values = reference_indexer_kl(part, **options)._asdict()
        else:
            values = eager_indexer_kl(part, lse=given_lse(part, setting), **options)._asdict()
        if self.sample.keys is not None:
            del values["loss"]
            dtype = torch.float64 if wide else torch.float32
            values["d_index_k"] = key_gradients(x, low, self.sample.keys, setting.target, dtype)
        if setting.index_dtype == FP8 and not through:
            for name in ("d_index_q", "d_index_k"):
                gradient = values[name]
                values[name] = rotate(gradient if wide else gradient.float()).to(gradient.dtype)
        return dict(values)


def given_lse(x: Inputs, setting: Setting) -> Tensor | None:
    """The attention's, as in training; a teacher in e4m3 has one of its own, and other targets read none."""
    return x.lse if setting.target == "mean" and setting.teacher_dtype is None else None


def stand_in(x: Inputs, setting: Setting) -> Inputs:
    """The numbers that the rounded rows stand for, in the inputs' dtype, which holds them exactly."""
    if setting.teacher_dtype is not None:
        rotation = setting.teacher_dtype == FP8
        q, k = (dequantize(quantize(y, rotation=rotation), y.dtype) for y in (x.q, x.k))
        x = replace(x, q=q, k=k)
    if setting.index_dtype is not None:
        rotation = setting.index_dtype == FP8
        index = (dequantize(quantize(y, rotation=rotation), y.dtype) for y in (x.index_q, x.index_k))
        x = replace(x, **dict(zip(("index_q", "index_k"), index, strict=True)))
    return x


def rows_of(x: Inputs, rows: Tensor | slice) -> Inputs:
    """Some queries, and all keys."""
    names = ("q", "index_q", "index_weights", "key_start", "key_end", "lse", "token_weight")
    return replace(x, **{name: getattr(x, name)[rows] for name in names})


def key_gradients(x: Inputs, scored: Inputs, keys: Tensor, target: str, dtype: torch.dtype) -> Tensor:
    """d_index_k[s] = sum_t,j dS[t,j,s] * index_q[t,j] of a few keys s, over all queries, a block of them at a time.

        dS[t,j,s] = (softmax(i[t,:])[s] - p[t,s]) / T * w[t,j] * [index_q[t,j]·index_k[s] > 0],   i of `scored`

    In float64, or in float32 with dS rounded once to index_q's dtype and the result once, as the eager formula has it.
    """
    low, heads = x.index_q.dtype, max(x.q.shape[1], x.index_q.shape[1])
    total = torch.zeros(len(keys), x.index_k.shape[1], dtype=dtype, device=keys.device)
    step = max(ELEMENTS // (heads * len(x.k)), 1)
    for begin in range(0, len(x.q), step):
        part, low_part = (rows_of(y, slice(begin, begin + step)) for y in (x, scored))
        ds = score_gradients(part, low_part, keys, target, dtype) / len(x.q)
        if dtype != torch.float64:
            ds = ds.to(low).to(dtype)
        total += torch.einsum("tis,tie->se", ds, part.index_q.to(dtype))
    return total if dtype == torch.float64 else total.to(low)


def score_gradients(x: Inputs, scored: Inputs, keys: Tensor, target: str, dtype: torch.dtype) -> Tensor:
    """T times dS of x's queries at some keys: [queries, I, keys]; index scores are those of `scored`."""
    q, k, index_q, index_k, w = (y.to(dtype) for y in (x.q, x.k, x.index_q, x.index_k, x.index_weights))
    low_q, low_k = scored.index_q.to(dtype), scored.index_k.to(dtype)
    start, end, seen = x.key_start, x.key_end, slice(0, int(x.key_end[-1]))
    if target == "sum_logits":  # one head as wide as the key heads together
        q = q.unflatten(1, (k.shape[1], -1)).sum(2).flatten(1)[:, None]
        k = k.flatten(1)[:, None]
    lse = reference.teacher_lse(q, k[seen], x.softmax_scale, start, end)
    p = (reference.teacher_logits(q, k[keys], x.softmax_scale) - lse[..., None]).exp()
    logit = torch.einsum("tie,se->tis", index_q, index_k[keys])
    scores = w[..., None] * torch.einsum("tie,se->tis", low_q, low_k[keys]).relu()
    normaliser = reference.indexer_scores(low_q, low_k[seen], w, start, end, target).logsumexp(-1)
    if target == "per_head":
        di = ((scores - normaliser[..., None]).exp() - p) / q.shape[1]
    else:
        di = (scores.sum(1) - normaliser[:, None]).exp() - p.mean(1)
        di = di[:, None]
    di = di.masked_fill(~reference.visible_keys(start, end, len(x.k))[:, None, keys], 0.0)
    return di * (logit > 0) * w[..., None]


def errors(got: Tensor, truth: Tensor) -> list[float]:
    """rms(got - truth) / rms(truth), and the largest of a row; absolute where truth is zero throughout.

    A row is an entry of the first dimension, its error told in units of the row's rms, or of SMALL_ROW of the whole
    tensor's where that is more.
    """
    rows = truth.shape[0] if truth.ndim else 1
    difference, truth = (y.double().reshape(rows, -1) for y in (got.double() - truth, truth))
    whole = rms(truth) or 1.0
    each = difference.square().mean(1).sqrt() / truth.square().mean(1).sqrt().clamp_min(SMALL_ROW * whole)
    return [rounded(rms(difference) / whole), rounded(float(each.max()))]


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def rounded(x: float) -> float:
    """Three significant digits."""
    return float(f"{x:.2e}")
