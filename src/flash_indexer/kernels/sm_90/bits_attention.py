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
from flash_indexer.kernels.sm_90.bits_steps import QueryTile, copy_bits
from flash_indexer.kernels.sm_90.macros import (
    FULL_ROW,
    PASS_CONFIGS,
    REGISTERS,
    advance,
    begin_turns,
    commit,
    new_ring,
    pass_turn,
    place,
    release,
    release_read,
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
    def logits(Qs, keys, S, v, tx):
        T.barrier_wait(keys.full[v[K_STAGE]], v[K_PARITY])
        wait_for_turn(tx)
        T.wgmma_gemm(Qs, keys.stages[v[K_STAGE], :, :], S, transpose_B=True, clear_accum=True, policy=FULL_ROW)

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
    def accumulate(P, values, O, v):
        T.barrier_wait(values.full[v[V_STAGE]], v[V_PARITY])
        T.wgmma_gemm(P, values.stages[v[V_STAGE], :, :], O, policy=FULL_ROW)
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
            Bs = T.alloc_shared((KST * WORDS,), "int32")
            S = T.alloc_fragment((128, N), "float32")
            P = T.alloc_fragment((128, N), "bfloat16")
            O = T.alloc_fragment((128, D), "float32")
            fullq = T.alloc_barrier([1])
            values, keys = new_ring(VST, N, D), new_ring(KST, N, D)
            tx = T.get_thread_binding()
            if tx < 256:
                T.set_max_nreg(REGISTERS[0], 1)
                v = T.alloc_local((STATE,), "int32")
                m = T.alloc_local((2,), "float32")
                l = T.alloc_local((2,), "float32")
                alpha = T.alloc_local((2,), "float32")
                words = T.alloc_var("int32")
                sums = (m, l, alpha)
                for i in list(range(STATE)):
                    v[i] = 0
                words = shared_address(Bs)
                here = QueryTile(LIST, bx, H, row_tiles, tiles)
                T.call_extern("handle", "ba_begin", m.access_ptr("w"), l.access_ptr("w"))
                T.clear(O)
                begin_turns(tx)
                if here.count > 0:
                    T.barrier_wait(fullq[0], 0)
                    logits(Qs, keys, S, v, tx)
                    T.wait_wgmma(0)
                    pass_turn(tx)
                    T.warpgroup_fence_operand(S, num_regs=N // 2)
                    softmax(S, sums, v, words, scale)
                    release_read(keys.empty, v[K_STAGE], tx)
                    next_tile(P, S, v)
                    for _ in T.serial(here.count - 1):
                        logits(Qs, keys, S, v, tx)
                        accumulate(P, values, O, v)
                        pass_turn(tx)
                        T.wait_wgmma(1)
                        T.warpgroup_fence_operand(S, num_regs=N // 2)
                        softmax(S, sums, v, words, scale)
                        release_read(keys.empty, v[K_STAGE], tx)
                        T.wait_wgmma(0)
                        T.warpgroup_fence_operand(O, num_regs=D // 2)
                        release(values.empty, v[V_BEFORE], tx)
                        T.call_extern("handle", f"ba_rescale<{D}>", O.access_ptr("rw"), alpha.access_ptr("r"))
                        next_tile(P, S, v)
                    accumulate(P, values, O, v)
                    T.wait_wgmma(0)
                    T.warpgroup_fence_operand(O, num_regs=D // 2)
                T.call_extern(
                    "handle", f"ba_store<{D}>", O.access_ptr("r"), m.access_ptr("r"), l.access_ptr("r"),
                    T.address_of(BAD[0]), T.address_of(OUT[0, 0]), T.address_of(LSE[0]), here.first, here.head, tq, H,
                )  # fmt: skip
            else:
                T.set_max_nreg(REGISTERS[1], 0)
                if tx < 288:
                    ks, kp = place(1)
                    vs, vp = place(1)
                    key = T.alloc_var("int32")
                    column = T.alloc_var("int32")
                    here = QueryTile(LIST, bx, H, row_tiles, tiles)
                    column = here.head // HG * D
                    if here.count > 0:
                        T.tma_copy(
                            Q[here.first : here.first + 128, here.head * D : here.head * D + D], Qs, barrier=fullq[0]
                        )
                        commit((fullq, 0))
                    for i in T.serial(here.count):
                        key = here.keys(i, N)
                        T.barrier_wait(keys.empty[ks], kp)
                        T.tma_copy(K[key : key + N, column : column + D], keys.stages[ks, :, :], barrier=keys.full[ks])
                        copy_bits(BITS, Bs, (keys.full, ks), N // 32, (key // 32, rows, here.first))
                        commit((keys.full, ks))
                        advance(ks, kp, KST)
                        T.barrier_wait(values.empty[vs], vp)
                        T.tma_copy(
                            V[key : key + N, column : column + D], values.stages[vs, :, :], barrier=values.full[vs]
                        )
                        commit((values.full, vs))
                        advance(vs, vp, VST)

    return flash_indexer_bits_attention
