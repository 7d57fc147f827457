"""Gradients of the indexer from di, the gradient of its scores (of which every kernel reads 128x128 tiles).

    logit[t,j,s] = index_q[t,j] · index_k[s]            m[t,j,s] = [logit[t,j,s] > 0]
    d_index_q[t,j] = w[t,j] · sum_s di[t,s]·m[t,j,s]·index_k[s]                             `build_query`
    d_weights[t,j] = sum_s di[t,s]·max(logit[t,j,s], 0)
                   = index_q[t,j] · (sum_s di[t,s]·m[t,j,s]·index_k[s])                     `build_query`
    d_index_k[s]   = sum_t sum_j di[t,s]·w[t,j]·m[t,j,s]·index_q[t,j]                       `build_key`, `build_reduce`

Both kernels are one template. X, 128 rows, stays in shared memory; tiles Y of 128 rows stream past it:

    S = X Y^T        P = f(S) in bfloat16        O += P Y

             X (stationary)                Y (streamed)                    f(S)
    query    128/IP tokens, IP heads each  128 keys                        di·[S > 0]   (w is applied once, at the end)
    key      128 keys                      128/IP tokens, IP heads each    (di·w)·[S > 0]

    warps 0-3, 4-7   64 rows of X each: S [64, 128], P [64, 128] and O [64, E] in registers
    warp 8           feeds the rings by TMA: X, and Y with its di (and w); it runs ahead across work items
    warps 9-11       idle (their registers go to the consumers)

    tensor cores     | O += P0 Y0 | S = X Y2^T | O += P1 Y1 | S = X Y3^T ...
    everything else  | P1 = f(S)               | P2 = f(S)  ...

S of tile i+1 is issued ahead of the second product of tile i, and S of tile i+2 as soon as f has consumed that of i+1.
ptxas tracks accumulators in flight only within a loop body, so the queue drains once in two tiles, at the back edge.

di may hold junk (NaN bits) in rows t >= T: there index_q is zero (TMA fills zeros out of bounds), so S = 0, and f masks
by a bitwise AND, which turns NaN into zero too. Heads are padded to IP with zeros and vanish the same way.
"""

import tilelang
import tilelang.language as T
from tilelang.layout import Fragment

from flash_indexer.kernels.device.sources import source

PASS_CONFIGS = {
    tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True,
    tilelang.PassConfigKey.TL_DISABLE_BUFFER_INIT_CHECK: True,
    tilelang.PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
    tilelang.PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
}
Y_STAGES = {32: 10, 64: 8, 128: 4}  # by E: about as many bytes in flight, within 227 KiB of shared memory
X_STAGES = 2
REGISTERS = (240, 24)  # consumers, producer
SOURCE = source(__file__)

