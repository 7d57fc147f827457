"""What a plan of the GPU kernels depends on, and the runs of token blocks that its chunks are."""

from __future__ import annotations

import bisect
import itertools
from typing import NamedTuple, TypeVar

from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import kl_parts
from flash_indexer.ops.worklists import TILE

BYTES_PER_TILE = TILE * TILE * (4 + 4 + 2)  # teacher scores, index scores, di
NARROW_TILES = 3  # that an item of `score_narrow` has at most
SHARE_OF_PARTIALS = 8  # at most this fraction of the workspace holds partial sums of d_index_k
_WORTH_A_RUN = 0.03  # of the time of a run of blocks: what another run takes for itself
_Count = TypeVar("_Count", int, Tensor)


class PlanSizes(NamedTuple):
    """What a plan depends on besides the intervals."""

    S: int
    E: int
    padded_heads: int
    grouped: bool
    workspace_bytes: int
    processors: int
    narrow: bool = False  # whether the teacher's scores come from `narrow_items`
    fused: bool = False  # whether scores leave what `gpu_fused` takes

    @property
    def tile_bytes(self) -> int:
        """That a score tile takes: scores and di; masks in bits, and three sums of each row."""
        return BYTES_PER_TILE + (TILE * TILE // 8 * self.padded_heads + 3 * 4 * TILE if self.fused else 0)

    @property
    def group_tokens(self) -> int:
        """Tokens of an item of the kernel that forms index_q's gradient."""
        parts = kl_parts(self.E) if self.fused else 1
        return TILE * parts // self.padded_heads

    @property
    def block_bytes(self) -> int:
        """That a block of 128 tokens takes besides: w·index_q."""
        return TILE * self.padded_heads * self.E * 2 if self.fused else 0


def cut(first: Tensor, end: Tensor, sizes: PlanSizes) -> list[tuple[int, int]]:
    """Runs of blocks whose tiles fit the workspace, one block at least. A run that sees nothing is left out.

    A run shorter than the workspace allows is taken where its items fill the processors' rounds better: much better
    where the rest then takes a run more, for each has kernels that begin and end.
    """
    limit = sizes.workspace_bytes * (SHARE_OF_PARTIALS - 1) // SHARE_OF_PARTIALS
    counts = (end - first).tolist()
    sums = list(itertools.accumulate((n * sizes.tile_bytes + sizes.block_bytes for n in counts), initial=0))
    spans, begin, blocks = [], 0, len(counts)
    last = _begins(sums, limit)  # of the runs behind the one at hand, were each as long as fits, from the end
    while begin < blocks:
        stop = max(bisect.bisect_right(sums, sums[begin] + limit) - 1, begin + 1)
        while last and last[-1] <= begin:
            last.pop()
        if stop < blocks:
            least = min(last[-1] if last else stop, stop) - begin
            stop = begin + _even(counts[begin:stop], least, sizes)
        if any(counts[begin:stop]):
            spans.append((begin, stop))
        begin = stop
    return spans


def _begins(sums: list[int], limit: int) -> list[int]:
    """First blocks of runs that end with the last block, each as long as fits, the last run's first. sums: of bytes
    before each block, and of all."""
    found, stop = [], len(sums) - 1
    while stop > 0:
        stop = min(bisect.bisect_left(sums, sums[stop] - limit), stop - 1)
        found.append(stop)
    return found


def _even(counts: list[int], least: int, sizes: PlanSizes) -> int:
    """The number of blocks, at least half of those given, whose items fill whole rounds of the processors best.

    least: with fewer the rest takes a run more, which `_WORTH_A_RUN` must make good. Scores take about three quarters
    of the time, each pass over index_q an eighth.
    """

    def filled(items: int) -> float:
        return items / sizes.processors / max(-(-items // sizes.processors), 1)

    items = list(itertools.accumulate(narrow_runs(n) if sizes.narrow else n for n in counts))

    def share(n: int) -> float:
        return 0.75 * filled(items[n - 1]) + 0.25 * filled(n * sizes.padded_heads)

    def best(least: int) -> int:
        return max(range(max(len(counts) // 2, least, 1), len(counts) + 1), key=lambda n: (round(share(n), 3), n))

    few, any_number = best(least), best(1)
    return any_number if share(any_number) > share(few) + _WORTH_A_RUN else few


def narrow_runs(tiles: _Count) -> _Count:
    """Items of `narrow_items` that a block with so many tiles has: runs of tiles, each for both halves."""
    return 2 * -(-tiles // NARROW_TILES)
