"""The three gradients of `head_gradients` from logits that are formed once: faster, but not the same bits every time.

    p[t,h,s] = g[t,h,s] · w[t,h] · coef[t] in bfloat16                  g, a, x, z as in `head_gradients`
    d_index_q[t,h] = sum_s p·index_k[s]                                 d_index_k[s] = sum_t,h p·index_q[t,h]
    d_weights[t,h] = index_q[t,h]·d_index_q[t,h] / w[t,h]               where w is 0, with 2^-60 in its place

A CTA goes through the keys that a tile of 128 rows sees, 128 at a time. What one adds to d_index_k is added to global
memory by `red`, in whatever order the CTAs come.

    warps 0-3, 4-7   64 rows each: S = q k^T, Z = index_q index_k^T [64, 128] and O += P index_k [64, E] in registers,
                     p [64, 128] to shared memory; and Y = P^T index_q [64, E] for 64 of the tile's keys each
    warp 8           feeds by TMA: keys in rings, index_q of the next item early; the other warps are idle

    tensor cores     | S Z of tile i+1, O and Y of tile i | ...      of one warpgroup, while the other one
    everything else  |        | p of i+1, Y leaves        |          is at its p

Rows of queries are (token, head) in one of two orders, see `attention`. Tiles that cross a query's interval are masked.
"""

from typing import Any, NamedTuple

import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from flash_indexer.kernels.device.items import ITEM, ITEM_BYTES, RowItem
from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.macros import (
    PASS_CONFIGS,
    REGISTERS,
    RowTile,
    advance,
    begin_turns,
    commit,
    count_items,
    pass_turn,
    release,
    shared_address,
    wait_for_turn,
)

__all__ = ["PASS_CONFIGS", "build"]
SOURCE = source(__file__)

ROW_TILES, KEY_TILES = range(2)  # of a thread that computes: row tiles and key tiles so far
QUERIES, INDEX_QUERIES, KEYS, INDEX_KEYS, P_TILES = range(5)  # addresses in shared memory


class Barriers(NamedTuple):
    """Of the tiles of k, of index_k, of P, and when the queries may be replaced."""

    full1: Any
    empty1: Any
    full2: Any
    empty2: Any
    fullp: Any
    emptyp: Any
    emptyx: Any


class Item(NamedTuple):
    """The item under way: its address in shared memory, its key tiles; x, sign, limits of the thread's rows."""

    address: Any
    tiles: Any
    x: Any
    sign: Any
    limits: Any


class Tensors(NamedTuple):
    """Of global memory."""

    KS: Any
    KE: Any
    SUM: Any
    tokens: Any
    nk: Any
    scale: Any


