"""What the kernels' programs share: rings of shared memory, turns of two warpgroups, copies of row tiles.

A ring is an array of stages with a `full` and an `empty` barrier each. The warp that feeds it waits for `empty`,
copies, and commits; the warps that read it wait for `full`, and release the stage with one arrival a warp. A stage
and the parity of its barriers go on together by `advance`.
"""

from typing import Any, NamedTuple

import tilelang
import tilelang.language as T
from tilelang.layout import Fragment

PASS_CONFIGS = {
    tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True,
    tilelang.PassConfigKey.TL_DISABLE_BUFFER_INIT_CHECK: True,
    tilelang.PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
    tilelang.PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
}
LOG2E = 1.4426950408889634
REGISTERS = (240, 24)  # of a thread of the warps that compute, of the others
FULL_ROW = T.GemmWarpPolicy.FullRow

# scalars of the rows of a 128-row tile, as its accumulator's threads own them: two a thread, alike in the four of a row
ROW_LAYOUT = Fragment(
    [128],
    forward_thread_fn=lambda i, rep: (i // 16) * 32 + (i % 8) * 4 + rep,
    replicate=4,
    forward_index_fn=lambda i: (i % 16) // 8,
)


def number(ITEMS, i):
    """The i-th int32 of a list in global memory."""
    return T.call_extern("int32", "load_int", T.address_of(ITEMS[0]), i)


def count_items(nitems, bx, grid):
    """How many items are this CTA's: bx, bx + grid, ..."""
    return T.call_extern("int32", "count_items", nitems, bx, grid)


def shared_address(buffer):
    """Of the beginning of a buffer in shared memory."""
    return T.call_extern("int32", "shared_address", T.address_of(buffer[(0,) * len(buffer.shape)]))


class Ring(NamedTuple):
    """Stages in shared memory, their barriers, and of rows with a tail the arrays that hold it."""

    stages: Any
    full: Any
    empty: Any
    tails: Any = None


def new_ring(stages, *shape, dtype="bfloat16"):
    """A ring of tiles of this shape; the eight warps that compute release a stage."""
    return Ring(
        T.alloc_shared((stages, *shape), dtype), T.alloc_barrier([1] * stages), T.alloc_barrier([8] * stages)
    )  # fmt: skip


def place(parity):
    """Stage and parity of who goes along a ring: 0 where the stages are waited for, 1 where they are fed."""
    return T.alloc_var("int32", 0), T.alloc_var("int32", parity)


class Chunks:
    """A row of D columns in `count` chunks of `width`, lines of 128 bytes where D allows; `tail` more in the last.

    The tail of a row lies in an array of its own, on the barriers of the last chunk: of a ring of n stages
    `tails(n)` arrays are enough, since an array is free when the stage of the last chunk is.
    """

    def __init__(self, D, fp8):
        self.fp8, self.dtype = fp8, "float8_e4m3fn" if fp8 else "bfloat16"
        widths = (128, 64, 32) if fp8 else (64,) if D % 64 == 0 else (32,)
        self.width = next(width for width in widths if width <= D)
        self.count = D // self.width
        self.tail = D - self.count * self.width
        self.last = self.count - 1
        self.early = D == 576  # a chunk is handed back when its product is done, before those of the row are

    def tails(self, stages):
        """Arrays for the tails of a ring."""
        return -(-stages // self.count)

    def begun(self, c):
        """Products begun with chunk c that may be under way while the chunk before is handed back."""
        return 2 if self.tail and c == self.last else 1

    def slots(self, stages):
        """Arrays of scales of a ring's rows: the sum over a product lags it by one."""
        return -(-stages // self.count) + 2


@T.macro
def arrive(barrier, i, tx):
    """One arrival of the warp."""
    if tx % 32 == 0:
        T.mbarrier_arrive(barrier[i])


@T.macro
def release(barrier, i, tx):
    """One arrival of the warp, when all its lanes are here."""
    T.sync_warp()
    if tx % 32 == 0:
        T.mbarrier_arrive(barrier[i])


@T.macro
def release_read(barrier, i, tx):
    """`release` of what lanes have read by loads, which may still be under way: an arrival doesn't wait for them."""
    T.call_extern("handle", "fence_shared")
    release(barrier, i, tx)


@T.macro
def commit(stage):
    """The copies into a stage, (full, i), have been asked for: one arrival of the warp that feeds.

    A tuple, for a number by itself becomes a variable of the macro; TileLang joins the arrival with the bytes that the
    copies expect only where both name the barrier alike.
    """
    if T.shuffle_elect(32):
        T.barrier_arrive(stage[0][stage[1]])


@T.macro
def advance(stage: T.Ref, parity: T.Ref, count):
    """The next of `count` stages."""
    stage = stage + 1
    if stage == count:
        stage = 0
        parity = parity ^ 1


@T.macro
def turn(place: T.Ref, count):
    """The next of `count` places."""
    place = place + 1
    if place == count:
        place = 0


@T.macro
def wait_for_turn(tx):
    """Two warpgroups issue products in turns; `pass_turn` by the first before its first turn starts it."""
    T.sync_threads(8 + tx // 128, 256)


@T.macro
def pass_turn(tx):
    """To the other warpgroup."""
    T.named_barrier_arrive(9 - tx // 128, 256)


@T.macro
def begin_turns(tx):
    """The first turn is the first warpgroup's."""
    if tx >= 128:
        T.named_barrier_arrive(8, 256)


class RowTile:
    """A tile of R rows of queries: HG heads of one key head, R // HG tokens, in the order that needs fewer copies.

    HG > TOKENS: row = token · HG + head, one copy a token from [T·H, width]; otherwise row = head · TOKENS + token, one
    copy a head from [T, H·width]. `device/rows.cuh` has the same.
    """

    def __init__(self, HG, R):
        self.HG, self.TOKENS = HG, R // HG
        self.TOKEN_MAJOR = HG > self.TOKENS
        self.BOX, self.BOXES = (HG, self.TOKENS) if self.TOKEN_MAJOR else (self.TOKENS, HG)
        self.PADDED = self.TOKENS * HG < R  # rows that no copy reaches

    def place(self, t0, g, b, H):
        """Row and head of global memory at which box b begins."""
        return ((t0 + b) * H + g * self.HG, 0) if self.TOKEN_MAJOR else (t0, g * self.HG + b)

    def copies(self):
        """load(source, target, slot, full, width, t0, g, H): the tile of token t0 and key head g, into a slot."""
        BOX, BOXES, place = self.BOX, self.BOXES, self.place

        @T.macro
        def load(source, target, slot, full, width, t0, g, H):
            panel = min(width, 64)
            for b in list(range(BOXES)):
                for c in list(range(width // panel)):
                    T.tma_copy(
                        source[
                            place(t0, g, b, H)[0] : place(t0, g, b, H)[0] + BOX,
                            place(t0, g, b, H)[1] * width + c * panel : place(t0, g, b, H)[1] * width
                            + c * panel
                            + panel,
                        ],
                        target[slot, b * BOX : b * BOX + BOX, c * panel : c * panel + panel],
                        barrier=full[slot],
                    )

        return load
