"""The ruler: random inputs of named shapes, the float64 truth, an honest float32 baseline, and `assert_close`.

Public, so that a port or a new kernel is judged as the operators of this package are:

    inputs = make_inputs(SHAPES["packed"], seed=0, dtype=torch.bfloat16, device="cuda")
    truth, eager = reference_indexer_kl(inputs), eager_indexer_kl(inputs)
    assert_close("d_index_q", mine, truth.d_index_q, eager.d_index_q)

Shape legend as in `flash_indexer.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_indexer import reference
from flash_indexer.intervals import causal_intervals

_ROW_FACTOR, _GLOBAL_FACTOR = 4.0, 2.0
_ABSOLUTE_FLOOR = 2.0**-22  # of rms(ref64): what float32 sums of float32 terms may leave anywhere
_ELEMENTS = 2**26  # of the teacher's logits in float64 that are held at a time


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem. documents holds (queries, keys) of each packed document; T and S are their sums.

    A document with more keys than queries has a cached prefix; one with fewer begins with queries that see nothing.
    window: each query sees at most this many keys; None means all of its document's past.
    """

    documents: tuple[tuple[int, int], ...]
    H: int
    G: int
    D: int
    I: int
    E: int
    window: int | None = None

    @property
    def T(self) -> int:
        """Number of query tokens."""
        return sum(queries for queries, _ in self.documents)

    @property
    def S(self) -> int:
        """Number of key tokens."""
        return sum(keys for _, keys in self.documents)

    def intervals(self) -> tuple[Tensor, Tensor]:
        """key_start, key_end: int32 [T] on the CPU."""
        boundaries = torch.tensor([(0, 0), *self.documents]).cumsum(0)
        key_start, key_end = causal_intervals(boundaries[:, 0], boundaries[:, 1])
        if self.window is not None:
            key_start = torch.maximum(key_start, key_end - self.window)
        return key_start, key_end


SHAPES = {
    "smollm2": Shape(((63, 63),), H=9, G=3, D=64, I=8, E=64),
    "packed": Shape(((1, 1), (30, 30), (1, 1), (19, 17), (40, 40)), H=9, G=3, D=16, I=8, E=32),
    "cached_prefix": Shape(((5, 33), (1, 70), (17, 17)), H=6, G=2, D=24, I=3, E=32),
    "fewer_keys": Shape(((37, 20), (3, 0), (11, 5)), H=4, G=4, D=16, I=5, E=32),
    "window": Shape(((70, 70), (1, 1), (27, 31)), H=5, G=1, D=40, I=7, E=32, window=13),
    "one_head": Shape(((2, 2), (31, 31), (3, 2)), H=1, G=1, D=8, I=1, E=32),
}
"""Small shapes with odd counts; between them: one query with one key and one with none, a document of length 1,
T != S in both directions, MHA, GQA and MQA teachers, sliding windows."""


class KernelClass(NamedTuple):
    """What a set of GPU kernels is compiled for: head width D, index head width E, index heads I padded to IP."""

    D: int
    E: int
    IP: int


KERNEL_CLASSES = tuple(
    KernelClass(*sizes)
    for sizes in (
        (96, 32, 8), (64, 32, 16), (256, 32, 32), (128, 32, 64),
        (64, 64, 8), (128, 64, 16), (192, 64, 32), (128, 64, 64),
        (96, 128, 8), (256, 128, 16), (576, 128, 32), (576, 128, 64), (192, 128, 64), (64, 128, 32),
    )
)  # fmt: skip
"""The classes that the GPU tests cover: every D, and every E with every IP, that the kernels support. (64, 64, 8) is
SmolLM2-135M's; (576, 128, 64) and (192, 128, 64) are DeepSeek-V3.2's, absorbed and expanded."""


class HeadClass(NamedTuple):
    """What the attention kernels are compiled for: head widths D and V, index width E, heads of a key head."""

    D: int
    V: int
    E: int
    heads: int


HEAD_CLASSES = (
    HeadClass(D=64, V=64, E=32, heads=3),
    HeadClass(D=128, V=128, E=64, heads=64),
    HeadClass(D=128, V=128, E=64, heads=4),
    HeadClass(D=128, V=128, E=128, heads=1),
    HeadClass(D=128, V=128, E=64, heads=128),
    HeadClass(D=192, V=128, E=64, heads=2),
    HeadClass(D=256, V=256, E=64, heads=8),
    HeadClass(D=80, V=40, E=32, heads=5),
    HeadClass(D=128, V=64, E=128, heads=12),
    HeadClass(D=64, V=64, E=32, heads=4),
)


