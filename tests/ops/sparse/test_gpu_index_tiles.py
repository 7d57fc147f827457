"""Work lists of dense index gradients, made from a selection: every pair of tiles once, whatever was selected."""

from __future__ import annotations

import pytest
import torch

from flash_indexer.ops import Selection
from flash_indexer.ops.sparse.gpu_index_tiles import lists, spans

S = 2000


def selection(T: int, kind: str) -> Selection:
    generator = torch.Generator().manual_seed(T)
    end = (torch.arange(T) + 30) * (S - 1) // (T + 30) + 1
    count = torch.randint(41, (T,), generator=generator, dtype=torch.int32)
    if kind == "nothing":
        count.zero_()
    if kind == "gaps":
        count[100:300] = 0
    indices = torch.full((T, 40), -1, dtype=torch.int32)
    for t in range(T):
        first = int(end[t]) - 60 if kind == "recent" else 0
        keys = torch.randperm(max(int(end[t]) - first, 40), generator=generator)[: int(count[t])] + first
        indices[t, : int(count[t])] = keys.clamp(0, S - 1).sort().values.int()
    return Selection(indices, count, torch.zeros(T, 40))


@pytest.mark.parametrize("IP", [8, 64])
@pytest.mark.parametrize("workspace", [1, 2**24, 2**29])
@pytest.mark.parametrize("kind", ["any", "recent", "gaps", "nothing"])
@pytest.mark.parametrize("T", [1, 130, 700])
def test_every_tile_that_holds_a_key_once(T: int, kind: str, workspace: int, IP: int) -> None:
    x = selection(T, kind)
    work = lists(x, (S, 64, IP), workspace, processors=16)
    blocks, key_tiles = -(-T // 128), -(-S // 128)
    held = torch.zeros(T, key_tiles, dtype=torch.bool)
    for t in range(T):
        held[t, x.indices[t, : int(x.count[t])].long() // 128] = True
    base = work.blocks.view(-1, 4)[:, 0].tolist()
    assert base == [b * key_tiles for b in range(blocks)]

    tokens, found = 128 // IP, torch.zeros(T, key_tiles, dtype=torch.int64)
    for token, first, count, begin in work.query.view(-1, 4).tolist():
        assert token % tokens == 0 and count >= 1 and first >= 0 and first + count <= key_tiles
        assert begin == base[token // 128]
        found[token : token + tokens, first : first + count] += 1
    assert (found[held] == 1).all() and found.max() <= 1 and (found.sum(1) >= 1).all()

    found = torch.zeros(blocks, key_tiles, dtype=torch.int64)
    written = []
    for tile, begin, stop, slot in work.key.view(-1, 4).tolist():
        assert 0 <= begin <= stop <= blocks and slot < work.slots
        found[begin:stop, tile] += 1
        written.append((tile, slot))
    by_block = torch.zeros(blocks * 128, key_tiles, dtype=torch.bool)
    by_block[:T] = held
    assert (found[by_block.view(blocks, 128, key_tiles).any(1)] == 1).all() and found.max() <= 1
    own = [slot for _, slot in written if slot >= 0]
    assert sorted(own) == list(range(work.slots)) and sum(slot < 0 for _, slot in written) == key_tiles
    for tile, first, stop, _ in work.reduce.view(-1, 4).tolist():
        assert sorted(slot for other, slot in written if other == tile and slot >= 0) == list(range(first, stop))


def test_spans_of_keys_that_are_none() -> None:
    indices = torch.tensor([[-(2**31), 5], [3, 2**31 - 1]], dtype=torch.int32)
    found = spans(Selection(indices, torch.tensor([2, 2], dtype=torch.int32), torch.zeros(2, 2)), S, 128)
    assert (found.first, found.end) == (torch.tensor([0]), torch.tensor([-(-S // 128)]))
