"""ops.sparse.chunks: runs of rows, and the two ways in which a run holds its keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_indexer.ops.sparse.chunks import THIN, Chunk, chunks, product, thin
from flash_indexer.ops.sparse.selection import Selection
from flash_indexer.ops.sparse.torch_select import top_keys


def selection(T: int, S: int, K: int) -> Selection:
    """Rows that see nothing, few keys, and more than K."""
    end = torch.tensor([0, 0, 1, 3, *range(4, S + 1, max(1, S // T))][:T])
    scores = torch.randn(T, S, generator=torch.Generator().manual_seed(T))
    return top_keys(scores, torch.zeros(T), end, K)


def cut(chosen: Selection, x: Tensor, workspace_bytes: int, by_row: tuple[Tensor, ...] = ()) -> list[Chunk]:
    return list(chunks(chosen, 10, workspace_bytes, (x,), by_row))


@pytest.mark.parametrize("workspace_bytes", [1, 10_000, 2**29])
def test_every_row_with_keys_is_in_one_chunk_that_fits(workspace_bytes: int) -> None:
    chosen, x = selection(300, 600, 5), torch.randn(600, 2)
    made = cut(chosen, x, workspace_bytes)
    rows = [t for chunk in made for t in range(chunk.rows.start, chunk.rows.stop)]
    assert len(rows) == len({*rows}) and {*(chosen.count > 0).nonzero()[:, 0].tolist()} <= {*rows}
    for chunk in made:
        length = chunk.rows.stop - chunk.rows.start
        assert length <= 128 and (length == 1 or length * 5 * 5 * THIN * 4 <= workspace_bytes)
        assert chunk.keys.shape == (length, int(chosen.count[chunk.rows].max()))


@pytest.mark.parametrize("S, way", [(40, "near"), (2000, "gathered")])
def test_both_ways_give_the_same(S: int, way: str) -> None:
    chosen = selection(30, S, 4)
    x, weights = torch.randn(S, 3, dtype=torch.float64), torch.randn(30, 2, S, dtype=torch.float64)
    rows, values = torch.randn(30, 2, 3, dtype=torch.float64), torch.randn(chosen.indices.shape, dtype=torch.float64)
    (chunk,) = cut(chosen, x, 2**29)
    assert (chunk.near is None) == (way == "gathered")
    tile = chunk.tile(x, torch.float64)
    logits = product(rows, tile.mT).masked_fill(chunk.unselected[:, None], 0.0)
    slots = torch.full(chosen.indices.shape, 7.0, dtype=torch.float64)
    chunk.to_slots(logits.sum(1), slots, absent=-1.0)
    sums = torch.zeros_like(x)
    spread = chunk.from_slots(values)[:, None].expand(-1, 2, -1)
    chunk.add(sums, chunk.outer(spread.contiguous(), rows), deterministic=True)
    expected = torch.zeros_like(x)
    for t in range(chunk.rows.start, chunk.rows.stop):
        for slot in range(chosen.indices.shape[1]):
            s = int(chosen.indices[t, slot])
            right = (rows[t] @ x[s]).sum() if s >= 0 else torch.tensor(-1.0).double()
            torch.testing.assert_close(slots[t, slot], right)
            if s >= 0:
                expected[s] += values[t, slot] * rows[t].sum(0)
    torch.testing.assert_close(sums, expected)
    assert weights.shape[2] == S


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_gathered(bad: float) -> None:
    """Of the keys in the range, and of the rows; what lies outside does not matter."""
    chosen, x, rows = selection(30, 40, 4), torch.randn(40, 3), torch.randn(30, 3)
    (chunk,) = cut(chosen, x, 2**29, (rows,))
    assert chunk.near is not None
    beyond = torch.cat([x, torch.full((3, 3), bad)])
    assert cut(chosen, beyond, 2**29, (rows,))[0].near == chunk.near
    inside, row = x.clone(), rows.clone()
    inside[chunk.near.start], row[20] = bad, bad
    assert cut(chosen, inside, 2**29, (rows,))[0].near is None
    assert cut(chosen, x, 2**29, (row,))[0].near is None


def test_slots_behind_the_count_are_not_read() -> None:
    chosen = selection(30, 40, 4)
    behind = torch.arange(4) >= chosen.count[:, None]
    junk = chosen._replace(indices=chosen.indices.masked_fill(behind, 2**30))
    for a, b in zip(cut(junk, torch.randn(40, 3), 2**29), cut(chosen, torch.randn(40, 3), 2**29), strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.absent, b.absent) and a.near == b.near


def test_products_do_not_depend_on_what_requires_a_gradient() -> None:
    """torch.matmul folds its operands, or not, by that, and its last bits change."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 1, 7, generator=generator, dtype=torch.float64)
    y = torch.randn(79, 7, generator=generator, dtype=torch.float64)
    plain = product(x, y.mT)
    torch.testing.assert_close(plain, torch.einsum("rpn,mn->rpm", x, y))
    assert torch.equal(product(x, y.clone().requires_grad_().mT).detach(), plain)
    z = torch.randn(80, 7, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(product(x, z), x @ z)


def test_on_a_gpu_it_depends_on_the_heads_of_a_key_when_keys_are_gathered() -> None:
    """Measured on an H100, 16,384 keys of which 2,048 are selected: gathering takes 142 ms for 181 of 32 heads on 8 key
    heads, and 27 for 580 of 64 on 1; on a CPU the heads do not matter."""
    gpu = torch.device("cuda")
    assert thin(torch.device("cpu"), 64, 1) == THIN == thin(torch.device("cpu"), 32, 32)
    assert 5 < thin(gpu, 32, 8) < 8 and thin(gpu, 128, 1) < thin(gpu, 64, 1) < 1 and thin(gpu, 32, 32) > 20


def test_a_range_is_taken_under_a_mask_up_to_so_many_keys_for_each_selected_one() -> None:
    chosen, x = selection(30, 40, 4), torch.randn(40, 3)
    span = int(chosen.indices.max()) + 1 - int(chosen.indices[chosen.indices >= 0].min())
    (near,) = chunks(chosen, 10, 2**29, (x,), (), most_keys=span / 4)
    (gathered,) = chunks(chosen, 10, 2**29, (x,), (), most_keys=span / 4 - 0.1)
    assert near.near is not None and gathered.near is None
