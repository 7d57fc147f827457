"""Checkpoints of a model that trains with its indexers: a native indexer directory with what else has trained.

    indexer_config.json, indexer.safetensors    the indexers (docs/format.md)
    sparse_config.json                          topk, and the rank of adapters where these trained
    trained.safetensors                         the model's parameters that trained, by name, float32
    optimizer.safetensors, training_state.json  AdamW's moments, and the step

Where FSDP2 shares parameters out over N processes, trained and optimizer are N files each, with one process's shards
in a file (`files/tensors.py`). Any number of processes reads them.

An exported sparse model has model/, a Transformers checkpoint, in the place of the last three. Both are written as a
whole by `atomic_directory`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from hashlib import file_digest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_indexer.files.atomic import atomic_directory, readable_directory, shared_directory
from flash_indexer.files.checkpoint import (
    OPTIMIZER,
    STATE_FILE,
    load_optimizer,
    optimizer_moments,
    read_save,
    read_step,
)
from flash_indexer.files.native import WEIGHTS_FILE, check_replaceable, load_native, read_native, write_native
from flash_indexer.files.tensors import Shard, local, stored_tensors, tensor_files, write_tensors
from flash_indexer.models.adapters import add_adapters, merge_adapters
from flash_indexer.models.load import load_model, model_fingerprint, without_bars
from flash_indexer.models.own_sparse import make_sparse
from flash_indexer.models.sparse import SparseHandle

TRAINED, SPARSE_FILE, MODEL_FOLDER = "trained", "sparse_config.json", "model"


class SparseConfig(NamedTuple):
    """What sparse_config.json says. lora: the rank of adapters; None: parameters of the model's own trained."""

    topk: int
    lora: int | None = None


class Sharing(NamedTuple):
    """Which shards a process writes, and how the processes wait for each other.

    together: a block that ends when all processes have ended theirs; where one raises in it, all raise.
    """

    shard: Shard
    together: Callable[[], AbstractContextManager[None]]


