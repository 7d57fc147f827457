"""What Megatron-LM's DSA layer has in hand, handed to the operator; nothing of Megatron is imported.

The loss takes vectors after rope, so it fits either layout of rope; weights fit one. The indexer of megatron-core
0.16.1 turns the last rope dims of a head, in adjacent pairs (2n, 2n + 1); DeepSeek-V3.2's, Transformers' and ours turn
the first ones, half-split (n with n + rope_dim/2). wq_b, wk and k_norm under the same names are therefore not
interchangeable: they load without an error and score other keys (docs/format.md).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from flash_indexer import causal_intervals, indexer_kl
from flash_indexer.parallel import tensor_parallel_indexer_kl

__all__ = ["PackedParameters", "dsa_indexer_loss"]
_OP = "dsa_indexer_loss"


class PackedParameters(Protocol):
    """The part of Megatron's PackedSeqParams that is read: int32 [documents + 1], beginning with 0."""

    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor


def dsa_indexer_loss(
    query: Tensor,
    key: Tensor,
    index_query: Tensor,
    index_key: Tensor,
    index_weights: Tensor,
    *,
    softmax_scale: float,
    loss_coeff: float,
    packed_seq_params: PackedParameters | None = None,
    tensor_group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    """loss_coeff * mean over all tokens of KL(teacher || indexer), the dense warm-up loss, differentiable.

    In the place of Megatron's compute_dsa_indexer_loss with sparse_loss=False, but from the indexer's vectors instead
    of its [b, sq, sk] scores, which are never formed; exact, without the epsilons inside the logarithms, which leave an
    error of 25 nats an eighth of its gradient (docs/math.md). A token that sees no key is not counted in the mean.

    Args:
        query: [sq, b, np, hn]. key: [sk, b, ng, hn], np a multiple of ng; ng = 1 for absorbed MLA. Detached here.
        index_query: [sq, b, index heads, index dim]. index_key: [sk, b, index dim].
        index_weights: [sq, b, index heads], the factors index heads^-0.5 and index dim^-0.5 included.
        softmax_scale: the attention's own. loss_coeff: Megatron's dsa_indexer_loss_coeff.
        packed_seq_params: documents packed into one sequence (b = 1), which do not see each other; None: each of the b
            sequences is causal. Where sq < sk, the queries are a sequence's last. cu_seqlens_q_padded and
            cu_seqlens_kv_padded, where there, must equal cu_seqlens_q and cu_seqlens_kv: no padding between documents.
        tensor_group: the ranks that share the heads of query (pg_collection.tp); all else is the same on each of them.

    Dtypes: as in `indexer_kl`; index_weights are converted to float32 beside bfloat16 vectors.

    Returns:
        A scalar in float32 (float64 for float64), for DSAIndexerLossAutoScaler. Under tensor parallelism it is the same
        on every rank, and so are its gradients.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it is.
    """
    for name, x, legend in (
        ("query", query, "sq, b, np, hn"), ("key", key, "sk, b, ng, hn"),
        ("index_query", index_query, "sq, b, index heads, index dim"), ("index_key", index_key, "sk, b, index dim"),
        ("index_weights", index_weights, "sq, b, index heads"),
    ):  # fmt: skip
        if x.ndim != len(legend.split(", ")) or x.shape[1] != query.shape[1]:
            raise ValueError(f"{_OP}: {name} must be [{legend}] with b={query.shape[1]}, got {list(x.shape)}")
    key_start, key_end = causal_intervals(*boundaries(query, key, packed_seq_params))
    wide = torch.promote_types(index_query.dtype, torch.float32)
    tensors = [
        x.transpose(0, 1).flatten(0, 1)
        for x in (query.detach(), key.detach(), index_query, index_key, index_weights.to(wide))
    ]
    options = dict(softmax_scale=softmax_scale, key_start=key_start, key_end=key_end)
    if tensor_group is None:
        return indexer_kl(*tensors, **options).loss * loss_coeff  # type: ignore[arg-type]
    return tensor_parallel_indexer_kl(*tensors, group=tensor_group, **options).loss * loss_coeff  # type: ignore[arg-type]


def boundaries(query: Tensor, key: Tensor, packed: PackedParameters | None) -> tuple[Tensor, Tensor]:
    """cu_seqlens of queries and keys, in the order of [b, s] flattened."""
    batch = query.shape[1]
    if packed is None:
        count = torch.arange(batch + 1, device=query.device, dtype=torch.int32)
        return count * query.shape[0], count * key.shape[0]
    if batch != 1:
        raise ValueError(
            f"{_OP}: query must have b=1 where documents are packed, got b={batch}; set micro_batch_size=1"
        )
    documents = []
    for name, x in (("cu_seqlens_q", query), ("cu_seqlens_kv", key)):
        bounds, padded = getattr(packed, name, None), getattr(packed, f"{name}_padded", None)
        where = f"{_OP}: packed_seq_params.{name}"
        if not isinstance(bounds, Tensor) or bounds.ndim != 1 or not bounds.numel():
            got = list(bounds.shape) if isinstance(bounds, Tensor) else repr(bounds)
            raise ValueError(
                f"{where} must be an int32 tensor [documents + 1] beginning with 0, got {got}; give cu_seqlens of both "
                "queries and keys, or packed_seq_params=None for causal sequences"
            )
        if padded is not None and not torch.equal(padded, bounds):
            raise ValueError(
                f"{_OP}: packed_seq_params must hold documents without padding between them, got {name}_padded "
                f"{padded.tolist()[:8]} beside {name} {bounds.tolist()[:8]}; take the padding out of the tensors"
            )
        if int(bounds[-1]) != x.shape[0]:
            raise ValueError(
                f"{where} must end with the {x.shape[0]} tokens of its tensor, got {int(bounds[-1])}; take padding "
                "behind the last document out of the tensors"
            )
        documents.append(bounds)
    return documents[0], documents[1]
