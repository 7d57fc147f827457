"""Gradients of the indexer where each index head is distilled from its own attention head ("per_head").

    a[t,h,s] = scale · q[t,h]·k[s,g] - lse[t,h]                z[t,h,s] = index_q[t,h]·index_k[s]
    x[t,h,s] = w[t,h] · max(z, 0) - lsx[t,h]                   g[t,h,s] = (exp(x) - exp(a)) · [z > 0]      where seen
    d_index_q[t,h] = w · coef[t] · sum_s g·index_k[s]          `build_query`
    d_weights[t,h] = coef[t] · index_q[t,h] · (sum_s g·index_k[s])
    d_index_k[s]   = sum_t,h g·w·coef[t]·index_q[t,h]          `build_key`

Both kernels are one template. X = (X1, X2), 128 rows, stays in shared memory; tiles Y = (Y1, Y2), N rows, stream by:

    S = X1 Y1^T    Z = X2 Y2^T    P = f(S, Z) in bfloat16    O += P Y2

             X (stationary)                    Y (streamed)                      P
    query    queries: q and index_q of         keys: k and index_k of N keys     g
             128 // HG tokens, HG heads each
    key      keys: k and index_k of 128 keys   queries: N // HG tokens           g · w · coef

    warps 0-3, 4-7   64 rows of X each: S, Z, P [64, N] and O [64, E] in registers
    warp 8           feeds by TMA;
    warps 10, 11     in `build_key` they gather the numbers that belong to a tile's queries; else idle, as warp 9 is

    tensor cores     | S Z of tile i+1 | O += P Y2 of tile i | ...      of one warpgroup, while the other one
    everything else  |                 | f of tile i+1       |          is at its f

Rows of queries are (token, head) in one of two orders, see `attention`. Tiles that cross a query's interval are masked.
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
REGISTERS = (240, 24)  # consumers, producers
KEY_REGISTERS = (232, 40)  # a gathering producer needs more
SOURCE = source(__file__)

# scalars of the rows of a 128-row tile, as its accumulator's threads own them: two a thread, alike in the four of a row
ROW_LAYOUT = Fragment(
    [128],
    forward_thread_fn=lambda i, rep: (i // 16) * 32 + (i % 8) * 4 + rep,
    replicate=4,
    forward_index_fn=lambda i: (i % 16) // 8,
)


def _template(E, N, XS, Y2S, apply, mask):
    """The consumers' side of both kernels: macros (first, step, last).

    State v: 0 row tiles of X so far, 1 tiles of Y so far, 2 stage of Y2 of this tile, 3 its parity, 4 stage of the tile
    before, 5 masked tile of the item.
    """
    rows = T.GemmWarpPolicy.FullRow

    @T.macro
    def release(empty, stage, tx):
        T.sync_warp()
        if tx % 32 == 0:
            T.mbarrier_arrive(empty[stage])

    @T.macro
    def advance(v):
        v[4] = v[2]
        v[1] = v[1] + 1
        v[2] = v[2] + 1
        if v[2] == Y2S:
            v[2] = 0
            v[3] = v[3] ^ 1

    @T.macro
    def products(tiles, S, Z, bars, v, tx):
        X1s, X2s, Y1s, Y2s = tiles
        v[0] = T.call_extern("int32", "hg_opaque", v[0])
        T.barrier_wait(bars[0][v[1] % 2], v[1] // 2 % 2)
        T.barrier_wait(bars[2][v[2]], v[3])
        T.sync_threads(8 + tx // 128, 256)
        T.wgmma_gemm(X1s[v[0] % XS, :, :], Y1s[v[1] % 2, :, :], S, transpose_B=True, clear_accum=True, policy=rows)
        T.wgmma_gemm(X2s[v[0] % XS, :, :], Y2s[v[2], :, :], Z, transpose_B=True, clear_accum=True, policy=rows)

    # P of the item's first tile; O = 0
    @T.macro
    def first(tiles, S, Z, P, O, bars, v, tx, context):
        products(tiles, S, Z, bars, v, tx)
        T.clear(O)
        T.wait_wgmma(0)
        T.named_barrier_arrive(9 - tx // 128, 256)
        T.warpgroup_fence_operand(S, num_regs=N // 2)
        T.warpgroup_fence_operand(Z, num_regs=N // 2)
        release(bars[1], v[1] % 2, tx)
        apply(S, Z, v, context)
        mask(S, v, context)
        T.call_extern("handle", f"hg_pack<{N}>", P.access_ptr("w"), S.access_ptr("r"))
        advance(v)

    # O += P Y2 of the tile before; then P of this one
    @T.macro
    def step(tiles, S, Z, P, O, bars, v, tx, context, masked):
        products(tiles, S, Z, bars, v, tx)
        T.wgmma_gemm(P, tiles[3][v[4], :, :], O, policy=rows)
        T.named_barrier_arrive(9 - tx // 128, 256)
        T.wait_wgmma(1)
        T.warpgroup_fence_operand(S, num_regs=N // 2)
        T.warpgroup_fence_operand(Z, num_regs=N // 2)
        release(bars[1], v[1] % 2, tx)
        apply(S, Z, v, context)
        if masked:
            mask(S, v, context)
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(O, num_regs=E // 2)
        release(bars[3], v[4], tx)
        T.call_extern("handle", f"hg_pack<{N}>", P.access_ptr("w"), S.access_ptr("r"))
        advance(v)

    @T.macro
    def last(tiles, P, O, bars, v, tx):
        T.wgmma_gemm(P, tiles[3][v[4], :, :], O, policy=rows)
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(O, num_regs=E // 2)
        release(bars[3], v[4], tx)

    return first, step, last, release


def rows_of(HG, R):
    """How a tile of R rows of queries is copied: macro load(source, target, slot, full, width, t0, g, H)."""
    TOKENS = R // HG
    TOKEN_MAJOR = HG > TOKENS
    BOX, BOXES = (HG, TOKENS) if TOKEN_MAJOR else (TOKENS, HG)

    def place(t0, g, b, H):
        return ((t0 + b) * H + g * HG, 0) if TOKEN_MAJOR else (t0, g * HG + b)

    @T.macro
    def load(source, target, slot, full, width, t0, g, H):
        panel = min(width, 64)
        for b in list(range(BOXES)):
            for c in list(range(width // panel)):
                T.tma_copy(
                    source[
                        place(t0, g, b, H)[0] : place(t0, g, b, H)[0] + BOX,
                        place(t0, g, b, H)[1] * width + c * panel : place(t0, g, b, H)[1] * width + c * panel + panel,
                    ],
                    target[slot, b * BOX : b * BOX + BOX, c * panel : c * panel + panel],
                    barrier=full[slot],
                )

    return load, TOKENS, TOKEN_MAJOR


def build_query(D, E, HG, N, XS, Y2S):
    """Gradients of index_q and of the weights.

    D, E: head widths of the attention (a multiple of 64) and of the indexer (32, 64, 128). HG: heads of a key head. N:
    keys of a tile. XS, Y2S: row tiles and tiles of index_k in shared memory. Run-time arguments:

        Q     [T·H, D], IQ [T·H, E] bfloat16; the same memory is read as [T, H·D], [T, H·E] where HG <= 128 // HG
        K     [S, G·D], IK [S, E] bfloat16
        W, LSE, LSX  [T·H] float32          weights; logsumexps of a and x; not read for a token that sees nothing
        COEF  [T] float32                   factor of a token's gradients
        KS, KE [T] int32, ITEMS [8·nitems]  as in `attention.build`, with tiles of N keys
        DQ    [T·H, E] bfloat16, DW [T·H] float32     written
        H, tokens, nitems, grid int32; scale float32, times log2(e)     CTA c of `grid` takes the items c, c + grid, ...
    """
    load, _TOKENS, TOKEN_MAJOR = rows_of(HG, 128)
    nq, nk, nt, nx, ni, kd = (T.dynamic(x) for x in ("nq", "nk", "nt", "nx", "ni", "kd"))
    qd, qe = (D, E) if TOKEN_MAJOR else (T.dynamic("qd"), T.dynamic("qe"))

    @T.macro
    def apply(S, Z, v, context):
        x, _limits, _item, _KS, _KE, _tokens, scale = context
        T.call_extern("handle", f"hq_apply<{N}>", S.access_ptr("rw"), Z.access_ptr("r"), x.access_ptr("r"), scale)

    @T.macro
    def mask(S, v, context):
        _x, limits, item, KS, KE, tokens, _scale = context
        T.call_extern(
            "handle", f"hq_limits<{HG}>", limits.access_ptr("w"), item, T.address_of(KS[0]), T.address_of(KE[0]), tokens
        )
        T.call_extern("handle", f"hq_mask<{N}>", S.access_ptr("rw"), limits.access_ptr("r"), item, v[5])

    first, step, last, release = _template(E, N, XS, Y2S, apply, mask)

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
            Y1s = T.alloc_shared((2, N, D), "bfloat16")
            Y2s = T.alloc_shared((Y2S, N, E), "bfloat16")
            Is = T.alloc_shared((XS, 8), "int32")
            S = T.alloc_fragment((128, N), "float32")
            Z = T.alloc_fragment((128, N), "float32")
            P = T.alloc_fragment((128, N), "bfloat16")
            O = T.alloc_fragment((128, E), "float32")
            XO = T.alloc_fragment((128, E), "float32")
            dw = T.alloc_fragment((128,), "float32")
            T.annotate_layout({dw: ROW_LAYOUT})
            fullx = T.alloc_barrier([1] * XS)
            emptyx = T.alloc_barrier([8] * XS)
            full1 = T.alloc_barrier([1] * 2)
            empty1 = T.alloc_barrier([8] * 2)
            full2 = T.alloc_barrier([1] * Y2S)
            empty2 = T.alloc_barrier([8] * Y2S)
            tx = T.get_thread_binding()
            if tx < 256:
                T.set_max_nreg(REGISTERS[0], 1)
                v = T.alloc_local((6,), "int32")
                x = T.alloc_local((6,), "float32")
                limits = T.alloc_local((4,), "int32")
                item = T.alloc_var("int32")
                items = T.alloc_var("int32")
                steps = T.alloc_var("int32")
                tiles = (X1s, X2s, Y1s, Y2s)
                bars = (full1, empty1, full2, empty2)

                context = (x, limits, item, KS, KE, tokens, scale)
                for i in list(range(6)):
                    v[i] = 0
                if tx >= 128:
                    T.named_barrier_arrive(8, 256)
                items = T.call_extern("int32", "hg_count", nitems, bx, grid)
                for _ in T.serial(items):
                    item = T.call_extern("int32", "hg_address", T.address_of(Is[0, 0])) + v[0] % XS * 32
                    T.barrier_wait(fullx[v[0] % XS], v[0] // XS % 2)
                    T.call_extern(
                        "handle", f"hq_numbers<{HG}>", x.access_ptr("w"), limits.access_ptr("w"), item,
                        T.address_of(LSE[0]), T.address_of(LSX[0]), T.address_of(W[0]), T.address_of(COEF[0]),
                        T.address_of(KS[0]), T.address_of(KE[0]), tokens, H,
                    )  # fmt: skip
                    v[5] = 0
                    first(tiles, S, Z, P, O, bars, v, tx, context)
                    steps = T.call_extern("int32", "hq_masked", item) - 1
                    for i in T.serial(steps):
                        v[5] = i + 1
                        step(tiles, S, Z, P, O, bars, v, tx, context, True)
                    steps = T.call_extern("int32", "hq_whole", item)
                    for _ in T.serial(steps):
                        step(tiles, S, Z, P, O, bars, v, tx, context, False)
                    last(tiles, P, O, bars, v, tx)
                    for r, e in T.Parallel(128, E):
                        XO[r, e] = O[r, e] * T.cast(X2s[v[0] % XS, r, e], "float32")
                    T.reduce_sum(XO, dw, dim=1)
                    T.call_extern(
                        "handle", f"hq_store<{HG}, {E}>", O.access_ptr("r"), dw.access_ptr("r"), x.access_ptr("r"),
                        item, T.address_of(COEF[0]), T.address_of(DQ[0, 0]), T.address_of(DW[0]), tokens, H,
                    )  # fmt: skip
                    release(emptyx, v[0] % XS, tx)
                    v[0] = v[0] + 1
            else:
                T.set_max_nreg(REGISTERS[1], 0)
                if tx < 288:
                    s1 = T.alloc_var("int32", 0)
                    p1 = T.alloc_var("int32", 1)
                    s2 = T.alloc_var("int32", 0)
                    p2 = T.alloc_var("int32", 1)
                    xs = T.alloc_var("int32", 0)
                    xp = T.alloc_var("int32", 1)
                    key = T.alloc_var("int32")
                    g = T.alloc_var("int32")
                    t0 = T.alloc_var("int32")
                    slot = T.alloc_var("int32")
                    field = T.alloc_var("int32")  # of the item, one a lane
                    rows = T.alloc_var("int32")
                    count = T.alloc_var("int32")
                    count = T.call_extern("int32", "hg_count", nitems, bx, grid)
                    for it in T.serial(count):
                        field = T.call_extern("int32", "it_lane", T.address_of(ITEMS[0]), bx + it * grid)
                        t0 = T.call_extern("int32", "it_pick", field, 0)
                        g = T.call_extern("int32", "it_pick", field, 1)
                        rows = T.call_extern("int32", "it_pick", field, 3)
                        slot = T.call_extern("int32", "hg_address", T.address_of(Is[0, 0])) + xs * 32
                        T.barrier_wait(emptyx[xs], xp)
                        T.call_extern("handle", "it_put", slot, field)
                        load(Q, X1s, xs, fullx, D, t0, g, H)
                        load(IQ, X2s, xs, fullx, E, t0, g, H)
                        if T.shuffle_elect(32):
                            T.barrier_arrive(fullx[xs])
                        xs = xs + 1
                        if xs == XS:
                            xs = 0
                            xp = xp ^ 1
                        for i in T.serial(rows):
                            key = T.call_extern("int32", f"it_key<{N}>", field, i)
                            T.barrier_wait(empty1[s1], p1)
                            T.tma_copy(K[key : key + N, g * D : g * D + D], Y1s[s1, :, :], barrier=full1[s1])
                            if T.shuffle_elect(32):
                                T.barrier_arrive(full1[s1])
                            T.barrier_wait(empty2[s2], p2)
                            T.tma_copy(IK[key : key + N, 0:E], Y2s[s2, :, :], barrier=full2[s2])
                            if T.shuffle_elect(32):
                                T.barrier_arrive(full2[s2])
                            s1 = s1 + 1
                            if s1 == 2:
                                s1 = 0
                                p1 = p1 ^ 1
                            s2 = s2 + 1
                            if s2 == Y2S:
                                s2 = 0
                                p2 = p2 ^ 1

    return flash_indexer_head_gradient_query


def build_key(D, E, HG, N, XS, Y2S):
    """Gradient of index_k, summed over a range of queries for each tile of 128 keys; g·w·coef is rounded once.

    D, E, HG and the arrays as in `build_query`, with N (64 or 128) rows of N // HG tokens in a tile. Further:

        DK    [S, E] float32               d_index_k, added to
        PART  [slots·128, E] float32       partial sums, written
        ITEMS [8·nitems] int32             (kt, first, end, whole, end of whole, slot, 0, 0): key tile kt, row tiles
                                           first .. end - 1, not empty; those in whole .. end of whole - 1 see all of
                                           kt.
                                           slot < 0: DK[kt·128 + r] += sum; otherwise PART[slot·128 + r] = sum
        G int32                            key heads, whose queries follow one another in an item
    """
    load, TOKENS, TOKEN_MAJOR = rows_of(HG, N)
    nq, nk, nt, nx, ni, kd, np = (T.dynamic(x) for x in ("nq", "nk", "nt", "nx", "ni", "kd", "np"))
    qd, qe = (D, E) if TOKEN_MAJOR else (T.dynamic("qd"), T.dynamic("qe"))

    @T.macro
    def apply(S, Z, v, context):
        numbers, _ITEMS, _item, scale = context
        T.call_extern(
            "handle", f"hk_apply<{N}>", S.access_ptr("rw"), Z.access_ptr("r"), numbers + v[2] * (24 * N), scale
        )

    @T.macro
    def mask(S, v, context):
        numbers, ITEMS, item, _scale = context
        T.call_extern(
            "handle", f"hk_mask<{N}>", S.access_ptr("rw"), numbers + v[2] * (24 * N), T.address_of(ITEMS[0]), item
        )

    first, step, last, release = _template(E, N, XS, Y2S, apply, mask)

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
            Ns = T.alloc_shared((Y2S, 6 * N), "float32")
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
            if TOKENS * HG < N:  # padding rows of index_q: no copy reaches them, a product would read them
                for z, r, e in T.Parallel(Y2S, N, E):
                    Y2s[z, r, e] = T.cast(0.0, "bfloat16")
                T.fence_proxy_async()
                T.sync_threads()
            if tx < 256:
                T.set_max_nreg(KEY_REGISTERS[0], 1)
                v = T.alloc_local((6,), "int32")
                item = T.alloc_var("int32")
                items = T.alloc_var("int32")
                steps = T.alloc_var("int32")
                numbers = T.alloc_var("int32")
                tiles = (X1s, X2s, Y1s, Y2s)
                bars = (full1, empty1, full2, empty2)

                context = (numbers, ITEMS, item, scale)
                for i in list(range(6)):
                    v[i] = 0
                numbers = T.call_extern("int32", "hg_address", T.address_of(Ns[0, 0]))
                if tx >= 128:
                    T.named_barrier_arrive(8, 256)
                items = T.call_extern("int32", "hg_count", nitems, bx, grid)
                for it in T.serial(items):
                    T.barrier_wait(fullx[v[0] % XS], v[0] // XS % 2)
                    item = (bx + it * grid) * 8
                    first(tiles, S, Z, P, O, bars, v, tx, context)
                    for g in T.serial(G):
                        if g > 0:
                            T.barrier_wait(fullx[v[0] % XS], v[0] // XS % 2)
                        steps = T.call_extern("int32", "hk_masked_left", T.address_of(ITEMS[0]), item, g)
                        for _ in T.serial(steps):
                            step(tiles, S, Z, P, O, bars, v, tx, context, True)
                        steps = T.call_extern("int32", "hk_whole_left", T.address_of(ITEMS[0]), item, g)
                        for _ in T.serial(steps):
                            step(tiles, S, Z, P, O, bars, v, tx, context, False)
                        if g < G - 1:
                            release(emptyx, v[0] % XS, tx)
                            v[0] = v[0] + 1
                    last(tiles, P, O, bars, v, tx)
                    T.call_extern(
                        "handle", f"hk_store<{E}>", O.access_ptr("r"), T.address_of(ITEMS[0]), item,
                        T.address_of(DK[0, 0]), T.address_of(PART[0, 0]), nk,
                    )  # fmt: skip
                    release(emptyx, v[0] % XS, tx)
                    v[0] = v[0] + 1
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
                    count = T.call_extern("int32", "hg_count", nitems, bx, grid)
                    for it in T.serial(count):
                        key = T.call_extern("int32", "hk_field", T.address_of(ITEMS[0]), (bx + it * grid) * 8, 0) * 128
                        rows = T.call_extern("int32", "hk_rows", T.address_of(ITEMS[0]), (bx + it * grid) * 8)
                        for g in T.serial(G):
                            T.barrier_wait(emptyx[xs], xp)
                            T.tma_copy(K[key : key + 128, g * D : g * D + D], X1s[xs, :, :], barrier=fullx[xs])
                            T.tma_copy(IK[key : key + 128, 0:E], X2s[xs, :, :], barrier=fullx[xs])
                            if T.shuffle_elect(32):
                                T.barrier_arrive(fullx[xs])
                            xs = xs + 1
                            if xs == XS:
                                xs = 0
                                xp = xp ^ 1
                            for i in T.serial(rows):
                                t0 = (
                                    T.call_extern("int32", "hk_tile", T.address_of(ITEMS[0]), (bx + it * grid) * 8, i)
                                    * TOKENS
                                )
                                T.barrier_wait(empty1[s1], p1)
                                load(Q, Y1s, s1, full1, D, t0, g, H)
                                if T.shuffle_elect(32):
                                    T.barrier_arrive(full1[s1])
                                T.barrier_wait(empty2[s2], p2)
                                load(IQ, Y2s, s2, full2, E, t0, g, H)
                                if T.shuffle_elect(32):
                                    T.barrier_arrive(full2[s2])
                                s1 = s1 + 1
                                if s1 == 2:
                                    s1 = 0
                                    p1 = p1 ^ 1
                                s2 = s2 + 1
                                if s2 == Y2S:
                                    s2 = 0
                                    p2 = p2 ^ 1

                elif tx >= 320:
                    s2 = T.alloc_var("int32", 0)
                    p2 = T.alloc_var("int32", 1)
                    rows2 = T.alloc_var("int32")
                    numbers2 = T.alloc_var("int32")
                    count2 = T.alloc_var("int32")
                    at2 = T.alloc_var("int32")
                    count2 = T.call_extern("int32", "hg_count", nitems, bx, grid)
                    numbers2 = T.call_extern("int32", "hg_address", T.address_of(Ns[0, 0]))
                    for it in T.serial(count2):
                        at2 = (bx + it * grid) * 8
                        rows2 = T.call_extern("int32", "hk_rows", T.address_of(ITEMS[0]), at2)
                        for g in T.serial(G):
                            for i in T.serial(rows2):
                                T.barrier_wait(empty2[s2], p2)
                                T.call_extern(
                                    "handle", f"hk_gather<{HG}, {N}>", numbers2 + s2 * (24 * N),
                                    T.call_extern("int32", "hk_tile", T.address_of(ITEMS[0]), at2, i) * TOKENS,
                                    g, T.address_of(LSE[0]), T.address_of(LSX[0]), T.address_of(W[0]),
                                    T.address_of(COEF[0]), T.address_of(KS[0]), T.address_of(KE[0]), tokens, H,
                                )  # fmt: skip
                                T.mbarrier_arrive(full2[s2])
                                s2 = s2 + 1
                                if s2 == Y2S:
                                    s2 = 0
                                    p2 = p2 ^ 1

    return flash_indexer_head_gradient_key
