"""dk and dv of attention over selected keys, in dense tiles with a bit per (query, key).

    a[t,h,s]  = exp(scale·q[t,h]·k[s,g(h)] - lse[t,h])                          s in S_t
    dS[t,h,s] = a · (d_out[t,h]·v[s,g(h)] - delta[t,h])
    dv[s,g]  += sum_{t, h of g} a d_out[t,h]             dk[s,g]  += scale · sum_{t, h of g} dS q[t,h]

128 keys of a head stay, the queries of its heads stream by, N at a time, those tiles that hold a set bit:

    warps 0-3, 4-7   64 keys each: S, Z, P, dS [64, N], dv and dk [64, D] in registers
    warp 8           feeds one ring: q, d_out, the bits (of keys by queries), lse and delta of the tile
    warps 9-11       idle (registers are given to the others)

    S = K q^T     Z = V d_out^T     P = exp of S at set bits     dv += P d_out     dS = P (Z - delta)     dk += dS q

P and dS are made where the next product wants them, in registers: nothing but the tiles themselves is in shared memory.
A warpgroup's products run under the other's exponentials, and Z and dv under its own.
"""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.bits_steps import copy_bits
from flash_indexer.kernels.sm_90.macros import (
    FULL_ROW,
    LOG2E,
    PASS_CONFIGS,
    REGISTERS,
    advance,
    commit,
    number,
    place,
    release,
    shared_address,
)

__all__ = ["PASS_CONFIGS", "build"]
SOURCE = source(__file__)
STAGES = 4


