"""A step of attention of the 576/512 form, with half of the output in either warpgroup: what its kernels share.

`attention_mla` tells the schedule. A kernel says how it waits for a panel of a key tile and how far apart its tiles'
first keys are; `attention_mla.cuh` has the device functions.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from flash_indexer.kernels.sm_90.macros import FULL_ROW, release, shared_address
from flash_indexer.kernels.sm_90.sizes import MLA_WIDTHS

D, V = MLA_WIDTHS
ROWS, KEYS = 64, 64  # of an item, of a key tile
PANELS = D // 64
TILE_BYTES, PANEL_BYTES = KEYS * D * 2, KEYS * 64 * 2

# numbers of a thread: parities of K's full barriers, of the other warpgroup's P, of Q; whether O is to be scaled; first
# key of the tile; an opaque ~0; the keys that all rows see
K_PARITY, P_PARITY, Q_PARITY, RESCALE, FIRST_KEY, ONES, LOW, HIGH = range(8)
# addresses in shared memory: own reference m and the other warpgroup's, own P, row sums of both
OWN_M, OTHER_M, OWN_P, OWN_SUMS, OTHER_SUMS = range(5)
OLD_FACTOR, NEW_FACTOR = 4, 5  # of O's two rows, among the numbers f (attention_mla.cuh)


class Barriers(NamedTuple):
    """Of the queries; of panels of key tiles, handed back in halves (slot · 2 + half); of P of either warpgroup."""

    qfull: Any
    qempty: Any
    kfull: Any
    kempty: Any
    pready: Any


class State(NamedTuple):
    """Of a thread: numbers v, an opaque zero, bounds of its two rows, addresses, numbers f of its rows, the scale."""

    v: Any
    zero: Any
    bounds: Any
    at: Any
    f: Any
    scale: Any


class Tiles(NamedTuple):
    """arrived(bars, wg, panel, parity): a macro that waits for a panel of the warpgroup's tile.

    stride: from the first key of a warpgroup's tile to that of its next.
    early: of 9 panels of S come before the product with the other warpgroup's P.
    """

    arrived: Any
    stride: int
    early: int


def panel_order(wg):
    """Of S = q k^T: the half that the warpgroup's own output needs is refilled last, hence read first."""
    return [4 * wg + i for i in range(4)] + [4 * (1 - wg) + i for i in range(4)] + [8]


@T.macro
def begin(wg, Ks, Ms, state, scale, H):
    """The numbers of a thread before its first item."""
    v, a = state.v, state.at
    for j in list(range(8)):
        v[j] = 0
    v[ONES] = T.if_then_else(H > 0, -1, 0)
    state.scale[0] = scale
    a[OWN_M] = T.call_extern("int32", "shared_address", T.address_of(Ms[wg * 64]))
    a[OTHER_M] = T.call_extern("int32", "shared_address", T.address_of(Ms[(1 - wg) * 64]))
    a[OWN_P] = shared_address(Ks) + wg * TILE_BYTES + (PANELS - 1) * PANEL_BYTES
    a[OWN_SUMS] = T.call_extern("int32", "shared_address", T.address_of(Ms[(2 + wg) * 64]))
    a[OTHER_SUMS] = T.call_extern("int32", "shared_address", T.address_of(Ms[(3 - wg) * 64]))


@T.macro
def qk(wg, Ks, S, state, bars, panels, first, arrived):
    """S (+)= q k^T of the warpgroup's tile, for some panels of 64 columns."""
    v, z = state.v, state.zero
    for i in panels:
        arrived(bars, wg, i, v[K_PARITY])
        T.wgmma_gemm(
            Ks[2 + z[0], :, i * 64 : i * 64 + 64],
            Ks[wg + z[0], :, i * 64 : i * 64 + 64],
            S,
            transpose_B=True,
            clear_accum=(i == first),
            policy=FULL_ROW,
        )