@dataclass(frozen=True)
class Inputs:
    """Arguments of `flash_indexer.indexer_kl`. lse and token_weight are there to be passed or not.

    q [T, H, D], k [S, G, D], index_q [T, I, E], index_k [S, E] in the dtype asked for; index_weights [T, I],
    lse [T, H] and token_weight [T] in float32 at least; key_start, key_end int32 [T].
    """

    q: Tensor
    k: Tensor
    index_q: Tensor
    index_k: Tensor
    index_weights: Tensor
    key_start: Tensor
    key_end: Tensor
    lse: Tensor
    token_weight: Tensor
    softmax_scale: float

    def double(self) -> Inputs:
        """The same values in float64."""
        names = ("q", "k", "index_q", "index_k", "index_weights", "lse", "token_weight")
        return replace(self, **{name: getattr(self, name).double() for name in names})


class Result(NamedTuple):
    """Values and gradients of `indexer_kl`; the gradients are those of d_loss * loss."""

    loss: Tensor
    kl: Tensor
    entropy: Tensor
    d_index_q: Tensor
    d_index_k: Tensor
    d_index_weights: Tensor


def make_inputs(
    shape: Shape, *, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Inputs:
    """Random inputs, the same on every device; scores spread over a few units: softmax is neither flat nor a spike.

    token_weight holds positive, negative and (every seventh) zero entries. lse is computed in float64 from the rounded
    q and k; it is -inf where a query sees nothing.
    """
    x = random_inputs(shape, *shape.intervals(), generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return replace(x, **{f.name: getattr(x, f.name).to(device) for f in fields(x) if f.name != "softmax_scale"})


def random_inputs(
    shape: Shape, key_start: Tensor, key_end: Tensor, *, generator: torch.Generator, dtype: torch.dtype
) -> Inputs:
    """`make_inputs` for any intervals, int32 [T], on the generator's device, for sizes that are slow on the CPU."""
    device = generator.device

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(size, generator=generator, dtype=torch.float64, device=device)

    T, S, wide = shape.T, shape.S, torch.promote_types(dtype, torch.float32)
    q, k = normal(T, shape.H, shape.D, scale=1.5).to(dtype), normal(S, shape.G, shape.D).to(dtype)
    index_q, index_k = normal(T, shape.I, shape.E).to(dtype), normal(S, shape.E).to(dtype)
    index_weights = normal(T, shape.I, scale=2.0 * (shape.I * shape.E) ** -0.5).to(wide)
    token_weight = normal(T).to(wide)
    token_weight[3::7] = 0.0
    scale = shape.D**-0.5
    key_start, key_end = key_start.to(device), key_end.to(device)
    wide_q, wide_k, step = q.double(), k.double(), max(_ELEMENTS // max(shape.H * S, 1), 1)
    blocks = [slice(begin, begin + step) for begin in range(0, max(T, 1), step)]
    lse = torch.cat([reference.teacher_lse(wide_q[b], wide_k, scale, key_start[b], key_end[b]) for b in blocks]).to(
        wide
    )
    return Inputs(q, k, index_q, index_k, index_weights, key_start, key_end, lse, token_weight, scale)


def reference_indexer_kl(
    inputs: Inputs,
    *,
    target: str = "mean",
    token_weight: Tensor | None = None,
    d_loss: float = 1.0,
    scored: tuple[Tensor, Tensor] | None = None,
) -> Result:
    """The truth: `reference.indexer_kl` in float64 on the given values, differentiated by autograd.

    Args:
        inputs: of any dtype. token_weight: [T], None means 1/n. d_loss: the upstream gradient. scored: rounded index_q
            and index_k, whose scores count.
    """
    x = inputs.double()
    leaves = [leaf.clone().requires_grad_() for leaf in (x.index_q, x.index_k, x.index_weights)]
    options: dict[str, Any] = dict(
        softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end, target=target,
        token_weight=None if token_weight is None else token_weight.double(),
    )  # fmt: skip
    if scored is None:
        loss, kl = reference.indexer_kl(x.q, x.k, *leaves, **options)
    else:
        index_q, index_k, weights = leaves
        rounded = scored[0].double(), scored[1].double()
        loss, kl = reference.rounded_indexer_kl(x.q, x.k, (index_q, index_k, weights), rounded, **options)
    p = reference.target_distribution(x.q, x.k, x.softmax_scale, x.key_start, x.key_end, target)
    gradients = torch.autograd.grad(d_loss * loss, leaves)
    return Result(loss.detach(), kl, torch.special.entr(p).sum(-1), *gradients)


def eager_indexer_kl(
    inputs: Inputs,
    *,
    target: str = "mean",
    lse: Tensor | None = None,
    token_weight: Tensor | None = None,
    d_loss: float = 1.0,
    scored: tuple[Tensor, Tensor] | None = None,
) -> Result:
    """The baseline: whole matrices in float32, products of low-precision inputs exact, every sum in float32.

    dS[t,j,s] = di[t,s] * w[t,j] * [index_q[t,j]·index_k[s] > 0] is rounded once to index_q's dtype before the
    products that form d_index_q and d_index_k, and so is dS / w before the one that forms d_index_weights; outputs are
    rounded once. float64 inputs are refused: their truth is `reference_indexer_kl`.

    Args:
        inputs: bfloat16, float16 or float32 vectors. lse: [T, H], None computes it. token_weight: [T], None means 1/n.
        d_loss: the upstream gradient. scored: rounded index_q and index_k, whose scores count.

    Returns:
        loss, kl, entropy in float32; gradients in their input's dtype.

    Raises:
        TypeError: for float64 inputs.
    """
    if inputs.q.dtype == torch.float64:
        raise TypeError("eager_indexer_kl: inputs must be bfloat16, float16 or float32, got float64")
    low = inputs.index_q.dtype
    q, k, index_q, index_k = (x.float() for x in (inputs.q, inputs.k, inputs.index_q, inputs.index_k))
    w, start, end = inputs.index_weights.float(), inputs.key_start, inputs.key_end
    visible = reference.visible_keys(start, end, k.shape[0])
    seen = end > start
    if target == "mean" and lse is not None:
        logits = reference.teacher_logits(q, k, inputs.softmax_scale)
        total = (logits - lse[..., None]).exp().masked_fill(~visible[:, None], 0.0).sum(1)
        p = total / total.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    else:
        p = reference.target_distribution(q, k, inputs.softmax_scale, start, end, target)
    logit = torch.einsum("tie,se->tis", index_q, index_k)
    formed = logit if scored is None else torch.einsum("tie,se->tis", scored[0].float(), scored[1].float())
    scores = w[..., None] * formed.relu()
    if target == "per_head":
        visible, seen_row = visible[:, None], seen[:, None]
    else:
        scores, p, visible, seen_row = scores.sum(1, keepdim=True), p[:, None], visible[:, None], seen[:, None]
    log_softmax = scores.masked_fill(~visible, torch.finfo(torch.float32).min).log_softmax(-1)
    kl = (torch.xlogy(p, p) - p * log_softmax.masked_fill(p == 0, 0.0)).sum(-1) * seen_row
    entropy = torch.special.entr(p).sum(-1)
    weight = seen.float() / seen.sum().clamp_min(1) if token_weight is None else token_weight.float()
    loss = (weight * kl.mean(-1)).sum()
    di = (log_softmax.exp() - p).masked_fill(~visible, 0.0) * (weight / kl.shape[1])[:, None, None]
    masked = di * (logit > 0)
    unscaled = torch.einsum("tis,se->tie", masked.to(low).float(), index_k)
    ds = (masked * w[..., None]).to(low).float()
    d_index_q = torch.einsum("tis,se->tie", ds, index_k)
    d_index_k = torch.einsum("tis,tie->se", ds, index_q)
    d_index_weights = (index_q * unscaled).sum(-1)
    if target != "per_head":
        kl, entropy = kl[:, 0], entropy[:, 0]
    gradients = (d_loss * d_index_q).to(low), (d_loss * d_index_k).to(low), d_loss * d_index_weights
    return Result(loss, kl, entropy, *gradients)


def eager_attention(inputs: Inputs, v: Tensor) -> tuple[Tensor, Tensor]:
    """The baseline of attention: out[t,h] = sum_s p[t,h,s] * v[s,g(h)] and lse, whole matrices and sums in float32.

    The probabilities p are rounded once to v's dtype before the product, and out once after it.

    Args:
        inputs: bfloat16, float16 or float32 vectors. v: [S, G, V] in their dtype.

    Returns:
        out [T, H, V] in v's dtype; lse [T, H] in float32.
    """
    x, heads = inputs, inputs.q.shape[1] // v.shape[1]
    q, k = x.q.float(), x.k.float()
    p = reference.target_distribution(q, k, x.softmax_scale, x.key_start, x.key_end, "per_head")
    out = torch.einsum("ths,shv->thv", p.to(v.dtype).float(), v.float().repeat_interleave(heads, 1)).to(v.dtype)
    return out, reference.teacher_lse(q, k, x.softmax_scale, x.key_start, x.key_end)


def assert_close(name: str, got: Tensor, ref64: Tensor, eager: Tensor) -> None:
    """rms(got - ref64) <= 2 * rms(eager - ref64) + floor, and the same for every row with factor 4.

        floor = 2 * eps(got's dtype) * rms(ref64, over the same elements) + 2^-22 * rms(ref64, whole)

    A row is an entry of the first dimension; a vector or a scalar is one row. The row criterion sees what a norm of
    the whole tensor can't: a few bad rows among thousands. Rounding errors within a row are correlated, so eager may
    be nearly exact in one by luck: a row's baseline is at least the row's norm times eager's relative error over the
    whole tensor. Non-finite elements must stand at the same places with the same values (nan equals nan) in all three
    and are left out of the sums.

    Args:
        got: what is judged. ref64: the float64 truth, on whose device all is compared. eager: the baseline, in got's
            dtype.

    Raises:
        AssertionError: naming the criterion, the row, the error, the allowance and where it comes from.
        TypeError, ValueError: when the three can't be compared.
    """
    if ref64.dtype != torch.float64:
        raise TypeError(f"assert_close: ref64 must be float64, got {ref64.dtype}")
    if eager.shape != ref64.shape:
        raise ValueError(f"assert_close: eager must be shaped like ref64, {list(ref64.shape)}, got {list(eager.shape)}")
    if got.shape != ref64.shape:
        raise AssertionError(f"{name}: shape must be {list(ref64.shape)}, got {list(got.shape)}")
    if got.dtype != eager.dtype:
        raise AssertionError(f"{name}: dtype must be {eager.dtype} like eager, got {got.dtype}")
    eps = torch.finfo(got.dtype).eps
    got, ref64, eager = (x.detach().to(ref64.device).double() for x in (got, ref64, eager))
    finite = ref64.isfinite()
    for which, x in (("got", got), ("eager", eager)):
        wrong = (x.isfinite() != finite) | (~finite & (x != ref64) & ~(x.isnan() & ref64.isnan()))
        if bool(wrong.any()):
            where = wrong.nonzero()[0].tolist()
            at = tuple(where)
            raise AssertionError(
                f"{name}: {which} and ref64 differ in their non-finite elements at {int(wrong.sum())} places, "
                f"first at {where}: {float(x[at])} against {float(ref64[at])}"
            )
    got, ref64, eager = (x.masked_fill(~finite, 0.0) for x in (got, ref64, eager))
    flat_ref, flat_error = ref64.reshape(1, -1), (eager - ref64).reshape(1, -1)
    base = _ABSOLUTE_FLOOR * float(_rms(flat_ref)[0])
    relative = float(_rms(flat_error)[0] / _rms(flat_ref)[0].clamp_min(1e-300))
    as_rows = ref64.shape[0] if ref64.ndim > 1 else 1
    for rows, factor in ((1, _GLOBAL_FACTOR), (as_rows, _ROW_FACTOR)):
        if ref64.numel() == 0:
            continue
        g, r, e = (x.reshape(rows, -1) for x in (got, ref64, eager))
        error, floor = _rms(g - r), 2 * eps * _rms(r) + base
        baseline = torch.maximum(_rms(e - r), _rms(r) * relative)
        allowed = factor * baseline + floor
        bad = error > allowed
        if bool(bad.any()):
            i = int((error / allowed.clamp_min(1e-300)).argmax())
            place = f"row {i} ({int(bad.sum())} of {rows} rows fail)" if factor == _ROW_FACTOR else "the whole tensor"
            raise AssertionError(
                f"{name}: rms error of {place} is {float(error[i]):.3e}, allowed {float(allowed[i]):.3e} = "
                f"{factor:g} x {float(baseline[i]):.3e} (eager) + {float(floor[i]):.3e} (rounding floor); "
                f"rms of ref64 there {float(_rms(r)[i]):.3e}"
            )


def _rms(x: Tensor) -> Tensor:
    """Root mean square of each row of a matrix."""
    return x.square().mean(-1).sqrt()
