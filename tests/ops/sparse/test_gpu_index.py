"""The kernels of selection and learning refuse what they don't take, before they look at the device."""

from __future__ import annotations

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch

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
        tiles = gpu_index.count_tiles(index, selection, True)
        assert (tiles and int(tiles.number)) == number
    none = Selection(indices[:, :0], count * 0, torch.zeros(T, 0))
    monkeypatch.setattr(gpu_index, "dense_is_faster", lambda *_: False)
    assert gpu_index.count_tiles(index, none, True) is None


MEASURED = {  # (T, K, I, E, tiles): ms of gathering with integers, in any order, and of dense tiles, lists hidden
    (8192, 2048, 64, 128, 2080): (3.2, 2.6, 3.0),
    (8192, 2048, 32, 128, 2080): (3.3, 2.5, 1.8),
    (8192, 2048, 64, 64, 2080): (1.8, 1.3, 2.2),
    (8192, 2048, 16, 64, 2080): (1.7, 1.3, 1.0),
    (8192, 2048, 64, 128, 6176): (3.4, 2.9, 7.9),
    (8192, 2048, 32, 128, 6176): (3.4, 2.9, 4.6),
    (8192, 2048, 8, 64, 6176): (1.9, 1.5, 1.1),
    (8192, 2048, 16, 64, 14368): (2.0, 1.5, 3.6),
    (8192, 512, 64, 128, 2080): (1.0, 0.8, 3.1),
    (8192, 512, 16, 64, 2080): (0.5, 0.4, 0.8),
}
CLEAR = 1.25  # times of two cards, and of causal squares, of which an eighth of the slots is empty, differ by less


@pytest.mark.parametrize(("problem", "times"), MEASURED.items())
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_faster_form_is_chosen_where_one_is_clearly_faster(
    problem: tuple[int, ...], times: tuple[float, ...], deterministic: bool
) -> None:
    T, K, I, E, tiles = problem
    index = torch.empty(T, I, E, device="meta"), torch.empty(T, E, device="meta"), torch.empty(T, I, device="meta")
    gathered, dense = times[0 if deterministic else 1], times[2]
    if max(gathered, dense) > CLEAR * min(gathered, dense):
        assert gpu_index.dense_is_faster(tiles, index, K, deterministic) == (dense < gathered)


def test_few_tokens_are_gathered() -> None:
    """The lists of dense tiles alone would take longer."""
    few = (
        torch.empty(128, 8, 64, device="meta"),
        torch.empty(2048, 64, device="meta"),
        torch.empty(128, 8, device="meta"),
    )
    assert not gpu_index.dense_is_faster(16, few, 2048, True)
