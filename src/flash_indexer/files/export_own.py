"""A model whose own indexers were trained, as the checkpoint of its family that Transformers loads."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from flash_indexer.files.atomic import atomic_directory
from flash_indexer.files.native import check_replaceable, check_tensors, describe
from flash_indexer.files.native_config import write_config
from flash_indexer.models.attach import IndexerHandle
from flash_indexer.models.load import without_bars

OWN_FORMAT = "flash-indexer/own"
"""The format that indexer_config.json names in the folder of a model with trained indexers of its own."""


def export_own(
    handle: IndexerHandle,
    path: str | os.PathLike[str],
    *,
    base_name: str,
    base_fingerprint: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """Writes what `save_pretrained` of the handle's model writes, atomically; arguments and errors are `export`'s.

    The indexers are written in float32 at least, as they were trained, the rest in the model's dtype.
    """
    if not handle.trains_own:
        raise ValueError(
            "export: format 'own' needs a handle of attach(model, indexers=\"own\"), got one of fresh indexers; use "
            "format='deepseek_v32' or 'native'"
        )
    described = describe(handle, base_name=base_name, base_fingerprint=base_fingerprint)
    check_tensors(handle.state_dict(), described, where="export: the handle")
    for name, tensor in handle.model.state_dict().items():
        _check_whole(name, tensor)
    check_replaceable(path, overwrite=overwrite)
    with atomic_directory(path) as folder, without_bars():
        handle.model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_config(folder, OWN_FORMAT, asdict(described))
    return Path(path)


def _check_whole(name: str, tensor: Tensor) -> None:
    if tensor.is_meta or isinstance(tensor, DTensor):
        raise ValueError(f"export: {name} is offloaded or sharded; load the model whole, as with device_map='cpu'")
