"""Training checkpoints: a native indexer directory with the optimizer's state and the step beside it.

Written as a whole by `atomic_directory`: after a kill or on a full disk, the earlier checkpoint is still there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flash_indexer.files.atomic import atomic_directory, named_errors, readable_directory
from flash_indexer.files.native import load_native, write_native
from flash_indexer.files.tensors import shared_out, stored_tensors, tensor_files
from flash_indexer.models.attach import IndexerHandle

OPTIMIZER = "optimizer"
OPTIMIZER_FILE = f"{OPTIMIZER}.safetensors"
STATE_FILE = "training_state.json"


def save_checkpoint(
    path: str | os.PathLike[str],
    handle: IndexerHandle,
    optimizer: torch.optim.Optimizer,
    step: int,
    *,
    base_name: str,
    base_fingerprint: str,
) -> None:
    """Writes indexers, AdamW moments and step into the directory `path`, replacing the checkpoint there."""
    with atomic_directory(path) as folder:
        write_native(handle, folder, base_name=base_name, base_fingerprint=base_fingerprint)
        save_file(optimizer_moments(optimizer), folder / OPTIMIZER_FILE)
        (folder / STATE_FILE).write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")


def load_checkpoint(
    path: str | os.PathLike[str], handle: IndexerHandle, optimizer: torch.optim.Optimizer, *, base_fingerprint: str
) -> int:
    """Loads what `save_checkpoint` wrote, and returns the step after which it was written.

    Raises:
        FileNotFoundError: a file is missing. ValueError: it belongs to another model or other sizes, or is damaged.
    """
    folder = readable_directory(path)
    step = read_step(folder)
    load_native(handle, folder, base_fingerprint=base_fingerprint)
    load_optimizer(folder, optimizer)
    return step


def optimizer_moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimizer's state, as "number of the parameter.name"."""
    return {
        f"{index}.{name}": value.contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }


def read_step(folder: Path) -> int:
    """The step after which a training checkpoint was written.

    Raises:
        FileNotFoundError: a file of a training checkpoint is missing. ValueError: it is damaged.
    """
    found = {OPTIMIZER_FILE: bool(tensor_files(folder, OPTIMIZER)), STATE_FILE: (folder / STATE_FILE).is_file()}
    for name, is_there in found.items():
        if not is_there:
            raise FileNotFoundError(
                f"load_checkpoint: {folder / name} is missing: no training checkpoint; start a new run elsewhere"
            )
    try:
        return int(_state(folder)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error


def read_save(folder: Path) -> str | None:
    """What tells the checkpoint's files from those of others; None where the checkpoint does not say.

    Raises:
        ValueError: training_state.json is damaged.
    """
    try:
        save: str | None = _state(folder).get("save") if (folder / STATE_FILE).is_file() else None
    except (ValueError, AttributeError) as error:
        raise _damaged(folder, error) from error
    return save


def _state(folder: Path) -> Any:
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))


def _damaged(folder: Path, error: Exception) -> ValueError:
    return ValueError(f"load_checkpoint: {folder / STATE_FILE} is damaged ({error!r}); start a new run")


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Loads the moments that `optimizer_moments` gave, each shared out as its parameter.

    Raises:
        ValueError: the file is damaged, or of more parameters.
    """
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with stored_tensors(folder, OPTIMIZER, read_save(folder)) as stored:
        for key, shape in stored.shapes.items():
            index, name = key.split(".", 1)
            if int(index) >= len(parameters):
                raise ValueError(
                    f"load_checkpoint: {OPTIMIZER} in {folder} must hold moments of {len(parameters)} parameters, got "
                    f"some of number {index}; start a new run"
                )
            own = parameters[int(index)]
            is_cut = shape == own.shape
            value = (stored.part(key, own) if is_cut else stored.whole(key)).clone()  # no view of the file
            state.setdefault(int(index), {})[name] = shared_out(value, own) if is_cut else value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file as a whole: the old content or the new, whenever the process is killed."""
    partial = path.with_name(f".{path.name}.partial")
    with named_errors(path), partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
