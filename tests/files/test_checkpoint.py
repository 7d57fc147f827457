"""Training checkpoints: what goes in comes out, to the bit; whatever is wrong with one is said."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flash_indexer.files import checkpoint as module
from flash_indexer.files.checkpoint import OPTIMIZER_FILE, STATE_FILE, load_checkpoint, save_checkpoint, write_json
from flash_indexer.files.native import load_native
from flash_indexer.models.attach import IndexerHandle, attach

Attached = Callable[..., tuple[IndexerHandle, torch.optim.AdamW]]
BASE = dict(base_name="tiny", base_fingerprint="f00d")


@pytest.fixture
def attached(checkpoint: Path) -> Attached:
    """`attached(seed)`: fresh indexers of two layers, random, and their optimizer."""

    def build(seed: int, **sizes: int) -> tuple[IndexerHandle, torch.optim.AdamW]:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        handle = attach(model, **(dict(num_heads=4, head_dim=32) | sizes), layers=[0, 2])
        return handle, torch.optim.AdamW(handle.indexers.parameters(), lr=1e-2, weight_decay=0.0)

    return build


def learn(handle: IndexerHandle, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        with torch.no_grad():
            handle.model((torch.arange(20)[None] * (7 + step)) % 59, use_cache=False)
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def saved(tmp_path: Path, attached: Attached) -> Iterator[tuple[Path, IndexerHandle, torch.optim.Optimizer]]:
    handle, optimizer = attached(0)
    learn(handle, optimizer)
    save_checkpoint(tmp_path / "checkpoint", handle, optimizer, 17, **BASE)
    yield tmp_path / "checkpoint", handle, optimizer


def test_weights_moments_and_step_come_back_and_training_goes_on_as_before(saved, attached: Attached) -> None:
    path, handle, optimizer = saved
    other, others = attached(1)
    assert not torch.equal(other.indexers["0"].wk.weight, handle.indexers["0"].wk.weight)
    assert load_checkpoint(path, other, others, base_fingerprint="f00d") == 17
    for _ in range(2):
        mine, theirs = optimizer.state_dict(), others.state_dict()
        assert mine["param_groups"] == theirs["param_groups"]
        assert mine["state"].keys() == theirs["state"].keys() == set(range(10))
        for index, entry in mine["state"].items():
            assert entry.keys() == theirs["state"][index].keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(value, theirs["state"][index][name]) for name, value in entry.items())
        for name, value in handle.state_dict().items():
            assert torch.equal(value, other.state_dict()[name])
        learn(handle, optimizer)
        learn(other, others)


def test_it_is_a_native_indexer_too(saved, checkpoint: Path) -> None:
    path, handle, _ = saved
    loaded = load_native(AutoModelForCausalLM.from_pretrained(checkpoint), path, base_fingerprint="f00d")
    assert loaded.layers == (0, 2)
    assert all(torch.equal(value, handle.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("name", [OPTIMIZER_FILE, STATE_FILE])
def test_a_missing_file(saved, attached: Attached, name: str) -> None:
    path, *_ = saved
    (path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing: no training checkpoint"):
        load_checkpoint(path, *attached(1), base_fingerprint="f00d")


def test_nothing_there(tmp_path: Path, attached: Attached) -> None:
    with pytest.raises(FileNotFoundError, match="is missing: no training checkpoint"):
        load_checkpoint(tmp_path / "none", *attached(1), base_fingerprint="f00d")


@pytest.mark.parametrize("name", [OPTIMIZER_FILE, "indexer.safetensors"])
def test_a_file_cut_short(saved, attached: Attached, name: str) -> None:
    path, *_ = saved
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{name} is .*damaged"):
        load_checkpoint(path, *attached(1), base_fingerprint="f00d")


@pytest.mark.parametrize("content", ["", "{}", '{"step": null}', "[3]"])
def test_a_damaged_state(saved, attached: Attached, content: str) -> None:
    path, *_ = saved
    (path / STATE_FILE).write_text(content)
    with pytest.raises(ValueError, match=f"{STATE_FILE} is damaged"):
        load_checkpoint(path, *attached(1), base_fingerprint="f00d")


def test_another_model_and_other_sizes(saved, attached: Attached) -> None:
    path, *_ = saved
    with pytest.raises(ValueError, match="fingerprint"):
        load_checkpoint(path, *attached(1), base_fingerprint="beef")
    with pytest.raises(ValueError, match="num_heads"):
        load_checkpoint(path, *attached(1, num_heads=2), base_fingerprint="f00d")


def test_a_kill_between_the_renames_leaves_a_loadable_checkpoint(saved, attached: Attached) -> None:
    path, *_ = saved
    path.rename(path.with_name(".checkpoint.old"))
    assert load_checkpoint(path, *attached(1), base_fingerprint="f00d") == 17


def test_a_full_disk_keeps_the_earlier_checkpoint(saved, attached: Attached, monkeypatch: pytest.MonkeyPatch) -> None:
    path, handle, optimizer = saved
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    learn(handle, optimizer)

    def save_file(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", save_file)
    with pytest.raises(OSError, match="no space left while writing .*checkpoint") as caught:
        save_checkpoint(path, handle, optimizer, 18, **BASE)
    assert caught.value.errno == errno.ENOSPC
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [entry.name for entry in path.parent.iterdir()] == ["checkpoint"]


def test_weights_that_are_not_finite_never_replace_a_checkpoint(saved, attached: Attached) -> None:
    path, handle, optimizer = saved
    handle.indexers["2"].k_norm.bias.data[3] = torch.inf
    with pytest.raises(ValueError, match="layers.2.*k_norm.bias"):
        save_checkpoint(path, handle, optimizer, 18, **BASE)
    assert load_checkpoint(path, *attached(1), base_fingerprint="f00d") == 17


def test_write_json_is_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    write_json(file, {"steps": 3})
    with pytest.raises(TypeError):
        write_json(file, {"steps": 4, "model": object()})
    assert json.loads(file.read_text()) == {"steps": 3}
    write_json(file, {"steps": 5})
    assert json.loads(file.read_text()) == {"steps": 5} and [file] == list(tmp_path.iterdir())


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    (tmp_path / ".run.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/run.json'"):
        write_json(tmp_path / "run.json", {"steps": 1})
