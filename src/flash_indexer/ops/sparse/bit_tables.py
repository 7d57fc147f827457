"""A selection as bits, for a run of query rows: made in the workspace when kernels need it, never saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flash_indexer.ops import launch
from flash_indexer.ops.sparse.selection import Selection

TILE = 128  # queries, or keys, of a tile that stays
_MOST_BYTES = 2**29  # of a run's tables: it has as many bytes of indices where all keys are selected
_BLOCK, _WORD, _FLAG = 32, 32, 64  # queries that are made together, keys of a word, keys of a flag


class Keys(NamedTuple):
    """k and v [S, G, W] for products: filled up to W columns, and zero where a key holds NaN or infinity.

    odd: a bit for each such key, int32 [words], ceil(S / 32) filled up to a multiple of 4.
    """

    k: Tensor
    v: Tensor
    odd: Tensor


class Bits(NamedTuple):
    """Bit tables of T queries and S keys, as kernels/sm_90/bits.py lays them out.

    bits [words·rows], turned [rows / 32 · words·32], flags [rows / 32 · words / 2]: int32. bad [T]: NaN where a query's
    scores are, and where it selected an odd key, else 0. rows, words: T and ceil(S / 32), filled up to multiples of 128
    and 4.
    """

    bits: Tensor
    turned: Tensor
    flags: Tensor
    bad: Tensor
    rows: int
    words: int

    def of_queries(self, keys: int) -> tuple[Tensor, int]:
        """For each tile of 128 queries the tiles of `keys` keys that hold a bit, and how many tiles of keys there are.

        Of each the list has their number, then they themselves, ascending: int32 [rows / 128 · (tiles + 1)].
        """
        blocks, columns = self.rows // _BLOCK, self.words * _WORD // _FLAG
        along = (TILE // _BLOCK, columns, blocks), (keys // _FLAG, 1, columns)
        return self._list(self.rows // TILE, -(-columns // (keys // _FLAG)), *along)

    def of_keys(self, queries: int) -> tuple[Tensor, int]:
        """For each tile of 128 keys the tiles of `queries` queries that hold a bit, likewise."""
        blocks, columns = self.rows // _BLOCK, self.words * _WORD // _FLAG
        along = (TILE // _FLAG, 1, columns), (queries // _BLOCK, columns, blocks)
        return self._list(columns // (TILE // _FLAG), blocks // (queries // _BLOCK), *along)

    def tiles(self) -> Tensor:
        """Which tiles of 128 queries and 128 keys hold a bit: bool [rows / 128, words / 4]."""
        flags = self.flags.view(self.rows // TILE, TILE // _BLOCK, -1, TILE // _FLAG)
        return flags.amax((1, 3)) > 0

    def _list(self, count: int, tiles: int, a: tuple[int, int, int], b: tuple[int, int, int]) -> tuple[Tensor, int]:
        found = torch.empty(count * (tiles + 1), dtype=torch.int32, device=self.flags.device)
        launch.load("bits_lists")(self.flags, found, count, tiles, *a, *b)
        return found, tiles


def make_keys(k: Tensor, v: Tensor | None, value_dim: int, W: int) -> Keys:
    """Of k [S, G, D] and v [S, G, V], or the first value_dim columns of k."""
    S, G, D = k.shape
    k = k.contiguous()
    v = k if v is None else v.contiguous()
    k_filled, v_filled = (torch.empty(S, G, W, dtype=k.dtype, device=k.device) for _ in "kv")
    odd = torch.empty(_filled(-(-S // _WORD), TILE // _WORD), dtype=torch.int32, device=k.device)
    launch.load("bits_keys", W=W)(
        k.view(-1), v.view(-1), k_filled.view(-1, W), v_filled.view(-1, W), odd, S, G, D, D, v.shape[2], value_dim
    )
    return Keys(k_filled, v_filled, odd)


def make_bits(selection: Selection, keys: Keys) -> Bits:
    """The tables of a selection. K is 1 at least; an index outside 0 .. S - 1 sets no bit."""
    indices, count, scores = selection
    (T, K), device = indices.shape, indices.device
    rows, words, num_keys = _filled(T, TILE), len(keys.odd), len(keys.k)
    bits, turned = (torch.empty(rows * words, dtype=torch.int32, device=device) for _ in range(2))
    flags = torch.empty(rows // _BLOCK * words // 2, dtype=torch.int32, device=device)
    bad = torch.empty(T, device=device)
    launch.load("bits")(
        as_int32(indices, num_keys), as_int32(count, K), scores.float().reshape(-1), keys.odd, bits, turned, flags,
        bad, T, K, num_keys, rows, words,
    )  # fmt: skip
    return Bits(bits, turned, flags, bad, rows, words)


def row_runs(T: int, num_keys: int, workspace_bytes: int) -> Iterator[slice]:
    """Runs of query rows, 128 at least, whose tables fit the workspace, and whose numbers int32 can count."""
    step = max(TILE, min(workspace_bytes, _MOST_BYTES) // (_filled(num_keys, TILE) // 4 + 8) // TILE * TILE)
    yield from (slice(begin, min(begin + step, T)) for begin in range(0, T, step))


def as_int32(x: Tensor, end: int) -> Tensor:
    """Flat; numbers that don't fit int32 become -1 or `end`, as much out of range as they were."""
    return (x if x.dtype == torch.int32 else x.clamp(-1, end).int()).reshape(-1)


def _filled(n: int, step: int) -> int:
    return -(-n // step) * step
