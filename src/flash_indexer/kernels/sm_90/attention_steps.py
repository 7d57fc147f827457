"""What the warpgroups of `attention` do with a key tile, as macros; see there for the picture and the letters."""

from typing import Any, NamedTuple

import tilelang.language as T

from flash_indexer.kernels.device.items import ITEM_BYTES
from flash_indexer.kernels.sm_90.macros import pass_turn, release, wait_for_turn

# of a thread that computes: key tiles and items so far; which sums of a tile are too large (at_over: 1 l, 2 y)
KEY_TILES, ROW_TILES, OVER = range(3)
STATE = 3
QUERIES, KEYS, VALUES, INDEX_QUERIES, INDEX_KEYS = range(5)  # addresses in shared memory
UNSET = 1.0e30


class Widths(NamedTuple):
    """Static sizes of `attention.build`."""

    D: int
    V: int
    E: int
    HG: int
    BN: int
    QS: int


class Registers(NamedTuple):
    """Of a thread: logits S of attention and X of the indexer, P, O."""

    S: Any
    X: Any
    P: Any
    O: Any


class Tiles(NamedTuple):
    """In shared memory: stages of q, k, v, index_q, index_k."""

    Q: Any
    K: Any
    V: Any
    IQ: Any
    IK: Any


class Sums(NamedTuple):
    """Of the thread's rows: shifts m, n; weights w; sums l, y (y_tile: of a tile), c, d; factor alpha of O."""

    m: Any
    n: Any
    w: Any
    l: Any
    y: Any
    y_tile: Any
    c: Any
    d: Any
    alpha: Any


class Barriers(NamedTuple):
    """Of the row tiles, with the numbers of their rows; of key and value tiles."""

    qfull: Any
    qempty: Any
    kfull: Any
    kempty: Any
    vfull: Any
    vempty: Any


class Item(NamedTuple):
    """The item under way: its address in shared memory, the thread's row limits, where old sums are kept."""

    address: Any
    limits: Any
    backup: Any


class Tensors(NamedTuple):
    """Of global memory, for logits that are formed again; tokens, heads, scale."""

    Q: Any
    K: Any
    tokens: Any
    H: Any
    scale: Any


class Steps(NamedTuple):
    """The macros that the kernel itself uses."""

    begin: Any
    first: Any
    step: Any
    redo: Any
    values: Any
    values_ready: Any
    values_done: Any
    rescale: Any
    finish: Any


