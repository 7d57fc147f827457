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
from flash_indexer.ops.sinks import share_beside_sinks
from flash_indexer.ops.sparse.dsa_op import DSAAttention, SparseSettings, dsa_attention, recomputed_attention
from flash_indexer.ops.sparse.kl_op import sparse_indexer_kl
from flash_indexer.ops.sparse.learning import Learner, runs_of_rows
from flash_indexer.ops.sparse.op import SparseAttention, select_keys, sparse_attention
from flash_indexer.ops.sparse.problem import KeySums, Needs, SparseProblem, new_key_sums
from flash_indexer.ops.sparse.selection import Selection, check_selection
from flash_indexer.ops.sparse.stages import (
    attended_rows,
    select_rows,
    sparse_backward,
    sparse_forward,
    sparse_index_gradients,
    sparse_index_scores,
    sparse_kl_rows,
    sparse_target,
)
from flash_indexer.ops.sparse.torch_select import top_keys
from flash_indexer.ops.unseen import with_unseen
from flash_indexer.ops.warmup import WarmupAttention, warmup_attention
from flash_indexer.ops.weighted import among_all, weighted_part

__all__ = [
    "DSAAttention",
    "IndexerKL",
    "KeySums",
    "Learner",
    "Needs",
    "Problem",
    "Quantized",
    "Selection",
    "SparseAttention",
    "SparseProblem",
    "SparseSettings",
    "Stages",
    "Sums",
    "WaitForKeys",
    "WarmupAttention",
    "among_all",
    "attended_rows",
    "attention_forward",
    "body_of",
    "check_arithmetic",
    "check_indexer_kl",
    "check_selection",
    "check_workspace",
    "dsa_attention",
    "index_gradients",
    "index_scores",
    "indexer_kl",
    "indexer_kl_sums",
    "indexer_scores",
    "kl_rows",
    "known_loss",
    "make_stages",
    "new_key_sums",
    "quantize",
    "recomputed_attention",
    "run_stages",
    "runs_of_rows",
    "select_keys",
    "select_rows",
    "share_beside_sinks",
    "sparse_attention",
    "sparse_backward",
    "sparse_forward",
    "sparse_index_gradients",
    "sparse_index_scores",
    "sparse_indexer_kl",
    "sparse_kl_rows",
    "sparse_target",
    "teacher_lse",
    "teacher_scores",
    "top_keys",
    "warmup_attention",
    "weighted_part",
    "with_unseen",
]
