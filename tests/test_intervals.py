"""causal_intervals against a loop over documents, and check_intervals' rules."""

from __future__ import annotations

import pytest
import torch

from flash_indexer import causal_intervals, check_intervals
from flash_indexer.intervals import key_blocks


def by_hand(queries: list[int], keys: list[int]) -> tuple[list[int], list[int]]:
    """Query i of n, in a document with m keys, sees the first m - n + i + 1 of them."""
    start, end, base = [], [], 0
    for n, m in zip(queries, keys, strict=True):
        for i in range(n):
            start.append(base)
            end.append(base + max(0, m - n + i + 1))
        base += m
    return start, end


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "queries, keys",
    [
        ([7], [7]),
        ([1], [1]),
        ([3, 1, 0, 5], [3, 1, 0, 5]),
        ([2, 1, 4], [9, 6, 4]),
        ([5, 3, 2], [2, 0, 2]),
        ([4, 1], [1, 3]),
        ([], []),
        ([0, 0], [3, 0]),
    ],
)
def test_causal_intervals(queries, keys, dtype):
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).to(dtype) for x in (queries, keys))
    start, end = causal_intervals(cu_q, cu_k)
    assert (start.tolist(), end.tolist()) == by_hand(queries, keys)
    assert start.dtype == end.dtype == torch.int32
    check_intervals(start, end, sum(keys))
    if queries == keys:
        alone = causal_intervals(cu_q)
        assert torch.equal(alone[0], start) and torch.equal(alone[1], end)


@pytest.mark.parametrize(
    "cu_q, cu_k, error, message",
    [
        ([0.0, 3.0], None, TypeError, "cu_seqlens_q must be int32 or int64, got torch.float32"),
        ([0, 3], [0.0, 3.0], TypeError, "cu_seqlens_k must be int32 or int64, got torch.float32"),
        ([[0, 3]], None, ValueError, r"cu_seqlens_q must be \[documents \+ 1\], got \[1, 2\]"),
        ([1, 3], None, ValueError, "cu_seqlens_q must begin with 0, got 1"),
        ([0, 3], [2, 3], ValueError, "cu_seqlens_k must begin with 0, got 2"),
        ([0, 3, 2], None, ValueError, r"cu_seqlens_q must be non-decreasing, got \[0, 3, 2\]"),
        ([0, 3], [0, 3, 4], ValueError, r"must match cu_seqlens_q in length and device, got \[3\]"),
    ],
)
def test_causal_intervals_refuses(cu_q, cu_k, error, message):
    with pytest.raises(error, match=message):
        causal_intervals(torch.tensor(cu_q), None if cu_k is None else torch.tensor(cu_k))


def test_causal_intervals_refuses_an_empty_vector():
    with pytest.raises(ValueError, match=r"must be \[documents \+ 1\], got \[0\]"):
        causal_intervals(torch.empty(0, dtype=torch.int32))


@pytest.mark.parametrize(
    "start, end, message",
    [
        ([0, -1, 0], [1, 1, 1], "key_start must not be negative; query 1 has key_start=-1"),
        ([0, 2, 2], [1, 1, 3], "key_end must be at least key_start .*; query 1 has key_start=2, key_end=1"),
        ([0, 0, 0], [1, 2, 9], "key_end must be at most S = 8; query 2 has key_start=0, key_end=9"),
        ([0, 2, 1], [3, 3, 3], "key_start must be non-decreasing; query 2"),
        ([0, 0, 0], [3, 2, 4], "key_end must be non-decreasing; query 1"),
    ],
)
def test_check_intervals_refuses(start, end, message):
    with pytest.raises(ValueError, match=f"check_intervals: {message}"):
        check_intervals(torch.tensor(start), torch.tensor(end), 8)


def test_lists_are_refused():
    with pytest.raises(TypeError, match=r"cu_seqlens_q must be a tensor of integers, got list \[0, 3\]; pass"):
        causal_intervals([0, 3])
    with pytest.raises(TypeError, match="causal_intervals: cu_seqlens_k must be a tensor of integers, got tuple"):
        causal_intervals(torch.tensor([0, 3]), (0, 3))
    with pytest.raises(TypeError, match=r"check_intervals: key_end must be a tensor .* pass torch.tensor\(key_end\)"):
        check_intervals(torch.tensor([0]), [1], 1)


def test_check_intervals_refuses_vectors_of_two_lengths():
    with pytest.raises(ValueError, match=r"key_start and key_end must be \[T\] both, got \[2\] and \[1\]"):
        check_intervals(torch.tensor([0, 0]), torch.tensor([1]), 1)


def test_check_intervals_accepts_the_limits():
    check_intervals(torch.tensor([0, 0, 8]), torch.tensor([0, 8, 8]), 8)
    check_intervals(torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32), 0)


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("lengths", [[13], [3, 1, 0, 9, 4], [], [0]])
def test_blocks_of_keys_are_those_that_are_complete(lengths: list[int], size: int) -> None:
    got = key_blocks(torch.tensor([0, *lengths]).cumsum(0), size)
    tokens, start, end, first = [], [], [], 0
    for n in lengths:
        begin = len(tokens)
        for i in range(n):
            if (i + 1) % size == 0:
                tokens.append(list(range(first + i + 1 - size, first + i + 1)))
            start.append(begin)
            end.append(len(tokens))
        first += n
    assert (got.tokens.tolist(), got.start.tolist(), got.end.tolist()) == (tokens, start, end)
    assert got.tokens.shape[1] == size and got.start.dtype == got.end.dtype == torch.int32
    check_intervals(got.start, got.end, len(tokens))


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4"])
def test_blocks_of_no_size_are_refused(size: object) -> None:
    with pytest.raises(ValueError, match=r"key_blocks: size must be a positive integer, got .*; pass 4 for one block"):
        key_blocks(torch.tensor([0, 5]), size)  # type: ignore[arg-type]
