"""Scores summed over heads: of the teacher, sum_h exp(scale·q_h·k - lse_h), and of the indexer, sum_j w_j·ReLU(q_j·k).

    OUT[t, s] = sum_h f(Q[t, h] · K[s, h // HG]; L[t, h])        f of the mode, see `build`

One CTA computes one tile of 128 tokens by 128 keys after the other. The sum over heads is a register accumulator, so
any number of heads, and of heads a key head, runs the same code, and a score leaves the registers once.

    warps 0-3, 4-7   64 tokens each: A [64, 128] (the sum) and two logit accumulators S0, S1 [64, 128] in registers
    warp 8           one thread feeds two rings of 64-wide chunks of D by TMA: Q a head, K once a group
    warps 9-11       idle (registers are given to the consumers)

    tensor cores     | S1 = Q[h+1] K^T | S0 = Q[h+2] K^T | S1 = Q[h+3] K^T | ...
    everything else  | A += f(S0)      | A += f(S1)      | A += f(S0)      | ...

The stream of (tile, head) steps runs on across tiles: a tile is stored while the next one's first product is under
way. For wide heads (D = 576) the step is split into chunks: a chunk's stage is handed back as soon as its product is
done, and a slice of f runs under each chunk.
"""

import tilelang
import tilelang.language as T

from flash_indexer.kernels.device.sources import source

PASS_CONFIGS = {
    tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True,
    tilelang.PassConfigKey.TL_DISABLE_BUFFER_INIT_CHECK: True,
    tilelang.PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
    tilelang.PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
}
EXP, RELU, SUM = 0, 1, 2
LOG2E = 1.4426950408889634
STAGES = {
    32: (8, 4),
    64: (8, 4),
    96: (7, 6),
    128: (8, 4),
    192: (7, 6),
    256: (8, 5),
    576: (5, 9),
}  # of the Q and K rings
SOURCE = source(__file__)


