"""flash-indexer: training operators for the lightning indexer of DeepSeek Sparse Attention."""

from flash_indexer.indexer import LightningIndexer
from flash_indexer.intervals import causal_intervals, check_intervals
from flash_indexer.ops import IndexerKL, WarmupAttention, indexer_kl, indexer_scores, warmup_attention

__all__ = [
    "IndexerKL",
    "LightningIndexer",
    "WarmupAttention",
    "causal_intervals",
    "check_intervals",
    "indexer_kl",
    "indexer_scores",
    "warmup_attention",
]
__version__ = "0.1.0"
