"""Visible key intervals: query t sees the keys key_start[t] <= s < key_end[t].

Two non-decreasing vectors of length T describe causal, packed and chunked layouts alike; every operator of this
package takes them instead of a mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def causal_intervals(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """key_start[t] = first key of t's document, key_end[t] = one past the last key that t may see.

    Where a document has more keys than queries (a cached prefix), its queries are its last tokens: the causal
    triangle is aligned to the bottom right. Where it has fewer, the first queries see nothing.

    Args:
        cu_seqlens_q: [documents + 1], int32 or int64, begins with 0; the queries' document boundaries.
        cu_seqlens_k: the keys' boundaries, same length; None means the same as the queries'.

    Returns:
        key_start, key_end: int32 [T] on the input's device.

    Raises:
        TypeError: for another type or dtype. ValueError: for a wrong shape, a first entry that is not 0, or a decrease.
    """
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    for name, boundaries in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_tensor("causal_intervals", name, boundaries)
        if boundaries.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"causal_intervals: {name} must be int32 or int64, got {boundaries.dtype}")
        if boundaries.ndim != 1 or boundaries.numel() < 1:
            raise ValueError(f"causal_intervals: {name} must be [documents + 1], got {list(boundaries.shape)}")
        if int(boundaries[0]) != 0:
            raise ValueError(f"causal_intervals: {name} must begin with 0, got {int(boundaries[0])}")
        if bool((boundaries.diff() < 0).any()):
            raise ValueError(f"causal_intervals: {name} must be non-decreasing, got {boundaries.tolist()[:16]}")
    if cu_seqlens_k.shape != cu_seqlens_q.shape or cu_seqlens_k.device != cu_seqlens_q.device:
        raise ValueError(
            "causal_intervals: cu_seqlens_k must match cu_seqlens_q in length and device, got "
            f"{list(cu_seqlens_k.shape)} on {cu_seqlens_k.device}, {list(cu_seqlens_q.shape)} on {cu_seqlens_q.device}"
        )
    lengths_q = cu_seqlens_q.diff().long()
    tokens = int(cu_seqlens_q[-1])
    document = torch.repeat_interleave(lengths_q, output_size=tokens)
    remaining = cu_seqlens_q[1:].long()[document] - torch.arange(tokens, device=cu_seqlens_q.device)
    key_start = cu_seqlens_k[:-1].long()[document]
    key_end = torch.maximum(key_start, cu_seqlens_k[1:].long()[document] - remaining + 1)
    return key_start.int(), key_end.int()


class KeyBlocks(NamedTuple):
    """Runs of keys of one size, which are pooled or ranked as one; N of them, documents laid end to end.

    Attributes:
        tokens: int64 [N, size], the keys of each block.
        start, end: int32 [T]: query t may see the blocks start[t] <= b < end[t], those of its document that end with
            its own token or before.
    """

    tokens: Tensor
    start: Tensor
    end: Tensor


def key_blocks(cu_seqlens: Tensor, size: int) -> KeyBlocks:
    """Blocks of `size` keys from each document's first; a document's last keys that fill none are in no block.

        end[t] - start[t] = floor((t - first token of t's document + 1) / size)

    As compressed keys of DeepSeek-V4, or blocks of keys of Qwen4 and MiniMax M3, are counted.

    Args:
        cu_seqlens: [documents + 1], int32 or int64, begins with 0; the documents' boundaries.
        size: keys in a block, 1 or more.

    Raises:
        TypeError, ValueError: for boundaries that `causal_intervals` refuses, and a size that is no positive integer.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"key_blocks: size must be a positive integer, got {size!r}; pass 4 for one block of 4 keys")
    first, end = (x.long() for x in causal_intervals(cu_seqlens))
    boundaries = cu_seqlens.long()
    blocks = boundaries.diff() // size
    before = blocks.cumsum(0) - blocks
    document = torch.searchsorted(boundaries[1:], first, right=True)
    of_block = torch.repeat_interleave(blocks)
    place = torch.arange(len(of_block), device=blocks.device) - before[of_block]
    tokens = (boundaries[:-1][of_block] + place * size)[:, None] + torch.arange(size, device=blocks.device)
    start = before[document]
    return KeyBlocks(tokens, start.int(), (start + (end - first) // size).int())


def check_intervals(key_start: Tensor, key_end: Tensor, num_keys: int) -> None:
    """Checks 0 <= key_start <= key_end <= S with both non-decreasing. Reads the contents: synchronises a GPU.

    Args:
        key_start, key_end: [T] integers.
        num_keys: S.

    Raises:
        TypeError: for intervals that are no tensors.
        ValueError: naming the first query that breaks a rule, with its values.
    """
    for name, x in (("key_start", key_start), ("key_end", key_end)):
        _check_tensor("check_intervals", name, x)
    if key_start.ndim != 1 or key_end.shape != key_start.shape:
        raise ValueError(
            f"check_intervals: key_start and key_end must be [T] both, got {list(key_start.shape)} and "
            f"{list(key_end.shape)}; pass one interval for each query"
        )
    rules = (
        (key_start < 0, "key_start must not be negative"),
        (
            key_end < key_start,
            "key_end must be at least key_start (an empty interval has key_end == key_start)",
        ),
        (key_end > num_keys, f"key_end must be at most S = {num_keys}"),
        (_decreases(key_start), "key_start must be non-decreasing"),
        (_decreases(key_end), "key_end must be non-decreasing"),
    )
    for broken, rule in rules:
        if bool(broken.any()):
            t = int(broken.int().argmax())
            raise ValueError(
                f"check_intervals: {rule}; query {t} has key_start={int(key_start[t])}, key_end={int(key_end[t])}; "
                "order queries so that both grow, or build them with causal_intervals"
            )


def _check_tensor(op: str, name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{op}: {name} must be a tensor of integers, got {type(x).__name__} {x!r}; pass torch.tensor({name})"
        )


def _decreases(x: Tensor) -> Tensor:
    """[T] bool: True where x falls below its predecessor."""
    broken = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    broken[1:] = x[1:] < x[:-1]
    return broken
