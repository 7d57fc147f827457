"""The CUDA body of `indexer_kl` with target="per_head": one pass for KL and entropy, two kernels for the gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from flash_indexer.ops.attention import gpu_body as heads
from flash_indexer.ops.kl.gpu_body import aligned

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of index_q, index_k, index_weights; None: not wanted


def refusal(q: Tensor, k: Tensor, index_q: Tensor) -> str | None:
    """Why the kernels can't take CUDA tensors of these sizes, on their GPU; None where they can."""
    if not torch.cuda.is_available():  # a compiler's tensors may claim to be on a GPU
        return "there is no GPU"
    try:
        heads.check_per_head("indexer_kl", q, k, index_q)
        heads.check_attention("indexer_kl", q, k, k)
    except ValueError as error:
        return str(error)
    return None if _tilelang_is_here() else "tilelang is not installed (pip install 'flash-indexer[kernels]')"


def indexer_kl(
    q: Tensor,
    k: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    key_start: Tensor,
    key_end: Tensor,
    token_weight: Tensor | None,
    softmax_scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, kl [T, H], entropy [T, H] and the gradients of index_q, index_k, index_weights (empty where not wanted)."""
    weight = heads.weight_of(token_weight, key_start, key_end, k.shape[0])
    kl, entropy, gradients = sums(q, k, index, key_start, key_end, weight, softmax_scale, needs)
    d_index_q, d_index_k, d_weights = (
        x.new_empty(0) if gradient is None else gradient.to(x.dtype)
        for x, gradient in zip(index, gradients, strict=True)
    )
    return (weight * kl.mean(1)).sum(), kl, entropy, d_index_q, d_index_k, d_weights


def sums(
    q: Tensor,
    k: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    key_start: Tensor,
    key_end: Tensor,
    token_weight: Tensor,
    softmax_scale: float,
    needs: Sequence[bool],
    before: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor, Gradients]:
    """kl and entropy [T, H]; the gradients of sum_t,h token_weight[t] / H * kl[t,h], index_k's in float32.

    before: called with the number of keys, ahead of everything: one pass reads them all.
    """
    heads.prepare(q, k, 0, index[0].shape[2], needs)
    if before is not None:
        before(k.shape[0])
    index_q, index_k, weights = (aligned(x) for x in index)
    starts, ends = key_start.contiguous(), key_end.contiguous()
    found = heads.statistics(q, k, (index_q, index_k, weights), starts, ends, softmax_scale)
    gradients: Gradients = (None, None, None)
    if any(needs):
        gradients = heads.per_head_gradients(
            q, k, (index_q, index_k, weights), (found.lse, found.lse_index), token_weight.contiguous() / q.shape[1],
            starts, ends, softmax_scale, (needs[0], needs[1], needs[2]),
        )  # fmt: skip
    return found.kl, found.entropy, gradients


@functools.cache
def _tilelang_is_here() -> bool:
    return find_spec("tilelang") is not None
