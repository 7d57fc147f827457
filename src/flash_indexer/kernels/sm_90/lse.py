"""Log-sum-exp of the teacher's logits over the keys each query sees, for callers whose attention did not keep it.

    LSE[t,h] = log sum_{KS[t] <= s < KE[t]} exp(scale · Q[t,h] · K[s, h // HG])     -inf where the interval is empty

The score kernel's plan with the roles of the rings changed: a work item is (token block, head), its 128 queries stay
in shared memory, and key tiles stream. Each thread keeps a running maximum and sum of the keys it holds; the four
threads of a row are combined once an item.

    warps 0-3, 4-7   64 tokens each: two logit accumulators S0, S1 [64, 128]; one is consumed while the other is formed
    warp 8           one thread feeds both rings by TMA
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
LOG2E = 1.4426950408889634
STAGES = {64: (2, 6), 96: (6, 9), 128: (4, 8), 192: (6, 7), 256: (4, 8), 576: (9, 4)}  # of the Q and K rings
SOURCE = source(__file__)


def build(D):
    """The kernel for head width D (64, 96, 128, 192, 256, 576).

    Run-time arguments: Q [T, H·D] and K [S, G·D] bfloat16, KS, KE [T] int32 (non-decreasing; clamped to [0, S]),
    LSE [T·H] float32, H, HG = H / G, scale, grid (CTAs; each takes items n, n + grid, ...).
    """
    BK = 64 if D % 64 == 0 else 32
    NK = D // BK
    sliced = NK > 4
    QST, KST = STAGES[D]
    chunks = list(range(NK))
    rows = T.GemmWarpPolicy.FullRow
    tq, hd, tk, gd, nl = T.dynamic("tq"), T.dynamic("hd"), T.dynamic("tk"), T.dynamic("gd"), T.dynamic("nl")

    @T.macro
    def advance(v, i, p, count):
        v[i] = v[i] + 1
        if v[i] == count:
            v[i] = 0
            v[p] = v[p] ^ 1

    # one arrival a warpgroup; Q chunks go back with the last key tile of their item
    @T.macro
    def release(emptyq, emptyk, v, tx):
        if tx % 128 == 0:
            T.mbarrier_arrive(emptyk[v[4]])
            if v[9] > 0:
                T.mbarrier_arrive(emptyq[v[6]])
        advance(v, 4, 5, KST)
        advance(v, 6, 7, QST)

    # u: what is being formed: 0 item, 1 key tiles left after this one
    @T.macro
    def take(u, KS, KE, H, nblocks, tokens, keys):
        u[2] = (nblocks - 1 - u[0] // H) * 128
        u[3] = T.call_extern("int32", "lse_first", T.address_of(KS[0]), u[2], keys)
        u[1] = T.call_extern("int32", "lse_count", T.address_of(KE[0]), u[2], tokens, keys, u[3])

    # v: 0,1 k stage, parity; 2,3 q stage, parity; 4 k stage to release; 6 q stage to release; 5,7 unused parities;
    #    9 last key tile of its item; 10,11 q stage, parity at the item's start
    @T.macro
    def issue(Qs, Ks, S, fullq, emptyq, fullk, emptyk, v, u, tx):
        v[2] = v[10]
        v[3] = v[11]
        v[6] = v[10]
        u[1] = u[1] - 1
        v[9] = 0
        if u[1] == 0:
            v[9] = 1
        # S = Q[t, h] @ K[s, h // HG].T
        for c in chunks:
            T.barrier_wait(fullq[v[2]], v[3])
            T.barrier_wait(fullk[v[0]], v[1])
            T.wgmma_gemm(Qs[v[2], :, :], Ks[v[0], :, :], S, transpose_B=True, clear_accum=(c == 0), policy=rows)
            advance(v, 0, 1, KST)
            advance(v, 2, 3, QST)
            if sliced and c > 0:
                T.wait_wgmma(1)
                release(emptyq, emptyk, v, tx)

    @T.macro
    def finish(S, emptyq, emptyk, v, u, KS, KE, H, nblocks, grid, nitems, tokens, keys, tx):
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(S, num_regs=64)
        for _ in chunks if not sliced else [NK - 1]:
            release(emptyq, emptyk, v, tx)
        if v[9] > 0:
            v[10] = v[2]
            v[11] = v[3]
            u[0] = u[0] + grid
            if u[0] < nitems:
                take(u, KS, KE, H, nblocks, tokens, keys)

    # w: what is being consumed: 0 item, 1 key tiles left, 2 token, 3 key
    @T.macro
    def begin(w, low, high, KS, KE, H, nblocks, tokens, keys, tx):
        take(w, KS, KE, H, nblocks, tokens, keys)
        w[3] = w[3] * 128
        for r in [0, 1]:
            w[4] = T.min(w[2] + (tx // 32) * 16 + (tx % 32) // 4 + 8 * r, tokens - 1)
            low[r] = T.max(T.call_extern("int32", "lse_int", T.address_of(KS[0]), w[4]), 0)
            high[r] = T.min(T.call_extern("int32", "lse_int", T.address_of(KE[0]), w[4]), keys)

    @T.macro
    def consume(S, m, l, low, high, w, factor, LSE, KS, KE, H, nblocks, grid, nitems, tokens, keys, tx):
        T.call_extern(
            "handle", "lse_add", S.access_ptr("rw"), m.access_ptr("rw"), l.access_ptr("rw"), low.access_ptr("r"),
            high.access_ptr("r"), w[3], factor,
        )  # fmt: skip
        w[3] = w[3] + 128
        w[1] = w[1] - 1
        if w[1] == 0:
            T.call_extern(
                "handle", "lse_store", m.access_ptr("rw"), l.access_ptr("rw"), T.address_of(LSE[0]), w[2], tokens, H,
                w[0] % H,
            )  # fmt: skip
            w[0] = w[0] + grid
            if w[0] < nitems:
                begin(w, low, high, KS, KE, H, nblocks, tokens, keys, tx)

    @T.prim_func
    def flash_indexer_lse(
        Q: T.Tensor((tq, hd), "bfloat16"), K: T.Tensor((tk, gd), "bfloat16"), KS: T.Tensor((tq,), "int32"),
        KE: T.Tensor((tq,), "int32"), LSE: T.Tensor((nl,), "float32"),
        H: T.int32, HG: T.int32, scale: T.float32, grid: T.int32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=384) as bx:
            T.import_source(SOURCE)
            Qs = T.alloc_shared((QST, 128, BK), "bfloat16")
            Ks = T.alloc_shared((KST, 128, BK), "bfloat16")
            S0 = T.alloc_fragment((128, 128), "float32")
            S1 = T.alloc_fragment((128, 128), "float32")
            fullq = T.alloc_barrier([1] * QST)
            emptyq = T.alloc_barrier([2] * QST)
            fullk = T.alloc_barrier([1] * KST)
            emptyk = T.alloc_barrier([2] * KST)
            tx = T.get_thread_binding()
            nblocks = T.alloc_var("int32")
            nitems = T.alloc_var("int32")
            nblocks = (tq + 127) // 128
            nitems = nblocks * H
            if tx < 256:
                T.set_max_nreg(240, 1)
                v = T.alloc_local((12,), "int32")
                u = T.alloc_local((4,), "int32")
                w = T.alloc_local((5,), "int32")
                m = T.alloc_local((2,), "float32")
                l = T.alloc_local((2,), "float32")
                low = T.alloc_local((2,), "int32")
                high = T.alloc_local((2,), "int32")
                factor = T.alloc_var("float32")
                for i in list(range(12)):
                    v[i] = 0
                for r in [0, 1]:
                    m[r] = -T.infinity("float32")
                    l[r] = 0.0
                factor = scale * LOG2E
                u[0] = bx
                w[0] = bx
                take(u, KS, KE, H, nblocks, tq, tk)
                begin(w, low, high, KS, KE, H, nblocks, tq, tk, tx)
                issue(Qs, Ks, S0, fullq, emptyq, fullk, emptyk, v, u, tx)
                finish(S0, emptyq, emptyk, v, u, KS, KE, H, nblocks, grid, nitems, tq, tk, tx)
                # for item, key tile: m, l = online softmax of S; w[0] leaves the list when the last item is stored
                while w[0] < nitems:
                    for S, SP in [(S1, S0), (S0, S1)]:
                        if w[0] < nitems:
                            if u[0] < nitems:
                                issue(Qs, Ks, S, fullq, emptyq, fullk, emptyk, v, u, tx)
                                consume(
                                    SP, m, l, low, high, w, factor, LSE, KS, KE, H, nblocks, grid, nitems, tq, tk, tx
                                )
                                finish(S, emptyq, emptyk, v, u, KS, KE, H, nblocks, grid, nitems, tq, tk, tx)
                            else:
                                consume(
                                    SP, m, l, low, high, w, factor, LSE, KS, KE, H, nblocks, grid, nitems, tq, tk, tx
                                )
            else:
                T.set_max_nreg(24, 0)
                if tx < 288:
                    qs = T.alloc_var("int32", 0)
                    qp = T.alloc_var("int32", 1)
                    ks = T.alloc_var("int32", 0)
                    kp = T.alloc_var("int32", 1)
                    p = T.alloc_local((4,), "int32")
                    item = T.alloc_var("int32")
                    s0 = T.alloc_var("int32")
                    qc = T.alloc_var("int32")
                    kc = T.alloc_var("int32")
                    t0 = T.alloc_var("int32")
                    item = bx
                    while item < nitems:
                        p[0] = item
                        take(p, KS, KE, H, nblocks, tq, tk)
                        t0 = p[2]
                        s0 = p[3] * 128
                        qc = (item % H) * D
                        kc = (item % H) // HG * D
                        for i in T.serial(p[1]):
                            for c in chunks:
                                if i == 0:
                                    T.barrier_wait(emptyq[qs], qp)
                                    T.tma_copy(
                                        Q[t0 : t0 + 128, qc + c * BK : qc + (c + 1) * BK],
                                        Qs[qs, :, :],
                                        barrier=fullq[qs],
                                    )
                                    if T.shuffle_elect(32):
                                        T.barrier_arrive(fullq[qs])
                                    qs = qs + 1
                                    if qs == QST:
                                        qs = 0
                                        qp = qp ^ 1
                                T.barrier_wait(emptyk[ks], kp)
                                T.tma_copy(
                                    K[s0 : s0 + 128, kc + c * BK : kc + (c + 1) * BK], Ks[ks, :, :], barrier=fullk[ks]
                                )
                                if T.shuffle_elect(32):
                                    T.barrier_arrive(fullk[ks])
                                ks = ks + 1
                                if ks == KST:
                                    ks = 0
                                    kp = kp ^ 1
                            s0 = s0 + 128
                        item = item + grid

    return flash_indexer_lse