# scalars of the rows of a 128-row tile, as its accumulator's threads own them: two a thread, alike in the four of a row
ROW_LAYOUT = Fragment(
    [128],
    forward_thread_fn=lambda i, rep: (i // 16) * 32 + (i % 8) * 4 + rep,
    replicate=4,
    forward_index_fn=lambda i: (i % 16) // 8,
)


def _template(E, IP, function):
    """The consumers' side of both kernels: the macros (mainloop, release_x) and the ring depth of Y.

    State v of the rings: 0, 1 newest stage of Y and its parity; 2 stage of Y to release next; 3 stage of Y whose S is
    next for f; 4, 5 stage of X and its parity.
    """
    STAGES = Y_STAGES[E]
    rows = T.GemmWarpPolicy.FullRow
    di_bytes = 128 // IP * 256
    w_bytes = 512

    @T.macro
    def release(empty, stage, tx):
        if tx % 32 == 0:  # one arrival a warp: di and w are read by plain loads
            T.mbarrier_arrive(empty[stage])

    @T.macro
    def advance(v):
        v[0] = v[0] + 1
        if v[0] == STAGES:
            v[0] = 0
            v[1] = v[1] ^ 1

    @T.macro
    def first_product(Xs, Ys, S, full, v):
        T.barrier_wait(full[v[0]], v[1])
        T.wgmma_gemm(Xs[v[4], :, :], Ys[v[0], :, :], S, transpose_B=True, clear_accum=True, policy=rows)

    @T.macro
    def apply(S, x, address, stage):
        T.warpgroup_fence_operand(S, num_regs=64)
        if function == "query":
            T.call_extern(
                "handle", f"gd_query<{IP}>", S.access_ptr("r"), x.access_ptr("w"), address[0] + stage * di_bytes
            )
        else:
            T.call_extern(
                "handle", f"gd_key<{IP}>", S.access_ptr("r"), x.access_ptr("w"), address[0] + stage * di_bytes,
                address[1] + stage * w_bytes,
            )  # fmt: skip

    @T.macro
    def define(P, x, ones):
        T.call_extern("handle", "gd_define", P.access_ptr("w"), x.access_ptr("r"), ones[0])

    # P of tile i is defined at entry; of tile i + tiles at exit, and nothing is in flight
    @T.macro
    def group(Xs, Ys, S, P, O, x, address, ones, full, empty, v, tx, tiles):
        v[2] = v[0]
        advance(v)
        first_product(Xs, Ys, S, full, v)
        for u in list(range(tiles)):
            v[3] = v[0]
            T.wgmma_gemm(P, Ys[v[2], :, :], O, policy=rows)
            T.wait_wgmma(1)
            apply(S, x, address, v[3])
            if u < tiles - 1:
                advance(v)
                first_product(Xs, Ys, S, full, v)
                T.wait_wgmma(1)
            else:
                T.wait_wgmma(0)
            T.warpgroup_fence_operand(O, num_regs=E // 2)
            release(empty, v[2], tx)
            define(P, x, ones)
            v[2] = v[3]

    # for Y in tiles: O += f(X @ Y.T) @ Y
    @T.macro
    def mainloop(Xs, Ys, S, P, O, x, address, ones, fullx, full, empty, v, n, tx):
        T.barrier_wait(fullx[v[4]], v[5])
        first_product(Xs, Ys, S, full, v)
        T.wait_wgmma(0)
        apply(S, x, address, v[0])
        define(P, x, ones)
        T.clear(O)
        for _ in T.serial((n - 1) // 2):
            group(Xs, Ys, S, P, O, x, address, ones, full, empty, v, tx, 2)
        for _ in T.serial((n - 1) % 2):
            group(Xs, Ys, S, P, O, x, address, ones, full, empty, v, tx, 1)
        T.wgmma_gemm(P, Ys[v[0], :, :], O, policy=rows)
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(O, num_regs=E // 2)
        release(empty, v[0], tx)
        advance(v)

    @T.macro
    def release_x(emptyx, v, tx):
        release(emptyx, v[4], tx)
        v[4] = v[4] + 1
        if v[4] == X_STAGES:
            v[4] = 0
            v[5] = v[5] ^ 1

    return mainloop, release_x, STAGES


def build_query(E, IP):
    """Gradients of index_q and of the weights, summed over the keys of each query token.

        DQ[t,j] = w[t,j] · sum_s di[t,s]·[logit[t,j,s] > 0]·index_k[s]
        DW[t,j] = index_q[t,j] · sum_s di[t,s]·[logit[t,j,s] > 0]·index_k[s]

    E: index head width, 32, 64 or 128. IP: padded number of index heads, 8, 16, 32 or 64. Run-time arguments:

        IQ     [n·IP, E] bfloat16     index_q, row (t - q_base)·IP + j, zeros in padded heads
        IK     [S, E] bfloat16        index_k
        W      [n·IP] float32         weights, rows as in IQ
        DI     [tiles·128, 128] bfloat16   gradient of the scores, see the module docstring
        DQ     [T·I, E] bfloat16, DW [T·I] float32   written for j < I, t < ntok and the tokens of the items
        ITEMS  [4·nitems] int32       (t0, kt_begin, n_kt, tile_base): 128/IP tokens from t0, a multiple of 128/IP; key
                                      tiles kt_begin .. kt_begin + n_kt - 1 (n_kt >= 1); di in tile tile_base + kt
        I, q_base, ntok, nitems, grid int32   CTA c of `grid` <= nitems takes the items c, c + grid, ...
    """
    mainloop, release_x, STAGES = _template(E, IP, "query")
    TOKENS = 128 // IP
    nq, nk, nt = T.dynamic("nq"), T.dynamic("nk"), T.dynamic("nt")
    no, ni = T.dynamic("no"), T.dynamic("ni")

    @T.prim_func
    def flash_indexer_gradient_query(
        IQ: T.Tensor((nq, E), "bfloat16"), IK: T.Tensor((nk, E), "bfloat16"), W: T.Tensor((nq,), "float32"),
        DI: T.Tensor((nt, 128), "bfloat16"), DQ: T.Tensor((no, E), "bfloat16"), DW: T.Tensor((no,), "float32"),
        ITEMS: T.Tensor((ni,), "int32"), I: T.int32, q_base: T.int32, ntok: T.int32, nitems: T.int32, grid: T.int32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=384) as bx:
            T.import_source(SOURCE)
            Xs = T.alloc_shared((X_STAGES, 128, E), "bfloat16")
            Ys = T.alloc_shared((STAGES, 128, E), "bfloat16")
            Ds = T.alloc_shared((STAGES, TOKENS, 128), "bfloat16")
            S = T.alloc_fragment((128, 128), "float32")
            P = T.alloc_fragment((128, 128), "bfloat16")
            O = T.alloc_fragment((128, E), "float32")
            XO = T.alloc_fragment((128, E), "float32")
            dw = T.alloc_fragment((128,), "float32")
            T.annotate_layout({dw: ROW_LAYOUT})
            fullx = T.alloc_barrier([1] * X_STAGES)
            emptyx = T.alloc_barrier([8] * X_STAGES)
            full = T.alloc_barrier([1] * STAGES)
            empty = T.alloc_barrier([8] * STAGES)
            tx = T.get_thread_binding()
            if tx < 256:
                T.set_max_nreg(REGISTERS[0], 1)
                v = T.alloc_local((6,), "int32")
                x = T.alloc_local((32,), "uint32")
                w = T.alloc_local((2,), "float32")
                address = T.alloc_local((1,), "int32")
                ones = T.alloc_local((1,), "int32")
                item = T.alloc_local((4,), "int32")  # t0 and n_kt, then those of the next item, loaded ahead
                at = T.alloc_var("int32")
                count = T.alloc_var("int32")
                for i in list(range(6)):
                    v[i] = 0
                address[0] = T.call_extern("int32", "gd_address", T.address_of(Ds[0, 0, 0]))
                ones[0] = T.if_then_else(grid > 0, -1, 0)
                at = bx
                item[2] = T.call_extern("int32", "gd_int", T.address_of(ITEMS[0]), at * 4)
                item[3] = T.call_extern("int32", "gd_int", T.address_of(ITEMS[0]), at * 4 + 2)
                count = T.call_extern("int32", "gd_count", nitems, bx, grid)
                # for t0, keys in items: O = ((index_q @ keys.T > 0) * di) @ keys; DQ = w * O; DW = sum(index_q * O)
                for _ in T.serial(count):
                    item[0] = item[2]
                    item[1] = item[3]
                    at = T.min(at + grid, nitems - 1)
                    item[2] = T.call_extern("int32", "gd_int", T.address_of(ITEMS[0]), at * 4)
                    item[3] = T.call_extern("int32", "gd_int", T.address_of(ITEMS[0]), at * 4 + 2)
                    T.call_extern(
                        "handle", "gd_weights", w.access_ptr("w"), T.address_of(W[0]), (item[0] - q_base) * IP, nq
                    )
                    mainloop(Xs, Ys, S, P, O, x, address, ones, fullx, full, empty, v, item[1], tx)
                    for r, e in T.Parallel(128, E):
                        XO[r, e] = O[r, e] * T.cast(Xs[v[4], r, e], "float32")
                    T.reduce_sum(XO, dw, dim=1)
                    release_x(emptyx, v, tx)
                    T.call_extern(
                        "handle", f"gd_store_query<{E}, {IP}>", O.access_ptr("r"), w.access_ptr("r"),
                        dw.access_ptr("r"), T.address_of(DQ[0, 0]), T.address_of(DW[0]), item[0], I, ntok,
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
                    items = T.call_extern("int32", "gd_count", nitems, bx, grid)
                    for it in T.serial(items):
                        first = T.call_extern("int32", "gd_int", T.address_of(ITEMS[0]), (bx + it * grid) * 4)
                        key = T.call_extern("int32", "gd_int", T.address_of(ITEMS[0]), (bx + it * grid) * 4 + 1)
                        steps = T.call_extern("int32", "gd_int", T.address_of(ITEMS[0]), (bx + it * grid) * 4 + 2)
                        row = T.call_extern("int32", "gd_int", T.address_of(ITEMS[0]), (bx + it * grid) * 4 + 3)
                        row = (row + key) * 128 + (first & 127)
                        key = key * 128
                        first = (first - q_base) * IP
                        T.barrier_wait(emptyx[xs], xp)
                        T.tma_copy(IQ[first : first + 128, 0:E], Xs[xs, :, :], barrier=fullx[xs])
                        if T.shuffle_elect(32):
                            T.barrier_arrive(fullx[xs])
                        xs = xs + 1
                        if xs == X_STAGES:
                            xs = 0
                            xp = xp ^ 1
                        for _ in T.serial(steps):
                            T.barrier_wait(empty[ys], yp)
                            T.tma_copy(IK[key : key + 128, 0:E], Ys[ys, :, :], barrier=full[ys])
                            T.tma_copy(DI[row : row + TOKENS, 0:128], Ds[ys, :, :], barrier=full[ys])
                            if T.shuffle_elect(32):
                                T.barrier_arrive(full[ys])
                            key = key + 128
                            row = row + 128
                            ys = ys + 1
                            if ys == STAGES:
                                ys = 0
                                yp = yp ^ 1

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
                                          otherwise PART[slot·128 + r] = sum, for `build_reduce` to add in order
    """
    mainloop, release_x, STAGES = _template(E, IP, "key")
    TOKENS = 128 // IP
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
            Xs = T.alloc_shared((X_STAGES, 128, E), "bfloat16")
            Ys = T.alloc_shared((STAGES, 128, E), "bfloat16")
            Ds = T.alloc_shared((STAGES, TOKENS, 128), "bfloat16")
            Ws = T.alloc_shared((STAGES, 128), "float32")
            S = T.alloc_fragment((128, 128), "float32")
            P = T.alloc_fragment((128, 128), "bfloat16")
            O = T.alloc_fragment((128, E), "float32")
            fullx = T.alloc_barrier([1] * X_STAGES)
            emptyx = T.alloc_barrier([8] * X_STAGES)
            full = T.alloc_barrier([1] * STAGES)
            empty = T.alloc_barrier([8] * STAGES)
            tx = T.get_thread_binding()
            if tx < 256:
                T.set_max_nreg(REGISTERS[0], 1)
                v = T.alloc_local((6,), "int32")
                x = T.alloc_local((32,), "uint32")
                address = T.alloc_local((2,), "int32")
                ones = T.alloc_local((1,), "int32")
                item = T.alloc_local((4,), "int32")  # kt and slot; b_begin and b_end of the next item, loaded ahead
                at = T.alloc_var("int32")
                n = T.alloc_var("int32")
                count = T.alloc_var("int32")
                for i in list(range(6)):
                    v[i] = 0
                address[0] = T.call_extern("int32", "gd_address", T.address_of(Ds[0, 0, 0]))
                address[1] = T.call_extern("int32", "gd_address", T.address_of(Ws[0, 0]))
                ones[0] = T.if_then_else(grid > 0, -1, 0)
                at = bx
                item[2] = T.call_extern("int32", "gd_int", T.address_of(ITEMS[0]), at * 4 + 1)
                item[3] = T.call_extern("int32", "gd_int", T.address_of(ITEMS[0]), at * 4 + 2)
                count = T.call_extern("int32", "gd_count", nitems, bx, grid)
                # for kt, tokens in items: O = ((index_k @ index_q.T > 0) * (di * w).bfloat16()) @ index_q; DK += O
                for _ in T.serial(count):
                    n = T.call_extern(
                        "int32", "gd_steps", (item[2] * 128 - q_base) * IP, (item[3] * 128 - q_base) * IP, nq
                    )
                    item[0] = T.call_extern("int32", "gd_int", T.address_of(ITEMS[0]), at * 4)
                    item[1] = T.call_extern("int32", "gd_int", T.address_of(ITEMS[0]), at * 4 + 3)
                    at = T.min(at + grid, nitems - 1)
                    item[2] = T.call_extern("int32", "gd_int", T.address_of(ITEMS[0]), at * 4 + 1)
                    item[3] = T.call_extern("int32", "gd_int", T.address_of(ITEMS[0]), at * 4 + 2)
                    if n > 0:
                        mainloop(Xs, Ys, S, P, O, x, address, ones, fullx, full, empty, v, n, tx)
                        release_x(emptyx, v, tx)
                        T.call_extern(
                            "handle", f"gd_store_key<{E}>", O.access_ptr("r"), T.address_of(DK[0, 0]),
                            T.address_of(PART[0, 0]), item[0], item[1], nk,
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
                    items = T.call_extern("int32", "gd_count", nitems, bx, grid)
                    for it in T.serial(items):
                        key = T.call_extern("int32", "gd_int", T.address_of(ITEMS[0]), (bx + it * grid) * 4)
                        block = T.call_extern("int32", "gd_int", T.address_of(ITEMS[0]), (bx + it * grid) * 4 + 1)
                        steps = T.call_extern("int32", "gd_int", T.address_of(ITEMS[0]), (bx + it * grid) * 4 + 2)
                        first = (block * 128 - q_base) * IP
                        steps = T.call_extern("int32", "gd_steps", first, (steps * 128 - q_base) * IP, nq)
                        left = 0
                        if steps > 0:
                            T.barrier_wait(emptyx[xs], xp)
                            T.tma_copy(IK[key * 128 : key * 128 + 128, 0:E], Xs[xs, :, :], barrier=fullx[xs])
                            if T.shuffle_elect(32):
                                T.barrier_arrive(fullx[xs])
                            xs = xs + 1
                            if xs == X_STAGES:
                                xs = 0
                                xp = xp ^ 1
                        for _ in T.serial(steps):
                            if left == 0:
                                left = IP
                                row = T.call_extern("int32", "gd_int", T.address_of(BLOCKS[0]), block * 4)
                                row = (row + key) * 128
                                block = block + 1
                            T.barrier_wait(empty[ys], yp)
                            T.tma_copy(IQ[first : first + 128, 0:E], Ys[ys, :, :], barrier=full[ys])
                            T.tma_copy(DI[row : row + TOKENS, 0:128], Ds[ys, :, :], barrier=full[ys])
                            T.tma_copy(W[first : first + 128], Ws[ys, :], barrier=full[ys])
                            if T.shuffle_elect(32):
                                T.barrier_arrive(full[ys])
                            first = first + 128
                            row = row + TOKENS
                            left = left - 1
                            ys = ys + 1
                            if ys == STAGES:
                                ys = 0
                                yp = yp ^ 1

    return flash_indexer_gradient_key


def build_reduce(E):
    """Adds the partial sums of `build_key` to the gradient of index_k, in a fixed order.

        DK[kt·128 + r] += PART[slot_begin·128 + r] + ... + PART[(slot_end - 1)·128 + r]      (rows below S)

    E: index head width. Run-time arguments: DK [S, E] float32, PART [slots·128, E] float32, ITEMS [4·nitems] int32
    (kt, slot_begin, slot_end, 0) with every kt at most once, nitems int32.
    """
    ROWS = 1024 // E
    CTAS = 128 // ROWS
    nk, np, ni = T.dynamic("nk"), T.dynamic("np"), T.dynamic("ni")

    @T.prim_func
    def flash_indexer_gradient_reduce(
        DK: T.Tensor((nk, E), "float32"), PART: T.Tensor((np, E), "float32"), ITEMS: T.Tensor((ni,), "int32"),
        nitems: T.int32,
    ):  # fmt: skip
        with T.Kernel(CTAS, nitems, threads=256) as (bx, by):
            total = T.alloc_fragment((ROWS, E), "float32")
            row = T.alloc_var("int32")
            part = T.alloc_var("int32")
            slots = T.alloc_var("int32")
            left = T.alloc_var("int32")
            row = ITEMS[by * 4] * 128 + bx * ROWS
            part = ITEMS[by * 4 + 1] * 128 + bx * ROWS
            slots = ITEMS[by * 4 + 2] - ITEMS[by * 4 + 1]
            left = nk - row
            T.clear(total)
            # total = PART[slots].sum(0)
            for _ in T.serial(slots):
                for r, e in T.Parallel(ROWS, E):
                    total[r, e] = total[r, e] + PART[part + r, e]
                part = part + 128
            # DK[rows] += total
            for r, e in T.Parallel(ROWS, E):
                if r < left:
                    DK[row + r, e] = DK[row + r, e] + total[r, e]

    return flash_indexer_gradient_reduce
