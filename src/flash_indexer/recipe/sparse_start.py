"""What a sparse run begins with: a model and its indexers, warmed up in a run, or the model's own as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_indexer.files.atomic import readable_directory
from flash_indexer.files.native import (
    WEIGHTS_FILE,
    NativeCheckpoint,
    check_tokenizer,
    describe,
    load_native,
    read_native,
)
from flash_indexer.files.trained import MODEL_FOLDER, has_trained
from flash_indexer.models.attach import IndexerHandle, attach
from flash_indexer.models.load import load_model, model_fingerprint, tokenizer_fingerprint
from flash_indexer.parallel.mesh import Parallel
from flash_indexer.recipe.processes import ParallelSettings
from flash_indexer.recipe.run_folder import indexer_folder
from flash_indexer.recipe.sparse_record import SparseRunSettings

TOPK = 2048
"""Keys of a query where neither the run nor the model says how many, DeepSeek-V3.2's."""


class Start(NamedTuple):
    """What a run begins with: the model's name and fingerprint, the indexers, their folder and its fingerprint.

    folder: None where the indexers are a model's own, as its checkpoint holds them. tokenizer_fingerprint: the model's.
    """

    name: str
    fingerprint: str
    indexers: NativeCheckpoint
    folder: Path | None
    init_fingerprint: str
    tokenizer_fingerprint: str

    @property
    def trains_own(self) -> bool:
        """Whether the indexers are those that the model has of its own."""
        return self.indexers.config.indexers == "own"


def load_start(
    settings: SparseRunSettings, parallel: ParallelSettings, say: Callable[[str], object]
) -> tuple[Start, PreTrainedModel, PreTrainedTokenizerBase]:
    """The model as it was warmed up, and what its indexers are.

    Raises:
        ValueError, FileNotFoundError: init_from holds no indexers, or those of another model or tokenizer, or of a
            model that trained with them; a model's own are to be shared out over processes.
    """
    folder, held = held_indexers(settings.init_from)
    if (held is None or held.config.indexers == "own") and (parallel.cp * parallel.tp > 1 or parallel.fsdp):
        raise ValueError(
            "sparse: --cp, --tp and --fsdp must be left out where a model's own indexers train, got "
            f"cp={parallel.cp}, tp={parallel.tp}, fsdp={parallel.fsdp}: each process holds the whole model then; "
            "several processes may share the data"
        )
    if held is None:
        return _own_start(settings, folder, say)
    if has_trained(folder):
        format = "own" if held.config.indexers == "own" else "native"
        raise ValueError(
            f"sparse: --init-from must name indexers of an untouched model, got {settings.init_from}, a sparse run "
            f"whose model trained with them; go on with --resume, or export it with --format {format} and name the "
            "export"
        )
    inside = folder / MODEL_FOLDER  # of an exported sparse run: the model that trained
    name = settings.model or (str(inside) if inside.is_dir() else held.config.base_name)
    say(f"loading {name}")
    model, tokenizer = load_model(name, dtype=getattr(torch, held.config.base_dtype), indexers=held.config.indexers)
    fingerprint = model_fingerprint(model)
    try:
        load_native(model, folder, base_fingerprint=fingerprint).remove()
    except ValueError as error:
        raise ValueError(f"sparse: --init-from must hold indexers of the model {name}: {error}") from error
    check_tokenizer(held.config, tokenizer, name=name, command="sparse")
    init = sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
    return Start(name, fingerprint, held, folder, init, tokenizer_fingerprint(tokenizer)), model, tokenizer


def held_indexers(init_from: str, name: str = "sparse: --init-from") -> tuple[Path, NativeCheckpoint | None]:
    """The folder of the indexers that `init_from` names, and they; None where it is a model with some of its own.

    Args:
        name: who asks, and what `init_from` is called there, for errors.

    Raises:
        ValueError, FileNotFoundError: it is neither a run, nor a native indexer folder, nor a Transformers checkpoint.
    """
    given = readable_directory(init_from)
    folder = readable_directory(indexer_folder(Path(init_from)))
    if (given / "config.json").is_file() and not (folder / WEIGHTS_FILE).is_file():
        return given, None
    try:
        return folder, read_native(folder)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(
            f"{name} must name a warm-up's run, a native indexer or a model with indexers of its own: {error}"
        ) from error


def _own_start(
    settings: SparseRunSettings, folder: Path, say: Callable[[str], object]
) -> tuple[Start, PreTrainedModel, PreTrainedTokenizerBase]:
    """A model whose own indexers are taken as its checkpoint has them."""
    if settings.model is not None and readable_directory(settings.model) != folder:
        raise ValueError(
            f"sparse: --model must be left out where --init-from names a model with indexers of its own, got "
            f"{settings.model} and {settings.init_from}"
        )
    name = settings.init_from
    say(f"loading {name}")
    model, tokenizer = load_model(name, dtype=getattr(torch, settings.dtype), indexers="own")
    fingerprint = model_fingerprint(model)
    try:
        handle = attach(model, indexers="own")
    except ValueError as error:
        raise ValueError(
            f"sparse: --init-from must name indexers, or a model with indexers of its own: {error}"
        ) from error
    config = describe(handle, base_name=name, base_fingerprint=fingerprint)
    held = NativeCheckpoint(config, {key: value.cpu().clone() for key, value in handle.state_dict().items()})
    handle.remove()
    return Start(name, fingerprint, held, None, fingerprint, tokenizer_fingerprint(tokenizer)), model, tokenizer


def attach_start(
    model: PreTrainedModel,
    held: NativeCheckpoint,
    *,
    layers: Sequence[int] | None = None,
    parallel: Parallel | None = None,
) -> IndexerHandle:
    """The indexers attached to the model, or those of some layers; dense."""
    config = held.config
    if config.indexers == "own":
        handle = attach(model, indexers="own", teachers=config.teachers, layers=layers, parallel=parallel)
    else:
        handle = attach(
            model, num_heads=config.num_heads, head_dim=config.head_dim, rope_dim=config.rope_dim, layers=layers,
            parallel=parallel,
        )  # fmt: skip
    own = handle.state_dict()
    handle.load_state_dict({key: value for key, value in held.state_dict.items() if key in own})
    return handle


def keys_of(settings: SparseRunSettings, model: PreTrainedModel, start: Start) -> int:
    """Keys of a query: those of the settings, of the model where its own indexers train, or TOPK."""
    if settings.topk is not None:
        return settings.topk
    own = getattr(model.config.get_text_config(), "index_topk", None) if start.trains_own else None
    return TOPK if own is None else int(own)
