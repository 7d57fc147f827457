"""Scores summed over heads, as `score` forms them, of heads of up to 128 columns: by three warpgroups.

    OUT[t, s] = sum_h f(Q[t, h] · K[s, h // HG]; L[t, h])        f of the mode, see `score.build`

One CTA takes 64 tokens and up to three neighbouring tiles of 128 keys after the other, a warpgroup for each tile:

    warps 0-3, 4-7, 8-11   the sum A [64, 128] and one accumulator of logits S [64, 128] in registers
    warp 12                feeds the ring of Q by TMA, a stage for each head, which all three read
    warp 13                feeds the ring of K, a stage for each warpgroup and group of heads
    warps 14, 15           idle (registers are given to those that compute)

    tensor cores     | S of 0      | S of 1      | S of 2      | S of 0      | ...       of each warpgroup the
    everything else  | A += f of 2 | A += f of 0 | A += f of 1 | A += f of 2 | ...       next head

While one warpgroup multiplies, two are at their sums: nothing within a warpgroup needs to overlap.

A barrier shows the parity of its phase alone: a warp may neither lag nor lead by two phases. So all warps hand stages
of Q back, those without a tile too; and that its keys are there a warpgroup learns from barriers of its own, as many as
K has stages, for it may be without a tile while the others go through the ring.

A tile of heads of 64 columns or more is stored by the copy engine, from the stage in which its last keys lay: a warp
writes its 16 rows there once its warpgroup has done with the keys, and hands the stage back when they have been read.

Of e4m3 rows (`build_fp8`, the indexer's) each row of Q and K has a scale. The query's is in L; those of 128 keys lie in
an array beside their stage of K, come and go with it, and multiply the sum over heads. Products are half as long, and
what lies between them counts: a stage holds two heads, the next one is waited for before the last sum of this one, and
max(x, 0) is half of x + |x|, an instruction at twice the rate of a maximum.

With `left` a tile leaves what the kernel that follows would have to form again (`kl_gradients`): sums of its rows over
the keys that a token sees, and of the indexer which logits are positive. The product is then -Q K^T, for which that is
the sign: zero has none. Words of masks of two heads are kept and written together, so that a quad fills 32 bytes, and a
stage holds these two heads here too: what lies between the sums counts as much as they do.
"""

import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from flash_indexer.kernels.device.items import SHORT_ITEM, NarrowItem
from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.macros import (
    LOG2E,
    PASS_CONFIGS,
    Ring,
    advance,
    arrive,
    count_items,
    number,
    release_read,
    shared_address,
    turn,
)
from flash_indexer.kernels.sm_90.score_narrow_feed import WARPGROUPS, Rings
from flash_indexer.kernels.sm_90.sizes import EXP, MASK_WORDS, NARROW_FP8, NARROW_STAGES, RELU, SUM

__all__ = ["PASS_CONFIGS", "build", "build_fp8"]
SOURCE = source(__file__)
REGISTERS = (160, 32)  # of a thread of the warps that compute, of the others

# of a thread that computes: stage of Q and its parity; stage of K; which barrier tells that it is full, and where its
# parity is 1 their number more
Q_STAGE, Q_PARITY, K_STAGE, K_FULL = range(4)
# of its item: numbers, and rows of L of the thread's two
TOKEN, TILES, TILE, FIRST, SECOND = range(5)
NEXT = 2  # of L's registers, the next head's
# where in shared memory Q and K begin, and the stages at hand, in units of 16 bytes; the scale of the thread's first
# key, and barriers of stages of Q, in bytes
Q_ROWS, K_ROWS, QUERIES, KEYS, SCALES, Q_FULL, Q_EMPTY = range(7)


