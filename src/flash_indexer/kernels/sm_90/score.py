"""Scores summed over heads: of the teacher, sum_h exp(scale·q_h·k - lse_h), and of the indexer, sum_j w_j·ReLU(q_j·k).

    OUT[t, s] = sum_h f(Q[t, h] · K[s, h // HG]; L[t, h])        f of the mode, see `build`

One CTA computes one tile of 128 tokens by 128 keys after the other. The sum over heads is a register accumulator, so
any number of heads, and of heads a key head, runs the same code, and a score leaves the registers once.

    warps 0-3, 4-7   64 tokens each: A [64, 128] (the sum) and two logit accumulators S0, S1 [64, 128] in registers
    warp 8           one thread feeds two rings of 64-wide chunks of D by TMA: Q a head, K once a group
    warps 9-11       idle (registers are given to the consumers)

    tensor cores     | S1 = Q[h+1] K^T | S0 = Q[h+2] K^T | S1 = Q[h+3] K^T | ...
    everything else  | A += f(S0)      | A += f(S1)      | A += f(S0)      | ...

The steps run on across tiles: a tile is stored while the next one's first product is under way. At D = 576 a chunk's
stage is handed back as soon as its product is done, and a slice of f runs under each chunk.

Of e4m3 rows (`build_fp8`, the teacher's) the chunks hold twice as many columns, and each row of Q and K has a scale.
The query's is read beside L, the keys' come with the first chunk of their tile, into one of SLOTS arrays: two more than
the ring holds, for a sum lags its product. Where 128 keys may share a scale, it has a minus sign
(`quantize.build_keys`); if they don't, logits are multiplied by their keys' scales before f.
"""

import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from flash_indexer.kernels.device.items import SHORT_ITEM, ScoreItem
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
    count_items,
    number,
    pass_turn,
    shared_address,
    turn,
    wait_for_turn,
)
from flash_indexer.kernels.sm_90.sizes import EXP, SCORE_FP8, SCORE_STAGES, SHARED_KEY_SCALES, SUM, UNIFORM_FP8

__all__ = ["PASS_CONFIGS", "build", "build_fp8"]
SOURCE = source(__file__)

# of a thread that computes: stages and parities of the Q and K rings that are read next; stages that are released next
# (the parity is not used); heads of the group done; whether this is the group's last head; stage and parity of K with
# which the group began; of e4m3 rows the group's array of scales, that of the head before, arrays of tails
Q_STAGE, Q_PARITY, K_STAGE, K_PARITY, Q_RELEASE, Q_UNUSED, K_RELEASE, K_UNUSED, DONE, LAST, K_FIRST, K_FIRST_PARITY = (
    range(12)
)  # fmt: skip
STATE = 12
SLOT, SLOT_BEFORE, Q_TAIL, K_TAIL = range(12, 16)
# where in shared memory, in units of 16 bytes, the warpgroup's rows of Q begin, those of K, and their tails
Q_ROWS, K_ROWS, Q_TAIL_ROWS, K_TAIL_ROWS = range(4)
KEY_SCALE = 4  # of the row scalars: L of two rows, scales of two rows, and the scale of the tile's first key
# of the accumulator: its item, head, first token; rows of L of the thread's two
ITEM, HEAD, TOKEN, ROW_0, ROW_1 = range(5)


def build(D, mode):
    """The kernel for head width D (64, 96, 128, 192, 256, 576; the indexer's 32).

    mode: EXP   f = exp(scale·x - L[t,h])      teacher, L = lse (natural log)
          RELU  f = L[t,h]·max(x, 0)           indexer, L = weights
          SUM   f = scale·x                    summed logits; L is not read

    Run-time arguments: Q [T, H·D] and K [S, G·D] bfloat16, L [T·H] float32, OUT [tiles·128, 128] float32, ITEMS int32
    (`items.ScoreItem`): CTA c of `grid` takes items c, c + grid, ...; whole tiles are written, unmasked.
    Row 0 of Q and L is token qbase.
    """
    return _build(Chunks(D, fp8=False), D, mode, SCORE_STAGES[D])


