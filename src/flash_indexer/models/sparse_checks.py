"""What a model must be, and a number of keys, for the sparse stage."""

from __future__ import annotations

import warnings

import torch
from torch.distributed.tensor import DTensor

from flash_indexer.indexer import LightningIndexer
from flash_indexer.models.handle import IndexerHandle
from flash_indexer.models.sharding import check_heads


def check_fresh(dense: IndexerHandle) -> None:
    """Raises ValueError unless the indexers are LightningIndexers and every layer has softmax attention."""
    if not all(type(indexer) is LightningIndexer for indexer in dense.indexers.values()):
        raise ValueError(
            "attach: to make a dense handle sparse, its indexers must be LightningIndexers, got a model's own; pass "
            'topk to attach(model, indexers="own", topk=...) instead'
        )
    if dense.found.refused:
        raise ValueError(
            "attach: with topk, every layer must have softmax attention, got a model some of whose layers have none; "
            "leave topk out"
        )


def check_sparse(dense: IndexerHandle, topk: int) -> None:
    """Raises ValueError for a K, a target, an attention or a sharing that the sparse stage can't have; may warn."""
    check_topk("attach", topk)
    if dense.parallel.tp > 1:
        check_heads("attach", dense.model.config.get_text_config(), dense.parallel.tp)
        if any("tp" in _mesh_names(parameter) for parameter in dense.model.parameters()):
            raise ValueError(
                f"attach: with topk and tp={dense.parallel.tp} each process must hold all heads of the model, got one "
                "whose heads shard_model shared out; load it again, and share its parameters out by FSDP"
            )
    if dense.target != "mean":
        raise ValueError(f'attach: with topk, target must be "mean", got {dense.target!r}')
    softcap = getattr(dense.model.config.get_text_config(), "attn_logit_softcapping", None)
    if softcap is not None:
        raise ValueError(
            f"attach: with topk, attention must have no softcap, got attn_logit_softcapping={softcap}; leave topk out"
        )
    shares = dense.parallel.cp * dense.parallel.tp > 1
    if shares and any(getattr(module, "sinks", None) is not None for _, module in dense.found.callers):
        raise ValueError(
            "attach: with topk, cp and tp must be 1 for attention with sinks, got "
            f"cp={dense.parallel.cp} and tp={dense.parallel.tp}; share parameters out by FSDP"
        )
    context = getattr(dense.model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and topk >= context:
        warnings.warn(
            f"attach: topk = {topk} covers the model's context of {context} tokens: no key is ever left out",
            stacklevel=4,
        )


def _mesh_names(parameter: torch.Tensor) -> tuple[str, ...]:
    return (parameter.device_mesh.mesh_dim_names or ()) if isinstance(parameter, DTensor) else ()


def check_learns() -> None:
    """Raises ValueError where no gradient can exist."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "attach: the forward must run outside of torch.inference_mode() while the indexers train, since no "
            "gradient exists inside it; use torch.no_grad() around the model, or handle.indexers.eval()"
        )


def check_topk(op: str, topk: object) -> None:
    """Raises ValueError, in the name of `op`, for a number of keys that no query can attend to."""
    if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
        raise ValueError(f"{op}: topk must be a whole number of keys, 1 or more, got {topk!r}; DeepSeek-V3.2 has 2048")
