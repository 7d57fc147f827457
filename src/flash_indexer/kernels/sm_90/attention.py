"""Attention forward with its logsumexp, and in the same pass the KL of each head's index scores to its attention.

    a[t,h,s] = scale · q[t,h]·k[s,g]          x[t,h,s] = w[t,h] · max(index_q[t,h]·index_k[s], 0)
    out[t,h] = sum_s exp(a - lse) · v[s,g]    lse[t,h] = log sum_s exp(a)    lsx[t,h] = log sum_s exp(x)
    kl[t,h]  = sum_s exp(a - lse) · (a - x) - lse + lsx                      over key_start[t] <= s < key_end[t]

A tile of 128 rows holds HG heads (those of one key head g) of 128 // HG tokens, so that rows share their keys:

    HG > 128 // HG    row = token · HG + head      one copy a token
    otherwise         row = head · TOKENS + token  one copy a head

    warps 0-3, 4-7   64 rows each: S = q k^T and X = index_q index_k^T [64, BN], P [64, BN] and O [64, V] in registers
    warp 8           feeds by TMA: the row tile of the next item while this one is under way; keys and values in rings
    warps 10, 11     gather the numbers that belong to an item's rows; warp 9 is idle

    tensor cores     | S X of tile i+1 | O += P v of tile i | S X of i+2 ...      of one warpgroup, while the other one
    everything else  |                 | softmaxes of i+1   |                     is at its softmaxes

The last product of an item shares its turn with the first ones of the next item, whose queries came long before;
outputs are scaled and stored beside them. Where row tiles have one place only (QS = 1), items follow one another.

Only key tiles that cross some row's interval are masked, and they come first: every row that sees a key sees one there.
Softmaxes of the first one visit its first half alone where no row sees more. Shifts are in powers of two: m, of a, is
the maximum of the masked tiles, n, of x, that of the first tile that the row sees. They are raised after the fact,
where a sum has passed 1e18: see `redo`, which forms the tile's logits once more. Without an indexer this is found out
beside the next tile's first product. A row that has seen nothing yet has both at UNSET: every term is then zero.
"""

import tilelang
import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from flash_indexer.kernels.device.sources import source

PASS_CONFIGS = {
    tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True,
    tilelang.PassConfigKey.TL_DISABLE_BUFFER_INIT_CHECK: True,
    tilelang.PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
    tilelang.PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
}
REGISTERS = (240, 24)  # consumers, producer
SOURCE = source(__file__)