def save_trained(
    path: str | os.PathLike[str],
    handle: SparseHandle,
    optimizer: torch.optim.Optimizer,
    step: int,
    *,
    lora: int | None,
    base: tuple[str, str],
    sharing: Sharing | None = None,
) -> None:
    """Writes indexers, parameters that require gradients, AdamW's moments and the step, replacing what is at `path`.

    Args:
        base: name and fingerprint of the model that the run began with.
        sharing: where FSDP2 shares the parameters out: all processes call, and each writes its shards.

    Raises:
        OSError: as `atomic_directory` and `shared_directory` do; and what `sharing` raises where another process does.
    """
    shard, together = sharing or Sharing(Shard(0, 1), nullcontext)
    with ExitStack() as unfinished:
        with together():
            if shard.rank == 0:
                folder = unfinished.enter_context(atomic_directory(path))
                write_native(handle, folder, base_name=base[0], base_fingerprint=base[1])
                write_sparse_config(folder, SparseConfig(handle.topk, lora))
                with (folder / WEIGHTS_FILE).open("rb") as file:
                    state = {"step": step, "save": file_digest(file, "sha256").hexdigest()[:16]}
                (folder / STATE_FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")
        with together(), shared_directory(path) as folder:
            save, of_all = read_save(folder), None if sharing is None else shard
            write_tensors(folder, TRAINED, trainable(handle.model, handle.indexers), of_all, save=save)
            write_tensors(folder, OPTIMIZER, optimizer_moments(optimizer), of_all, save=save)
        with together():
            unfinished.close()


def load_trained_checkpoint(
    path: str | os.PathLike[str], handle: SparseHandle, optimizer: torch.optim.Optimizer
) -> int:
    """Loads what `save_trained` wrote into a handle and an optimizer of the same run; returns the step.

    Raises:
        FileNotFoundError: a file is missing. ValueError: it belongs to another model or other sizes, or is damaged.
    """
    folder = readable_directory(path)
    step = read_step(folder)
    load_native(handle, folder)
    load_trained_parameters(folder, handle.model, trainable(handle.model, handle.indexers))
    load_optimizer(folder, optimizer)
    return step


def load_trained_parameters(folder: Path, model: nn.Module, wanted: Collection[str] = ()) -> None:
    """Copies the parameters of trained.safetensors, or of its shards, into those of the same names.

    Args:
        wanted: names that must be among them.

    Raises:
        FileNotFoundError: there is no such file, or not of every shard. ValueError: one is damaged or of another save
            than the checkpoint, names or shapes are not the model's, or a name that is wanted is missing.
    """
    if not tensor_files(folder, TRAINED):
        raise FileNotFoundError(
            f"load_trained_parameters: {folder} must hold {TRAINED}.safetensors or shards of it, got neither; copy the "
            "whole checkpoint"
        )
    own = dict(model.named_parameters())
    with stored_tensors(folder, TRAINED, read_save(folder)) as stored:
        if missing := sorted(set(wanted) - stored.shapes.keys()):
            raise ValueError(
                f"load_trained_parameters: {TRAINED} in {folder} must hold all parameters that train, got none named "
                f"{missing[0]}; use an earlier checkpoint"
            )
        for name, shape in stored.shapes.items():
            _check_trained(name, shape, own.get(name), folder)
        for name in stored.shapes:
            if not bool(torch.isfinite(stored.part(name, own[name])).all()):
                raise ValueError(
                    f"load_trained_parameters: {name} in {folder} holds NaN or infinity; use an earlier checkpoint"
                )
        for name in stored.shapes:
            with torch.no_grad():
                local(own[name]).copy_(stored.part(name, own[name]))


def _check_trained(name: str, shape: torch.Size, own: Tensor | None, folder: Path) -> None:
    if own is None or own.shape != shape:
        found = "no such parameter" if own is None else list(own.shape)
        raise ValueError(
            f"load_trained_parameters: {name} of {folder} must be {list(shape)} in the model, got {found}; "
            "load the model that the run began with"
        )


def save_sparse(
    handle: SparseHandle,
    path: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    base_name: str,
    overwrite: bool = False,
) -> Path:
    """Writes a sparse model whole, atomically: model/ by `save_pretrained`, its indexers, and its topk.

    Args:
        handle: of the model without adapters. tokenizer: saved beside the model. base_name: of the model that it was.
        overwrite: replace an earlier checkpoint of ours at `path`.

    Raises:
        ValueError: a tensor holds NaN or infinity, adapters are not merged, or `path` may not be replaced.
    """
    check_replaceable(path, overwrite=overwrite)
    if any("lora_" in name for name, _ in handle.model.named_parameters()):
        raise ValueError("save_sparse: the model must be without adapters, got some; merge_adapters(model) first")
    with atomic_directory(path) as folder, without_bars():
        write_native(handle, folder, base_name=base_name, base_fingerprint=model_fingerprint(handle.model))
        write_sparse_config(folder, SparseConfig(handle.topk))
        handle.model.save_pretrained(folder / MODEL_FOLDER)
        tokenizer.save_pretrained(folder / MODEL_FOLDER)
    return Path(path)


def load_sparse(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> tuple[SparseHandle, PreTrainedTokenizerBase]:
    """The sparse model that `save_sparse` wrote, in eval mode and frozen, which generates; and its tokenizer.

    Args:
        dtype: of the model; None: the one it was saved in.

    Raises:
        FileNotFoundError, ValueError: read_native's and load_model's; the folder holds no sparse model.
    """
    folder = readable_directory(path)
    config, sparse = read_native(folder).config, read_sparse_config(folder)
    if sparse is None or not (folder / MODEL_FOLDER).is_dir():
        raise ValueError(
            f"load_sparse: {folder} must hold {SPARSE_FILE} and {MODEL_FOLDER}/, as `flash-indexer export --format "
            "native` writes them of a sparse run; load indexers alone with load_native(model, path, topk=...)"
        )
    saved = getattr(torch, config.base_dtype)
    wide = saved if dtype is None else dtype
    model, tokenizer = load_model(folder / MODEL_FOLDER, dtype=wide, indexers=config.indexers)
    fingerprint = model_fingerprint(model) if dtype in (None, saved) else None
    handle = make_sparse(load_native(model, folder, base_fingerprint=fingerprint), sparse.topk)
    handle.indexers.train(False)
    return handle, tokenizer


def add_trained(model: PreTrainedModel, folder: Path, config: SparseConfig) -> None:
    """Gives the model that a run began with what the run's checkpoint in `folder` has trained; adapters are merged.

    Raises:
        FileNotFoundError, ValueError: as `load_trained_parameters` does.
    """
    if config.lora is None:
        load_trained_parameters(folder, model)
        return
    add_adapters(model, config.lora)
    load_trained_parameters(folder, model)
    merge_adapters(model)
    model.requires_grad_(False)


def has_trained(folder: Path) -> bool:
    """Whether the checkpoint in `folder` holds parameters of the model that trained with the indexers."""
    if not tensor_files(folder, TRAINED):
        return False
    with stored_tensors(folder, TRAINED) as stored:
        return bool(stored.shapes)


def trainable(model: nn.Module, indexers: nn.Module | None = None) -> dict[str, Tensor]:
    """The parameters that require gradients, by name; shared ones once, and without those of the model's `indexers`."""
    apart = set[int]() if indexers is None else {id(value) for value in indexers.parameters()}
    return {name: x for name, x in model.named_parameters() if x.requires_grad and id(x) not in apart}


def write_sparse_config(folder: Path, config: SparseConfig) -> None:
    """Writes sparse_config.json."""
    (folder / SPARSE_FILE).write_text(json.dumps(config._asdict(), indent=2) + "\n", encoding="utf-8")


def read_sparse_config(folder: Path) -> SparseConfig | None:
    """What sparse_config.json in `folder` says; None where there is none: the indexers were not trained sparsely.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / SPARSE_FILE
    if not file.is_file():
        return None
    try:
        record: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        lora = record["lora"]
        return SparseConfig(int(record["topk"]), None if lora is None else int(lora))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"read_sparse_config: {file} is damaged ({error!r}); use an earlier checkpoint") from error