def build_fp8(D):
    """The kernel of mode EXP for rows of e4m3 with a scale each: x = QS[t,h]·KS[g,s]·(Q[t,h] · K[s,g]).

    Run-time arguments: as above, with Q and K float8_e4m3fn, and before OUT: QS [T·H] float32 and KS [G·keys] float32,
    keys a multiple of 128, at least S.
    """
    return _build(Chunks(D, fp8=True), D, EXP, SCORE_FP8[D])


def _build(row, D, mode, stages):
    """row: its chunks. stages: of the Q and K rings."""
    QST, KST = stages
    BK, NK, TAIL, FP8, dtype, EARLY = row.width, row.count, row.tail, row.fp8, row.dtype, row.early
    TURNS = FP8 and EARLY  # the two warpgroups issue products one after the other: faster here, slower where D is small
    SHARED = FP8 and D in SHARED_KEY_SCALES
    UNIFORM = FP8 and D in UNIFORM_FP8
    QTAILS, KTAILS, SLOTS = row.tails(QST), row.tails(KST), row.slots(KST)
    chunks = list(range(NK))
    slices = [(c * 16 // NK, (c + 1) * 16 // NK) for c in chunks]
    tq, hd, tk, gd = T.dynamic("tq"), T.dynamic("hd"), T.dynamic("tk"), T.dynamic("gd")
    nl, nr, ni, nq, nk = T.dynamic("nl"), T.dynamic("nr"), T.dynamic("ni"), T.dynamic("nq"), T.dynamic("nk")

    def before(v):
        return v[SLOT_BEFORE] if FP8 else 0  # the scales of the head that is summed

    @T.macro
    def add(S, sums, first, last, slot):
        A, low, scale, columns = sums[:4]
        if FP8 and not SHARED:
            T.call_extern(
                "handle", f"sc_add_scaled<{first}, {last}>",
                S.access_ptr("r"), A.access_ptr("rw"), low.access_ptr("r"), scale, columns + slot * 512,
            )  # fmt: skip
        else:
            T.call_extern(
                "handle", f"sc_add_shared<{first}, {last}>" if SHARED else f"sc_add<{mode}, {first}, {last}>",
                S.access_ptr("r"), A.access_ptr("rw"), low.access_ptr("r"), scale,
            )  # fmt: skip

    # a chunk of S = Q[t, h] @ K[s, h // HG].T, the last one with the tail
    @T.macro
    def multiply(q, k, v, S, at, c):
        if UNIFORM:
            T.call_extern(
                "handle", f"sc_product<{BK}, {TAIL if c == NK - 1 else 0}, {int(c > 0)}>", S.access_ptr("rw"),
                at[Q_ROWS] + v[Q_STAGE] * (8 * BK), at[K_ROWS] + v[K_STAGE] * (8 * BK),
                at[Q_TAIL_ROWS] + v[Q_TAIL] * (8 * TAIL) if TAIL else 0,
                at[K_TAIL_ROWS] + v[K_TAIL] * (8 * TAIL) if TAIL else 0,
            )  # fmt: skip
        else:
            T.wgmma_gemm(
                q.stages[v[Q_STAGE], :, :], k.stages[v[K_STAGE], :, :], S, transpose_B=True, clear_accum=(c == 0),
                policy=FULL_ROW,
            )  # fmt: skip
            if TAIL and c == NK - 1:
                T.wgmma_gemm(
                    q.tails[v[Q_TAIL], :, :], k.tails[v[K_TAIL], :, :], S, transpose_B=True, clear_accum=False,
                    policy=FULL_ROW,
                )  # fmt: skip

    # one arrival a warpgroup; K chunks go back with the last head of their group
    @T.macro
    def release_chunk(q, k, v, tx):
        if tx % 128 == 0:
            T.mbarrier_arrive(q.empty[v[Q_RELEASE]])
            if v[LAST] > 0:
                T.mbarrier_arrive(k.empty[v[K_RELEASE]])
        advance(v[Q_RELEASE], v[Q_UNUSED], QST)
        advance(v[K_RELEASE], v[K_UNUSED], KST)

    # S = the next head's logits; beside it A += f(SP), of the head before, unless this is the first one
    @T.macro
    def issue(q, k, v, S, SP, sums, HG, tx, prefix):
        if FP8:
            v[SLOT_BEFORE] = v[SLOT]
            if v[DONE] == 0:
                turn(v[SLOT], SLOTS)
        v[K_STAGE] = v[K_FIRST]
        v[K_PARITY] = v[K_FIRST_PARITY]
        v[K_RELEASE] = v[K_FIRST]
        v[DONE] = v[DONE] + 1
        v[LAST] = 0
        if v[DONE] == HG:
            v[DONE] = 0
            v[LAST] = 1
        if TURNS:
            wait_for_turn(tx)
        for c in chunks:
            T.barrier_wait(k.full[v[K_STAGE]], v[K_PARITY])
            T.barrier_wait(q.full[v[Q_STAGE]], v[Q_PARITY])
            multiply(q, k, v, S, sums[4], c)
            advance(v[Q_STAGE], v[Q_PARITY], QST)
            advance(v[K_STAGE], v[K_PARITY], KST)
            if EARLY:
                if c > 0:
                    T.wait_wgmma(row.begun(c))
                    release_chunk(q, k, v, tx)
                if not TURNS and not prefix:
                    add(SP, sums, slices[c][0], slices[c][1], before(v))
        if TURNS:
            pass_turn(tx)
        if (TURNS or not EARLY) and not prefix:
            add(SP, sums, 0, 16, before(v))

    @T.macro
    def finish(q, k, v, S, sums, tx):
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(S, num_regs=64)
        if SHARED:
            if sums[1][KEY_SCALE] >= 0.0:
                T.call_extern("handle", "sc_scale", S.access_ptr("rw"), sums[3] + v[SLOT] * 512)
                sums[1][KEY_SCALE] = -1.0
        for _ in chunks if not EARLY else [NK - 1]:
            release_chunk(q, k, v, tx)
        if TAIL:
            turn(v[Q_TAIL], QTAILS)
        if v[LAST] > 0:
            v[K_FIRST] = v[K_STAGE]
            v[K_FIRST_PARITY] = v[K_PARITY]
            if TAIL:
                turn(v[K_TAIL], KTAILS)

    @T.macro
    def load_low(sums, rows, v, w, H, last, tx):
        low = sums[1]
        L, QS = rows
        if SHARED:
            low[KEY_SCALE] = T.call_extern("float32", "load_shared_float_once", sums[3] + v[SLOT] * 512)
        if mode != SUM:
            w[ROW_0] = T.min(w[TOKEN] + (tx // 32) * 16 + (tx % 32) // 4, last) * H + w[HEAD]
            w[ROW_1] = T.min(w[TOKEN] + (tx // 32) * 16 + (tx % 32) // 4 + 8, last) * H + w[HEAD]
            low[0] = T.call_extern("float32", "load_float", T.address_of(L[0]), w[ROW_0])
            low[1] = T.call_extern("float32", "load_float", T.address_of(L[0]), w[ROW_1])
        if FP8:
            low[2] = T.call_extern("float32", "load_float", T.address_of(QS[0]), w[ROW_0])
            low[3] = T.call_extern("float32", "load_float", T.address_of(QS[0]), w[ROW_1])

    @T.macro
    def store(A, OUT, ITEMS, w):
        T.call_extern(
            "handle", "sc_store", A.access_ptr("rw"), T.address_of(OUT[0, 0]),
            number(ITEMS, w[ITEM] * SHORT_ITEM + ScoreItem.TILE) * 128,
        )  # fmt: skip

    @T.macro
    def next_head(sums, v, w, tensors, sizes, tx):
        rows, OUT, ITEMS = tensors
        H, qbase, nitems, grid = sizes
        w[HEAD] = w[HEAD] + 1
        if w[HEAD] == H:
            store(sums[0], OUT, ITEMS, w)
            w[HEAD] = 0
            w[ITEM] = T.min(w[ITEM] + grid, nitems - 1)
            w[TOKEN] = number(ITEMS, w[ITEM] * SHORT_ITEM + ScoreItem.TOKEN) - qbase
        load_low(sums, rows, v, w, H, tq - 1, tx)

    @T.macro
    def body(bx, operands, rows, KS, OUT, ITEMS, sizes):
        Q, K = operands
        H, HG, scale, qbase, nitems, grid, keys = sizes
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
        if UNIFORM:
            T.annotate_layout({x: make_swizzled_layout(x) for x in ((Qs, Ks, Qt, Kt) if TAIL else (Qs, Ks))})
        S0 = T.alloc_local((64,), "float32") if UNIFORM else T.alloc_fragment((128, 128), "float32")
        S1 = T.alloc_local((64,), "float32") if UNIFORM else T.alloc_fragment((128, 128), "float32")
        A = T.alloc_local((64,), "float32")
        low = T.alloc_local((5 if UNIFORM else 4 if FP8 else 2,), "float32")
        fullq = T.alloc_barrier([1] * QST)
        emptyq = T.alloc_barrier([2] * QST)
        fullk = T.alloc_barrier([1] * KST)
        emptyk = T.alloc_barrier([2] * KST)
        q, k = Ring(Qs, fullq, emptyq, Qt), Ring(Ks, fullk, emptyk, Kt)
        tx = T.get_thread_binding()
        if tx < 256:
            T.set_max_nreg(REGISTERS[0], 1)
            v = T.alloc_local((STATE + 4 if FP8 else STATE,), "int32")
            w = T.alloc_local((5,), "int32")
            steps = T.alloc_var("int32")
            factor = T.alloc_var("float32")
            for i in list(range(STATE + 4 if FP8 else STATE)):
                v[i] = 0
            for i in T.unroll(64):
                A[i] = 0.0
            factor = scale * (LOG2E if mode == EXP else 1.0)
            if FP8:
                columns = T.alloc_var("int32")  # where the thread's first column is in the first array of scales
                columns = shared_address(Ss) + (tx % 4) * 8
                v[SLOT] = SLOTS - 1
                if UNIFORM:
                    at = T.alloc_local((4,), "int32")
                    at[Q_ROWS] = (shared_address(Qs) + tx // 128 % 2 * (64 * BK)) // 16
                    at[K_ROWS] = shared_address(Ks) // 16
                    if TAIL:
                        at[Q_TAIL_ROWS] = (shared_address(Qt) + tx // 128 % 2 * (64 * TAIL)) // 16
                        at[K_TAIL_ROWS] = shared_address(Kt) // 16
                    sums = (A, low, factor, columns, at)
                else:
                    sums = (A, low, factor, columns, None)
            else:
                sums = (A, low, factor, 0, None)
            tensors, counts = (rows, OUT, ITEMS), (H, qbase, nitems, grid)
            w[ITEM] = bx
            w[HEAD] = 0
            w[TOKEN] = number(ITEMS, bx * SHORT_ITEM + ScoreItem.TOKEN) - qbase
            steps = count_items(nitems, bx, grid) * H
            if not UNIFORM:  # otherwise when the keys' scales have come
                load_low(sums, rows, v, w, H, tq - 1, tx)
            if TURNS:
                begin_turns(tx)
            issue(q, k, v, S0, S1, sums, HG, tx, True)
            if UNIFORM:
                load_low(sums, rows, v, w, H, tq - 1, tx)
            finish(q, k, v, S0, sums, tx)
            # for tile, head: A += f(S)
            for _ in T.serial((steps - 1) // 2):
                for S, SP in [(S1, S0), (S0, S1)]:
                    issue(q, k, v, S, SP, sums, HG, tx, False)
                    next_head(sums, v, w, tensors, counts, tx)
                    finish(q, k, v, S, sums, tx)
            if steps % 2 == 0:
                issue(q, k, v, S1, S0, sums, HG, tx, False)
                next_head(sums, v, w, tensors, counts, tx)
                finish(q, k, v, S1, sums, tx)
                add(S1, sums, 0, 16, v[SLOT] if FP8 else 0)
            else:
                add(S0, sums, 0, 16, v[SLOT] if FP8 else 0)
            store(A, OUT, ITEMS, w)
        else:
            T.set_max_nreg(REGISTERS[1], 0)
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
                if FP8:
                    slot = T.alloc_var("int32", 0)
                    qt = T.alloc_var("int32", 0)
                    kt = T.alloc_var("int32", 0)
                    at = T.alloc_var("int32")  # of the group's scales in KS
                count = count_items(nitems, bx, grid)
                for i in T.serial(count):
                    t0 = number(ITEMS, (bx + i * grid) * SHORT_ITEM + ScoreItem.TOKEN) - qbase
                    s0 = number(ITEMS, (bx + i * grid) * SHORT_ITEM + ScoreItem.KEY)
                    left = 0
                    kc = -D
                    if FP8:
                        at = s0
                    for h in T.serial(H):
                        qc = h * D
                        if left == 0:
                            kc = kc + D
                        for c in chunks:
                            if left == 0:
                                T.barrier_wait(emptyk[ks], kp)
                                T.tma_copy(
                                    K[s0 : s0 + 128, kc + c * BK : kc + (c + 1) * BK], Ks[ks, :, :], barrier=fullk[ks]
                                )
                                if TAIL and c == NK - 1:
                                    T.tma_copy(K[s0 : s0 + 128, kc + NK * BK : kc + D], Kt[kt, :, :], barrier=fullk[ks])
                                    turn(kt, KTAILS)
                                if FP8 and c == 0:
                                    T.tma_copy(KS[at : at + 128], Ss[slot * 128 : slot * 128 + 128], barrier=fullk[ks])
                                    turn(slot, SLOTS)
                                    at = at + keys
                                commit((fullk, ks))
                                advance(ks, kp, KST)
                            T.barrier_wait(emptyq[qs], qp)
                            T.tma_copy(
                                Q[t0 : t0 + 128, qc + c * BK : qc + (c + 1) * BK], Qs[qs, :, :], barrier=fullq[qs]
                            )
                            if TAIL and c == NK - 1:
                                T.tma_copy(Q[t0 : t0 + 128, qc + NK * BK : qc + D], Qt[qt, :, :], barrier=fullq[qs])
                                turn(qt, QTAILS)
                            commit((fullq, qs))
                            advance(qs, qp, QST)
                        if left == 0:
                            left = HG
                        left = left - 1

    if FP8:

        @T.prim_func
        def flash_indexer_score_fp8(
            Q: T.Tensor((tq, hd), dtype), K: T.Tensor((tk, gd), dtype), L: T.Tensor((nl,), "float32"),
            QS: T.Tensor((nq,), "float32"), KS: T.Tensor((nk,), "float32"),
            OUT: T.Tensor((nr, 128), "float32"), ITEMS: T.Tensor((ni,), "int32"),
            H: T.int32, HG: T.int32, scale: T.float32, qbase: T.int32, nitems: T.int32, grid: T.int32, keys: T.int32,
        ):  # fmt: skip
            with T.Kernel(grid, threads=384) as bx:
                body(bx, (Q, K), (L, QS), KS, OUT, ITEMS, (H, HG, scale, qbase, nitems, grid, keys))

        return flash_indexer_score_fp8

    @T.prim_func
    def flash_indexer_score(
        Q: T.Tensor((tq, hd), dtype), K: T.Tensor((tk, gd), dtype), L: T.Tensor((nl,), "float32"),
        OUT: T.Tensor((nr, 128), "float32"), ITEMS: T.Tensor((ni,), "int32"),
        H: T.int32, HG: T.int32, scale: T.float32, qbase: T.int32, nitems: T.int32, grid: T.int32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=384) as bx:
            body(bx, (Q, K), (L, None), None, OUT, ITEMS, (H, HG, scale, qbase, nitems, grid, 0))

    return flash_indexer_score
