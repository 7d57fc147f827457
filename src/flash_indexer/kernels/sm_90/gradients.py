"""Gradients of the indexer from di, the gradient of its scores (of which every kernel reads 128x128 tiles).

    logit[t,j,s] = index_q[t,j] · index_k[s]            m[t,j,s] = [logit[t,j,s] > 0]
    d_index_q[t,j] = w[t,j] · sum_s di[t,s]·m[t,j,s]·index_k[s]                             `build_query`
    d_weights[t,j] = sum_s di[t,s]·max(logit[t,j,s], 0)
                   = index_q[t,j] · (sum_s di[t,s]·m[t,j,s]·index_k[s])                     `build_query`
    d_index_k[s]   = sum_t sum_j di[t,s]·w[t,j]·m[t,j,s]·index_q[t,j]            `build_key`, `gradients_reduce`

Both kernels are one template. X, 128 rows, stays in shared memory; tiles Y of 128 rows stream past it:

    S = X Y^T        P = f(S) in bfloat16        O += P Y

             X (stationary)                Y (streamed)                    f(S)
    query    128/IP tokens, IP heads each  128 keys                        di·[S > 0]   (w is applied once, at the end)
    key      128 keys                      128/IP tokens, IP heads each    (di·w)·[S > 0]

    warps 0-3, 4-7   64 rows of X each: S [64, 128], two P [64, 128] and O [64, E] in registers; X itself where E < 128
    warp 8           feeds the rings by TMA: X, and Y with its di (and w); it runs ahead across work items
    warps 9-11       idle (their registers go to the consumers)

    tensor cores     | O += P0 Y0 | S = X Y2^T | O += P1 Y1 | S = X Y3^T ...
    everything else  | P1 = f(S)               | P2 = f(S)  ...

What is formed is -S: the mask [S > 0] is then made of sign bits, by one instruction for two elements. P of one tile is
formed in the registers that the product under way does not read.

S of tile i+1 is issued ahead of the second product of tile i, and S of tile i+2 as soon as f has consumed that of i+1.
ptxas tracks accumulators in flight only within a loop body, so the queue drains once in two tiles, at the back edge.

di may hold junk (NaN bits) in rows t >= T: there index_q is zero (TMA fills zeros out of bounds), so S = +0, and f
masks by a bitwise AND, which turns NaN into zero too. Heads are padded to IP with zeros and vanish the same way.
"""

import tilelang.language as T

from flash_indexer.kernels.device.items import SHORT_ITEM, Block, KeyBlocksItem, QueryTilesItem
from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.gradients_steps import (
    ROW_TILE,
    SCORE_TILE,
    STATE,
    WEIGHTS,
    X_ROWS,
    X_STAGE,
    registers,
    shared_rings,
    template,
)
from flash_indexer.kernels.sm_90.macros import (
    PASS_CONFIGS,
    REGISTERS,
    advance,
    commit,
    count_items,
    number,
    shared_address,
)
from flash_indexer.kernels.sm_90.sizes import X_STAGES, Y_STAGES

__all__ = ["PASS_CONFIGS", "build_key", "build_query"]
SOURCE = source(__file__)

# of the item of `build_query` and of its next one, of `build_key`: what is read ahead of the item before
TOKEN, STEPS, NEXT_TOKEN, NEXT_STEPS, NEXT_TILE = range(5)
KEY_TILE, SLOT, NEXT_BLOCK, NEXT_BLOCK_END = range(4)


