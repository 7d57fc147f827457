"""The torch boundary: checks, chunking, the stages, and the custom operators with their fakes and autograd."""

from flash_indexer.ops.attention.op import attention_forward
from flash_indexer.ops.checks import check_indexer_kl, check_workspace
from flash_indexer.ops.kl.arithmetic import check_arithmetic
from flash_indexer.ops.kl.op import IndexerKL, indexer_kl
from flash_indexer.ops.kl.scores import indexer_scores
from flash_indexer.ops.kl.stages import Stages, run_stages
from flash_indexer.ops.kl.sums import body_of, indexer_kl_sums, make_stages
from flash_indexer.ops.kl.torch_body import index_gradients, index_scores, kl_rows, teacher_lse, teacher_scores
from flash_indexer.ops.known import known_loss
from flash_indexer.ops.problem import Problem, Sums, WaitForKeys
from flash_indexer.ops.quantization import Quantized, quantize
from flash_indexer.ops.sparse.torch_body import Selection, sparse_attention, top_keys
from flash_indexer.ops.unseen import with_unseen
from flash_indexer.ops.warmup import WarmupAttention, warmup_attention
from flash_indexer.ops.weighted import among_all, weighted_part

__all__ = [
    "IndexerKL",
    "Problem",
    "Quantized",
    "Selection",
    "Stages",
    "Sums",
    "WaitForKeys",
    "WarmupAttention",
    "among_all",
    "attention_forward",
    "body_of",
    "check_arithmetic",
    "check_indexer_kl",
    "check_workspace",
    "index_gradients",
    "index_scores",
    "indexer_kl",
    "indexer_kl_sums",
    "indexer_scores",
    "kl_rows",
    "known_loss",
    "make_stages",
    "quantize",
    "run_stages",
    "sparse_attention",
    "teacher_lse",
    "teacher_scores",
    "top_keys",
    "warmup_attention",
    "weighted_part",
    "with_unseen",
]
