"""Attention over selected keys in dense tiles with a bit per (query, key): models with many key heads, or narrow ones.

    out[t,h] = sum_{s in S_t} exp(scale·q[t,h]·k[s,g(h)] - lse[t,h]) v[s,g(h)]       lse over S_t

A CTA takes 128 queries of a head and walks over the tiles of N keys that hold a set bit:

    warps 0-3, 4-7   64 queries each: S, P [64, N] and O [64, D] in registers
    warp 8           feeds rings of K with the tile's bits, and of V, by copies that need no thread
    warps 9-11       idle (registers are given to the others)

    tensor cores     | S of tile i+1 | O += P V of tile i | ...    of one warpgroup, while the other one
    everything else  |               | P of tile i+1      |        is at its P

An unselected key's logit is -inf before anything is taken of it, so that NaN in k has no part; a value multiplies
P = 0 there, so that values must be finite: `bits_tables.build_keys` sees to it.
"""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.macros import (
    FULL_ROW,
    PASS_CONFIGS,
    REGISTERS,
    advance,
    begin_turns,
    commit,
    number,
    pass_turn,
    release,
    shared_address,
    wait_for_turn,
)

__all__ = ["PASS_CONFIGS", "build"]
SOURCE = source(__file__)
KST, VST = 2, 2  # of the rings
STATE = 5  # of a thread that computes: stage and parity of K, of V, and the stage of V of the tile before
K_STAGE, K_PARITY, V_STAGE, V_PARITY, V_BEFORE = range(STATE)