def build_query(E, IP, masks=0):
    """Gradients of index_q and of the weights, summed over the keys of each query token.

        DQ[t,j] = w[t,j] · sum_s di[t,s]·[logit[t,j,s] > 0]·index_k[s]
        DW[t,j] = index_q[t,j] · sum_s di[t,s]·[logit[t,j,s] > 0]·index_k[s]

    E: index head width, 32, 64 or 128. IP: padded number of index heads, 8, 16, 32 or 64. masks: 1 leaves for
    `gradients_masked`, which forms the gradient of index_k, what it needs. Run-time arguments:

        IQ     [n·IP, E] bfloat16     index_q, row (t - q_base)·IP + j, zeros in padded heads
        IK     [S, E] bfloat16        index_k
        W      [n·IP] float32         weights, rows as in IQ
        DI     [tiles·128, 128] bfloat16   gradient of the scores, see the module docstring
        DQ     [T·I, E] bfloat16, DW [T·I] float32   written for j < I, t < ntok and the tokens of the items
        ITEMS  [4·nitems] int32       (t0, kt_begin, n_kt, tile_base): 128/IP tokens from t0, a multiple of 128/IP; key
                                      tiles kt_begin .. kt_begin + n_kt - 1 (n_kt >= 1); di in tile tile_base + kt
        WQ           [n·IP, E] bfloat16   masks: w·index_q, rows from token `base` on, as tiles of 128 rows lie in
                                          shared memory; written for the tokens of the items
        MASKS, MORE  [n, 64] int32        masks: their words (`device/mask_words.cuh`), of the items' tiles; a tile's
                                          first 4,096 rows (token, head), and the others (IP = 64)
        I, q_base, ntok, nitems, grid, base int32   CTA c of `grid` <= nitems takes the items c, c + grid, ...
    """
    STAGES, TOKENS = Y_STAGES[E], 128 // IP
    nq, nk, nt, nw = T.dynamic("nq"), T.dynamic("nk"), T.dynamic("nt"), T.dynamic("nw")
    nm, nr = T.dynamic("nm"), T.dynamic("nr")
    no, ni = T.dynamic("no"), T.dynamic("ni")

    @T.prim_func
    def flash_indexer_gradient_query(
        IQ: T.Tensor((nq, E), "bfloat16"), IK: T.Tensor((nk, E), "bfloat16"), W: T.Tensor((nq,), "float32"),
        DI: T.Tensor((nt, 128), "bfloat16"), DQ: T.Tensor((no, E), "bfloat16"), DW: T.Tensor((no,), "float32"),
        ITEMS: T.Tensor((ni,), "int32"), WQ: T.Tensor((nw, E), "bfloat16"), MASKS: T.Tensor((nm, 64), "int32"),
        MORE: T.Tensor((nr, 64), "int32"), I: T.int32, q_base: T.int32, ntok: T.int32, nitems: T.int32,
        grid: T.int32, base: T.int32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=384) as bx:
            T.import_source(SOURCE)
            mainloop, release_x, addresses = template(E, IP, "query", (MASKS, MORE) if masks else None)
            x, y, Ds = shared_rings(E, STAGES, TOKENS)
            tx = T.get_thread_binding()
            if tx < 256:
                T.set_max_nreg(REGISTERS[0], 1)
                v, S, P, O, X, at = registers(E)
                w = T.alloc_local((2,), "float32")
                dw = T.alloc_local((2,), "float32")
                item = T.alloc_local((5,), "int32")
                place = T.alloc_var("int32")
                count = T.alloc_var("int32")
                for i in list(range(STATE)):
                    v[i] = 0
                addresses(at, x.stages, y.stages, Ds, tx)
                place = bx
                item[NEXT_TOKEN] = number(ITEMS, place * SHORT_ITEM + QueryTilesItem.TOKEN)
                item[NEXT_STEPS] = number(ITEMS, place * SHORT_ITEM + QueryTilesItem.KEY_TILES)
                item[NEXT_TILE] = number(ITEMS, place * SHORT_ITEM + QueryTilesItem.TILE_BASE)
                item[NEXT_TILE] = item[NEXT_TILE] + number(ITEMS, place * SHORT_ITEM + QueryTilesItem.KEY_TILE)
                count = count_items(nitems, bx, grid)
                # for t0, keys in items: O = ((index_q @ keys.T > 0) * di) @ keys; DQ = w * O; DW = sum(index_q * O)
                for _ in T.serial(count):
                    item[TOKEN] = item[NEXT_TOKEN]
                    item[STEPS] = item[NEXT_STEPS]
                    v[SCORE_TILE] = item[NEXT_TILE]
                    v[ROW_TILE] = item[TOKEN] % 128 // TOKENS
                    place = T.min(place + grid, nitems - 1)
                    item[NEXT_TOKEN] = number(ITEMS, place * SHORT_ITEM + QueryTilesItem.TOKEN)
                    item[NEXT_STEPS] = number(ITEMS, place * SHORT_ITEM + QueryTilesItem.KEY_TILES)
                    item[NEXT_TILE] = number(ITEMS, place * SHORT_ITEM + QueryTilesItem.TILE_BASE)
                    item[NEXT_TILE] = item[NEXT_TILE] + number(ITEMS, place * SHORT_ITEM + QueryTilesItem.KEY_TILE)
                    T.call_extern(
                        "handle", "gd_weights", w.access_ptr("w"), T.address_of(W[0]), (item[TOKEN] - q_base) * IP, nq
                    )
                    mainloop(x, y, S, X, P, O, at, v, item[STEPS], tx)
                    T.call_extern(
                        "handle", f"gd_row_products<{E}>", O.access_ptr("r"), dw.access_ptr("w"),
                        at[X_ROWS] * 16 + v[X_STAGE] * (256 * E),
                    )  # fmt: skip
                    if masks:
                        T.call_extern(
                            "handle", f"gd_store_scaled<{E}>", w.access_ptr("r"),
                            at[X_ROWS] * 16 + v[X_STAGE] * (256 * E), T.address_of(WQ[0, 0]),
                            (item[TOKEN] - base) * IP, (item[TOKEN] - q_base) * IP, nq,
                        )  # fmt: skip
                    release_x(x, v, tx)
                    T.call_extern(
                        "handle", f"gd_store_query<{E}, {IP}>", O.access_ptr("r"), w.access_ptr("r"),
                        dw.access_ptr("r"), T.address_of(DQ[0, 0]), T.address_of(DW[0]), item[TOKEN], I, ntok,
                    )  # fmt: skip
            else:
                T.set_max_nreg(REGISTERS[1], 0)
                if tx < 288:
                    ys = T.alloc_var("int32", 0)
                    yp = T.alloc_var("int32", 1)
                    xs = T.alloc_var("int32", 0)
                    xp = T.alloc_var("int32", 1)
                    first = T.alloc_var("int32")
                    key = T.alloc_var("int32")
                    steps = T.alloc_var("int32")
                    row = T.alloc_var("int32")
                    items = T.alloc_var("int32")
                    items = count_items(nitems, bx, grid)
                    for it in T.serial(items):
                        first = number(ITEMS, (bx + it * grid) * SHORT_ITEM + QueryTilesItem.TOKEN)
                        key = number(ITEMS, (bx + it * grid) * SHORT_ITEM + QueryTilesItem.KEY_TILE)
                        steps = number(ITEMS, (bx + it * grid) * SHORT_ITEM + QueryTilesItem.KEY_TILES)
                        row = number(ITEMS, (bx + it * grid) * SHORT_ITEM + QueryTilesItem.TILE_BASE)
                        row = (row + key) * 128 + (first & 127)
                        key = key * 128
                        first = (first - q_base) * IP
                        T.barrier_wait(x.empty[xs], xp)
                        T.tma_copy(IQ[first : first + 128, 0:E], x.stages[xs, :, :], barrier=x.full[xs])
                        commit((x.full, xs))
                        advance(xs, xp, X_STAGES)
                        for _ in T.serial(steps):
                            T.barrier_wait(y.empty[ys], yp)
                            T.tma_copy(IK[key : key + 128, 0:E], y.stages[ys, :, :], barrier=y.full[ys])
                            T.tma_copy(DI[row : row + TOKENS, 0:128], Ds[ys, :, :], barrier=y.full[ys])
                            commit((y.full, ys))
                            key = key + 128
                            row = row + 128
                            advance(ys, yp, STAGES)

    return flash_indexer_gradient_query