def build(D, mode, left=0):
    """The kernel for head width D (64, 128; the indexer's 32) and a mode of `score`: EXP, RELU or SUM.

    Run-time arguments: Q [T, H·D] and K [S, G·D] bfloat16, L [T·H] float32, OUT [tiles·128, 128] float32, ITEMS int32
    (`items.NarrowItem`): CTA c of `grid` takes items c, c + grid, ...; whole tiles are written, unmasked.
    Row 0 of Q and L is token qbase.

    left: 1 takes, before ITEMS, the intervals KS and KE [T] int32, and writes of each row of OUT, over the keys seen:

        EXP   TSUM [tiles·128] float32        sum of the scores, 0 where no key is seen
        RELU  TOPS [tiles·128, 2] float32     maximum m (NaN where a score is, -inf where no key is seen) and sum of
                                              exp(score - m)
              MASKS [tiles·8·IP, 64] int32    bits [Q[t,h] · K[s] > 0] of all keys and of heads padded to IP, the last
                                              argument; those of padded heads are not written

    Word (R / 2)·8 + 2q + c of a tile's masks, R = t·IP + h even, holds the keys 8g + 2q + c of the tile, g < 16, c < 2,
    of rows R and R + 1: as bits 8·(g % 2) + 7 - g / 2 of its lower and of its upper half (`device/mask_words.cuh`).
    """
    stages = NARROW_STAGES[D]
    return _build(D, mode, (stages[0] // 2, stages[1]) if left and mode == RELU else stages, fp8=False, leaves=left)


def build_fp8(E):
    """The kernel for one key head and rows of E (32, 64, 128) in e4m3: f = KS[s]·L[t,h]·(x + |x|).

    Run-time arguments: as above, with Q and K float8_e4m3fn, L half of the weights times the scales of Q's rows, and
    before OUT: KS float32, the scales of K's, whole tiles of 128; without HG and scale.
    """
    return _build(E, RELU, NARROW_FP8[E], fp8=True)


def _build(D, mode, stages, fp8, leaves=0):
    """stages: of the Q and K rings."""
    MASKS, SIGN = leaves and mode == RELU, -1 if leaves and mode == RELU else 1
    QST, KST = stages
    FP8, dtype, PANEL, BYTES = fp8, *(("float8_e4m3fn", D, 1) if fp8 else ("bfloat16", min(D, 64), 2))
    HEADS = 2 if fp8 or MASKS else 1  # of a stage of Q; zeros where there is none left
    BY_KEYS = not fp8 and D >= 64  # a tile is stored by way of its stage of keys, which holds half of it at least
    IN_TURNS = mode == EXP and D > 64  # exponentials and additions; heads of 64 take longer with it
    rings = Rings(D, PANEL, HEADS, QST, KST, FP8)
    feed_queries, feed_keys = rings.feed_queries(), rings.feed_keys()
    Q_SIZE, K_SIZE = 64 * D * BYTES // 16, 128 * D * BYTES // 16  # of a head, in units of 16 bytes
    tq, hd, tk, gd = T.dynamic("tq"), T.dynamic("hd"), T.dynamic("tk"), T.dynamic("gd")
    nl, nr, ni, nk = T.dynamic("nl"), T.dynamic("nr"), T.dynamic("ni"), T.dynamic("nk")
    nt, ns, nm = T.dynamic("nt"), T.dynamic("ns"), T.dynamic("nm")

    def beginning(tensor):
        return T.address_of(tensor[(0,) * len(tensor.shape)])

    def stages_of(heads):
        return (heads + 1) // 2 if HEADS == 2 else heads

    @T.macro
    def await_queries(v, at):
        T.call_extern("handle", "barrier_wait", at[Q_FULL] + 8 * v[Q_STAGE], v[Q_PARITY])

    @T.macro
    def next_stage(v, at, tx):
        if tx % 32 == 0:
            T.call_extern("handle", "barrier_arrive", at[Q_EMPTY] + 8 * v[Q_STAGE])
        advance(v[Q_STAGE], v[Q_PARITY], QST)

    # L of the thread's two rows
    @T.macro
    def load_low(L, low, at, first, second, head):
        if mode != SUM:
            low[at] = T.call_extern("float32", "load_float", T.address_of(L[0]), first + head)
            low[at + 1] = T.call_extern("float32", "load_float", T.address_of(L[0]), second + head)

    @T.macro
    def multiply(S, queries, keys):
        if FP8:
            T.call_extern("handle", f"sc_product<{D}, 0, 0>", S.access_ptr("rw"), queries, keys, 0, 0)
        else:
            T.call_extern("handle", f"nr_product<{D}, {SIGN}>", S.access_ptr("rw"), queries, keys)

    # S = Q[t, h] @ K[s, h // HG].T; A += f(S), of a head of the stage. L of the next head is asked for meanwhile
    @T.macro
    def step(v, registers, at, rows, head, H, scale, tx, place):
        S, A, low, bits = registers
        L, first, second = rows
        if HEADS == 1:
            await_queries(v, at)
        if place == 0:
            at[QUERIES] = T.call_extern("int32", "wg_uniform", at[Q_ROWS] + v[Q_STAGE] * (HEADS * Q_SIZE))
        multiply(S, at[QUERIES] + place * Q_SIZE, at[KEYS])
        load_low(L, low, NEXT, first, second, T.min(head + 1, H - 1))
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(S, num_regs=64)
        if place == HEADS - 1:
            next_stage(v, at, tx)
            if HEADS == 2:
                if head + 1 < H:
                    await_queries(v, at)
        if FP8:
            T.call_extern("handle", "nr_add_twice", S.access_ptr("r"), A.access_ptr("rw"), low.access_ptr("r"))
        elif MASKS:
            T.call_extern(
                "handle", "nr_add_masks", S.access_ptr("r"), A.access_ptr("rw"), low.access_ptr("r"),
                bits[place].access_ptr("w"),
            )  # fmt: skip
        elif IN_TURNS:
            T.call_extern(
                "handle", "nr_add_exponentials", S.access_ptr("rw"), A.access_ptr("rw"), low.access_ptr("r"), scale,
                at[Q_FULL],
            )  # fmt: skip
        else:
            T.call_extern(
                "handle", f"sc_add<{mode}, 0, 16>", S.access_ptr("r"), A.access_ptr("rw"), low.access_ptr("r"), scale
            )
        low[0] = low[NEXT]
        low[1] = low[NEXT + 1]

    # numbers of an item, the last one's beyond the end
    @T.macro
    def take(ITEMS, w, item, nitems):
        for n, field in [(TOKEN, NarrowItem.TOKEN), (TILES, NarrowItem.TILES), (TILE, NarrowItem.TILE)]:
            w[n] = number(ITEMS, T.min(item, nitems - 1) * SHORT_ITEM + field)

    # rows of Q and L that are the thread's first two, and L of their first head
    @T.macro
    def begin_rows(L, low, w, H, qbase):
        w[FIRST] = T.call_extern("int32", "nr_row", w[TOKEN] - qbase, tq - 1) * H
        w[SECOND] = T.call_extern("int32", "nr_row", w[TOKEN] - qbase + 8, tq - 1) * H
        load_low(L, low, 0, w[FIRST], w[SECOND], 0)

    # OUT[t] = A[t], and what is left of the tile, a row of the thread after the other: what is left of one is formed
    # while its scores are copied. What the next item begins with is asked for meanwhile
    @T.macro
    def store(A, tensors, left, low, w, item, sizes, at, made, tx):
        L, OUT, ITEMS = tensors
        H, _, _, qbase, nitems, grid = sizes
        limits = T.alloc_local((4,), "int32")
        row = T.alloc_var("int32")
        key = T.alloc_var("int32")
        if MASKS:  # registers are short: read again
            w[TILE] = number(ITEMS, item * SHORT_ITEM + NarrowItem.TILE)
            w[TOKEN] = number(ITEMS, item * SHORT_ITEM + NarrowItem.TOKEN)
        row = T.call_extern("int32", "nr_out", w[TILE] + tx // 128, w[TOKEN])
        if leaves:
            key = number(ITEMS, item * SHORT_ITEM + NarrowItem.KEY) + tx // 128 * 128
            T.call_extern(
                "handle", "nr_limits", limits.access_ptr("w"), T.address_of(left[0][0]), T.address_of(left[1][0]),
                w[TOKEN], qbase + tq - 1,
            )  # fmt: skip
        take(ITEMS, w, item + grid, nitems)
        made[0] = 0.0
        if BY_KEYS:
            T.sync_threads(10 + tx // 128, 128)
        else:
            T.call_extern(
                "handle", f"sc_store_rows<{int(not leaves)}>", A.access_ptr("rw"), T.address_of(OUT[0, 0]), row
            )
        for h in (0, 1):
            if BY_KEYS:
                T.call_extern(
                    "handle", f"nr_store<{64 * D}, {h}>", A.access_ptr("r"), T.address_of(OUT[0, 0]), row,
                    at[KEYS] * 16, made[0],
                )  # fmt: skip
            if h == 0:
                begin_rows(L, low, w, H, qbase)
            if leaves:
                made[0] = T.call_extern(
                    "float32", f"nr_leave<{mode}, {h}>", A.access_ptr("rw"), beginning(left[2]), limits.access_ptr("r"),
                    row, key,
                )  # fmt: skip
        if BY_KEYS and not leaves:
            for i in T.unroll(64):
                A[i] = 0.0

    @T.macro
    def await_keys(k, v, tx):
        T.barrier_wait(
            k.full[tx // 128 * KST + v[K_FULL] - T.if_then_else(v[K_FULL] >= KST, KST, 0)],
            T.if_then_else(v[K_FULL] >= KST, 1, 0),
        )
        turn(v[K_FULL], 2 * KST)

    @T.macro
    def begin_group(k, v, at, tx):
        await_keys(k, v, tx)
        at[KEYS] = T.call_extern("int32", "wg_uniform", at[K_ROWS] + v[K_STAGE] * K_SIZE)

    @T.macro
    def next_group(v, tiles):
        v[K_STAGE] = v[K_STAGE] + tiles
        if v[K_STAGE] >= KST:
            v[K_STAGE] = v[K_STAGE] - KST

    # the stage of K goes back, when its scales have been read
    @T.macro
    def end_group(k, v, A, at, tiles, tx):
        if FP8:
            T.call_extern("handle", "sc_scale", A.access_ptr("rw"), at[SCALES] + v[K_STAGE] * 512)
            release_read(k.empty, v[K_STAGE], tx)
        else:
            arrive(k.empty, v[K_STAGE], tx)
        next_group(v, tiles)

    @T.macro
    def compute(bx, q, k, arrays, tensors, left, sizes, tx):
        Qs, Ks, Ss = arrays
        L, _, ITEMS = tensors
        H, HG, scale, qbase, nitems, grid = sizes
        S = T.alloc_local((64,), "float32")
        A = T.alloc_local((64,), "float32")
        low = T.alloc_local((4,), "float32")
        bits = (T.alloc_local((2,), "uint32"), T.alloc_local((2,), "uint32")) if MASKS else None  # of a stage's heads
        registers = S, A, low, bits
        v = T.alloc_local((4,), "int32")
        at = T.alloc_local((7,), "int32")
        factor = T.alloc_var("float32")
        count = T.alloc_var("int32")
        w = T.alloc_local((5,), "int32")
        tiles = T.alloc_var("int32")
        head = T.alloc_var("int32")
        masks = T.alloc_var("int64")
        made = T.alloc_local((1,), "float32")  # what the work beside the copies of a tile ends with
        v[Q_STAGE] = 0
        v[Q_PARITY] = 0
        v[K_STAGE] = tx // 128
        v[K_FULL] = 0
        if IN_TURNS:  # in a uniform register it costs 3% there, and elsewhere it saves 1%
            at[Q_ROWS] = shared_address(Qs) // 16
        else:
            at[Q_ROWS] = T.call_extern("int32", "wg_uniform", shared_address(Qs) // 16)
        at[K_ROWS] = shared_address(Ks) // 16
        at[Q_FULL] = T.call_extern("int32", "opaque", shared_address(q.full))
        at[Q_EMPTY] = T.call_extern("int32", "opaque", shared_address(q.empty))
        if FP8:
            at[SCALES] = shared_address(Ss) + (tx % 4) * 8
        factor = scale * (LOG2E if mode == EXP else 1.0)
        for i in T.unroll(64):
            A[i] = 0.0
        count = count_items(nitems, bx, grid)
        # for tokens, tiles in items: OUT = f(Q[tokens] @ K[tile].T).sum(0)
        take(ITEMS, w, bx, nitems)
        begin_rows(L, low, w, H, qbase)
        for it in T.serial(count):
            tiles = w[TILES]
            if tx // 128 < tiles:
                if MASKS:
                    masks = T.call_extern(
                        "int64", "nr_masks", beginning(left[3]), w[TILE] + tx // 128, w[TOKEN], left[4]
                    )
                if HEADS == 2:  # and one group
                    await_queries(v, at)
                    begin_group(k, v, at, tx)
                    for pair in T.serial((H + 1) // 2):
                        for n in (0, 1):
                            step(v, registers, at, (L, w[FIRST], w[SECOND]), 2 * pair + n, H, factor, tx, n)
                        if MASKS:
                            T.call_extern(
                                "handle", "nr_store_masks", bits[0].access_ptr("r"), bits[1].access_ptr("r"), masks,
                                left[4],
                            )  # fmt: skip
                            masks = masks + 32
                    if not BY_KEYS:
                        end_group(k, v, A, at, tiles, tx)
                else:
                    head = 0
                    for group in T.serial(H // HG):
                        begin_group(k, v, at, tx)
                        for _ in T.serial(HG):
                            step(v, registers, at, (L, w[FIRST], w[SECOND]), head, H, factor, tx, 0)
                            head = head + 1
                        if not BY_KEYS or group < H // HG - 1:
                            end_group(k, v, A, at, tiles, tx)
                store(A, tensors, left, low, w, bx + it * grid, sizes, at, made, tx)
                if BY_KEYS:
                    T.call_extern("handle", "nr_stored", made[0])
                    end_group(k, v, A, at, tiles, tx)
            else:
                for _ in T.serial(stages_of(H)):
                    await_queries(v, at)
                    next_stage(v, at, tx)
                for _ in T.serial(H // HG):
                    next_group(v, tiles)
                take(ITEMS, w, bx + (it + 1) * grid, nitems)
                begin_rows(L, low, w, H, qbase)

    @T.macro
    def body(bx, operands, scales, tensors, left, sizes):
        Q, K = operands
        ITEMS = tensors[2]
        H, HG, _, qbase, nitems, grid = sizes
        T.import_source(SOURCE)
        Qs = T.alloc_shared((QST * HEADS, 64, D), dtype)
        Ks = T.alloc_shared((KST, 128, D), dtype)
        Ss = T.alloc_shared((KST * 128,), "float32") if FP8 else None
        T.annotate_layout({x: make_swizzled_layout(x) for x in (Qs, Ks)})
        fullq = T.alloc_barrier([1] * QST)
        emptyq = T.alloc_barrier([4 * WARPGROUPS] * QST)
        fullk = T.alloc_barrier([1] * (WARPGROUPS * KST))
        emptyk = T.alloc_barrier([4] * KST)
        q, k = Ring(Qs, fullq, emptyq), Ring(Ks, fullk, emptyk)
        tx = T.get_thread_binding()
        if tx < 384:
            T.set_max_nreg(REGISTERS[0], 1)
            compute(bx, q, k, (Qs, Ks, Ss), tensors, left, sizes, tx)
        else:
            T.set_max_nreg(REGISTERS[1], 0)
            if tx < 416:
                feed_queries(bx, Q, q, ITEMS, H, qbase, nitems, grid)
            else:
                if tx < 448:
                    feed_keys(bx, (K, scales), k, Ss, ITEMS, H // HG, nitems, grid)

    if FP8:

        @T.prim_func
        def flash_indexer_score_narrow_fp8(
            Q: T.Tensor((tq, hd), dtype), K: T.Tensor((tk, gd), dtype), L: T.Tensor((nl,), "float32"),
            KS: T.Tensor((nk,), "float32"), OUT: T.Tensor((nr, 128), "float32"), ITEMS: T.Tensor((ni,), "int32"),
            H: T.int32, qbase: T.int32, nitems: T.int32, grid: T.int32,
        ):  # fmt: skip
            with T.Kernel(grid, threads=512) as bx:
                body(bx, (Q, K), KS, (L, OUT, ITEMS), None, (H, H, 1.0, qbase, nitems, grid))

        return flash_indexer_score_narrow_fp8

    if MASKS:

        @T.prim_func
        def flash_indexer_score_narrow_masks(
            Q: T.Tensor((tq, hd), dtype), K: T.Tensor((tk, gd), dtype), L: T.Tensor((nl,), "float32"),
            OUT: T.Tensor((nr, 128), "float32"), KS: T.Tensor((nt,), "int32"), KE: T.Tensor((nt,), "int32"),
            TOPS: T.Tensor((ns, 2), "float32"), MASKS: T.Tensor((nm, MASK_WORDS), "int32"),
            ITEMS: T.Tensor((ni,), "int32"), H: T.int32, HG: T.int32, scale: T.float32, qbase: T.int32,
            nitems: T.int32, grid: T.int32, IP: T.int32,
        ):  # fmt: skip
            with T.Kernel(grid, threads=512) as bx:
                left = KS, KE, TOPS, MASKS, IP
                body(bx, (Q, K), None, (L, OUT, ITEMS), left, (H, HG, scale, qbase, nitems, grid))

        return flash_indexer_score_narrow_masks

    if leaves:

        @T.prim_func
        def flash_indexer_score_narrow_sums(
            Q: T.Tensor((tq, hd), dtype), K: T.Tensor((tk, gd), dtype), L: T.Tensor((nl,), "float32"),
            OUT: T.Tensor((nr, 128), "float32"), KS: T.Tensor((nt,), "int32"), KE: T.Tensor((nt,), "int32"),
            TSUM: T.Tensor((ns,), "float32"), ITEMS: T.Tensor((ni,), "int32"),
            H: T.int32, HG: T.int32, scale: T.float32, qbase: T.int32, nitems: T.int32, grid: T.int32,
        ):  # fmt: skip
            with T.Kernel(grid, threads=512) as bx:
                body(bx, (Q, K), None, (L, OUT, ITEMS), (KS, KE, TSUM), (H, HG, scale, qbase, nitems, grid))

        return flash_indexer_score_narrow_sums

    @T.prim_func
    def flash_indexer_score_narrow(
        Q: T.Tensor((tq, hd), dtype), K: T.Tensor((tk, gd), dtype), L: T.Tensor((nl,), "float32"),
        OUT: T.Tensor((nr, 128), "float32"), ITEMS: T.Tensor((ni,), "int32"),
        H: T.int32, HG: T.int32, scale: T.float32, qbase: T.int32, nitems: T.int32, grid: T.int32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=512) as bx:
            body(bx, (Q, K), None, (L, OUT, ITEMS), None, (H, HG, scale, qbase, nitems, grid))

    return flash_indexer_score_narrow