@T.macro
def other(wg, Ks, O, state, bars):
    """O += P v of the other warpgroup's tile."""
    v, z = state.v, state.zero
    T.barrier_wait(bars.pready[1 - wg], v[P_PARITY])
    v[P_PARITY] = v[P_PARITY] ^ 1
    T.call_extern("handle", "mla_adopt", O.access_ptr("rw"), state.f.access_ptr("rw"), state.at[OTHER_M])
    T.wgmma_gemm(
        Ks[1 - wg + z[0], :, 512:576],
        Ks[1 - wg + z[0], :, wg * 256 : wg * 256 + 256],
        O,
        policy=FULL_ROW,
    )


@T.macro
def softmax(wg, S, x, state, bars, tx):
    """P of the warpgroup's tile."""
    v, at = state.v, state.at
    T.warpgroup_fence_operand(S, num_regs=32)
    if v[FIRST_KEY] < v[LOW] or v[FIRST_KEY] + 64 > v[HIGH]:
        T.call_extern("handle", "mla_mask", S.access_ptr("rw"), state.bounds.access_ptr("r"), v[FIRST_KEY])
    v[RESCALE] = T.call_extern(
        "int32", "mla_softmax", S.access_ptr("r"), x.access_ptr("w"), state.f.access_ptr("rw"), state.scale[0],
        at[OWN_M], at[OWN_P],
    )  # fmt: skip
    T.mbarrier_arrive(bars.pready[wg])  # by every thread: each has written and read references, and racecheck follows


@T.macro
def own(wg, Ks, O, P, x, state):
    """O += P v of the warpgroup's tile."""
    v, z, f = state.v, state.zero, state.f
    T.call_extern("handle", "define_operand<16>", P.access_ptr("w"), x.access_ptr("r"), v[ONES])
    if v[RESCALE] != 0:
        T.call_extern("handle", "scale_rows<256>", O.access_ptr("rw"), f[OLD_FACTOR], f[NEW_FACTOR])
    T.wgmma_gemm(P, Ks[wg + z[0], :, wg * 256 : wg * 256 + 256], O, policy=FULL_ROW)


@T.macro
def step(wg, last, prev, Ks, registers, state, bars, tx, tiles):
    """A tile of the warpgroup, and the product with the other's P where there is one before (`prev`)."""
    S, P, O, x = registers
    v = state.v
    order = panel_order(wg)
    state.zero[0] = T.call_extern("int32", "mla_zero")
    if prev:
        qk(wg, Ks, S, state, bars, order[: tiles.early], order[0], tiles.arrived)
        other(wg, Ks, O, state, bars)
        qk(wg, Ks, S, state, bars, order[tiles.early :], order[0], tiles.arrived)
        T.wait_wgmma(PANELS - tiles.early)
        T.warpgroup_fence_operand(O, num_regs=128)
        release(bars.kempty, 2 * (1 - wg) + wg, tx)
        T.wait_wgmma(0)
    else:
        qk(wg, Ks, S, state, bars, order, order[0], tiles.arrived)
        T.wait_wgmma(0)
    v[K_PARITY] = v[K_PARITY] ^ 1
    if last:
        release(bars.qempty, 0, tx)
    softmax(wg, S, x, state, bars, tx)
    own(wg, Ks, O, P, x, state)
    v[FIRST_KEY] = v[FIRST_KEY] + tiles.stride
    T.wait_wgmma(0)
    T.warpgroup_fence_operand(O, num_regs=128)
    release(bars.kempty, 2 * wg + wg, tx)


@T.macro
def sweep(wg, n, Ks, registers, state, bars, tx, tiles):
    """The tiles of one item, 2n of them, and the sums of both warpgroups."""
    O = registers[2]
    if wg == 0:
        step(wg, n == 1, False, Ks, registers, state, bars, tx, tiles)
        for i in T.serial(n - 1):
            step(wg, i == n - 2, True, Ks, registers, state, bars, tx, tiles)
        other(wg, Ks, O, state, bars)
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(O, num_regs=128)
        release(bars.kempty, 2 * (1 - wg) + wg, tx)
    else:
        for i in T.serial(n):
            step(wg, i == n - 1, True, Ks, registers, state, bars, tx, tiles)
    T.call_extern("handle", "mla_sums", state.f.access_ptr("rw"), state.at[OWN_SUMS])
    T.sync_threads(8, 256)
