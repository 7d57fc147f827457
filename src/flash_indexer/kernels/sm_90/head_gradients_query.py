"""Gradients of index_q and the weights for "per_head": tiles of queries stay, keys stream by; see `head_gradients`."""

import tilelang.language as T

from flash_indexer.kernels.device.items import ITEM, ITEM_BYTES, RowItem
from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.head_gradients import MASKED, STATE, X_TILES, Products, Tiles, template
from flash_indexer.kernels.sm_90.macros import (
    PASS_CONFIGS,
    REGISTERS,
    ROW_LAYOUT,
    RowTile,
    advance,
    begin_turns,
    commit,
    count_items,
    new_ring,
    place,
    release,
    shared_address,
)

__all__ = ["PASS_CONFIGS", "build"]
SOURCE = source(__file__)


def build(D, E, HG, N, XS, Y2S):
    """Gradients of index_q and of the weights.

    D, E: head widths of the attention (a multiple of 64) and of the indexer (32, 64, 128). HG: heads of a key head. N:
    keys of a tile. XS, Y2S: row tiles and tiles of index_k in shared memory. Run-time arguments:

        Q     [T·H, D], IQ [T·H, E] bfloat16; the same memory is read as [T, H·D], [T, H·E] where HG <= 128 // HG
        K     [S, G·D], IK [S, E] bfloat16
        W, LSE, LSX  [T·H] float32          weights; logsumexps of a and x; not read for a token that sees nothing
        COEF  [T] float32                   factor of a token's gradients
        KS, KE [T] int32, ITEMS [8·nitems]  as in `attention.build` (`items.RowItem`), tiles of N keys
        DQ    [T·H, E] bfloat16, DW [T·H] float32     written
        H, tokens, nitems, grid int32; scale float32, times log2(e)     CTA c of `grid` takes the items c, c + grid, ...
    """
    row_tile = RowTile(HG, 128)
    load = row_tile.copies()
    nq, nk, nt, nx, ni, kd = (T.dynamic(x) for x in ("nq", "nk", "nt", "nx", "ni", "kd"))
    qd, qe = (D, E) if row_tile.TOKEN_MAJOR else (T.dynamic("qd"), T.dynamic("qe"))

    @T.macro
    def apply(S, Z, v, context):
        x, _limits, _item, _KS, _KE, _tokens, scale = context
        T.call_extern("handle", f"hq_apply<{N}>", S.access_ptr("rw"), Z.access_ptr("r"), x.access_ptr("r"), scale)

    @T.macro
    def mask(S, v, context):
        _x, limits, item, KS, KE, tokens, _scale = context
        T.call_extern(
            "handle", f"hg_limits<{HG}>", limits.access_ptr("w"), item, T.address_of(KS[0]), T.address_of(KE[0]), tokens
        )
        T.call_extern("handle", f"hq_mask<{N}>", S.access_ptr("rw"), limits.access_ptr("r"), item, v[MASKED])

    first, step, last = template(E, N, XS, Y2S, apply, mask)

    @T.prim_func
    def flash_indexer_head_gradient_query(
        Q: T.Tensor((nq, qd), "bfloat16"), K: T.Tensor((nk, kd), "bfloat16"), IQ: T.Tensor((nq, qe), "bfloat16"),
        IK: T.Tensor((nk, E), "bfloat16"), W: T.Tensor((nx,), "float32"), LSE: T.Tensor((nx,), "float32"),
        LSX: T.Tensor((nx,), "float32"), COEF: T.Tensor((nt,), "float32"), KS: T.Tensor((nt,), "int32"),
        KE: T.Tensor((nt,), "int32"), ITEMS: T.Tensor((ni,), "int32"), DQ: T.Tensor((nx, E), "bfloat16"),
        DW: T.Tensor((nx,), "float32"), H: T.int32, tokens: T.int32, nitems: T.int32, grid: T.int32, scale: T.float32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=384) as bx:
            T.import_source(SOURCE)
            X1s = T.alloc_shared((XS, 128, D), "bfloat16")
            X2s = T.alloc_shared((XS, 128, E), "bfloat16")
            Is = T.alloc_shared((XS, ITEM), "int32")
            S = T.alloc_fragment((128, N), "float32")
            Z = T.alloc_fragment((128, N), "float32")
            P = T.alloc_fragment((128, N), "bfloat16")
            O = T.alloc_fragment((128, E), "float32")
            XO = T.alloc_fragment((128, E), "float32")
            dw = T.alloc_fragment((128,), "float32")
            T.annotate_layout({dw: ROW_LAYOUT})
            fullx = T.alloc_barrier([1] * XS)
            emptyx = T.alloc_barrier([8] * XS)
            y1, y2 = new_ring(2, N, D), new_ring(Y2S, N, E)
            tx = T.get_thread_binding()
            if tx < 256:
                T.set_max_nreg(REGISTERS[0], 1)
                v = T.alloc_local((STATE,), "int32")
                x = T.alloc_local((6,), "float32")
                limits = T.alloc_local((4,), "int32")
                item = T.alloc_var("int32")
                items = T.alloc_var("int32")
                steps = T.alloc_var("int32")
                tiles = Tiles(X1s, X2s, y1, y2)
                products = Products(S, Z, P, O)
                context = (x, limits, item, KS, KE, tokens, scale)
                for i in list(range(STATE)):
                    v[i] = 0
                begin_turns(tx)
                items = count_items(nitems, bx, grid)
                for _ in T.serial(items):
                    item = shared_address(Is) + v[X_TILES] % XS * ITEM_BYTES
                    T.barrier_wait(fullx[v[X_TILES] % XS], v[X_TILES] // XS % 2)
                    T.call_extern(
                        "handle", f"hq_numbers<{HG}>", x.access_ptr("w"), limits.access_ptr("w"), item,
                        T.address_of(LSE[0]), T.address_of(LSX[0]), T.address_of(W[0]), T.address_of(COEF[0]),
                        T.address_of(KS[0]), T.address_of(KE[0]), tokens, H,
                    )  # fmt: skip
                    v[MASKED] = 0
                    first(tiles, products, v, tx, context)
                    steps = T.call_extern("int32", "masked_tiles", item) - 1
                    for i in T.serial(steps):
                        v[MASKED] = i + 1
                        step(tiles, products, v, tx, context, True)
                    steps = T.call_extern("int32", "whole_tiles", item)
                    for _ in T.serial(steps):
                        step(tiles, products, v, tx, context, False)
                    last(tiles, products, v, tx)
                    for r, e in T.Parallel(128, E):
                        XO[r, e] = O[r, e] * T.cast(X2s[v[X_TILES] % XS, r, e], "float32")
                    T.reduce_sum(XO, dw, dim=1)
                    T.call_extern(
                        "handle", f"hq_store<{HG}, {E}>", O.access_ptr("r"), dw.access_ptr("r"), x.access_ptr("r"),
                        item, T.address_of(COEF[0]), T.address_of(DQ[0, 0]), T.address_of(DW[0]), tokens, H,
                    )  # fmt: skip
                    release(emptyx, v[X_TILES] % XS, tx)
                    v[X_TILES] = v[X_TILES] + 1
            else:
                T.set_max_nreg(REGISTERS[1], 0)
                if tx < 288:
                    s1, p1 = place(1)
                    s2, p2 = place(1)
                    xs, xp = place(1)
                    key = T.alloc_var("int32")
                    g = T.alloc_var("int32")
                    t0 = T.alloc_var("int32")
                    slot = T.alloc_var("int32")
                    field = T.alloc_var("int32")  # of the item, one a lane
                    rows = T.alloc_var("int32")
                    count = T.alloc_var("int32")
                    count = count_items(nitems, bx, grid)
                    for it in T.serial(count):
                        field = T.call_extern("int32", "lane_field", T.address_of(ITEMS[0]), bx + it * grid)
                        t0 = T.call_extern("int32", "pick_field", field, RowItem.TOKEN)
                        g = T.call_extern("int32", "pick_field", field, RowItem.KEY_HEAD)
                        rows = T.call_extern("int32", "pick_field", field, RowItem.TILES)
                        slot = shared_address(Is) + xs * ITEM_BYTES
                        T.barrier_wait(emptyx[xs], xp)
                        T.call_extern("handle", "put_item", slot, field)
                        load(Q, X1s, xs, fullx, D, t0, g, H)
                        load(IQ, X2s, xs, fullx, E, t0, g, H)
                        commit((fullx, xs))
                        advance(xs, xp, XS)
                        for i in T.serial(rows):
                            key = T.call_extern("int32", f"pick_first_key<{N}>", field, i)
                            T.barrier_wait(y1.empty[s1], p1)
                            T.tma_copy(K[key : key + N, g * D : g * D + D], y1.stages[s1, :, :], barrier=y1.full[s1])
                            commit((y1.full, s1))
                            T.barrier_wait(y2.empty[s2], p2)
                            T.tma_copy(IK[key : key + N, 0:E], y2.stages[s2, :, :], barrier=y2.full[s2])
                            commit((y2.full, s2))
                            advance(s1, p1, 2)
                            advance(s2, p2, Y2S)

    return flash_indexer_head_gradient_query