def build(D, E, HG):
    """Gradients of index_q, index_k and the weights.

    D: head width of the attention (64, 128), E: of the indexer (32, 64), HG: heads of a key head. Run-time arguments:

        Q, K, IQ, IK, W, LSE, LSX, COEF, KS, KE as in `head_gradients_query`; ITEMS too, with tiles of 128 keys
        DQ    [T·H, E] bfloat16, DW [T·H] float32     written
        SUM   [S, E] float32        d_index_k, added to: column 16j + 8a + 2q + c (a, c < 2; q < 4) at 16j + 4q + 2a + c
        H, tokens, nitems, grid int32; scale float32, times log2(e)     CTA c of `grid` takes the items c, c + grid, ...
    """
    row_tile = RowTile(HG, 128)
    load = row_tile.copies()
    nq, nk, nt, nx, ni, kd = (T.dynamic(x) for x in ("nq", "nk", "nt", "nx", "ni", "kd"))
    qd, qe = (D, E) if row_tile.TOKEN_MAJOR else (T.dynamic("qd"), T.dynamic("qe"))

    # S and Z of the present row tile and key tile
    @T.macro
    def logits(S, Z, at, bars, v, tx):
        T.barrier_wait(bars.full1[v[KEY_TILES] % 2], v[KEY_TILES] // 2 % 2)
        T.barrier_wait(bars.full2[v[KEY_TILES] % 2], v[KEY_TILES] // 2 % 2)
        wait_for_turn(tx)
        T.call_extern(
            "handle", f"ho_logits<{D}, {E}>", S.access_ptr("rw"), Z.access_ptr("rw"), at[QUERIES], at[INDEX_QUERIES],
            at[KEYS], at[INDEX_KEYS], v[ROW_TILES], v[KEY_TILES],
        )  # fmt: skip

    # S and Z have been read: of the item's i-th tile
    @T.macro
    def taken(bars, v, i, tiles, tx):
        T.sync_warp()
        if tx % 32 == 0:
            T.mbarrier_arrive(bars.empty1[v[KEY_TILES] % 2])
            if i + 1 == tiles:
                T.mbarrier_arrive(bars.emptyx[0])

    # P of the item's i-th tile, in registers
    @T.macro
    def apply(S, Z, P, item, tensors, i, masked):
        if masked:
            T.call_extern(
                "handle", f"hg_limits<{HG}>", item.limits.access_ptr("w"), item.address, T.address_of(tensors.KS[0]),
                T.address_of(tensors.KE[0]), tensors.tokens,
            )  # fmt: skip
            T.call_extern("handle", "ho_mask", Z.access_ptr("rw"), item.limits.access_ptr("r"), item.address, i)
        T.call_extern(
            "handle", "ho_apply", P.access_ptr("w"), S.access_ptr("r"), Z.access_ptr("r"), item.x.access_ptr("r"),
            item.sign.access_ptr("r"), tensors.scale,
        )  # fmt: skip

    # P to shared memory, where both products of the key tile before the last one have been done with
    @T.macro
    def put(P, at, bars, v, tx):
        T.barrier_wait(bars.emptyp[v[KEY_TILES] % 2], (v[KEY_TILES] // 2 + 1) % 2)
        T.call_extern("handle", "ho_put", P.access_ptr("r"), at[P_TILES], v[KEY_TILES])
        release(bars.fullp, v[KEY_TILES] % 2, tx)
        v[KEY_TILES] = v[KEY_TILES] + 1

    # O += P index_k and Y = P^T index_q of the key tile before
    @T.macro
    def products(O, Y, at, bars, v, fresh):
        T.call_extern(
            "handle", f"ho_rows<{E}>", O.access_ptr("rw"), at[P_TILES], at[INDEX_KEYS], v[KEY_TILES] + 1, fresh
        )
        T.barrier_wait(bars.fullp[(v[KEY_TILES] + 1) % 2], (v[KEY_TILES] - 1) // 2 % 2)
        T.call_extern(
            "handle", f"ho_keys<{E}>", Y.access_ptr("rw"), at[P_TILES], at[INDEX_QUERIES], v[ROW_TILES],
            v[KEY_TILES] + 1,
        )  # fmt: skip

    # both are done; Y, of the item's i-th tile, leaves
    @T.macro
    def leave(O, Y, bars, v, item, tensors, i, tx):
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(O, num_regs=E // 2)
        T.warpgroup_fence_operand(Y, num_regs=E // 2)
        T.sync_warp()
        if tx % 32 == 0:
            T.mbarrier_arrive(bars.empty2[(v[KEY_TILES] + 1) % 2])
            T.mbarrier_arrive(bars.emptyp[(v[KEY_TILES] + 1) % 2])
        T.call_extern(
            "handle", f"ho_add<{E}>", Y.access_ptr("r"), item.address, i, T.address_of(tensors.SUM[0, 0]), tensors.nk
        )

    @T.macro
    def first(registers, at, bars, v, item, tensors, tx):
        S, Z, P, _O, _Y = registers
        logits(S, Z, at, bars, v, tx)
        pass_turn(tx)
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(S, num_regs=64)
        T.warpgroup_fence_operand(Z, num_regs=64)
        taken(bars, v, 0, item.tiles, tx)
        apply(S, Z, P, item, tensors, 0, True)
        put(P, at, bars, v, tx)

    @T.macro
    def step(registers, at, bars, v, item, tensors, i, masked, tx):
        S, Z, P, O, Y = registers
        logits(S, Z, at, bars, v, tx)
        products(O, Y, at, bars, v, i == 1)
        pass_turn(tx)
        T.wait_wgmma(2)
        T.warpgroup_fence_operand(S, num_regs=64)
        T.warpgroup_fence_operand(Z, num_regs=64)
        taken(bars, v, i, item.tiles, tx)
        apply(S, Z, P, item, tensors, i, masked)
        leave(O, Y, bars, v, item, tensors, i - 1, tx)
        put(P, at, bars, v, tx)

    @T.prim_func
    def flash_indexer_head_gradients_once(
        Q: T.Tensor((nq, qd), "bfloat16"), K: T.Tensor((nk, kd), "bfloat16"), IQ: T.Tensor((nq, qe), "bfloat16"),
        IK: T.Tensor((nk, E), "bfloat16"), W: T.Tensor((nx,), "float32"), LSE: T.Tensor((nx,), "float32"),
        LSX: T.Tensor((nx,), "float32"), COEF: T.Tensor((nt,), "float32"), KS: T.Tensor((nt,), "int32"),
        KE: T.Tensor((nt,), "int32"), ITEMS: T.Tensor((ni,), "int32"), DQ: T.Tensor((nx, E), "bfloat16"),
        DW: T.Tensor((nx,), "float32"), SUM: T.Tensor((nk, E), "float32"), H: T.int32, tokens: T.int32,
        nitems: T.int32, grid: T.int32, scale: T.float32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=384) as bx:
            T.import_source(SOURCE)
            X1s = T.alloc_shared((1, 128, D), "bfloat16")
            X2s = T.alloc_shared((2, 128, E), "bfloat16")
            Y1s = T.alloc_shared((2, 128, D), "bfloat16")
            Y2s = T.alloc_shared((2, 128, E), "bfloat16")
            Ps = T.alloc_shared((2, 128, 128), "bfloat16")
            Is = T.alloc_shared((2, ITEM), "int32")
            T.annotate_layout({x: make_swizzled_layout(x) for x in (X1s, X2s, Y1s, Y2s, Ps)})
            S = T.alloc_local((64,), "float32")
            Z = T.alloc_local((64,), "float32")
            P = T.alloc_local((32,), "uint32")
            O = T.alloc_local((E // 2,), "float32")
            Y = T.alloc_local((E // 2,), "float32")
            fullx = T.alloc_barrier([1])
            emptyx = T.alloc_barrier([8])
            fulli = T.alloc_barrier([1] * 2)
            emptyi = T.alloc_barrier([8] * 2)
            full1 = T.alloc_barrier([1] * 2)
            empty1 = T.alloc_barrier([8] * 2)
            full2 = T.alloc_barrier([1] * 2)
            empty2 = T.alloc_barrier([8] * 2)
            fullp = T.alloc_barrier([8] * 2)
            emptyp = T.alloc_barrier([8] * 2)
            tx = T.get_thread_binding()
            if row_tile.PADDED:  # padding rows of index_q: no copy reaches them, a product would read them
                for z, r, e in T.Parallel(2, 128, E):
                    X2s[z, r, e] = T.cast(0.0, "bfloat16")
                T.fence_proxy_async()
                T.sync_threads()
            if tx < 256:
                T.set_max_nreg(REGISTERS[0], 1)
                v = T.alloc_local((2,), "int32")  # row tiles and key tiles so far
                x = T.alloc_local((6,), "float32")
                sign = T.alloc_local((2,), "uint32")
                limits = T.alloc_local((4,), "int32")
                at = T.alloc_local((5,), "int32")  # addresses of q, index_q, k, index_k, P
                item = T.alloc_var("int32")
                items = T.alloc_var("int32")
                tiles = T.alloc_var("int32")
                masked = T.alloc_var("int32")
                bars = Barriers(full1, empty1, full2, empty2, fullp, emptyp, emptyx)
                here, tensors = Item(item, tiles, x, sign, limits), Tensors(KS, KE, SUM, tokens, nk, scale)
                registers = (S, Z, P, O, Y)
                for j, z in enumerate((X1s, X2s, Y1s, Y2s, Ps)):
                    at[j] = shared_address(z)
                v[ROW_TILES] = 0
                v[KEY_TILES] = 0
                begin_turns(tx)
                items = count_items(nitems, bx, grid)
                for _ in T.serial(items):
                    item = shared_address(Is) + v[ROW_TILES] % 2 * ITEM_BYTES
                    T.barrier_wait(fulli[v[ROW_TILES] % 2], v[ROW_TILES] // 2 % 2)
                    T.call_extern(
                        "handle", f"ho_numbers<{HG}>", x.access_ptr("w"), sign.access_ptr("w"), item,
                        T.address_of(LSE[0]), T.address_of(LSX[0]), T.address_of(W[0]), T.address_of(COEF[0]),
                        T.address_of(KS[0]), T.address_of(KE[0]), tokens, H,
                    )  # fmt: skip
                    tiles = T.call_extern("int32", "item_field", item, RowItem.TILES)
                    masked = T.call_extern("int32", "masked_tiles", item)
                    T.barrier_wait(fullx[0], v[ROW_TILES] % 2)
                    first(registers, at, bars, v, here, tensors, tx)
                    for i in T.serial(masked - 1):
                        step(registers, at, bars, v, here, tensors, i + 1, True, tx)
                    for i in T.serial(tiles - masked):
                        step(registers, at, bars, v, here, tensors, masked + i, False, tx)
                    products(O, Y, at, bars, v, tiles == 1)
                    leave(O, Y, bars, v, here, tensors, tiles - 1, tx)
                    T.call_extern(
                        "handle", f"ho_store<{HG}, {E}>", O.access_ptr("r"), item, T.address_of(W[0]),
                        T.address_of(IQ[0, 0]), T.address_of(DQ[0, 0]), T.address_of(DW[0]), tokens, H,
                    )  # fmt: skip
                    release(emptyi, v[ROW_TILES] % 2, tx)
                    v[ROW_TILES] = v[ROW_TILES] + 1
            else:
                T.set_max_nreg(REGISTERS[1], 0)
                if tx < 288:
                    st = T.alloc_var("int32", 0)
                    ph = T.alloc_var("int32", 1)
                    key = T.alloc_var("int32")
                    g = T.alloc_var("int32")
                    t0 = T.alloc_var("int32")
                    field = T.alloc_var("int32")  # of the item, one a lane
                    slot = T.alloc_var("int32")
                    rows = T.alloc_var("int32")
                    count = T.alloc_var("int32")
                    count = count_items(nitems, bx, grid)
                    for it in T.serial(count):
                        field = T.call_extern("int32", "lane_field", T.address_of(ITEMS[0]), bx + it * grid)
                        t0 = T.call_extern("int32", "pick_field", field, RowItem.TOKEN)
                        g = T.call_extern("int32", "pick_field", field, RowItem.KEY_HEAD)
                        rows = T.call_extern("int32", "pick_field", field, RowItem.TILES)
                        T.barrier_wait(emptyi[it % 2], (it // 2 + 1) % 2)
                        slot = shared_address(Is) + it % 2 * ITEM_BYTES
                        T.call_extern("handle", "put_item", slot, field)
                        load(IQ, X2s, it % 2, fulli, E, t0, g, H)
                        commit((fulli, it % 2))
                        for i in T.serial(rows):
                            key = T.call_extern("int32", "pick_first_key<128>", field, i)
                            T.barrier_wait(empty1[st], ph)
                            T.tma_copy(K[key : key + 128, g * D : g * D + D], Y1s[st, :, :], barrier=full1[st])
                            commit((full1, st))
                            if i == 0:
                                T.barrier_wait(emptyx[0], (it + 1) % 2)
                                load(Q, X1s, 0, fullx, D, t0, g, H)
                                commit((fullx, 0))
                            T.barrier_wait(empty2[st], ph)
                            T.tma_copy(IK[key : key + 128, 0:E], Y2s[st, :, :], barrier=full2[st])
                            commit((full2, st))
                            advance(st, ph, 2)

    return flash_indexer_head_gradients_once
