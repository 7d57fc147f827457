"""The project's own checkpoint: a directory with a config and the indexers' weights (docs/format.md)."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_indexer.files.atomic import atomic_directory, readable_directory
from flash_indexer.files.native_config import CONFIG_FILE, FORMAT, NativeConfig, parse, read_config, write_config
from flash_indexer.indexer import LightningIndexer
from flash_indexer.models.attach import IndexerHandle, attach
from flash_indexer.models.load import tokenizer_fingerprint
from flash_indexer.models.own_sparse import make_sparse
from flash_indexer.models.sparse_checks import check_topk
from flash_indexer.parallel.mesh import Parallel

WEIGHTS_FILE = "indexer.safetensors"


class NativeCheckpoint(NamedTuple):
    """A checkpoint that was read and checked: its config and its tensors on the CPU."""

    config: NativeConfig
    state_dict: dict[str, Tensor]


def save_native(
    handle: IndexerHandle,
    path: str | os.PathLike[str],
    *,
    base_name: str,
    base_fingerprint: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the handle's indexers as a native checkpoint, atomically, and return its path.

    Args:
        handle: what `attach` returned.
        path: the directory to write. An earlier checkpoint there stays whole until the new one is on disk.
        base_name: the model's name or path, for people and for `flash-indexer evaluate`.
        base_fingerprint: what `model_fingerprint` gave for the bare model; None records none.
        overwrite: replace an earlier checkpoint of ours at `path`.

    Raises:
        ValueError: a tensor holds NaN or infinity (named), or `path` may not be replaced.
        OSError: the disk is full; see `atomic_directory`.
    """
    check_replaceable(path, overwrite=overwrite)
    with atomic_directory(path) as folder:
        write_native(handle, folder, base_name=base_name, base_fingerprint=base_fingerprint)
    return Path(path)


def write_native(
    handle: IndexerHandle,
    folder: str | os.PathLike[str],
    *,
    base_name: str,
    base_fingerprint: str | None = None,
) -> None:
    """Write a native checkpoint's two files into an existing folder, such as one of `atomic_directory`'s.

    Arguments and errors are save_native's.
    """
    config = describe(handle, base_name=base_name, base_fingerprint=base_fingerprint)
    state_dict = apart({key: tensor.detach().cpu() for key, tensor in handle.state_dict().items()})
    check_tensors(state_dict, config, where="the handle")
    save_file(state_dict, Path(folder) / WEIGHTS_FILE, metadata={"format": "pt"})
    write_config(folder, FORMAT, asdict(config))


