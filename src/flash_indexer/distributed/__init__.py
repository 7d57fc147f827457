"""The operator on several processes, wrapped around `flash_indexer.ops` from outside."""

from flash_indexer.distributed.context_parallel import (
    context_parallel_indexer_kl,
    context_positions,
    gather_tokens,
)
from flash_indexer.distributed.tensor_parallel import tensor_parallel_indexer_kl

__all__ = ["context_parallel_indexer_kl", "context_positions", "gather_tokens", "tensor_parallel_indexer_kl"]
