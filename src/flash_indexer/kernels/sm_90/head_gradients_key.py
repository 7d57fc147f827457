"""Gradient of index_k for "per_head": tiles of keys stay, queries stream by; see `head_gradients`."""

import tilelang.language as T

from flash_indexer.kernels.device.items import ITEM, KeyItem
from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.head_gradients import STATE, X_TILES, Y2_STAGE, Products, Tiles, template
from flash_indexer.kernels.sm_90.macros import (
    PASS_CONFIGS,
    Ring,
    RowTile,
    advance,
    begin_turns,
    commit,
    count_items,
    number,
    release,
    shared_address,
)
from flash_indexer.kernels.sm_90.sizes import NUMBERS_BYTES

__all__ = ["PASS_CONFIGS", "build"]
KEY_REGISTERS = (232, 40)  # of a thread that computes, of the others: one that gathers needs more than 24
SOURCE = source(__file__)


def build(D, E, HG, N, XS, Y2S):
    """Gradient of index_k, summed over a range of queries for each tile of 128 keys; g·w·coef is rounded once.

    D, E, HG and the arrays as in `head_gradients_query`, with N (64 or 128) rows of N // HG tokens in a tile. Further:

        DK    [S, E] float32               d_index_k, added to
        PART  [slots·128, E] float32       partial sums, written
        ITEMS [8·nitems] int32             `items.KeyItem` (kt, first, end, whole, end of whole, slot): key tile kt, row
                                           tiles first .. end - 1, not empty; those in whole .. end of whole - 1 see
                                           all of kt. slot < 0: DK[kt·128 + r] += sum; otherwise
                                           PART[slot·128 + r] = sum, for `gradients_reduce` to add in order
        G int32                            key heads, whose queries follow one another in an item
    """
    row_tile = RowTile(HG, N)
    load, TOKENS = row_tile.copies(), row_tile.TOKENS
    nq, nk, nt, nx, ni, kd, np = (T.dynamic(x) for x in ("nq", "nk", "nt", "nx", "ni", "kd", "np"))
    qd, qe = (D, E) if row_tile.TOKEN_MAJOR else (T.dynamic("qd"), T.dynamic("qe"))

    @T.macro
    def apply(S, Z, v, context):
        numbers, _ITEMS, _item, scale = context
        T.call_extern(
            "handle", f"hk_apply<{N}>", S.access_ptr("rw"), Z.access_ptr("r"),
            numbers + v[Y2_STAGE] * (NUMBERS_BYTES * N), scale,
        )  # fmt: skip

    @T.macro
    def mask(S, v, context):
        numbers, ITEMS, item, _scale = context
        T.call_extern(
            "handle", f"hk_mask<{N}>", S.access_ptr("rw"), numbers + v[Y2_STAGE] * (NUMBERS_BYTES * N),
            T.address_of(ITEMS[0]), item,
        )  # fmt: skip

    first, step, last = template(E, N, XS, Y2S, apply, mask)

    @T.prim_func
    def flash_indexer_head_gradient_key(
        Q: T.Tensor((nq, qd), "bfloat16"), K: T.Tensor((nk, kd), "bfloat16"), IQ: T.Tensor((nq, qe), "bfloat16"),
        IK: T.Tensor((nk, E), "bfloat16"), W: T.Tensor((nx,), "float32"), LSE: T.Tensor((nx,), "float32"),
        LSX: T.Tensor((nx,), "float32"), COEF: T.Tensor((nt,), "float32"), KS: T.Tensor((nt,), "int32"),
        KE: T.Tensor((nt,), "int32"), ITEMS: T.Tensor((ni,), "int32"), DK: T.Tensor((nk, E), "float32"),
        PART: T.Tensor((np, E), "float32"), H: T.int32, G: T.int32, tokens: T.int32, nitems: T.int32, grid: T.int32,
        scale: T.float32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=384) as bx:
            T.import_source(SOURCE)
            X1s = T.alloc_shared((XS, 128, D), "bfloat16")
            X2s = T.alloc_shared((XS, 128, E), "bfloat16")
            Y1s = T.alloc_shared((2, N, D), "bfloat16")
            Y2s = T.alloc_shared((Y2S, N, E), "bfloat16")
            Ns = T.alloc_shared((Y2S, NUMBERS_BYTES // 4 * N), "float32")
            S = T.alloc_fragment((128, N), "float32")
            Z = T.alloc_fragment((128, N), "float32")
            P = T.alloc_fragment((128, N), "bfloat16")
            O = T.alloc_fragment((128, E), "float32")
            fullx = T.alloc_barrier([1] * XS)
            emptyx = T.alloc_barrier([8] * XS)
            full1 = T.alloc_barrier([1] * 2)
            empty1 = T.alloc_barrier([8] * 2)
            full2 = T.alloc_barrier([65] * Y2S)  # the copies, 64 gathering threads
            empty2 = T.alloc_barrier([8] * Y2S)
            tx = T.get_thread_binding()
            if row_tile.PADDED:  # padding rows of index_q: no copy reaches them, a product would read them
                for z, r, e in T.Parallel(Y2S, N, E):
                    Y2s[z, r, e] = T.cast(0.0, "bfloat16")
                T.fence_proxy_async()
                T.sync_threads()
            if tx < 256:
                T.set_max_nreg(KEY_REGISTERS[0], 1)
                v = T.alloc_local((STATE,), "int32")
                item = T.alloc_var("int32")
                items = T.alloc_var("int32")
                steps = T.alloc_var("int32")
                numbers = T.alloc_var("int32")
                tiles = Tiles(X1s, X2s, Ring(Y1s, full1, empty1), Ring(Y2s, full2, empty2))
                products = Products(S, Z, P, O)
                context = (numbers, ITEMS, item, scale)
                for i in list(range(STATE)):
                    v[i] = 0
                numbers = shared_address(Ns)
                begin_turns(tx)
                items = count_items(nitems, bx, grid)
                for it in T.serial(items):
                    T.barrier_wait(fullx[v[X_TILES] % XS], v[X_TILES] // XS % 2)
                    item = (bx + it * grid) * ITEM
                    first(tiles, products, v, tx, context)
                    for g in T.serial(G):
                        if g > 0:
                            T.barrier_wait(fullx[v[X_TILES] % XS], v[X_TILES] // XS % 2)
                        steps = T.call_extern("int32", "hk_masked_left", T.address_of(ITEMS[0]), item, g)
                        for _ in T.serial(steps):
                            step(tiles, products, v, tx, context, True)
                        steps = T.call_extern("int32", "hk_whole_left", T.address_of(ITEMS[0]), item, g)
                        for _ in T.serial(steps):
                            step(tiles, products, v, tx, context, False)
                        if g < G - 1:
                            release(emptyx, v[X_TILES] % XS, tx)
                            v[X_TILES] = v[X_TILES] + 1
                    last(tiles, products, v, tx)
                    T.call_extern(
                        "handle", f"hk_store<{E}>", O.access_ptr("r"), T.address_of(ITEMS[0]), item,
                        T.address_of(DK[0, 0]), T.address_of(PART[0, 0]), nk,
                    )  # fmt: skip
                    release(emptyx, v[X_TILES] % XS, tx)
                    v[X_TILES] = v[X_TILES] + 1
            else:
                T.set_max_nreg(KEY_REGISTERS[1], 0)
                if tx < 288:
                    s1 = T.alloc_var("int32", 0)
                    p1 = T.alloc_var("int32", 1)
                    s2 = T.alloc_var("int32", 0)
                    p2 = T.alloc_var("int32", 1)
                    xs = T.alloc_var("int32", 0)
                    xp = T.alloc_var("int32", 1)
                    key = T.alloc_var("int32")
                    t0 = T.alloc_var("int32")
                    rows = T.alloc_var("int32")
                    count = T.alloc_var("int32")
                    count = count_items(nitems, bx, grid)
                    for it in T.serial(count):
                        key = number(ITEMS, (bx + it * grid) * ITEM + KeyItem.KEY_TILE) * 128
                        rows = T.call_extern("int32", "row_tiles", T.address_of(ITEMS[0]), (bx + it * grid) * ITEM)
                        for g in T.serial(G):
                            T.barrier_wait(emptyx[xs], xp)
                            T.tma_copy(K[key : key + 128, g * D : g * D + D], X1s[xs, :, :], barrier=fullx[xs])
                            T.tma_copy(IK[key : key + 128, 0:E], X2s[xs, :, :], barrier=fullx[xs])
                            commit((fullx, xs))
                            advance(xs, xp, XS)
                            for i in T.serial(rows):
                                t0 = TOKENS * T.call_extern(
                                    "int32", "visited_row_tile", T.address_of(ITEMS[0]), (bx + it * grid) * ITEM, i
                                )
                                T.barrier_wait(empty1[s1], p1)
                                load(Q, Y1s, s1, full1, D, t0, g, H)
                                commit((full1, s1))
                                T.barrier_wait(empty2[s2], p2)
                                load(IQ, Y2s, s2, full2, E, t0, g, H)
                                commit((full2, s2))
                                advance(s1, p1, 2)
                                advance(s2, p2, Y2S)

                elif tx >= 320:
                    s2 = T.alloc_var("int32", 0)
                    p2 = T.alloc_var("int32", 1)
                    rows2 = T.alloc_var("int32")
                    numbers2 = T.alloc_var("int32")
                    count2 = T.alloc_var("int32")
                    at2 = T.alloc_var("int32")
                    count2 = count_items(nitems, bx, grid)
                    numbers2 = shared_address(Ns)
                    for it in T.serial(count2):
                        at2 = (bx + it * grid) * ITEM
                        rows2 = T.call_extern("int32", "row_tiles", T.address_of(ITEMS[0]), at2)
                        for g in T.serial(G):
                            for i in T.serial(rows2):
                                T.barrier_wait(empty2[s2], p2)
                                T.call_extern(
                                    "handle", f"hk_gather<{HG}, {N}>", numbers2 + s2 * (NUMBERS_BYTES * N),
                                    T.call_extern("int32", "visited_row_tile", T.address_of(ITEMS[0]), at2, i) * TOKENS,
                                    g, T.address_of(LSE[0]), T.address_of(LSX[0]), T.address_of(W[0]),
                                    T.address_of(COEF[0]), T.address_of(KS[0]), T.address_of(KE[0]), tokens, H,
                                )  # fmt: skip
                                T.mbarrier_arrive(full2[s2])
                                advance(s2, p2, Y2S)

    return flash_indexer_head_gradient_key
