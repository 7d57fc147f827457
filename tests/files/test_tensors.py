"""Tensors in safetensors files, whole or in shards: what the library reads of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from flash_indexer.files.tensors import shared_out, stored_tensors, tensor_files, write_tensors


def some() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "z": torch.randn(3, 5, generator=draw),
        "transposed": torch.randn(4, 7, generator=draw).T.requires_grad_(True),
        "number": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "wide": torch.randn(2, generator=draw, dtype=torch.float64),
        "narrow": torch.randn(3, 2, generator=draw).bfloat16(),
        "half": torch.randn(6, generator=draw).half(),
    }


def read(folder: Path, stem: str) -> dict[str, Tensor]:
    with stored_tensors(folder, stem) as stored:
        return {name: stored.whole(name) for name in stored.shapes}


def shards(folder: Path, count: int, save: str = "one") -> dict[str, Tensor]:
    """As `count` processes write them that share `cut` and `thin` out; `number` is on all of them."""
    draw = torch.Generator().manual_seed(1)
    tensors = {"cut": torch.randn(7, 3, generator=draw), "thin": torch.randn(2, generator=draw)}
    for rank in range(count):
        rows, held = {}, {}
        for name, x in tensors.items():
            each = -(-len(x) // count)
            held[name] = x[rank * each : (rank + 1) * each].clone()
            rows[name] = [min(rank * each, len(x)), len(x)]
        if rank == 0:
            held["number"] = torch.tensor(4.0)
        metadata = {"rows": json.dumps(rows), "save": save}
        save_file(held, folder / f"state-{rank + 1:05}-of-{count:05}.safetensors", metadata=metadata)
    return tensors | {"number": torch.tensor(4.0)}


def test_the_library_reads_the_same_tensors(tmp_path: Path) -> None:
    written = some()
    write_tensors(tmp_path, "state", written)
    for found in (load_file(tmp_path / "state.safetensors"), read(tmp_path, "state")):
        assert found.keys() == written.keys()
        for name, x in written.items():
            assert found[name].dtype == x.dtype and torch.equal(found[name], x.detach()), name


def test_the_order_of_the_names_changes_no_byte(tmp_path: Path) -> None:
    write_tensors(tmp_path, "one", some())
    write_tensors(tmp_path, "other", dict(reversed(some().items())))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "other.safetensors").read_bytes()


def test_no_tensors_are_a_file_too(tmp_path: Path) -> None:
    write_tensors(tmp_path, "state", {})
    assert load_file(tmp_path / "state.safetensors") == {} == read(tmp_path, "state")


def test_what_is_whole_stays_whole() -> None:
    x = torch.arange(3.0)
    assert torch.equal(shared_out(x, torch.zeros(3)), x)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_rows_are_read_of_the_shards_of_any_number_of_processes(tmp_path: Path, count: int) -> None:
    """With five processes the last ones hold no row of the short tensor."""
    truth = shards(tmp_path, count)
    assert_close(read(tmp_path, "state"), truth, rtol=0, atol=0)
    with stored_tensors(tmp_path, "state") as stored:
        assert stored.shapes == {name: x.shape for name, x in truth.items()}
        for begin in range(8):
            for end in range(begin, 8):
                assert torch.equal(stored.rows("cut", begin, end), truth["cut"][begin:end]), (begin, end)


def test_a_missing_shard_and_one_of_another_writing_are_refused(tmp_path: Path) -> None:
    shards(tmp_path, 3)
    assert tensor_files(tmp_path, "other") == []
    middle, last = (tmp_path / f"state-0000{n}-of-00003.safetensors" for n in (2, 3))
    kept = last.read_bytes()
    last.write_bytes(middle.read_bytes())
    with pytest.raises(ValueError, match="must hold each row of cut once, got rows 0 to 3, 3 to 6, 3 to 6 of 7; copy"):
        read(tmp_path, "state")
    last.write_bytes(kept)
    middle.unlink()
    with pytest.raises(FileNotFoundError, match="a file of each of 3 processes, got none named state-00002-of-00003"):
        read(tmp_path, "state")


def test_files_of_several_saves_are_refused(tmp_path: Path) -> None:
    """As a copy over an earlier checkpoint leaves them, of other processes, or of as many."""
    shards(tmp_path, 2, save="one")
    kept = (tmp_path / "state-00002-of-00002.safetensors").read_bytes()
    with stored_tensors(tmp_path, "state", "one") as stored:
        assert set(stored.shapes) == {"cut", "thin", "number"}
    refused = r"state-0000{}-of-00002.safetensors must be of the save two, as its checkpoint, got one; copy"
    with pytest.raises(ValueError, match=refused.format(1)), stored_tensors(tmp_path, "state", "two"):
        pass
    shards(tmp_path, 2, save="two")
    (tmp_path / "state-00002-of-00002.safetensors").write_bytes(kept)
    with pytest.raises(ValueError, match=refused.format(2)):
        read(tmp_path, "state")
    shards(tmp_path, 3)
    with pytest.raises(
        ValueError, match=r"got state-\*-of-00002.safetensors and state-\*-of-00003.safetensors; delete"
    ):
        tensor_files(tmp_path, "state")
    for file in tmp_path.glob("*-of-00002*"):
        file.unlink()
    write_tensors(tmp_path, "state", some(), save="two")
    with pytest.raises(ValueError, match=r"got state.safetensors and state-\*-of-00003.safetensors; delete those of"):
        read(tmp_path, "state")


@pytest.mark.parametrize(
    ("rows", "second", "message"),
    [
        ('{"x": [0, 4]', torch.zeros(2, 3), "the rows in the header of .*state-00002-of-00002.safetensors are damaged"),
        ('{"x": 5}', torch.zeros(2, 3), "the rows in the header of .*state-00002-of-00002.safetensors are damaged"),
        ("[2]", torch.zeros(2, 3), "the rows in the header of .*state-00002-of-00002.safetensors are damaged"),
        ('{"x": [2, 4]}', torch.zeros(2, 2), r"x of .*00002.* must be of \[4, 3\] and F32 .*, got \[4, 2\] and F32"),
        ('{"x": [2, 5]}', torch.zeros(2, 3), r"x of .*00002.* must be of \[4, 3\] and F32 .*, got \[5, 3\] and F32"),
        ('{"x": [2, 4]}', torch.zeros(2, 3).double(), r"x of .*00002.* must be of .* F32 .*, got \[4, 3\] and F64"),
        ('{"x": [1, 4]}', torch.zeros(2, 3), "must hold each row of x once, got rows 0 to 2, 1 to 3 of 4; copy"),
    ],
)
def test_shards_that_do_not_fit_together_are_refused(tmp_path: Path, rows: str, second: Tensor, message: str) -> None:
    first, other = (tmp_path / f"state-0000{n}-of-00002.safetensors" for n in (1, 2))
    save_file({"x": torch.zeros(2, 3)}, first, metadata={"rows": '{"x": [0, 4]}'})
    save_file({"x": second}, other, metadata={"rows": rows})
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "state")


def test_a_dtype_of_no_checkpoint_and_a_truncated_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="write_tensors: steps must be of .*float32.*, got torch.int64"):
        write_tensors(tmp_path, "state", {"steps": torch.zeros(1, dtype=torch.int64)})
    file = tmp_path / "state.safetensors"
    assert not file.exists()
    write_tensors(tmp_path, "state", some())
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="state.safetensors is truncated or damaged"):
        read(tmp_path, "state")