def build(D, N):
    """The kernel for queries, keys and values of D columns, 64 or 128, and tiles of N keys. Run-time arguments:

    Q     [T, H·D], K, V [S, G·D] bfloat16
    BITS  [words·rows] int32            see `bits`
    LIST  [row tiles · (tiles + 1)]     of each tile of 128 queries: how many tiles of keys, and which; int32
    BAD   [T] float32                   added to every result of a query: NaN, or 0
    OUT   [T, H·D] bfloat16, LSE [T·H] float32        written: zeros and -inf for a query without keys
    H, HG, rows, row_tiles, tiles int32; scale float32, positive, times log2(e)
    """
    WORDS = N // 32 * 128  # of a tile
    tq, tk, hd, gd = (T.dynamic(x) for x in ("tq", "tk", "hd", "gd"))
    nb, nl, nx = (T.dynamic(x) for x in ("nb", "nl", "nx"))

    # S = Q @ K.T
    @T.macro
    def logits(Qs, Ks, S, fullk, v, tx):
        T.barrier_wait(fullk[v[K_STAGE]], v[K_PARITY])
        wait_for_turn(tx)
        T.wgmma_gemm(Qs, Ks[v[K_STAGE], :, :], S, transpose_B=True, clear_accum=True, policy=FULL_ROW)

    # P of the tile
    @T.macro
    def softmax(S, sums, v, words, scale):
        m, l, alpha = sums
        T.call_extern(
            "handle", f"ba_softmax<{N}>", S.access_ptr("rw"), m.access_ptr("rw"), l.access_ptr("rw"),
            alpha.access_ptr("w"), words + v[K_STAGE] * (WORDS * 4), scale,
        )  # fmt: skip

    @T.macro
    def next_tile(P, S, v):
        T.call_extern("handle", f"pack_operand<{N}>", P.access_ptr("w"), S.access_ptr("r"))
        advance(v[K_STAGE], v[K_PARITY], KST)
        v[V_BEFORE] = v[V_STAGE]

    # O += P @ V of the tile before
    @T.macro
    def accumulate(P, Vs, O, fullv, v):
        T.barrier_wait(fullv[v[V_STAGE]], v[V_PARITY])
        T.wgmma_gemm(P, Vs[v[V_STAGE], :, :], O, policy=FULL_ROW)
        advance(v[V_STAGE], v[V_PARITY], VST)

    @T.prim_func
    def flash_indexer_bits_attention(
        Q: T.Tensor((tq, hd), "bfloat16"), K: T.Tensor((tk, gd), "bfloat16"), V: T.Tensor((tk, gd), "bfloat16"),
        BITS: T.Tensor((nb,), "int32"), LIST: T.Tensor((nl,), "int32"), BAD: T.Tensor((tq,), "float32"),
        OUT: T.Tensor((tq, hd), "bfloat16"), LSE: T.Tensor((nx,), "float32"), H: T.int32, HG: T.int32, rows: T.int32,
        row_tiles: T.int32, tiles: T.int32, scale: T.float32,
    ):  # fmt: skip
        with T.Kernel(row_tiles * H, threads=384) as bx:
            T.import_source(SOURCE)
            Qs = T.alloc_shared((128, D), "bfloat16")
            Ks = T.alloc_shared((KST, N, D), "bfloat16")
            Vs = T.alloc_shared((VST, N, D), "bfloat16")
            Bs = T.alloc_shared((KST * WORDS,), "int32")
            S = T.alloc_fragment((128, N), "float32")
            P = T.alloc_fragment((128, N), "bfloat16")
            O = T.alloc_fragment((128, D), "float32")
            fullq = T.alloc_barrier([1])
            fullk = T.alloc_barrier([1] * KST)
            emptyk = T.alloc_barrier([8] * KST)
            fullv = T.alloc_barrier([1] * VST)
            emptyv = T.alloc_barrier([8] * VST)
            tx = T.get_thread_binding()
            if tx < 256:
                T.set_max_nreg(REGISTERS[0], 1)
                v = T.alloc_local((STATE,), "int32")
                m = T.alloc_local((2,), "float32")
                l = T.alloc_local((2,), "float32")
                alpha = T.alloc_local((2,), "float32")
                count = T.alloc_var("int32")
                words = T.alloc_var("int32")
                tile = T.alloc_var("int32")  # of queries
                sums = (m, l, alpha)
                for i in list(range(STATE)):
                    v[i] = 0
                words = shared_address(Bs)
                tile = row_tiles - 1 - bx // H
                count = number(LIST, tile * (tiles + 1))
                T.call_extern("handle", "ba_begin", m.access_ptr("w"), l.access_ptr("w"))
                T.clear(O)
                begin_turns(tx)
                if count > 0:
                    T.barrier_wait(fullq[0], 0)
                    logits(Qs, Ks, S, fullk, v, tx)
                    T.wait_wgmma(0)
                    pass_turn(tx)
                    T.warpgroup_fence_operand(S, num_regs=N // 2)
                    softmax(S, sums, v, words, scale)
                    release(emptyk, v[K_STAGE], tx)
                    next_tile(P, S, v)
                    for _ in T.serial(count - 1):
                        logits(Qs, Ks, S, fullk, v, tx)
                        accumulate(P, Vs, O, fullv, v)
                        pass_turn(tx)
                        T.wait_wgmma(1)
                        T.warpgroup_fence_operand(S, num_regs=N // 2)
                        softmax(S, sums, v, words, scale)
                        release(emptyk, v[K_STAGE], tx)
                        T.wait_wgmma(0)
                        T.warpgroup_fence_operand(O, num_regs=D // 2)
                        release(emptyv, v[V_BEFORE], tx)
                        T.call_extern("handle", f"ba_rescale<{D}>", O.access_ptr("rw"), alpha.access_ptr("r"))
                        next_tile(P, S, v)
                    accumulate(P, Vs, O, fullv, v)
                    T.wait_wgmma(0)
                    T.warpgroup_fence_operand(O, num_regs=D // 2)
                T.call_extern(
                    "handle", f"ba_store<{D}>", O.access_ptr("r"), m.access_ptr("r"), l.access_ptr("r"),
                    T.address_of(BAD[0]), T.address_of(OUT[0, 0]), T.address_of(LSE[0]), tile * 128, bx % H, tq, H,
                )  # fmt: skip
            else:
                T.set_max_nreg(REGISTERS[1], 0)
                if tx < 288:
                    ks = T.alloc_var("int32", 0)
                    kp = T.alloc_var("int32", 1)
                    vs = T.alloc_var("int32", 0)
                    vp = T.alloc_var("int32", 1)
                    t0 = T.alloc_var("int32")
                    head = T.alloc_var("int32")
                    column = T.alloc_var("int32")
                    at = T.alloc_var("int32")
                    key = T.alloc_var("int32")
                    total = T.alloc_var("int32")
                    head = bx % H
                    column = head // HG * D
                    at = (row_tiles - 1 - bx // H) * (tiles + 1)
                    t0 = (row_tiles - 1 - bx // H) * 128
                    total = number(LIST, at)
                    if total > 0:
                        T.tma_copy(Q[t0 : t0 + 128, head * D : head * D + D], Qs, barrier=fullq[0])
                        commit((fullq, 0))
                    for i in T.serial(total):
                        key = number(LIST, at + 1 + i) * N
                        T.barrier_wait(emptyk[ks], kp)
                        T.tma_copy(K[key : key + N, column : column + D], Ks[ks, :, :], barrier=fullk[ks])
                        for j in list(range(N // 32)):
                            T.tma_copy(
                                BITS[(key // 32 + j) * rows + t0 : (key // 32 + j) * rows + t0 + 128],
                                Bs[ks * WORDS + j * 128 : ks * WORDS + j * 128 + 128], barrier=fullk[ks],
                            )  # fmt: skip
                        commit((fullk, ks))
                        advance(ks, kp, KST)
                        T.barrier_wait(emptyv[vs], vp)
                        T.tma_copy(V[key : key + N, column : column + D], Vs[vs, :, :], barrier=fullv[vs])
                        commit((fullv, vs))
                        advance(vs, vp, VST)

    return flash_indexer_bits_attention
