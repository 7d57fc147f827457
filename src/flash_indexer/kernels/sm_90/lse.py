"""Log-sum-exp of the teacher's logits over the keys each query sees, for callers whose attention did not keep it.

    LSE[t,h] = log sum_{KS[t] <= s < KE[t]} exp(scale · Q[t,h] · K[s, h // HG])     -inf where the interval is empty

The score kernel's plan with the roles of the rings changed: a work item is (token block, head), its 128 queries stay
in shared memory, and key tiles stream. Each thread keeps a running maximum and sum of the keys it holds; the four
threads of a row are combined once an item.

    warps 0-3, 4-7   64 tokens each: two logit accumulators S0, S1 [64, 128]; one is consumed while the other is formed
    warp 8           one thread feeds both rings by TMA

Of e4m3 rows (`build_fp8`) each row has a scale: a query's is read once an item, the keys' come with their tile, into
one of SLOTS arrays as in `score`.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.macros import (
    FULL_ROW,
    LOG2E,
    PASS_CONFIGS,
    REGISTERS,
    Chunks,
    Ring,
    advance,
    begin_turns,
    commit,
    number,
    pass_turn,
    shared_address,
    turn,
    wait_for_turn,
)
from flash_indexer.kernels.sm_90.sizes import LSE_FP8, LSE_STAGES

__all__ = ["PASS_CONFIGS", "build", "build_fp8"]
SOURCE = source(__file__)

# of a thread that computes: stages and parities of the K and Q rings that are read next; stages that are released next
# (the parity is not used); whether this is the last key tile of its item; stage and parity of Q with which it began; of
# e4m3 rows the tile's array of scales, that of the tile before, arrays of tails
K_STAGE, K_PARITY, Q_STAGE, Q_PARITY, K_RELEASE, K_UNUSED, Q_RELEASE, Q_UNUSED, _, LAST, Q_FIRST, Q_FIRST_PARITY = (
    range(12)
)  # fmt: skip
STATE = 12
SLOT, SLOT_BEFORE, Q_TAIL, K_TAIL = range(12, 16)
# of the item whose logits are formed, fed or consumed: key tiles left after this one; first token, first key (tile)
ITEM, LEFT, TOKEN, KEY, ROW = range(5)


class Sizes(NamedTuple):
    """Heads, blocks of 128 tokens, CTAs, items."""

    H: Any
    blocks: Any
    grid: Any
    items: Any


def build(D):
    """The kernel for head width D (64, 96, 128, 192, 256, 576).

    Run-time arguments: Q [T, H·D] and K [S, G·D] bfloat16, KS, KE [T] int32 (non-decreasing; clamped to [0, S]),
    LSE [T·H] float32, H, HG = H / G, scale, grid (CTAs; each takes items n, n + grid, ...).
    """
    return _build(Chunks(D, fp8=False), D, LSE_STAGES[D])


def build_fp8(D):
    """The kernel for rows of e4m3 with a scale each: logits QS[t,h]·KSC[g,s]·(Q[t,h] · K[s,g]).

    Run-time arguments: as above, with Q and K float8_e4m3fn, and before KS: QS [T·H] float32 and KSC [G·keys] float32,
    keys a multiple of 128, at least S, which follows grid.
    """
    return _build(Chunks(D, fp8=True), D, LSE_FP8[D])


def _build(row, D, stages):
    """row: its chunks. stages: of the Q and K rings."""
    QST, KST = stages
    BK, NK, TAIL, FP8, dtype, EARLY = row.width, row.count, row.tail, row.fp8, row.dtype, row.early
    TURNS = FP8  # the two warpgroups issue products one after the other
    QTAILS, KTAILS, SLOTS = row.tails(QST), row.tails(KST), row.slots(KST)
    chunks = list(range(NK))
    tokens, hd, keys, gd, nl = (T.dynamic(x) for x in ("tokens", "hd", "keys", "gd", "nl"))
    nq, nk = T.dynamic("nq"), T.dynamic("nk")

    # one arrival a warpgroup; Q chunks go back with the last key tile of their item
    @T.macro
    def release_chunk(q, k, v, tx):
        if tx % 128 == 0:
            T.mbarrier_arrive(k.empty[v[K_RELEASE]])
            if v[LAST] > 0:
                T.mbarrier_arrive(q.empty[v[Q_RELEASE]])
        advance(v[K_RELEASE], v[K_UNUSED], KST)
        advance(v[Q_RELEASE], v[Q_UNUSED], QST)

    # the run of key tiles of item u[ITEM]
    @T.macro
    def take(u, intervals, sizes):
        KS, KE = intervals
        u[TOKEN] = (sizes.blocks - 1 - u[ITEM] // sizes.H) * 128
        u[KEY] = T.call_extern("int32", "lse_first", T.address_of(KS[0]), u[TOKEN], keys)
        u[LEFT] = T.call_extern("int32", "lse_count", T.address_of(KE[0]), u[TOKEN], tokens, keys, u[KEY])

    # S = logits of the next key tile of item u
    @T.macro
    def issue(q, k, v, u, S, tx):
        if FP8:
            v[SLOT_BEFORE] = v[SLOT]
            turn(v[SLOT], SLOTS)
        v[Q_STAGE] = v[Q_FIRST]
        v[Q_PARITY] = v[Q_FIRST_PARITY]
        v[Q_RELEASE] = v[Q_FIRST]
        u[LEFT] = u[LEFT] - 1
        v[LAST] = 0
        if u[LEFT] == 0:
            v[LAST] = 1
        # S = Q[t, h] @ K[s, h // HG].T
        if TURNS:
            wait_for_turn(tx)
        for c in chunks:
            T.barrier_wait(q.full[v[Q_STAGE]], v[Q_PARITY])
            T.barrier_wait(k.full[v[K_STAGE]], v[K_PARITY])
            T.wgmma_gemm(
                q.stages[v[Q_STAGE], :, :], k.stages[v[K_STAGE], :, :], S, transpose_B=True, clear_accum=(c == 0),
                policy=FULL_ROW,
            )  # fmt: skip
            if TAIL and c == NK - 1:
                T.wgmma_gemm(
                    q.tails[v[Q_TAIL], :, :], k.tails[v[K_TAIL], :, :], S, transpose_B=True, clear_accum=False,
                    policy=FULL_ROW,
                )  # fmt: skip
            advance(v[K_STAGE], v[K_PARITY], KST)
            advance(v[Q_STAGE], v[Q_PARITY], QST)
            if EARLY and c > 0:
                T.wait_wgmma(row.begun(c))
                release_chunk(q, k, v, tx)
        if TURNS:
            pass_turn(tx)

    @T.macro
    def finish(q, k, v, u, S, intervals, sizes, tx):
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(S, num_regs=64)
        for _ in chunks if not EARLY else [NK - 1]:
            release_chunk(q, k, v, tx)
        if TAIL:
            turn(v[K_TAIL], KTAILS)
        if v[LAST] > 0:
            v[Q_FIRST] = v[Q_STAGE]
            v[Q_FIRST_PARITY] = v[Q_PARITY]
            if TAIL:
                turn(v[Q_TAIL], QTAILS)
            u[ITEM] = u[ITEM] + sizes.grid
            if u[ITEM] < sizes.items:
                take(u, intervals, sizes)

    # item w, to be consumed: its first key, and the intervals and scales of the thread's rows
    @T.macro
    def begin(w, low, high, scales, intervals, sizes, tx):
        KS, KE = intervals
        take(w, intervals, sizes)
        w[KEY] = w[KEY] * 128
        for r in [0, 1]:
            w[ROW] = T.min(w[TOKEN] + (tx // 32) * 16 + (tx % 32) // 4 + 8 * r, tokens - 1)
            low[r] = T.max(number(KS, w[ROW]), 0)
            high[r] = T.min(number(KE, w[ROW]), keys)
            if FP8:
                scales[0][r] = T.call_extern(
                    "float32", "load_float", T.address_of(scales[1][0]), w[ROW] * sizes.H + w[ITEM] % sizes.H
                )

    # m, l = online softmax of S; the item is stored with its last key tile
    @T.macro
    def consume(S, w, sums, scales, slot, LSE, intervals, sizes, tx):
        m, l, low, high, factor = sums
        if FP8:
            T.call_extern("handle", "lse_scale", S.access_ptr("rw"), scales[0].access_ptr("r"), scales[2] + slot * 512)
        T.call_extern(
            "handle", "lse_add", S.access_ptr("rw"), m.access_ptr("rw"), l.access_ptr("rw"), low.access_ptr("r"),
            high.access_ptr("r"), w[KEY], factor,
        )  # fmt: skip
        w[KEY] = w[KEY] + 128
        w[LEFT] = w[LEFT] - 1
        if w[LEFT] == 0:
            T.call_extern(
                "handle", "lse_store", m.access_ptr("rw"), l.access_ptr("rw"), T.address_of(LSE[0]), w[TOKEN], tokens,
                sizes.H, w[ITEM] % sizes.H,
            )  # fmt: skip
            w[ITEM] = w[ITEM] + sizes.grid
            if w[ITEM] < sizes.items:
                begin(w, low, high, scales, intervals, sizes, tx)

    @T.macro
    def body(bx, operands, row_scales, key_scales, intervals, LSE, numbers):
        Q, K = operands
        H, HG, scale, grid, stride = numbers
        T.import_source(SOURCE)
        Qs = T.alloc_shared((QST, 128, BK), dtype)
        Ks = T.alloc_shared((KST, 128, BK), dtype)
        if TAIL:
            Qt = T.alloc_shared((QTAILS, 128, TAIL), dtype)
            Kt = T.alloc_shared((KTAILS, 128, TAIL), dtype)
        else:
            Qt, Kt = None, None
        if FP8:
            Ss = T.alloc_shared((SLOTS * 128,), "float32")
        S0 = T.alloc_fragment((128, 128), "float32")
        S1 = T.alloc_fragment((128, 128), "float32")
        fullq = T.alloc_barrier([1] * QST)
        emptyq = T.alloc_barrier([2] * QST)
        fullk = T.alloc_barrier([1] * KST)
        emptyk = T.alloc_barrier([2] * KST)
        tx = T.get_thread_binding()
        nblocks = T.alloc_var("int32")
        nitems = T.alloc_var("int32")
        nblocks = (tokens + 127) // 128
        nitems = nblocks * H
        q, k = Ring(Qs, fullq, emptyq, Qt), Ring(Ks, fullk, emptyk, Kt)
        sizes = Sizes(H, nblocks, grid, nitems)
        if tx < 256:
            T.set_max_nreg(REGISTERS[0], 1)
            v = T.alloc_local((STATE + 4 if FP8 else STATE,), "int32")
            u = T.alloc_local((4,), "int32")
            w = T.alloc_local((5,), "int32")
            m = T.alloc_local((2,), "float32")
            l = T.alloc_local((2,), "float32")
            low = T.alloc_local((2,), "int32")
            high = T.alloc_local((2,), "int32")
            factor = T.alloc_var("float32")
            for i in list(range(STATE)):
                v[i] = 0
            for r in [0, 1]:
                m[r] = -T.infinity("float32")
                l[r] = 0.0
            factor = scale * LOG2E
            if FP8:
                own = T.alloc_local((2,), "float32")
                columns = T.alloc_var("int32")  # where the thread's first column is in the first array of scales
                columns = shared_address(Ss) + (tx % 4) * 8
                v[SLOT] = SLOTS - 1
                v[Q_TAIL] = 0
                v[K_TAIL] = 0
                scales = (own, row_scales, columns)
            else:
                scales = None
            sums = (m, l, low, high, factor)
            u[ITEM] = bx
            w[ITEM] = bx
            take(u, intervals, sizes)
            begin(w, low, high, scales, intervals, sizes, tx)
            if TURNS:
                begin_turns(tx)
            issue(q, k, v, u, S0, tx)
            finish(q, k, v, u, S0, intervals, sizes, tx)
            # for item, key tile: m, l = online softmax of S; w leaves the list when the last item is stored
            while w[ITEM] < nitems:
                for S, SP in [(S1, S0), (S0, S1)]:
                    if w[ITEM] < nitems:
                        if u[ITEM] < nitems:
                            issue(q, k, v, u, S, tx)
                            consume(SP, w, sums, scales, v[SLOT_BEFORE] if FP8 else 0, LSE, intervals, sizes, tx)
                            finish(q, k, v, u, S, intervals, sizes, tx)
                        else:
                            consume(SP, w, sums, scales, v[SLOT] if FP8 else 0, LSE, intervals, sizes, tx)
        else:
            T.set_max_nreg(REGISTERS[1], 0)
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
                if FP8:
                    slot = T.alloc_var("int32", 0)
                    qt = T.alloc_var("int32", 0)
                    kt = T.alloc_var("int32", 0)
                    at = T.alloc_var("int32")  # of the tile's scales
                item = bx
                while item < nitems:
                    p[ITEM] = item
                    take(p, intervals, sizes)
                    t0 = p[TOKEN]
                    s0 = p[KEY] * 128
                    qc = (item % H) * D
                    kc = (item % H) // HG * D
                    if FP8:
                        at = (item % H) // HG * stride + s0
                    for i in T.serial(p[LEFT]):
                        for c in chunks:
                            if i == 0:
                                T.barrier_wait(emptyq[qs], qp)
                                T.tma_copy(
                                    Q[t0 : t0 + 128, qc + c * BK : qc + (c + 1) * BK], Qs[qs, :, :], barrier=fullq[qs]
                                )
                                if TAIL and c == NK - 1:
                                    T.tma_copy(Q[t0 : t0 + 128, qc + NK * BK : qc + D], Qt[qt, :, :], barrier=fullq[qs])
                                    turn(qt, QTAILS)
                                commit((fullq, qs))
                                advance(qs, qp, QST)
                            T.barrier_wait(emptyk[ks], kp)
                            T.tma_copy(
                                K[s0 : s0 + 128, kc + c * BK : kc + (c + 1) * BK], Ks[ks, :, :], barrier=fullk[ks]
                            )
                            if TAIL and c == NK - 1:
                                T.tma_copy(K[s0 : s0 + 128, kc + NK * BK : kc + D], Kt[kt, :, :], barrier=fullk[ks])
                                turn(kt, KTAILS)
                            if FP8 and c == 0:
                                T.tma_copy(
                                    key_scales[at : at + 128], Ss[slot * 128 : slot * 128 + 128], barrier=fullk[ks]
                                )
                                turn(slot, SLOTS)
                                at = at + 128
                            commit((fullk, ks))
                            advance(ks, kp, KST)
                        s0 = s0 + 128
                    item = item + grid

    if FP8:

        @T.prim_func
        def flash_indexer_lse_fp8(
            Q: T.Tensor((tokens, hd), dtype), K: T.Tensor((keys, gd), dtype), QS: T.Tensor((nq,), "float32"),
            KSC: T.Tensor((nk,), "float32"), KS: T.Tensor((tokens,), "int32"), KE: T.Tensor((tokens,), "int32"),
            LSE: T.Tensor((nl,), "float32"),
            H: T.int32, HG: T.int32, scale: T.float32, grid: T.int32, stride: T.int32,
        ):  # fmt: skip
            with T.Kernel(grid, threads=384) as bx:
                body(bx, (Q, K), QS, KSC, (KS, KE), LSE, (H, HG, scale, grid, stride))

        return flash_indexer_lse_fp8

    @T.prim_func
    def flash_indexer_lse(
        Q: T.Tensor((tokens, hd), dtype), K: T.Tensor((keys, gd), dtype), KS: T.Tensor((tokens,), "int32"),
        KE: T.Tensor((tokens,), "int32"), LSE: T.Tensor((nl,), "float32"),
        H: T.int32, HG: T.int32, scale: T.float32, grid: T.int32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=384) as bx:
            body(bx, (Q, K), None, None, (KS, KE), LSE, (H, HG, scale, grid, 0))

    return flash_indexer_lse