def build(D, mode):
    """The kernel for head width D (64, 96, 128, 192, 256, 576; the indexer's 32).

    mode: EXP   f = exp(scale·x - L[t,h])      teacher, L = lse (natural log)
          RELU  f = L[t,h]·max(x, 0)           indexer, L = weights
          SUM   f = scale·x                    summed logits; L is not read

    Run-time arguments: Q [T, H·D] and K [S, G·D] bfloat16, L [T·H] float32, OUT [tiles·128, 128] float32, ITEMS int32
    (token, key, tile, 0) each: CTA c of `grid` takes items c, c + grid, ...; whole tiles are written, unmasked.
    Row 0 of Q and L is token qbase.
    """
    BK = 64 if D % 64 == 0 else 32
    NK = D // BK
    sliced = NK > 4
    QST, KST = STAGES[D]
    chunks = list(range(NK))
    slices = [(c * 16 // NK, (c + 1) * 16 // NK) for c in chunks]
    rows = T.GemmWarpPolicy.FullRow
    tq, hd, tk, gd = T.dynamic("tq"), T.dynamic("hd"), T.dynamic("tk"), T.dynamic("gd")
    nl, nr, ni = T.dynamic("nl"), T.dynamic("nr"), T.dynamic("ni")

    @T.macro
    def add(S, A, low, scale, first, last):
        T.call_extern(
            "handle", f"sc_add<{mode}, {first}, {last}>",
            S.access_ptr("r"), A.access_ptr("rw"), low.access_ptr("r"), scale,
        )  # fmt: skip

    @T.macro
    def advance(v, i, p, count):
        v[i] = v[i] + 1
        if v[i] == count:
            v[i] = 0
            v[p] = v[p] ^ 1

    # one arrival a warpgroup; K chunks go back with the last head of their group
    @T.macro
    def release(emptyq, emptyk, v, tx):
        if tx % 128 == 0:
            T.mbarrier_arrive(emptyq[v[4]])
            if v[9] > 0:
                T.mbarrier_arrive(emptyk[v[6]])
        advance(v, 4, 5, QST)
        advance(v, 6, 7, KST)

    # v: 0,1 q stage, parity; 2,3 k stage, parity; 4 q stage to release; 6 k stage to release; 5,7 unused parities;
    #    8 heads of the group done; 9 last head of its group; 10,11 k stage, parity at the group's start
    @T.macro
    def issue(Qs, Ks, S, SP, A, low, scale, fullq, emptyq, fullk, emptyk, v, HG, tx, prefix):
        v[2] = v[10]
        v[3] = v[11]
        v[6] = v[10]
        v[8] = v[8] + 1
        v[9] = 0
        if v[8] == HG:
            v[8] = 0
            v[9] = 1
        # S = Q[t, h] @ K[s, h // HG].T
        for c in chunks:
            T.barrier_wait(fullk[v[2]], v[3])
            T.barrier_wait(fullq[v[0]], v[1])
            T.wgmma_gemm(Qs[v[0], :, :], Ks[v[2], :, :], S, transpose_B=True, clear_accum=(c == 0), policy=rows)
            advance(v, 0, 1, QST)
            advance(v, 2, 3, KST)
            if sliced:
                if c > 0:
                    T.wait_wgmma(1)
                    release(emptyq, emptyk, v, tx)
                if not prefix:
                    add(SP, A, low, scale, slices[c][0], slices[c][1])
        if not sliced and not prefix:
            add(SP, A, low, scale, 0, 16)

    @T.macro
    def finish(S, emptyq, emptyk, v, tx):
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(S, num_regs=64)
        for _ in chunks if not sliced else [NK - 1]:
            release(emptyq, emptyk, v, tx)
        if v[9] > 0:
            v[10] = v[2]
            v[11] = v[3]

    # w: 0 item of the accumulator, 1 its head, 2 first token; low: row scalars of that head
    @T.macro
    def load_low(low, L, w, H, last, tx):
        if mode != SUM:
            w[3] = T.min(w[2] + (tx // 32) * 16 + (tx % 32) // 4, last) * H + w[1]
            w[4] = T.min(w[2] + (tx // 32) * 16 + (tx % 32) // 4 + 8, last) * H + w[1]
            low[0] = T.call_extern("float32", "sc_float", T.address_of(L[0]), w[3])
            low[1] = T.call_extern("float32", "sc_float", T.address_of(L[0]), w[4])

    @T.macro
    def next_head(A, low, L, OUT, ITEMS, w, H, qbase, nitems, grid, tq, tx):
        w[1] = w[1] + 1
        if w[1] == H:
            T.call_extern(
                "handle", "sc_store", A.access_ptr("rw"), T.address_of(OUT[0, 0]),
                T.call_extern("int32", "sc_int", T.address_of(ITEMS[0]), w[0] * 4 + 2) * 128,
            )  # fmt: skip
            w[1] = 0
            w[0] = T.min(w[0] + grid, nitems - 1)
            w[2] = T.call_extern("int32", "sc_int", T.address_of(ITEMS[0]), w[0] * 4) - qbase
        load_low(low, L, w, H, tq - 1, tx)

    @T.prim_func
    def flash_indexer_score(
        Q: T.Tensor((tq, hd), "bfloat16"), K: T.Tensor((tk, gd), "bfloat16"), L: T.Tensor((nl,), "float32"),
        OUT: T.Tensor((nr, 128), "float32"), ITEMS: T.Tensor((ni,), "int32"),
        H: T.int32, HG: T.int32, scale: T.float32, qbase: T.int32, nitems: T.int32, grid: T.int32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=384) as bx:
            T.import_source(SOURCE)
            Qs = T.alloc_shared((QST, 128, BK), "bfloat16")
            Ks = T.alloc_shared((KST, 128, BK), "bfloat16")
            S0 = T.alloc_fragment((128, 128), "float32")
            S1 = T.alloc_fragment((128, 128), "float32")
            A = T.alloc_local((64,), "float32")
            low = T.alloc_local((2,), "float32")
            fullq = T.alloc_barrier([1] * QST)
            emptyq = T.alloc_barrier([2] * QST)
            fullk = T.alloc_barrier([1] * KST)
            emptyk = T.alloc_barrier([2] * KST)
            tx = T.get_thread_binding()
            if tx < 256:
                T.set_max_nreg(240, 1)
                v = T.alloc_local((12,), "int32")
                w = T.alloc_local((5,), "int32")
                steps = T.alloc_var("int32")
                factor = T.alloc_var("float32")
                for i in list(range(12)):
                    v[i] = 0
                for i in T.unroll(64):
                    A[i] = 0.0
                factor = scale * (LOG2E if mode == EXP else 1.0)
                w[0] = bx
                w[1] = 0
                w[2] = T.call_extern("int32", "sc_int", T.address_of(ITEMS[0]), bx * 4) - qbase
                steps = T.call_extern("int32", "sc_count", nitems, bx, grid) * H
                load_low(low, L, w, H, tq - 1, tx)
                issue(Qs, Ks, S0, S1, A, low, factor, fullq, emptyq, fullk, emptyk, v, HG, tx, True)
                finish(S0, emptyq, emptyk, v, tx)
                # for tile, head: A += f(S)
                for _ in T.serial((steps - 1) // 2):
                    for S, SP in [(S1, S0), (S0, S1)]:
                        issue(Qs, Ks, S, SP, A, low, factor, fullq, emptyq, fullk, emptyk, v, HG, tx, False)
                        next_head(A, low, L, OUT, ITEMS, w, H, qbase, nitems, grid, tq, tx)
                        finish(S, emptyq, emptyk, v, tx)
                if steps % 2 == 0:
                    issue(Qs, Ks, S1, S0, A, low, factor, fullq, emptyq, fullk, emptyk, v, HG, tx, False)
                    next_head(A, low, L, OUT, ITEMS, w, H, qbase, nitems, grid, tq, tx)
                    finish(S1, emptyq, emptyk, v, tx)
                    add(S1, A, low, factor, 0, 16)
                else:
                    add(S0, A, low, factor, 0, 16)
                T.call_extern(
                    "handle", "sc_store", A.access_ptr("rw"), T.address_of(OUT[0, 0]),
                    T.call_extern("int32", "sc_int", T.address_of(ITEMS[0]), w[0] * 4 + 2) * 128,
                )  # fmt: skip
            else:
                T.set_max_nreg(24, 0)
                if tx < 288:
                    qs = T.alloc_var("int32", 0)
                    qp = T.alloc_var("int32", 1)
                    ks = T.alloc_var("int32", 0)
                    kp = T.alloc_var("int32", 1)
                    t0 = T.alloc_var("int32")
                    s0 = T.alloc_var("int32")
                    left = T.alloc_var("int32")  # heads left that use the present K tile
                    kc = T.alloc_var("int32")
                    qc = T.alloc_var("int32")
                    count = T.alloc_var("int32")
                    count = T.call_extern("int32", "sc_count", nitems, bx, grid)
                    for i in T.serial(count):
                        t0 = T.call_extern("int32", "sc_int", T.address_of(ITEMS[0]), (bx + i * grid) * 4) - qbase
                        s0 = T.call_extern("int32", "sc_int", T.address_of(ITEMS[0]), (bx + i * grid) * 4 + 1)
                        left = 0
                        kc = -D
                        for h in T.serial(H):
                            qc = h * D
                            if left == 0:
                                kc = kc + D
                            for c in chunks:
                                if left == 0:
                                    T.barrier_wait(emptyk[ks], kp)
                                    T.tma_copy(
                                        K[s0 : s0 + 128, kc + c * BK : kc + (c + 1) * BK],
                                        Ks[ks, :, :],
                                        barrier=fullk[ks],
                                    )
                                    if T.shuffle_elect(32):
                                        T.barrier_arrive(fullk[ks])
                                    ks = ks + 1
                                    if ks == KST:
                                        ks = 0
                                        kp = kp ^ 1
                                T.barrier_wait(emptyq[qs], qp)
                                T.tma_copy(
                                    Q[t0 : t0 + 128, qc + c * BK : qc + (c + 1) * BK], Qs[qs, :, :], barrier=fullq[qs]
                                )
                                if T.shuffle_elect(32):
                                    T.barrier_arrive(fullq[qs])
                                qs = qs + 1
                                if qs == QST:
                                    qs = 0
                                    qp = qp ^ 1
                            if left == 0:
                                left = HG
                            left = left - 1

    return flash_indexer_score
