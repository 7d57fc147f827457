"""Tensors in a safetensors file: what the library reads of it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from flash_indexer.files.tensors import read_tensors, shared_out, write_tensors


def some() -> dict[str, torch.Tensor]:
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


def test_the_library_reads_the_same_tensors(tmp_path: Path) -> None:
    written = some()
    write_tensors(tmp_path / "file", written)
    for found in (load_file(tmp_path / "file"), dict(read_tensors(tmp_path / "file"))):
        assert found.keys() == written.keys()
        for name, x in written.items():
            assert found[name].dtype == x.dtype and torch.equal(found[name], x.detach()), name


def test_the_order_of_the_names_changes_no_byte(tmp_path: Path) -> None:
    write_tensors(tmp_path / "one", some())
    write_tensors(tmp_path / "other", dict(reversed(some().items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_nothing_is_written_where_another_process_writes(tmp_path: Path) -> None:
    write_tensors(None, some())
    assert not list(tmp_path.iterdir())


def test_no_tensors_are_a_file_too(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {})
    assert load_file(tmp_path / "file") == {}


def test_what_is_whole_stays_whole() -> None:
    x = torch.arange(3.0)
    assert torch.equal(shared_out(x, torch.zeros(3)), x)


def test_a_dtype_of_no_checkpoint_and_a_truncated_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="write_tensors: steps must be of .*float32.*, got torch.int64"):
        write_tensors(tmp_path / "file", {"steps": torch.zeros(1, dtype=torch.int64)})
    assert not (tmp_path / "file").exists()
    write_tensors(tmp_path / "file", some())
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-1])
    with pytest.raises(SafetensorError):
        list(read_tensors(tmp_path / "file"))
