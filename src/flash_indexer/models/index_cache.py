"""index_k beside k and v in a model's own Cache, so that it is cropped, reordered and repeated with them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer


def prepare_layer(cache: Any, layer: int) -> None:
    """Puts a cache layer that holds index keys in the place of an empty one.

    One of a sliding window becomes one that keeps all keys: the queries' intervals are the window.

    Raises:
        ValueError: the cache is of another kind, or its layer was filled by a model without indexers.
    """
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"attach: the cache must be a DynamicCache, which index keys have a place in, got "
            f"{type(cache).__name__}; generate with cache_implementation='dynamic', or with use_cache=False"
        )
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer:
            cache.layers.append(DynamicLayer())  # type: ignore[no-untyped-call]
    found: Any = cache.layers[layer]
    if isinstance(found, DynamicIndexedLayer):
        return
    if type(found) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise ValueError(f"attach: layer {layer} of the cache must be a DynamicLayer, got {type(found).__name__}")
    if found.is_initialized:
        raise ValueError(
            f"attach: layer {layer} of the cache holds keys without index keys, from before the model was attached; "
            "start with an empty cache"
        )
    cache.layers[layer] = DynamicIndexedLayer()  # type: ignore[no-untyped-call]


def add_index_keys(cache: Any, layer: int, index_k: Tensor) -> Tensor:
    """index_k [B, L, E] of new tokens behind those that the cache holds: [B, past + L, E]."""
    keys: Tensor = cache.update_indexer(index_k, layer)
    return keys