def build(D, V, E, HG, BN, QS, TMA_STORE):
    """Attention of HG heads a key head, queries and keys of width D, values of width V (multiples of 64).

    E: index head width (32, 64 or 128); 0 leaves the indexer out. BN: keys of a tile. QS: row tiles in shared memory, 1
    or 2. TMA_STORE: whether outputs leave through shared memory, in the place of their queries (V <= D, QS = 2), or
    from registers. V = 0 leaves values and output out, and gives the entropy of each row's attention instead (E > 0,
    TMA_STORE = 0). Run-time arguments, with TOKENS = 128 // HG:

        Q     [T·H, D] bfloat16; the same memory is read as [T, H·D] where HG <= TOKENS
        K     [S, G·D], VAL [S, G·V] bfloat16
        IQ    as Q with E, IK [S, E] bfloat16, W [T·H] float32   index_q, index_k, weights; not read where E is 0
        KS    [T], KE [T] int32             visible keys of each token
        ITEMS [8·nitems] int32              (t0, g, first, tiles, right, left, seen, 0): TOKENS tokens from t0, heads of
                                            g; key tile j holds the keys first - j·BN + 0 .. BN-1, j = 0 .. tiles - 1;
                                            those with j < right or j >= left are masked, 1 <= right <= left <= tiles.
                                            Where some row sees its last key in tile j, j < right. No row
                                            sees more of tile 0 than its first `seen` keys
        OUT   as Q with V, bfloat16; LSE, LSX, KL [T·H] float32     written; LSX and KL where E is not 0. Where V is 0
                                            VAL is not read, and OUT is the entropy, [T·H] float32
        H, tokens, nitems, grid int32, scale float32        CTA c of `grid` takes the items c, c + grid, ...; scale
                                                            times log2(e)
    """
    TOKENS = 128 // HG
    BOX, BOXES = (HG, TOKENS) if HG > TOKENS else (TOKENS, HG)
    PIECE = min(BOX, 64)  # rows of one store
    NARROW = BN // 32 * 16
    ENTROPY = int(V == 0)
    assert V or (E and not TMA_STORE)
    assert not TMA_STORE or (V <= D and QS == 2 and 64 % PIECE == 0 and BOX % PIECE == 0 and BOX * BOXES == 128)
    nq, nk, nt, nx, ni = T.dynamic("nq"), T.dynamic("nk"), T.dynamic("nt"), T.dynamic("nx"), T.dynamic("ni")
    kd, kv = T.dynamic("kd"), T.dynamic("kv")
    TOKEN_MAJOR = HG > TOKENS
    qd, qv = (D, V) if TOKEN_MAJOR else (T.dynamic("qd"), T.dynamic("qv"))
    index_q = (nq, E if TOKEN_MAJOR else T.dynamic("qe")) if E else (T.dynamic("n0"), T.dynamic("n1"))
    index_k = (nk, E) if E else (T.dynamic("n2"), T.dynamic("n3"))
    output, output_type = ((nx,), "float32") if ENTROPY else ((nq, qv), "bfloat16")

    @T.macro
    def release(empty, stage, tx):
        T.sync_warp()
        if tx % 32 == 0:
            T.mbarrier_arrive(empty[stage])

    # box b of the row tile: rows b·BOX .. of shared memory; global row, column (in heads)
    def box_row(t0, g, b, H):
        return (t0 + b) * H + g * HG if TOKEN_MAJOR else t0

    def box_head(g, b):
        return 0 if TOKEN_MAJOR else g * HG + b

    @T.macro
    def load_rows(source, target, slot, full, width, t0, g, H):
        panel = min(width, 64)
        for b in list(range(BOXES)):
            for c in list(range(width // panel)):
                T.tma_copy(
                    source[
                        box_row(t0, g, b, H) : box_row(t0, g, b, H) + BOX,
                        box_head(g, b) * width + c * panel : box_head(g, b) * width + c * panel + panel,
                    ],
                    target[slot, b * BOX : b * BOX + BOX, c * panel : c * panel + panel],
                    barrier=full[slot],
                )

    # the row tile of the item whose fields the lanes hold
    @T.macro
    def feed_rows(Q, IQ, Qs, IQs, qfull, qempty, qs, qp, slots, field, H):
        T.barrier_wait(qempty[qs], qp)
        T.call_extern("handle", "it_put", slots + qs * 2080, field)
        t0 = T.call_extern("int32", "it_pick", field, 0)
        g = T.call_extern("int32", "it_pick", field, 1)
        load_rows(Q, Qs, qs, qfull, D, t0, g, H)
        if E:
            load_rows(IQ, IQs, qs, qfull, E, t0, g, H)
        if T.shuffle_elect(32):
            T.barrier_arrive(qfull[qs])

    # S = q k^T and X = index_q index_k^T of row tile v[1] and key tile v[0]
    @T.macro
    def logits(S, X, at, v):
        T.call_extern(
            "handle", f"at_logits<{D}, {E}, {BN}, {QS}>", S.access_ptr("rw"), X.access_ptr("rw"), at[0], at[1], at[3],
            at[4], v[1], v[0],
        )  # fmt: skip

    # O += P v of key tile v[0] - 1
    @T.macro
    def values(O, P, at, v):
        if V:
            T.call_extern("handle", f"at_values<{BN}, {V}>", O.access_ptr("rw"), P.access_ptr("rw"), at[2], v[0] + 1)

    @T.macro
    def pack(N, S, P):
        if V:
            T.call_extern("handle", f"at_pack<{N}>", P.access_ptr("w"), S.access_ptr("r"))

    @T.macro
    def rescale(O, by):
        if V:
            T.call_extern("handle", f"at_scale<{V}>", O.access_ptr("rw"), by.access_ptr("r"))

    @T.macro
    def values_ready(bars, v):
        if V:
            T.barrier_wait(bars[2][(v[0] + 1) % 2], (v[0] - 1) // 2 % 2)

    @T.macro
    def values_done(O, bars, v, tx):
        if V:
            T.warpgroup_fence_operand(O, num_regs=V // 2)
            release(bars[3], (v[0] + 1) % 2, tx)

    @T.macro
    def softmax(N, S, X, sums, backup, scale, ready):
        m, n, w, l, _y, y_tile, c, d, _alpha = sums
        T.call_extern(
            "handle", f"at_softmax<{N}, {E}, {ENTROPY}, {ready}>", S.access_ptr("rw"), X.access_ptr("rw"),
            m.access_ptr("r"), n.access_ptr("r"), w.access_ptr("r"), l.access_ptr("rw"), y_tile.access_ptr("w"),
            c.access_ptr("rw"), d.access_ptr("rw"), backup, scale,
        )  # fmt: skip

    # P of tile 0, of which no row sees more than the first N keys
    @T.macro
    def first(N, S, X, P, sums, backup, item, limits, scale):
        m, n, w, _l, y, y_tile, _c, _d, _alpha = sums
        T.call_extern(
            "handle", f"at_mask<{N}>", S.access_ptr("rw"), m.access_ptr("rw"), limits.access_ptr("r"), item, 0, scale
        )
        if E:
            T.call_extern(
                "handle", f"at_mask_index<{N}>", X.access_ptr("rw"), n.access_ptr("rw"), w.access_ptr("r"),
                limits.access_ptr("r"), item, 0,
            )  # fmt: skip
        softmax(N, S, X, sums, backup, scale, "true")
        if E:
            T.call_extern("handle", "at_total", y.access_ptr("rw"), y_tile.access_ptr("r"))
        pack(N, S, P)
        if V:
            for j in list(range(N // 4, BN // 4)):
                P[j] = T.cast(0, "uint32")

    @T.macro
    def raise_index(X, sums):
        _m, n, _w, l, y, y_tile, c, _d, _alpha = sums
        T.call_extern(
            "handle", f"at_raise_index<{BN}>", X.access_ptr("rw"), n.access_ptr("rw"), l.access_ptr("r"),
            y.access_ptr("rw"), c.access_ptr("rw"), y_tile.access_ptr("rw"),
        )  # fmt: skip

    # P of the i-th tile that is not masked, with shifts that suit it
    @T.macro
    def redo(S, X, P, O, sums, backup, item, Q, K, tokens, H, scale, i):
        m, _n, _w, l, _y, _y_tile, c, d, alpha = sums
        T.call_extern(
            "handle", f"at_redo<{BN}, {D}, {V}, {HG}, {E}, {ENTROPY}>", S.access_ptr("rw"), X.access_ptr("r"),
            O.access_ptr("rw"), m.access_ptr("rw"), l.access_ptr("rw"), c.access_ptr("rw"), d.access_ptr("rw"),
            alpha.access_ptr("w"), backup, scale, item, i, T.address_of(Q[0, 0]), T.address_of(K[0, 0]), tokens, H,
        )  # fmt: skip
        pack(BN, S, P)

    # O += P v of the tile before; then P of tile i of the masked ones, or of the others
    @T.macro
    def step(S, X, P, O, at, bars, v, sums, backup, item, limits, Q, K, tokens, H, scale, tx, i, masked):
        kfull, kempty, _vfull, _vempty = bars
        m, n, w, l, y, y_tile, c, d, alpha = sums
        T.barrier_wait(kfull[v[0] % 2], v[0] // 2 % 2)
        T.sync_threads(8 + tx // 128, 256)
        logits(S, X, at, v)
        if not E and not masked:
            v[2] = T.call_extern("int32", f"at_over<{E}>", l.access_ptr("r"), y_tile.access_ptr("r"))
            if v[2] != 0:  # for this warp alone: it can't issue the warpgroup's products again
                T.wait_wgmma(0)
                T.warpgroup_fence_operand(S, num_regs=BN // 2)
                redo(S, X, P, O, sums, backup, item, Q, K, tokens, H, scale, i - 1)
                T.call_extern(
                    "handle", f"at_again<{BN}, {D}, {HG}>", S.access_ptr("w"), item, i, T.address_of(Q[0, 0]),
                    T.address_of(K[0, 0]), tokens, H,
                )  # fmt: skip
        values_ready(bars, v)
        values(O, P, at, v)
        T.named_barrier_arrive(9 - tx // 128, 256)
        T.wait_wgmma((1 if E else 0) + (1 if V else 0))
        T.warpgroup_fence_operand(S, num_regs=BN // 2)
        if masked:
            T.call_extern("handle", "at_limits", limits.access_ptr("w"), item + 32)
            T.call_extern(
                "handle", f"at_mask<{BN}>", S.access_ptr("rw"), m.access_ptr("rw"), limits.access_ptr("r"), item, i,
                scale,
            )  # fmt: skip
            T.call_extern(
                "handle", f"at_raise<{BN}, {E}, {ENTROPY}>", S.access_ptr("r"), m.access_ptr("rw"), l.access_ptr("rw"),
                c.access_ptr("rw"), d.access_ptr("rw"), alpha.access_ptr("w"), scale,
            )  # fmt: skip
        if E:
            T.wait_wgmma(1 if V else 0)
            T.warpgroup_fence_operand(X, num_regs=BN // 2)
        release(kempty, v[0] % 2, tx)
        if masked and E:
            T.call_extern(
                "handle", f"at_mask_index<{BN}>", X.access_ptr("rw"), n.access_ptr("rw"), w.access_ptr("r"),
                limits.access_ptr("r"), item, i,
            )  # fmt: skip
        softmax(BN, S, X, sums, backup, scale, "true" if masked else "false")
        if V:
            T.wait_wgmma(0)
        values_done(O, bars, v, tx)
        v[0] = v[0] + 1
        if masked:
            rescale(O, alpha)
        pack(BN, S, P)
        if E:
            v[2] = T.call_extern("int32", f"at_over<{E}>", l.access_ptr("r"), y_tile.access_ptr("r"))
            if v[2] != 0:
                if not masked:
                    if v[2] % 2 == 1:
                        redo(S, X, P, O, sums, backup, item, Q, K, tokens, H, scale, i)
                if v[2] >= 2:
                    raise_index(X, sums)
            T.call_extern("handle", "at_total", y.access_ptr("rw"), y_tile.access_ptr("r"))

    # S and X of tile 0 of the next item, or of what lies there after the last one
    @T.macro
    def begin(S, X, at, v, qfull, kfull, more):
        if more:
            T.barrier_wait(qfull[v[1] % QS], v[1] // QS % 2)
            T.barrier_wait(kfull[v[0] % 2], v[0] // 2 % 2)
        logits(S, X, at, v)

    @T.macro
    def finish(sums, item, LSE, LSX, KL, ENT, tokens, H):
        m, n, _w, l, y, _y_tile, c, d, alpha = sums
        T.call_extern(
            "handle", f"at_finish<{HG}, {E}, {ENTROPY}>", alpha.access_ptr("w"), item, m.access_ptr("r"),
            n.access_ptr("r"), l.access_ptr("r"), y.access_ptr("r"), c.access_ptr("r"), d.access_ptr("r"),
            T.address_of(LSE[0]), T.address_of(LSX[0]), T.address_of(KL[0]), T.address_of(ENT[0]), tokens, H,
        )  # fmt: skip

    @T.macro
    def store_piece(Qs, OUT, slot, row, t0, g, panel, H, tokens):
        # row of the tile, first of PIECE; token-major: part of a token's heads, head-major: some tokens of one head
        if TOKEN_MAJOR:
            if t0 + row // HG < tokens:
                T.tma_copy(
                    Qs[slot, row : row + PIECE, panel * 64 : panel * 64 + 64],
                    OUT[
                        (t0 + row // HG) * H + g * HG + row % HG : (t0 + row // HG) * H + g * HG + row % HG + PIECE,
                        panel * 64 : panel * 64 + 64,
                    ],
                    leader_scope_threads=128,
                )
        else:
            if t0 + row % TOKENS < tokens:
                T.tma_copy(
                    Qs[slot, row : row + PIECE, panel * 64 : panel * 64 + 64],
                    OUT[
                        t0 + row % TOKENS : t0 + row % TOKENS + PIECE,
                        (g * HG + row // TOKENS) * V + panel * 64 : (g * HG + row // TOKENS) * V + panel * 64 + 64,
                    ],
                    leader_scope_threads=128,
                )

    @T.prim_func
    def flash_indexer_attention(
        Q: T.Tensor((nq, qd), "bfloat16"), K: T.Tensor((nk, kd), "bfloat16"), VAL: T.Tensor((nk, kv), "bfloat16"),
        IQ: T.Tensor(index_q, "bfloat16"), IK: T.Tensor(index_k, "bfloat16"), W: T.Tensor((nx,), "float32"),
        KS: T.Tensor((nt,), "int32"), KE: T.Tensor((nt,), "int32"), ITEMS: T.Tensor((ni,), "int32"),
        OUT: T.Tensor(output, output_type), LSE: T.Tensor((nx,), "float32"), LSX: T.Tensor((nx,), "float32"),
        KL: T.Tensor((nx,), "float32"), H: T.int32, tokens: T.int32, nitems: T.int32, grid: T.int32, scale: T.float32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=384) as bx:
            T.import_source(SOURCE)
            Qs = T.alloc_shared((QS, 128, D), "bfloat16")
            Ks = T.alloc_shared((2, BN, D), "bfloat16")
            Vs = T.alloc_shared((2, BN, V), "bfloat16") if V else Ks
            Is = T.alloc_shared((QS, 8 + 512), "int32")  # an item, and the numbers of its rows
            Bs = T.alloc_shared((1536 if ENTROPY else 1024,), "float32")
            S = T.alloc_local((BN // 2,), "float32")
            P = T.alloc_local((BN // 4,), "uint32") if V else S
            O = T.alloc_local((V // 2,), "float32") if V else S
            T.annotate_layout({x: make_swizzled_layout(x) for x in (Qs, Ks, Vs)})
            if E:
                IQs = T.alloc_shared((QS, 128, E), "bfloat16")
                IKs = T.alloc_shared((2, BN, E), "bfloat16")
                X = T.alloc_local((BN // 2,), "float32")
                T.annotate_layout({x: make_swizzled_layout(x) for x in (IQs, IKs)})
            else:
                IQs, IKs, X = Qs, Ks, S
            qfull = T.alloc_barrier([65] * QS)  # the copies, 64 gathering threads
            qempty = T.alloc_barrier([2 if TMA_STORE else 8] * QS)
            kfull = T.alloc_barrier([1] * 2)
            kempty = T.alloc_barrier([8] * 2)
            vfull = T.alloc_barrier([1] * 2)
            vempty = T.alloc_barrier([8] * 2)
            tx = T.get_thread_binding()
            if TOKENS * HG < 128:  # rows that no copy reaches: what lies there could make sums overflow
                for z, r, d in T.Parallel(QS, 128, D):
                    Qs[z, r, d] = T.cast(0.0, "bfloat16")
                if E:
                    for z, r, d in T.Parallel(QS, 128, E):
                        IQs[z, r, d] = T.cast(0.0, "bfloat16")
                T.fence_proxy_async()
                T.sync_threads()
            if tx < 256:
                T.set_max_nreg(REGISTERS[0], 1)
                v = T.alloc_local((3,), "int32")  # key tiles and items so far; which sums of a tile are too large
                limits = T.alloc_local((4,), "int32")
                m = T.alloc_local((2,), "float32")
                l = T.alloc_local((4,), "float32")
                alpha = T.alloc_local((2,), "float32")
                if E:
                    n = T.alloc_local((2,), "float32")
                    w = T.alloc_local((2,), "float32")
                    y = T.alloc_local((4,), "float32")
                    c = T.alloc_local((4,), "float32")
                    y_tile = T.alloc_local((4,), "float32")
                else:
                    n, w, y, c, y_tile = m, m, l, l, l
                d = T.alloc_local((4,), "float32") if ENTROPY else l
                bars = (kfull, kempty, vfull, vempty)
                sums = (m, n, w, l, y, y_tile, c, d, alpha)
                at = T.alloc_local((5,), "int32")  # addresses of q, k, v, index_q, index_k
                for j, x in enumerate((Qs, Ks, Vs, IQs, IKs)):
                    at[j] = T.call_extern("int32", "at_address", T.address_of(x[0, 0, 0]))
                backup = T.alloc_var("int32")
                backup = T.call_extern("int32", "at_address", T.address_of(Bs[0]))
                items = T.alloc_var("int32")
                item = T.alloc_var("int32")
                steps = T.alloc_var("int32")
                v[0] = 0
                v[1] = 0
                if tx >= 128:
                    T.named_barrier_arrive(8, 256)
                items = T.call_extern("int32", "at_count", nitems, bx, grid)
                T.sync_threads(8 + tx // 128, 256)
                begin(S, X, at, v, qfull, kfull, True)
                T.named_barrier_arrive(9 - tx // 128, 256)
                T.wait_wgmma(0)
                T.warpgroup_fence_operand(S, num_regs=BN // 2)
                if E:
                    T.warpgroup_fence_operand(X, num_regs=BN // 2)
                for it in T.serial(items):
                    # tile 0: S and X are there; P
                    item = T.call_extern("int32", "at_address", T.address_of(Is[0, 0])) + v[1] % QS * 2080
                    release(kempty, v[0] % 2, tx)
                    v[0] = v[0] + 1
                    T.call_extern("handle", "at_limits", limits.access_ptr("w"), item + 32)
                    if E:
                        T.call_extern("handle", "at_weights", w.access_ptr("w"), item + 32)
                    for h in [0, 1]:
                        m[h] = 1.0e30
                        if E:
                            n[h] = 1.0e30
                    for i in [0, 1, 2, 3]:
                        l[i] = 0.0
                        if E:
                            y[i] = 0.0
                            c[i] = 0.0
                        if ENTROPY:
                            d[i] = 0.0
                    for i in list(range(V // 2)):
                        O[i] = 0.0
                    steps = T.call_extern("int32", "at_field", item, 6)
                    if steps <= NARROW:
                        first(NARROW, S, X, P, sums, backup, item, limits, scale)
                    else:
                        first(BN, S, X, P, sums, backup, item, limits, scale)
                    if TMA_STORE:
                        if v[1] > 0:  # the last item's outputs have left
                            if T.shuffle_elect(128):
                                T.tma_store_wait(0)
                                T.mbarrier_arrive(qempty[(v[1] + 1) % 2])
                    steps = T.call_extern("int32", "at_masked", item)
                    for i in T.serial(steps):
                        step(
                            S, X, P, O, at, bars, v, sums, backup, item, limits, Q, K, tokens, H, scale, tx, i + 1, True
                        )
                    steps = T.call_extern("int32", "at_whole", item)
                    for i in T.serial(steps):
                        step(S, X, P, O, at, bars, v, sums, backup, item, limits, Q, K, tokens, H, scale, tx, i, False)
                    if not E:
                        v[2] = T.call_extern("int32", f"at_over<{E}>", l.access_ptr("r"), y_tile.access_ptr("r"))
                        if v[2] != 0:
                            redo(S, X, P, O, sums, backup, item, Q, K, tokens, H, scale, steps - 1)
                    # O += P v of the last tile, and tile 0 of the next item beside it
                    values_ready(bars, v)
                    if QS == 2:
                        v[1] = v[1] + 1
                        T.sync_threads(8 + tx // 128, 256)
                        values(O, P, at, v)
                        begin(S, X, at, v, qfull, kfull, it + 1 < items)
                        T.named_barrier_arrive(9 - tx // 128, 256)
                        finish(sums, item, LSE, LSX, KL, OUT if ENTROPY else LSE, tokens, H)
                        if V:
                            T.wait_wgmma(2 if E else 1)
                    else:
                        values(O, P, at, v)
                        finish(sums, item, LSE, LSX, KL, OUT if ENTROPY else LSE, tokens, H)
                        if V:
                            T.wait_wgmma(0)
                    values_done(O, bars, v, tx)
                    rescale(O, alpha)
                    if TMA_STORE:
                        t0 = T.call_extern("int32", "at_field", item, 0)
                        g = T.call_extern("int32", "at_field", item, 1)
                        T.call_extern("handle", f"at_stage<{V}>", O.access_ptr("r"), at[0] + (v[1] + 1) % 2 * (256 * D))
                        T.fence_proxy_async()
                        T.sync_threads(10 + tx // 128, 128)
                        for z in list(range(64 // PIECE)):
                            for p in list(range(V // 64)):
                                store_piece(Qs, OUT, (v[1] + 1) % 2, tx // 128 * 64 + z * PIECE, t0, g, p, H, tokens)
                    else:
                        if V:
                            T.call_extern(
                                "handle", f"at_store<{HG}, {V}>", O.access_ptr("r"), item, T.address_of(OUT[0, 0]),
                                tokens, H,
                            )  # fmt: skip
                        release(qempty, (v[1] + QS - 1) % QS, tx)
                    if QS == 1:
                        v[1] = v[1] + 1
                        T.sync_threads(8 + tx // 128, 256)
                        begin(S, X, at, v, qfull, kfull, it + 1 < items)
                        T.named_barrier_arrive(9 - tx // 128, 256)
                    T.wait_wgmma(0)
                    T.warpgroup_fence_operand(S, num_regs=BN // 2)
                    if E:
                        T.warpgroup_fence_operand(X, num_regs=BN // 2)
                if TMA_STORE:
                    if T.shuffle_elect(128):
                        T.tma_store_wait(0)
            else:
                T.set_max_nreg(REGISTERS[1], 0)
                if tx < 288:
                    st = T.alloc_var("int32", 0)
                    ph = T.alloc_var("int32", 1)
                    qs = T.alloc_var("int32", 0)
                    qp = T.alloc_var("int32", 1)
                    key = T.alloc_var("int32")
                    g = T.alloc_var("int32")
                    tiles = T.alloc_var("int32")
                    field = T.alloc_var("int32")  # of the item under way, one a lane
                    coming = T.alloc_var("int32")  # of the next one
                    count = T.alloc_var("int32")
                    slots = T.alloc_var("int32")
                    slots = T.call_extern("int32", "at_address", T.address_of(Is[0, 0]))
                    count = T.call_extern("int32", "at_count", nitems, bx, grid)
                    coming = T.call_extern("int32", "it_lane", T.address_of(ITEMS[0]), bx)
                    feed_rows(Q, IQ, Qs, IQs, qfull, qempty, qs, qp, slots, coming, H)
                    for it in T.serial(count):
                        field = coming
                        g = T.call_extern("int32", "it_pick", field, 1)
                        tiles = T.call_extern("int32", "it_pick", field, 3)
                        if it + 1 < count:
                            coming = T.call_extern("int32", "it_lane", T.address_of(ITEMS[0]), bx + (it + 1) * grid)
                        for i in T.serial(tiles):
                            key = T.call_extern("int32", f"it_key<{BN}>", field, i)
                            T.barrier_wait(kempty[st], ph)
                            T.tma_copy(K[key : key + BN, g * D : g * D + D], Ks[st, :, :], barrier=kfull[st])
                            if E:
                                T.tma_copy(IK[key : key + BN, 0:E], IKs[st, :, :], barrier=kfull[st])
                            if T.shuffle_elect(32):
                                T.barrier_arrive(kfull[st])
                            if V:
                                T.barrier_wait(vempty[st], ph)
                                T.tma_copy(VAL[key : key + BN, g * V : g * V + V], Vs[st, :, :], barrier=vfull[st])
                                if T.shuffle_elect(32):
                                    T.barrier_arrive(vfull[st])
                            st = st + 1
                            if st == 2:
                                st = 0
                                ph = ph ^ 1
                            if i == (T.min(tiles - 1, 2) if QS == 2 else tiles - 1):
                                qs = qs + 1
                                if qs == QS:
                                    qs = 0
                                    qp = qp ^ 1
                                if it + 1 < count:
                                    feed_rows(Q, IQ, Qs, IQs, qfull, qempty, qs, qp, slots, coming, H)

                elif tx >= 320:
                    qs = T.alloc_var("int32", 0)
                    qp = T.alloc_var("int32", 1)
                    count = T.alloc_var("int32")
                    slots = T.alloc_var("int32")
                    slots = T.call_extern("int32", "at_address", T.address_of(Is[0, 0]))
                    count = T.call_extern("int32", "at_count", nitems, bx, grid)
                    for it in T.serial(count):
                        T.barrier_wait(qempty[qs], qp)
                        T.call_extern(
                            "handle", f"at_gather<{HG}, {E}>", slots + qs * 2080 + 32, T.address_of(ITEMS[0]),
                            bx + it * grid, T.address_of(KS[0]), T.address_of(KE[0]), T.address_of(W[0]), tokens, H,
                        )  # fmt: skip
                        T.mbarrier_arrive(qfull[qs])
                        qs = qs + 1
                        if qs == QS:
                            qs = 0
                            qp = qp ^ 1

    return flash_indexer_attention