def steps(widths):
    """The macros for these sizes."""
    D, V, E, HG, BN, QS = widths
    ENTROPY = int(V == 0)

    # S = q k^T and X = index_q index_k^T of the present row tile and key tile
    @T.macro
    def logits(registers, at, v):
        T.call_extern(
            "handle", f"at_logits<{D}, {E}, {BN}, {QS}>", registers.S.access_ptr("rw"), registers.X.access_ptr("rw"),
            at[QUERIES], at[KEYS], at[INDEX_QUERIES], at[INDEX_KEYS], v[ROW_TILES], v[KEY_TILES],
        )  # fmt: skip

    # O += P v of the key tile before
    @T.macro
    def values(registers, at, v):
        if V:
            T.call_extern(
                "handle", f"at_values<{BN}, {V}>", registers.O.access_ptr("rw"), registers.P.access_ptr("rw"),
                at[VALUES], v[KEY_TILES] + 1,
            )  # fmt: skip

    @T.macro
    def pack(N, registers):
        if V:
            T.call_extern("handle", f"pack_operand<{N}>", registers.P.access_ptr("w"), registers.S.access_ptr("r"))

    @T.macro
    def rescale(registers, by):
        if V:
            T.call_extern("handle", f"at_scale<{V}>", registers.O.access_ptr("rw"), by.access_ptr("r"))

    @T.macro
    def values_ready(bars, v):
        if V:
            T.barrier_wait(bars.vfull[(v[KEY_TILES] + 1) % 2], (v[KEY_TILES] - 1) // 2 % 2)

    @T.macro
    def values_done(registers, bars, v, tx):
        if V:
            T.warpgroup_fence_operand(registers.O, num_regs=V // 2)
            release(bars.vempty, (v[KEY_TILES] + 1) % 2, tx)

    @T.macro
    def softmax(N, registers, sums, item, scale, ready):
        T.call_extern(
            "handle", f"at_softmax<{N}, {E}, {ENTROPY}, {ready}>", registers.S.access_ptr("rw"),
            registers.X.access_ptr("rw"), sums.m.access_ptr("r"), sums.n.access_ptr("r"), sums.w.access_ptr("r"),
            sums.l.access_ptr("rw"), sums.y_tile.access_ptr("w"), sums.c.access_ptr("rw"), sums.d.access_ptr("rw"),
            item.backup, scale,
        )  # fmt: skip

    @T.macro
    def mask(N, registers, sums, item, i, scale):
        T.call_extern(
            "handle", f"at_mask<{N}>", registers.S.access_ptr("rw"), sums.m.access_ptr("rw"),
            item.limits.access_ptr("r"), item.address, i, scale,
        )  # fmt: skip

    @T.macro
    def mask_index(N, registers, sums, item, i):
        T.call_extern(
            "handle", f"at_mask_index<{N}>", registers.X.access_ptr("rw"), sums.n.access_ptr("rw"),
            sums.w.access_ptr("r"), item.limits.access_ptr("r"), item.address, i,
        )  # fmt: skip

    # P of tile 0, of which no row sees more than the first N keys
    @T.macro
    def first(N, registers, sums, item, scale):
        mask(N, registers, sums, item, 0, scale)
        if E:
            mask_index(N, registers, sums, item, 0)
        softmax(N, registers, sums, item, scale, "true")
        if E:
            T.call_extern("handle", "at_total", sums.y.access_ptr("rw"), sums.y_tile.access_ptr("r"))
        pack(N, registers)
        if V:
            for j in list(range(N // 4, BN // 4)):
                registers.P[j] = T.cast(0, "uint32")

    @T.macro
    def raise_index(registers, sums):
        T.call_extern(
            "handle", f"at_raise_index<{BN}>", registers.X.access_ptr("rw"), sums.n.access_ptr("rw"),
            sums.l.access_ptr("r"), sums.y.access_ptr("rw"), sums.c.access_ptr("rw"), sums.y_tile.access_ptr("rw"),
        )  # fmt: skip

    # P of the i-th tile that is not masked, with shifts that suit it
    @T.macro
    def redo(registers, sums, item, tensors, i):
        T.call_extern(
            "handle", f"at_redo<{BN}, {D}, {V}, {HG}, {E}, {ENTROPY}>", registers.S.access_ptr("rw"),
            registers.X.access_ptr("r"), registers.O.access_ptr("rw"), sums.m.access_ptr("rw"),
            sums.l.access_ptr("rw"), sums.c.access_ptr("rw"), sums.d.access_ptr("rw"), sums.alpha.access_ptr("w"),
            item.backup, tensors.scale, item.address, i, T.address_of(tensors.Q[0, 0]), T.address_of(tensors.K[0, 0]),
            tensors.tokens, tensors.H,
        )  # fmt: skip
        pack(BN, registers)

    # O += P v of the tile before; then P of tile i of the masked ones, or of the others
    @T.macro
    def step(registers, at, bars, v, sums, item, tensors, i, masked, tx):
        S, X = registers.S, registers.X
        T.barrier_wait(bars.kfull[v[KEY_TILES] % 2], v[KEY_TILES] // 2 % 2)
        wait_for_turn(tx)
        logits(registers, at, v)
        if not E and not masked:
            v[OVER] = T.call_extern(
                "int32", f"at_over<{E}>", sums.l.access_ptr("r"), sums.y_tile.access_ptr("r")
            )  # fmt: skip
            if v[OVER] != 0:  # for this warp alone: it can't issue the warpgroup's products again
                T.wait_wgmma(0)
                T.warpgroup_fence_operand(S, num_regs=BN // 2)
                redo(registers, sums, item, tensors, i - 1)
                T.call_extern(
                    "handle", f"at_again<{BN}, {D}, {HG}>", S.access_ptr("w"), item.address, i,
                    T.address_of(tensors.Q[0, 0]), T.address_of(tensors.K[0, 0]), tensors.tokens, tensors.H,
                )  # fmt: skip
        values_ready(bars, v)
        values(registers, at, v)
        pass_turn(tx)
        T.wait_wgmma((1 if E else 0) + (1 if V else 0))
        T.warpgroup_fence_operand(S, num_regs=BN // 2)
        if masked:
            T.call_extern("handle", "at_limits", item.limits.access_ptr("w"), item.address + ITEM_BYTES)
            mask(BN, registers, sums, item, i, tensors.scale)
            T.call_extern(
                "handle", f"at_raise<{BN}, {E}, {ENTROPY}>", S.access_ptr("r"), sums.m.access_ptr("rw"),
                sums.l.access_ptr("rw"), sums.c.access_ptr("rw"), sums.d.access_ptr("rw"), sums.alpha.access_ptr("w"),
                tensors.scale,
            )  # fmt: skip
        if E:
            T.wait_wgmma(1 if V else 0)
            T.warpgroup_fence_operand(X, num_regs=BN // 2)
        release(bars.kempty, v[KEY_TILES] % 2, tx)
        if masked and E:
            mask_index(BN, registers, sums, item, i)
        softmax(BN, registers, sums, item, tensors.scale, "true" if masked else "false")
        if V:
            T.wait_wgmma(0)
        values_done(registers, bars, v, tx)
        v[KEY_TILES] = v[KEY_TILES] + 1
        if masked:
            rescale(registers, sums.alpha)
        pack(BN, registers)
        if E:
            v[OVER] = T.call_extern("int32", f"at_over<{E}>", sums.l.access_ptr("r"), sums.y_tile.access_ptr("r"))
            if v[OVER] != 0:
                if not masked:
                    if v[OVER] % 2 == 1:
                        redo(registers, sums, item, tensors, i)
                if v[OVER] >= 2:
                    raise_index(registers, sums)
            T.call_extern("handle", "at_total", sums.y.access_ptr("rw"), sums.y_tile.access_ptr("r"))

    # S and X of tile 0 of the next item, or of what lies there after the last one
    @T.macro
    def begin(registers, at, bars, v, more):
        if more:
            T.barrier_wait(bars.qfull[v[ROW_TILES] % QS], v[ROW_TILES] // QS % 2)
            T.barrier_wait(bars.kfull[v[KEY_TILES] % 2], v[KEY_TILES] // 2 % 2)
        logits(registers, at, v)

    @T.macro
    def finish(sums, item, tensors, LSE, LSX, KL, ENT):
        T.call_extern(
            "handle", f"at_finish<{HG}, {E}, {ENTROPY}>", sums.alpha.access_ptr("w"), item.address,
            sums.m.access_ptr("r"), sums.n.access_ptr("r"), sums.l.access_ptr("r"), sums.y.access_ptr("r"),
            sums.c.access_ptr("r"), sums.d.access_ptr("r"), T.address_of(LSE[0]), T.address_of(LSX[0]),
            T.address_of(KL[0]), T.address_of(ENT[0]), tensors.tokens, tensors.H,
        )  # fmt: skip

    return Steps(begin, first, step, redo, values, values_ready, values_done, rescale, finish)
