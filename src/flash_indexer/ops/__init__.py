"""The torch boundary: checks, chunking, the three stages, and the custom operators with their fakes and autograd."""

from flash_indexer.ops.attention.op import attention_forward
from flash_indexer.ops.checks import check_indexer_kl, check_workspace
from flash_indexer.ops.kl.op import IndexerKL, indexer_kl, scale_gradients
from flash_indexer.ops.kl.scores import indexer_scores
from flash_indexer.ops.kl.shards import Stages, make_stages
from flash_indexer.ops.kl.sums import Problem, Sums, indexer_kl_sums
from flash_indexer.ops.kl.torch_body import index_gradients, index_scores, kl_rows, teacher_lse, teacher_scores
from flash_indexer.ops.warmup import WarmupAttention, warmup_attention

__all__ = [
    "IndexerKL",
    "Problem",
    "Stages",
    "Sums",
    "WarmupAttention",
    "attention_forward",
    "check_indexer_kl",
    "check_workspace",
    "index_gradients",
    "index_scores",
    "indexer_kl",
    "indexer_kl_sums",
    "indexer_scores",
    "kl_rows",
    "make_stages",
    "scale_gradients",
    "teacher_lse",
    "teacher_scores",
    "warmup_attention",
]
