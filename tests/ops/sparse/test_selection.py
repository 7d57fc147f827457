"""ops.sparse.selection: what is a selection, and what its check refuses."""

from __future__ import annotations

import pytest
import torch

from flash_indexer.ops.sparse.selection import Selection, check_selection


def selection(rows: list[list[int]], count: list[int]) -> Selection:
    indices = torch.tensor(rows, dtype=torch.int32)
    return Selection(indices, torch.tensor(count, dtype=torch.int32), torch.zeros(indices.shape))


def test_what_is_one() -> None:
    """Behind `count` anything may stand."""
    check_selection(selection([[0, 3, 9], [9, 9, 77], [-1, -1, -1], [5, -1, -1]], [3, 1, 0, 1]), 10)
    check_selection(selection([[]], [0]), 10)
    check_selection(Selection(torch.empty(0, 4), torch.empty(0), torch.empty(0, 4)), 10)


@pytest.mark.parametrize(
    "rows, count, message",
    [
        ([[0, 1, -1], [0, -1, 2]], [2, 2], "indices must be from 0 to S - 1 = 9, .* query 1 has 0, -1 at slot 1"),
        ([[0, 1, -1], [0, 4, 10]], [2, 3], "indices must be from 0 to S - 1 = 9, .* query 1 has 4, 10 at slot 2"),
        ([[10, 1, -1]], [1], "indices must be from 0 to S - 1 = 9, .* query 0 has 10 at slot 0"),
        (
            [[0, 1, 2], [0, 4, 4]],
            [3, 3],
            "indices must ascend, each key once, .* query 1 has 4, 4 at slot 2; sort each",
        ),
        ([[3, 1, -1]], [2], "indices must ascend, each key once, .* query 0 has 3, 1 at slot 1"),
        ([[0, 1], [0, 1]], [2, 3], "count must be from 0 to K = 2; query 1 has count=3"),
        ([[0, 1], [0, 1]], [-1, 1], "count must be from 0 to K = 2; query 0 has count=-1"),
    ],
)
def test_what_is_none(rows: list[list[int]], count: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_selection(selection(rows, count), 10)


def test_shapes_and_types() -> None:
    with pytest.raises(ValueError, match=r"indices and count must be \[T, K\] and \[T\], got \[1, 2\] and \[2\]"):
        check_selection(selection([[0, 1]], [1, 1]), 10)
    with pytest.raises(TypeError, match="selection must be a Selection, got tuple"):
        check_selection((1, 2, 3), 10)


def test_rows_are_views() -> None:
    whole = selection([[0, 1], [2, 3], [4, 5]], [2, 1, 2])
    part = whole.rows(slice(1, 3))
    assert part.indices.tolist() == [[2, 3], [4, 5]] and part.count.tolist() == [1, 2]
    assert all(
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for a, b in zip(part, whole, strict=True)
    )
