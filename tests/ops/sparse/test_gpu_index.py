"""The kernels of selection and learning refuse what they don't take, before they look at the device."""

from __future__ import annotations

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch

from flash_indexer.kernels.sm_90 import sizes
from flash_indexer.ops import Selection, launch
from flash_indexer.ops.sparse import gpu_index, gpu_select


def leaves(I: int, E: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros(3, I, E), torch.zeros(5, E), torch.zeros(3, I)


@pytest.mark.parametrize("E", [16, 48, 256])
def test_other_widths_are_refused(E: int) -> None:
    for refusal, widths in ((gpu_index.refusal, "64, 128"), (gpu_select.refusal, "32, 64, 128")):
        assert re.search(rf"E in \[{widths}\], got E={E}; zero-pad", str(refusal(leaves(4, E))))


def test_more_heads_are_refused_where_they_do_not_fit() -> None:
    assert "1 to 64 heads (I) on CUDA, got I=65" in str(gpu_index.refusal(leaves(65, 64)))
    assert gpu_index.refusal(leaves(64, 128)) is None
    assert gpu_select.refusal(leaves(65, 64)) is None


def test_tiles_are_counted_where_the_choice_depends_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of 128 queries: 2 tiles, none, and 1 from the first key that a query selects to the last."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(launch, "on_its_way", lambda x: (x, SimpleNamespace(synchronize=lambda: None)))
    T, S, K = 300, 1000, 2
    indices, count = torch.full((T, K), -1, dtype=torch.int32), torch.zeros(T, dtype=torch.int32)
    for t, keys in ((5, (127, 130)), (290, (999,)), (299, (900,))):
        indices[t, : len(keys)], count[t] = torch.tensor(keys, dtype=torch.int32), len(keys)
    selection = Selection(indices, count, torch.zeros(T, K))
    index = torch.zeros(T, 4, 64), torch.zeros(S, 64), torch.zeros(T, 4)
    for faster, gathering, number in ((False, 1e9, 3), (True, 1e9, None), (False, 1e5, None)):
        monkeypatch.setattr(gpu_index, "dense_is_faster", lambda *_, faster=faster: faster)
        monkeypatch.setattr(gpu_index, "gathering_time", lambda *_, gathering=gathering: gathering)
        tiles = gpu_index.count_tiles(index, selection)
        assert (tiles and int(tiles.number)) == number
    none = Selection(indices[:, :0], count * 0, torch.zeros(T, 0))
    monkeypatch.setattr(gpu_index, "dense_is_faster", lambda *_: False)
    assert gpu_index.count_tiles(index, none) is None


def test_ranges_are_for_few_keys_and_take_the_widths_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    index = torch.empty(8192, 64, 128, device="meta"), torch.empty(16384, 128, device="meta"), torch.empty(0)
    monkeypatch.setattr(gpu_index, "_RANGED_WIDTHS", sizes.GATHERED_INDEX_WIDTHS)
    assert gpu_index.ranges_are_faster(16384, index, 2048) and not gpu_index.ranges_are_faster(131072, index, 2048)
    assert not gpu_index.ranges_are_faster(sizes.INDEX_RUN * sizes.INDEX_RUNS + 1, index, 10**6)
    monkeypatch.setattr(gpu_index, "_RANGED_WIDTHS", (64,))
    assert not gpu_index.ranges_are_faster(16384, index, 2048)
