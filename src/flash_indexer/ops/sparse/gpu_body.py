"""Attention over selected keys on the GPU, in gather form: one key head, MLA's absorbed widths.

`forward` and `backward` are steps as `stages` describes them, for the problems that their refusals let pass;
`latent_attention` and `latent_gradients` are the launches. The target alone, without a backward, has no kernel yet.

Shape legend: T queries, S keys, K slots of a query, H heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import MAX_HEADS, MLA_WIDTHS
from flash_indexer.ops import launch
from flash_indexer.ops.sparse.gpu_exact import TOKENS, ExactSums, largest_value
from flash_indexer.ops.sparse.problem import KeySums, Needs, SparseProblem

_LOG2E = 1.4426950408889634
_ROWS = 64  # heads of an item
_HALF_HEADS = 64  # up to which a token's gradients are one CTA's work


class LatentGradients(NamedTuple):
    """dq: bfloat16 [T, H, 576]. dk: float32 [S, 576], the values' gradient in its first 512 columns. p_sum: float32
    [T, K], the sums of the attention's probabilities over heads, zero behind the last key.
    """

    dq: Tensor
    dk: Tensor
    p_sum: Tensor


def refusal() -> str | None:
    """Why no kernel takes the target alone."""
    return "this step of the sparse stage has no kernel yet"


def forward_refusal(problem: SparseProblem) -> str | None:
    """Why `forward` doesn't take a problem; None where it does."""
    (H, D), (S, G) = problem.q.shape[1:], problem.k.shape[:2]
    widths = (D, problem.value_dim)
    if problem.v is not None or G != 1 or widths != MLA_WIDTHS:
        values = "v=None" if problem.v is None else "a v of its own"
        return (
            "attention over selected keys has kernels for MLA's absorbed form, one key head of D=576 whose first 512 "
            f"columns are the values (v=None, value_dim=512); got G={G}, D={D}, V={problem.value_dim}, {values}"
        )
    if not 1 <= H <= MAX_HEADS:
        return f"attention over selected keys takes 1 to {MAX_HEADS} heads, got H={H}; split the heads"
    if problem.k.numel() >= 2**31:
        return f"attention over selected keys takes fewer than {2**31 // D} keys, got S={S}"
    return None


def backward_refusal(problem: SparseProblem, needs: Needs) -> str | None:
    """Why `backward` doesn't take a problem; None where it does."""
    return forward_refusal(problem)


def forward(problem: SparseProblem) -> tuple[Tensor, Tensor]:
    """out [T, H, V] in q's dtype and lse [T, H]: zeros and -inf for a query without keys, NaN where its scores are."""
    indices, count, scores = problem.selection
    with torch.cuda.device(scores.device):
        has_nan = scores[:, :1].isnan().any(-1)  # a row with NaN has nothing else
        any_nan, known = launch.on_its_way(has_nan.any())
    out, lse = latent_attention(problem.q, problem.k[:, 0], indices, count, softmax_scale=problem.softmax_scale)
    known.synchronize()  # for what came before the attention
    if bool(any_nan):
        out[has_nan], lse[has_nan] = torch.nan, torch.nan
    return out, lse


def backward(
    problem: SparseProblem, d_out: Tensor, out: Tensor, lse: Tensor, needs: Needs, sums: KeySums
) -> tuple[Tensor | None, Tensor | None]:
    """dq and p_sum, None where not wanted; dk, with the values' part, is added to `sums`."""
    indices, count, _ = problem.selection
    found = latent_gradients(
        problem.q, problem.k[:, 0], indices, count, out, lse, d_out, softmax_scale=problem.softmax_scale, dk=sums.dk,
        deterministic=problem.deterministic and needs.k,
    )  # fmt: skip
    return found.dq if needs.q else None, found.p_sum if needs.p_sum else None


