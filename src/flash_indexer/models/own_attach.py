"""Attaching to the indexers that a model has of its own, which then train in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from flash_indexer.models.handle import IndexerHandle
from flash_indexer.models.install import install
from flash_indexer.models.layers import DecoderLayers
from flash_indexer.models.options import check_arithmetic, check_target
from flash_indexer.models.own_check import check_ranks
from flash_indexer.models.own_hooks import OWN_ATTENTION, OwnTap
from flash_indexer.models.own_indexers import (
    OwnIndexer,
    chosen_own_layers,
    indexer_sources,
    own_indexer,
    own_modules,
    thaw_own,
)
from flash_indexer.models.rope import check_rope
from flash_indexer.parallel.mesh import Parallel


@dataclass(frozen=True)
class OwnOptions:
    """`attach`'s arguments of these names; sizes that are None, or fresh indexers' defaults, are the model's."""

    num_heads: int
    head_dim: int
    rope_dim: int | None
    layers: Sequence[int] | None
    target: str
    teachers: str
    index_dtype: str | None
    teacher_dtype: str | None


FRESH_SIZES = {"num_heads": 8, "head_dim": 64, "rope_dim": None}
"""What `attach` takes for fresh indexers where nothing is said."""


def attach_own(model: PreTrainedModel, found: DecoderLayers, options: OwnOptions, parallel: Parallel) -> IndexerHandle:
    """The handle of a model whose own indexers train; see `flash_indexer.models.attach.attach`.

    Raises:
        ValueError: a model without indexers, of a family whose scores aren't known, with indexers that are offloaded,
            sharded or quantised; layers that have none; sizes that aren't the model's; scores that rank keys otherwise
            than the model does.
    """
    if options.teachers not in ("shared", "own"):
        raise ValueError(f'attach: teachers must be "shared" or "own", got {options.teachers!r}')
    attentions: dict[int, Any] = dict(found.callers)
    sources = indexer_sources(attentions)
    if not sources:
        raise ValueError(
            f'attach: indexers="own" needs a model with indexers of its own, got {type(model).__name__} without; use '
            'indexers="fresh"'
        )
    config = model.config.get_text_config()
    check_rope(config, parallel.cp)
    chosen = chosen_own_layers(options.layers, sources)
    modules = own_modules(attentions, chosen)
    first: Any = modules[str(chosen[0])]
    for name, default in FRESH_SIZES.items():
        given, own = getattr(options, name), getattr(first, name)
        if given not in (default, own):
            raise ValueError(
                f'attach: {name} must be left out with indexers="own", or {own} as the model has it, got {given}'
            )
    check_target(options.target, first.num_heads, attentions[chosen[0]], parallel)
    check_arithmetic(options.index_dtype, options.teacher_dtype, first.head_dim)
    without = {layer: "has no indexer of its own" for layer in attentions if layer not in sources}
    without |= {layer: f"uses the indexer of layer {at}" for layer, at in sources.items() if at != layer}
    handle = IndexerHandle(
        model, modules, options.target, parallel, found=found._replace(attentions=attentions, refused=without),
        index_dtype=options.index_dtype, teacher_dtype=options.teacher_dtype, teachers=options.teachers,
        sources={layer: source for layer, source in sources.items() if source in chosen},
    )  # fmt: skip
    install(handle, found, lambda layer, module: OwnTap(handle.attend, layer, layer in chosen), OWN_ATTENTION)
    for undo in thaw_own(modules):
        handle.undo_with(undo)
    try:
        for layer in chosen:
            own, indexer = own_indexer(attentions[layer]), modules[str(layer)]
            assert own is not None and isinstance(indexer, OwnIndexer)
            check_ranks(own, indexer, layer)
    except BaseException:
        handle.remove()
        raise
    return handle