def apart(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are written: float32 at least, each with memory of its own.

    An indexer that several layers share is written once for each of them; layers that read it learn apart.
    """
    separate, seen = {}, set()
    for key, tensor in state_dict.items():
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()
        if (memory := wide.untyped_storage().data_ptr()) in seen:
            wide = wide.clone()
        seen.add(memory)
        separate[key] = wide
    return separate


def read_native(path: str | os.PathLike[str]) -> NativeCheckpoint:
    """Read a native checkpoint and check it whole: format, version, fields, tensor names, shapes, finiteness.

    Raises:
        FileNotFoundError: there is no such directory, or one of its two files is missing.
        ValueError: the directory is not one of ours, is of a newer version, or its content is damaged; the
            message names the field, file or tensor and what to do.
    """
    folder = readable_directory(path)
    record = read_config(folder)
    if record["format"] != FORMAT:
        raise ValueError(
            f"read_native: {folder} has format {record['format']!r}, expected {FORMAT!r}; load an exported "
            "model with AutoModelForCausalLM.from_pretrained"
        )
    config = parse(record, folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise FileNotFoundError(f"read_native: {weights} is missing; copy the whole directory, both files")
    try:
        state_dict = load_file(weights)
    except SafetensorError as error:
        raise ValueError(
            f"read_native: {weights} is truncated or damaged ({error}); copy it again or use an earlier one"
        ) from error
    check_tensors(state_dict, config, where=str(weights))
    return NativeCheckpoint(config, state_dict)


def load_native(
    handle_or_model: IndexerHandle | PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    base_fingerprint: str | None = None,
    topk: int | None = None,
    parallel: Parallel | None = None,
) -> IndexerHandle:
    """Load a native checkpoint into a handle, or attach indexers of the recorded sizes to a model first.

    Args:
        handle_or_model: a handle with the checkpoint's layers and sizes, or a model without indexers.
        path: the checkpoint's directory.
        base_fingerprint: `model_fingerprint(model)`; where given it is compared, and the size of the vocabulary before
            it, with what the checkpoint records.
        topk: the model then attends to so many keys, see `attach`; None: it stays dense. A handle is what it is.
        parallel: as for `attach`, of a model.

    Returns:
        The handle, with the tokenizer_fingerprint that the checkpoint records. Where anything fails, a model given
        stays as it was, and so do a handle's weights.

    Raises:
        TypeError: `handle_or_model` is neither, such as a wrapper around a model.
        FileNotFoundError, ValueError: read_native's.
        ValueError: the base model, its vocabulary, the layers or a size differ; all differences are listed.
    """
    is_model = isinstance(handle_or_model, PreTrainedModel)
    if not is_model and not isinstance(handle_or_model, IndexerHandle):
        raise TypeError(
            "load_native: handle_or_model must be the handle that attach returned or a PreTrainedModel, "
            f"got {type(handle_or_model).__name__}; unwrap it: take merge_and_unload() of a PeftModel, .module of "
            "DistributedDataParallel"
        )
    if topk is not None:
        check_topk("load_native", topk)
        if not is_model:
            raise ValueError(f"load_native: topk must be None for a handle, got {topk}; pass the model")
    config, state_dict = read_native(path)
    model: Any = handle_or_model if isinstance(handle_or_model, PreTrainedModel) else handle_or_model.model
    _compare_base(config, model, base_fingerprint, path)
    if isinstance(handle_or_model, PreTrainedModel):
        handle = attach(
            handle_or_model,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            rope_dim=config.rope_dim,
            target=config.target,
            layers=config.layers,
            index_dtype=config.index_dtype,
            teacher_dtype=config.teacher_dtype,
            indexers=config.indexers,
            teachers=config.teachers,
            parallel=parallel,
        )
    else:
        handle = handle_or_model
    try:
        _compare_indexers(config, describe(handle, base_name=config.base_name), path)
        handle.load_state_dict(state_dict)
    except BaseException:
        if is_model:
            handle.remove()
        raise
    handle.tokenizer_fingerprint = config.base_tokenizer_fingerprint or handle.tokenizer_fingerprint
    if topk is None:
        return handle
    return make_sparse(handle, topk)


def check_tokenizer(config: NativeConfig, tokenizer: PreTrainedTokenizerBase, *, name: str, command: str) -> None:
    """Raises ValueError where the indexers' config records another tokenizer than the model `name` has.

    Args:
        command: what the message begins with.
    """
    recorded, found = config.base_tokenizer_fingerprint, tokenizer_fingerprint(tokenizer)
    if recorded not in (None, found):
        raise ValueError(
            f"{command}: the tokenizer of {name} must be the one that the indexers were trained with, whose vocabulary "
            f"has the fingerprint {recorded}, got {found}: the same text has other token ids; use the tokenizer of "
            f"{config.base_name}, or train indexers with this one"
        )


def describe(handle: IndexerHandle, *, base_name: str, base_fingerprint: str | None = None) -> NativeConfig:
    """The config of a handle's indexers. ValueError where indexers of one handle differ in size."""
    indexers = [cast(LightningIndexer, module) for module in handle.indexers.values()]
    sizes = {(x.num_heads, x.head_dim, x.rope_dim, x.rope_interleaved, x.q_lora_rank) for x in indexers}
    if len(sizes) != 1:
        raise ValueError(
            "describe: a handle's indexers must all have one (num_heads, head_dim, rope_dim, "
            f"rope_interleaved, q_lora_rank), got {sorted(sizes, key=str)}; attach them with one call"
        )
    num_heads, head_dim, rope_dim, rope_interleaved, q_lora_rank = sizes.pop()
    base = handle.model.config.get_text_config()
    return NativeConfig(
        base_name=base_name,
        base_model_type=base.model_type,
        base_hidden_size=base.hidden_size,
        base_num_layers=base.num_hidden_layers,
        base_fingerprint=base_fingerprint,
        layers=tuple(handle.layers),
        num_heads=num_heads,
        head_dim=head_dim,
        rope_dim=rope_dim,
        rope_interleaved=rope_interleaved,
        q_lora_rank=q_lora_rank,
        target=handle.target,
        base_dtype=str(handle.model.dtype).removeprefix("torch."),
        index_dtype=handle.index_dtype,
        teacher_dtype=handle.teacher_dtype,
        indexers="own" if handle.trains_own else "fresh",
        teachers=handle.teachers,
        base_vocab_size=getattr(base, "vocab_size", None),
        base_tokenizer_fingerprint=handle.tokenizer_fingerprint,
    )


def check_replaceable(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Refuse to replace what is not ours, and what is ours without `overwrite`. Missing or empty is fine."""
    folder = readable_directory(path)
    if folder.is_file():
        raise NotADirectoryError(f"path must be a directory or not exist, got the file {folder}")
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        read_config(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"path must be empty, missing or a checkpoint of ours, got {folder}, which holds other files; "
            "nothing was written: choose another path"
        ) from error
    if not overwrite:
        raise ValueError(
            f"path must be empty or missing, got {folder}, which holds an earlier checkpoint; choose another path, or "
            "pass overwrite=True (--overwrite)"
        )


def check_tensors(state_dict: dict[str, Tensor], config: NativeConfig, *, where: str) -> None:
    """Check the indexers' tensors against the config: names, shapes, finiteness; ValueError names the tensor."""
    shapes = config.shapes()
    if missing := sorted(shapes.keys() - state_dict.keys()):
        raise ValueError(f"{where} lacks {len(missing)} tensors that the config tells of, first {missing[0]}")
    if unexpected := sorted(key for key in state_dict.keys() - shapes.keys() if not config.may_hold(key)):
        raise ValueError(f"{where} has {len(unexpected)} tensors too many, first {unexpected[0]}")
    for key, tensor in state_dict.items():
        if tuple(tensor.shape) != (wanted := shapes.get(key, tuple(tensor.shape))):
            raise ValueError(f"{where}: {key} must be {list(wanted)}, got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{where}: {key} must be floating point, got {tensor.dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{where}: {key} holds NaN or infinity; use an earlier checkpoint")


def _compare_base(
    config: NativeConfig, model: PreTrainedModel, fingerprint: str | None, path: str | os.PathLike[str]
) -> None:
    base = model.config.get_text_config()
    pairs = [
        ("model_type", config.base_model_type, base.model_type),
        ("hidden_size", config.base_hidden_size, base.hidden_size),
        ("num_hidden_layers", config.base_num_layers, base.num_hidden_layers),
    ]
    same_sizes = all(was == now for _, was, now in pairs)
    vocabulary = getattr(base, "vocab_size", None)
    if same_sizes and fingerprint is not None and config.base_vocab_size not in (None, vocabulary):
        raise ValueError(
            f"load_native: {os.fspath(path)} was trained on a model with a vocabulary of {config.base_vocab_size} "
            f"tokens (vocab_size), this one has {vocabulary}; load {config.base_name!r}"
        )
    if fingerprint is not None and config.base_fingerprint is not None:
        pairs.append(("fingerprint", config.base_fingerprint, fingerprint))
    if wrong := [f"{name} {was!r}, the model has {now!r}" for name, was, now in pairs if was != now]:
        raise ValueError(
            f"load_native: {os.fspath(path)} was trained on another base model: {'; '.join(wrong)}; load "
            f"{config.base_name!r}"
        )


def _compare_indexers(config: NativeConfig, other: NativeConfig, path: str | os.PathLike[str]) -> None:
    names = ("indexers", "layers", "num_heads", "head_dim", "rope_dim", "rope_interleaved", "q_lora_rank")
    pairs = [(name, getattr(config, name), getattr(other, name)) for name in names]
    if wrong := [f"{name} {was!r}, attached are {now!r}" for name, was, now in pairs if was != now]:
        raise ValueError(
            f"load_native: {os.fspath(path)} does not fit the attached indexers: {'; '.join(wrong)}; "
            "attach with the checkpoint's sizes, or pass the model alone"
        )