def latent_attention(
    q: Tensor, k: Tensor, indices: Tensor, count: Tensor, *, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """out[t,h] = sum_{s in S_t} softmax over S_t (scale * q[t,h]·k[s]) k[s, :512], and its logsumexp.

    Args:
        q: bfloat16 [T, H, 576], 1 to 128 heads. k: bfloat16 [S, 576].
        indices: int32 [T, K], distinct keys in the first `count` slots. One outside 0 .. S - 1 is not read, and counts
            as a key of zeros; slots behind `count` are not looked at.
        count: int32 [T], 0 to K.
        softmax_scale: the model's own softmax scale.

    Returns:
        out [T, H, 512] in bfloat16 and lse [T, H] in float32, natural logarithm: zeros and -inf without keys.

    Raises:
        ValueError: for other widths or numbers of heads.
    """
    _check(q, k)
    (T, H, D), S = q.shape, k.shape[0]
    with torch.cuda.device(q.device):
        out = q.new_empty(T, H, MLA_WIDTHS[1])
        lse = torch.empty(T, H, device=q.device)
        if not (S and indices.numel()):
            return out.zero_(), lse.fill_(-torch.inf)
        halves = -(-H // _ROWS)
        items = T * halves
        launch.load("sparse_attention_mla")(
            launch.aligned(q).view(T * H, D), launch.aligned(k), indices.contiguous().view(-1), count,
            out.view(T * H, -1), lse.view(-1), H, halves, items, min(items, launch.processors(q.device)),
            indices.shape[1], S, softmax_scale * _LOG2E,
        )  # fmt: skip
    return out, lse


def latent_gradients(
    q: Tensor,
    k: Tensor,
    indices: Tensor,
    count: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    *,
    softmax_scale: float,
    dk: Tensor | None = None,
    deterministic: bool = True,
) -> LatentGradients:
    """dq, dk and p_sum[t,s] = sum_h exp(scale * q[t,h]·k[s] - lse[t,h]) at the selected keys, from one pass.

    The same bits in every run, but for dk's last ones where deterministic is False: its terms are added in any order.

    Args:
        q, k, indices, count, softmax_scale: as of `latent_attention`; a key outside 0 .. S - 1 gets no gradient.
        out, lse: its results. d_out: the gradient of out, bfloat16 [T, H, 512].
        dk: contiguous float32 of S * 576 numbers to add to; None makes zeros.
        deterministic: terms of dk are rounded to integers in units of a power of two for each key, whose sums don't
            depend on their order. A row to which a term is NaN, infinite or beyond 2^48 units is NaN.

    Raises:
        ValueError: for other widths or numbers of heads.
    """
    _check(q, k)
    (T, _, D), S = q.shape, k.shape[0]
    with torch.cuda.device(q.device):
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk = torch.zeros(S, D, device=q.device) if dk is None else dk
        p_sum = torch.zeros(indices.shape, device=q.device)
        if not (S and indices.numel()):
            return LatentGradients(dq.zero_(), dk, p_sum)
        k = launch.aligned(k)
        step = TOKENS if deterministic else T
        for rows in (slice(first, first + step) for first in range(0, T, step)):
            of_rows = _Rows(*(launch.aligned(x[rows]) for x in (q, d_out, out, lse, indices, count)))
            _add_gradients(of_rows, k, softmax_scale, LatentGradients(dq[rows], dk, p_sum[rows]), exact=deterministic)
    return LatentGradients(dq, dk, p_sum)


class _Rows(NamedTuple):
    """Of some queries, what `latent_gradients` takes."""

    q: Tensor
    d_out: Tensor
    out: Tensor
    lse: Tensor
    indices: Tensor
    counts: Tensor


def _add_gradients(x: _Rows, k: Tensor, softmax_scale: float, found: LatentGradients, *, exact: bool) -> None:
    """dq and p_sum of some queries are written to `found`, their terms added to its dk; exact: in integers."""
    (T, H, D), S, K = x.q.shape, k.shape[0], x.indices.shape[1]
    rows, half = T * H, H <= _HALF_HEADS
    q, d_out, indices = x.q.view(rows, D), x.d_out.view(rows, -1), x.indices.view(-1)
    delta, most = torch.empty(rows, device=q.device), torch.zeros(T, device=q.device)
    value = largest_value(k, x.indices, x.counts) if exact else delta  # not looked at
    launch.load("sparse_delta", bound=int(exact))(x.out.view(rows, -1), d_out, q, value, delta, most, H, softmax_scale)
    sums = ExactSums.new(most, k, x.indices, x.counts, H) if exact else ExactSums(x.counts, delta)  # not looked at
    launch.load("sparse_gradients_mla", exact=int(exact), half=int(half))(
        q, k, d_out, indices, x.counts, x.lse.view(-1), delta, found.dq.view(rows, D), found.dk.view(-1),
        found.p_sum.view(-1), sums.grid, sums.total, T, H, S, K,
        min(T, launch.processors(q.device) // (1 if half else 2)), softmax_scale,
    )  # fmt: skip
    if exact:
        sums.add_to(found.dk.view(S, D))


def _check(q: Tensor, k: Tensor) -> None:
    width = MLA_WIDTHS[0]
    if q.shape[2] != width or k.shape[1] != width:
        raise ValueError(f"q, k: expected width {width}, got {q.shape[2]} and {k.shape[1]}; use the torch body")
    if not 1 <= q.shape[1] <= MAX_HEADS:
        raise ValueError(f"q: expected 1 to {MAX_HEADS} heads, got {q.shape[1]}; split the heads")
    if k.numel() >= 2**31:
        raise ValueError(f"k: expected fewer than {2**31 // width} keys, got {k.shape[0]}; split the keys")