def build(D, N):
    """The kernel for queries, keys and values of D columns, 64 or 128, and N rows that stream by. Run-time arguments:

    Q, G  [T, H·D], K, V [S, G·D] bfloat16           G: the gradient of out
    NUMBERS [H·rows·2] float32                       lse and delta, see `bits_tables`
    TURNED [rows / 32 · columns] int32               the bits of keys by queries
    LIST  [key tiles · (tiles + 1)] int32            of tiles of N queries
    DK, DV [parts·S·G·D] float32                     added to; part p takes the p-th of `parts` equal runs of a key
                                                     tile's steps (heads, and tiles of each), so parts never meet
    H, HG, rows, columns, key_tiles, tiles, parts int32; scale float32
    """
    WORDS = N // 32 * 128
    tq, tk, hd, gd = (T.dynamic(x) for x in ("tq", "tk", "hd", "gd"))
    nb, nl, nn, nd = (T.dynamic(x) for x in ("nb", "nl", "nn", "nd"))

    @T.prim_func
    def flash_indexer_bits_gradients_key(
        Q: T.Tensor((tq, hd), "bfloat16"), G: T.Tensor((tq, hd), "bfloat16"), K: T.Tensor((tk, gd), "bfloat16"),
        V: T.Tensor((tk, gd), "bfloat16"), NUMBERS: T.Tensor((nn,), "float32"), TURNED: T.Tensor((nb,), "int32"),
        LIST: T.Tensor((nl,), "int32"), DK: T.Tensor((nd,), "float32"), DV: T.Tensor((nd,), "float32"), H: T.int32,
        HG: T.int32, rows: T.int32, columns: T.int32, key_tiles: T.int32, tiles: T.int32, parts: T.int32,
        scale: T.float32,
    ):  # fmt: skip
        with T.Kernel(key_tiles * (H // HG) * parts, threads=384) as bx:
            T.import_source(SOURCE)
            Ks = T.alloc_shared((128, D), "bfloat16")
            Vs = T.alloc_shared((128, D), "bfloat16")
            Qs = T.alloc_shared((STAGES, N, D), "bfloat16")
            Gs = T.alloc_shared((STAGES, N, D), "bfloat16")
            Bs = T.alloc_shared((STAGES * WORDS,), "int32")
            Ns = T.alloc_shared((STAGES * 2 * N,), "float32")
            S = T.alloc_fragment((128, N), "float32")
            Z = T.alloc_fragment((128, N), "float32")
            P = T.alloc_fragment((128, N), "bfloat16")
            dS = T.alloc_fragment((128, N), "bfloat16")
            dk = T.alloc_fragment((128, D), "float32")
            dv = T.alloc_fragment((128, D), "float32")
            fullx = T.alloc_barrier([1])
            full = T.alloc_barrier([1] * STAGES)
            empty = T.alloc_barrier([8] * STAGES)
            tx = T.get_thread_binding()
            if tx < 256:
                T.set_max_nreg(REGISTERS[0], 1)
                stage, parity = place(0)
                words = T.alloc_var("int32")
                numbers = T.alloc_var("int32")
                steps = T.alloc_var("int32")
                part = T.alloc_var("int32")
                tile = T.alloc_var("int32")
                words = shared_address(Bs)
                numbers = shared_address(Ns)
                part = bx % parts
                tile = bx // parts // (H // HG)
                steps = number(LIST, tile * (tiles + 1)) * HG
                steps = steps * (part + 1) // parts - steps * part // parts
                T.clear(dk)
                T.clear(dv)
                if steps > 0:
                    T.barrier_wait(fullx[0], 0)
                    for _ in T.serial(steps):
                        T.barrier_wait(full[stage], parity)
                        # S = K @ Q.T; Z = V @ G.T
                        T.wgmma_gemm(Ks, Qs[stage, :, :], S, transpose_B=True, clear_accum=True, policy=FULL_ROW)
                        T.wgmma_gemm(Vs, Gs[stage, :, :], Z, transpose_B=True, clear_accum=True, policy=FULL_ROW)
                        T.wait_wgmma(1)
                        T.warpgroup_fence_operand(S, num_regs=N // 2)
                        T.call_extern(
                            "handle", f"bk_probabilities<{N}>", S.access_ptr("rw"), words + stage * (WORDS * 4),
                            numbers + stage * (8 * N), scale * LOG2E,
                        )  # fmt: skip
                        T.call_extern("handle", f"pack_operand<{N}>", P.access_ptr("w"), S.access_ptr("r"))
                        # dv += P @ G
                        T.wgmma_gemm(P, Gs[stage, :, :], dv, policy=FULL_ROW)
                        T.wait_wgmma(1)
                        T.warpgroup_fence_operand(Z, num_regs=N // 2)
                        T.call_extern(
                            "handle", f"bk_apply<{N}>", S.access_ptr("rw"), Z.access_ptr("r"), numbers + stage * (8 * N)
                        )
                        T.call_extern("handle", f"pack_operand<{N}>", dS.access_ptr("w"), S.access_ptr("r"))
                        # dk += dS @ Q
                        T.wgmma_gemm(dS, Qs[stage, :, :], dk, policy=FULL_ROW)
                        T.wait_wgmma(0)
                        T.warpgroup_fence_operand(dv, num_regs=D // 2)
                        T.warpgroup_fence_operand(dk, num_regs=D // 2)
                        release(empty, stage, tx)
                        advance(stage, parity, STAGES)
                    for total, target, factor in [(dk, DK, scale), (dv, DV, 1.0)]:
                        T.call_extern(
                            "handle", f"bk_add<{D}>", total.access_ptr("r"), T.address_of(target[0]),
                            T.cast(part, "int64") * tk * gd, tile * 128, bx // parts % (H // HG), tk, H // HG, factor,
                        )  # fmt: skip
            else:
                T.set_max_nreg(REGISTERS[1], 0)
                if tx < 288:
                    s1, p1 = place(1)
                    group = T.alloc_var("int32")
                    key = T.alloc_var("int32")
                    at = T.alloc_var("int32")
                    count = T.alloc_var("int32")
                    begin = T.alloc_var("int32")
                    total1 = T.alloc_var("int32")
                    i = T.alloc_var("int32")
                    head = T.alloc_var("int32")
                    t0 = T.alloc_var("int32")
                    group = bx // parts % (H // HG)
                    key = bx // parts // (H // HG) * 128
                    at = bx // parts // (H // HG) * (tiles + 1)
                    count = number(LIST, at)
                    begin = count * HG * (bx % parts) // parts
                    total1 = count * HG * (bx % parts + 1) // parts - begin
                    if total1 > 0:
                        T.tma_copy(K[key : key + 128, group * D : group * D + D], Ks, barrier=fullx[0])
                        T.tma_copy(V[key : key + 128, group * D : group * D + D], Vs, barrier=fullx[0])
                        commit((fullx, 0))
                        head = group * HG + begin // count
                        i = begin % count
                    for _ in T.serial(total1):
                        t0 = number(LIST, at + 1 + i) * N
                        T.barrier_wait(empty[s1], p1)
                        T.tma_copy(Q[t0 : t0 + N, head * D : head * D + D], Qs[s1, :, :], barrier=full[s1])
                        T.tma_copy(G[t0 : t0 + N, head * D : head * D + D], Gs[s1, :, :], barrier=full[s1])
                        T.tma_copy(
                            NUMBERS[(head * rows + t0) * 2 : (head * rows + t0) * 2 + 2 * N],
                            Ns[s1 * 2 * N : s1 * 2 * N + 2 * N], barrier=full[s1],
                        )  # fmt: skip
                        copy_bits(TURNED, Bs, (full, s1), N // 32, (t0 // 32, columns, key))
                        commit((full, s1))
                        advance(s1, p1, STAGES)
                        i = i + 1
                        if i == count:
                            i = 0
                            head = head + 1

    return flash_indexer_bits_gradients_key
