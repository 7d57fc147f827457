"""The operator on several processes, wrapped around `flash_indexer.ops` from outside."""

from flash_indexer.parallel.context import (
    context_parallel_indexer_kl,
    context_positions,
    gather_tokens,
)
from flash_indexer.parallel.sparse import context_parallel_dsa_attention, tensor_parallel_dsa_attention
from flash_indexer.parallel.tensor import tensor_parallel_indexer_kl

__all__ = [
    "context_parallel_dsa_attention",
    "context_parallel_indexer_kl",
    "context_positions",
    "gather_tokens",
    "tensor_parallel_dsa_attention",
    "tensor_parallel_indexer_kl",
]
