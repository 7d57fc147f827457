"""The torch boundary: checks, chunking, the three stages, and the custom operators with their fakes and autograd."""

from flash_indexer.ops.attention import attention_forward
from flash_indexer.ops.cpu import index_gradients, index_scores, kl_rows, teacher_lse, teacher_scores
from flash_indexer.ops.indexer_kl import IndexerKL, indexer_kl
from flash_indexer.ops.indexer_scores import indexer_scores
from flash_indexer.ops.warmup_attention import WarmupAttention, warmup_attention

__all__ = [
    "IndexerKL",
    "WarmupAttention",
    "attention_forward",
    "index_gradients",
    "index_scores",
    "indexer_kl",
    "indexer_scores",
    "kl_rows",
    "teacher_lse",
    "teacher_scores",
    "warmup_attention",
]