def build_key(E, IP):
    """Gradient of index_k, summed over a range of query tokens for each key tile.

        dIK[s] = sum_t sum_j di[t,s]·w[t,j]·[logit[t,j,s] > 0]·index_q[t,j]

    di·w is rounded to bfloat16, once. E, IP, IQ, IK, W, DI, q_base, nitems and grid as in `build_query`. Further:

        DK      [S, E] float32            d_index_k, added to
        PART    [slots·128, E] float32    partial sums, written
        BLOCKS  [4·blocks] int32          (tile_base, kt_begin, kt_end, 0) of token block t // 128, by absolute number
        ITEMS   [4·nitems] int32          (kt, b_begin, b_end, slot): key tile kt, tokens of blocks b_begin .. b_end - 1
                                          (each sees kt; none: an empty item). slot < 0: DK[kt·128 + r] += sum;
                                          otherwise PART[slot·128 + r] = sum, for `gradients_reduce` to add in order
    """
    mainloop, release_x, addresses = template(E, IP, "key")
    STAGES, TOKENS = Y_STAGES[E], 128 // IP
    nq, nk, nt = T.dynamic("nq"), T.dynamic("nk"), T.dynamic("nt")
    np, nb, ni = T.dynamic("np"), T.dynamic("nb"), T.dynamic("ni")

    @T.prim_func
    def flash_indexer_gradient_key(
        IQ: T.Tensor((nq, E), "bfloat16"), IK: T.Tensor((nk, E), "bfloat16"), W: T.Tensor((nq,), "float32"),
        DI: T.Tensor((nt, 128), "bfloat16"), DK: T.Tensor((nk, E), "float32"), PART: T.Tensor((np, E), "float32"),
        BLOCKS: T.Tensor((nb,), "int32"), ITEMS: T.Tensor((ni,), "int32"),
        q_base: T.int32, nitems: T.int32, grid: T.int32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=384) as bx:
            T.import_source(SOURCE)
            x, y, Ds = shared_rings(E, STAGES, TOKENS)
            Ws = T.alloc_shared((STAGES, 128), "float32")
            tx = T.get_thread_binding()
            if tx < 256:
                T.set_max_nreg(REGISTERS[0], 1)
                v, S, P, O, X, at = registers(E)
                item = T.alloc_local((4,), "int32")
                place = T.alloc_var("int32")
                n = T.alloc_var("int32")
                count = T.alloc_var("int32")
                for i in list(range(STATE)):
                    v[i] = 0
                addresses(at, x.stages, y.stages, Ds, tx)
                at[WEIGHTS] = shared_address(Ws)
                place = bx
                item[NEXT_BLOCK] = number(ITEMS, place * SHORT_ITEM + KeyBlocksItem.BLOCK)
                item[NEXT_BLOCK_END] = number(ITEMS, place * SHORT_ITEM + KeyBlocksItem.BLOCK_END)
                count = count_items(nitems, bx, grid)
                # for kt, tokens in items: O = ((index_k @ index_q.T > 0) * (di * w).bfloat16()) @ index_q; DK += O
                for _ in T.serial(count):
                    n = T.call_extern(
                        "int32", "gd_steps", (item[NEXT_BLOCK] * 128 - q_base) * IP,
                        (item[NEXT_BLOCK_END] * 128 - q_base) * IP, nq,
                    )  # fmt: skip
                    item[KEY_TILE] = number(ITEMS, place * SHORT_ITEM + KeyBlocksItem.KEY_TILE)
                    item[SLOT] = number(ITEMS, place * SHORT_ITEM + KeyBlocksItem.SLOT)
                    place = T.min(place + grid, nitems - 1)
                    item[NEXT_BLOCK] = number(ITEMS, place * SHORT_ITEM + KeyBlocksItem.BLOCK)
                    item[NEXT_BLOCK_END] = number(ITEMS, place * SHORT_ITEM + KeyBlocksItem.BLOCK_END)
                    if n > 0:
                        mainloop(x, y, S, X, P, O, at, v, n, tx)
                        release_x(x, v, tx)
                        T.call_extern(
                            "handle", f"add_or_store<{E}>", O.access_ptr("r"), T.address_of(DK[0, 0]),
                            T.address_of(PART[0, 0]), item[KEY_TILE], item[SLOT], nk,
                        )  # fmt: skip
            else:
                T.set_max_nreg(REGISTERS[1], 0)
                if tx < 288:
                    ys = T.alloc_var("int32", 0)
                    yp = T.alloc_var("int32", 1)
                    xs = T.alloc_var("int32", 0)
                    xp = T.alloc_var("int32", 1)
                    key = T.alloc_var("int32")
                    block = T.alloc_var("int32")
                    left = T.alloc_var("int32")  # steps left of the block
                    steps = T.alloc_var("int32")
                    first = T.alloc_var("int32")
                    row = T.alloc_var("int32")
                    items = T.alloc_var("int32")
                    items = count_items(nitems, bx, grid)
                    for it in T.serial(items):
                        key = number(ITEMS, (bx + it * grid) * SHORT_ITEM + KeyBlocksItem.KEY_TILE)
                        block = number(ITEMS, (bx + it * grid) * SHORT_ITEM + KeyBlocksItem.BLOCK)
                        steps = number(ITEMS, (bx + it * grid) * SHORT_ITEM + KeyBlocksItem.BLOCK_END)
                        first = (block * 128 - q_base) * IP
                        steps = T.call_extern("int32", "gd_steps", first, (steps * 128 - q_base) * IP, nq)
                        left = 0
                        if steps > 0:
                            T.barrier_wait(x.empty[xs], xp)
                            T.tma_copy(IK[key * 128 : key * 128 + 128, 0:E], x.stages[xs, :, :], barrier=x.full[xs])
                            commit((x.full, xs))
                            advance(xs, xp, X_STAGES)
                        for _ in T.serial(steps):
                            if left == 0:
                                left = IP
                                row = number(BLOCKS, block * SHORT_ITEM + Block.TILE_BASE)
                                row = (row + key) * 128
                                block = block + 1
                            T.barrier_wait(y.empty[ys], yp)
                            T.tma_copy(IQ[first : first + 128, 0:E], y.stages[ys, :, :], barrier=y.full[ys])
                            T.tma_copy(DI[row : row + TOKENS, 0:128], Ds[ys, :, :], barrier=y.full[ys])
                            T.tma_copy(W[first : first + 128], Ws[ys, :], barrier=y.full[ys])
                            commit((y.full, ys))
                            first = first + 128
                            row = row + TOKENS
                            left = left - 1
                            advance(ys, yp, STAGES)

    return flash_indexer_gradient_key
