"""One layer's warm-up loss, by the operator that fits how sequence and heads are shared out."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flash_indexer.models.capture import LayerCapture
from flash_indexer.ops import IndexerKL, indexer_kl
from flash_indexer.parallel.context import context_parallel_indexer_kl
from flash_indexer.parallel.mesh import Parallel
from flash_indexer.parallel.tensor import tensor_parallel_indexer_kl


def layer_kl(
    capture: LayerCapture,
    *,
    target: str,
    token_weight: Tensor,
    parallel: Parallel,
    index_dtype: str | None = None,
    teacher_dtype: str | None = None,
) -> IndexerKL:
    """sum_t token_weight[t] * KL[t] over this process's tokens, differentiable once in the capture's index tensors.

    Gradients are those of all heads; of index_k they are those of all queries of the context-parallel processes.
    A teacher in FP8 gets a logsumexp of its own: with the model's, rows of real models sum to 2 as well as to 1.
    """
    tensors = (capture.q, capture.k, capture.index_q, capture.index_k, capture.index_weights)
    options: dict[str, Any] = dict(
        softmax_scale=capture.softmax_scale, key_start=capture.key_start, key_end=capture.key_end,
        lse=None if target == "sum_logits" or teacher_dtype is not None else capture.lse, target=target,
        token_weight=token_weight, index_dtype=index_dtype, teacher_dtype=teacher_dtype,
    )  # fmt: skip
    cp, tp = parallel.group("cp"), parallel.group("tp")
    if cp is not None:
        group = cp if tp is None else (cp, tp)
        return context_parallel_indexer_kl(*tensors, group=group, layout=parallel.layout, **options)
    if tp is not None:
        return tensor_parallel_indexer_kl(*tensors, group=tp, **options)
    return indexer_kl(*tensors, softcap=capture.softcap, **options)
