"""flash-indexer: training operators for the lightning indexer of DeepSeek Sparse Attention.

The names below are imported when they are first used, since they need torch, and `flash-indexer --help` does not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flash_indexer.indexer import LightningIndexer
    from flash_indexer.intervals import causal_intervals, check_intervals
    from flash_indexer.ops import (
        DSAAttention,
        IndexerKL,
        Quantized,
        Selection,
        SparseAttention,
        WarmupAttention,
        dsa_attention,
        indexer_kl,
        indexer_scores,
        quantize,
        select_keys,
        sparse_attention,
        sparse_indexer_kl,
        warmup_attention,
    )

__all__ = [
    "DSAAttention",
    "IndexerKL",
    "LightningIndexer",
    "Quantized",
    "Selection",
    "SparseAttention",
    "WarmupAttention",
    "causal_intervals",
    "check_intervals",
    "dsa_attention",
    "indexer_kl",
    "indexer_scores",
    "quantize",
    "select_keys",
    "sparse_attention",
    "sparse_indexer_kl",
    "warmup_attention",
]
__version__ = "0.1.0"

_MODULES = {"LightningIndexer": "indexer", "causal_intervals": "intervals", "check_intervals": "intervals"}
"""Where names are that `ops` does not have."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'ops')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
