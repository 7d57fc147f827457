"""Attention forward with its logsumexp for MLA's absorbed form: q and k 576 wide, one key head, v = k[:, :512].

    out[t,h] = sum_s exp(scale · q[t,h]·k[s] - lse[t,h]) · k[s, :512]          over key_start[t] <= s < key_end[t]
    lse[t,h] = log sum_s exp(scale · q[t,h]·k[s])

An item is 64 consecutive rows (token, head) and an even number of tiles of 64 keys, from right to left; tile t lies in
slot t % 2 of shared memory and is loaded once, for both products. An output of 64 x 512 is too large for one warpgroup:

    warps 0-3    S and P of even tiles; O[:, :256]
    warps 4-7    S and P of odd tiles; O[:, 256:]
    warp 8       feeds by TMA, panels of 64 columns: a panel is refilled as soon as both are done with it
    warps 9-11   idle (their registers go to the consumers)

Step t, of warpgroup w = t % 2:

    S  = q k_t^T, the first EARLY panels
    O += P_{t-1} v_{t-1}[:, half w]           P of the other warpgroup, from shared memory
    S += q k_t^T, the other panels
    P_t = exp2(S - m) in registers, and in shared memory over the last panel of k_t, which no product reads any more
    O += P_t v_t[:, half w]

    warpgroup 0    | S_0 ...... | P_0 |  O | S_2 .... O .... | P_2 |  O | ...
    warpgroup 1         | S_1 .... O .... | P_1 |  O | S_3 .... O .... | P_3 | ...     half a step later

The reference m of the exponentials goes from tile to tile, and moves when some row exceeds it by 2^8.
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
D, V = 576, 512
ROWS, KEYS = 64, 64  # of an item, of a key tile
EARLY = 6  # of 9 panels of S come before the product with the other warpgroup's P; 2, 4 and 9 are slower
REGISTERS = (240, 24)  # consumers, producer
SOURCE = source(__file__)


def build():
    """Attention forward with its logsumexp: q and k 576 wide, v = k[:, :512], one key head. Run-time arguments:

    Q     [T·H, 576], K [S, 576] bfloat16
    KS    [T], KE [T] int32             visible keys of each token
    ITEMS [8·nitems] int32              (row, first, pairs, low, high, 0, 0, 0): rows row .. row + 63 of Q; key tiles
                                        2·pairs, at least 2: tile j holds the keys first - 64·j + 0 .. 63, all that
                                        some row sees; tiles within low .. high - 1, which every row sees, are
                                        not masked
    OUT   [T·H, 512] bfloat16, LSE [T·H] float32     written; zeros and -inf where a token sees nothing
    H, nitems, grid int32; scale float32, times log2(e)     CTA c of `grid` takes the items c, c + grid, ...
    """
    TILE, PANEL = KEYS * D * 2, KEYS * 64 * 2
    nqh, tk, nm, nt = T.dynamic("nqh"), T.dynamic("tk"), T.dynamic("nm"), T.dynamic("nt")

    @T.macro
    def release(bar, i, tx):  # one arrival a warp
        T.sync_warp()
        if tx % 32 == 0:
            T.mbarrier_arrive(bar[i])

    # v: 0 parity of K's full barriers, 1 of the other warpgroup's P, 2 of Q, 3 O is to be scaled, 4 first key of the
    # tile, 5 ones, 6, 7 keys visible to all rows. vb: bounds of the thread's two rows. z: an opaque zero.
    # a: address of 0 own m, 1 the other's m, 2 own P, 3, 4 own and other row sums
    @T.macro
    def qk(wg, Ks, S, kfull, v, z, panels, first):
        for i in panels:
            T.barrier_wait(kfull[wg * 9 + i], v[0])
            T.wgmma_gemm(
                Ks[2 + z[0], :, i * 64 : i * 64 + 64],
                Ks[wg + z[0], :, i * 64 : i * 64 + 64],
                S,
                transpose_B=True,
                clear_accum=(i == first),
                policy=T.GemmWarpPolicy.FullRow,
            )

    @T.macro
    def other(wg, Ks, O, pready, v, z, a, f):
        T.barrier_wait(pready[1 - wg], v[1])
        v[1] = v[1] ^ 1
        T.call_extern("handle", "mla_adopt", O.access_ptr("rw"), f.access_ptr("rw"), a[1])
        T.wgmma_gemm(
            Ks[1 - wg + z[0], :, 512:576],
            Ks[1 - wg + z[0], :, wg * 256 : wg * 256 + 256],
            O,
            policy=T.GemmWarpPolicy.FullRow,
        )

    @T.macro
    def softmax(wg, S, x, pready, v, vb, a, f, cs, tx):
        T.warpgroup_fence_operand(S, num_regs=32)
        if v[4] < v[6] or v[4] + 64 > v[7]:
            T.call_extern("handle", "mla_mask", S.access_ptr("rw"), vb.access_ptr("r"), v[4])
        v[3] = T.call_extern(
            "int32", "mla_softmax", S.access_ptr("r"), x.access_ptr("w"), f.access_ptr("rw"), cs[0], a[0], a[2]
        )
        release(pready, wg, tx)

    @T.macro
    def own(wg, Ks, O, P, x, v, z, f):
        T.call_extern("handle", "mla_define", P.access_ptr("w"), x.access_ptr("r"), v[5])
        if v[3] != 0:
            T.call_extern("handle", "mla_scale", O.access_ptr("rw"), f[4], f[5])
        T.wgmma_gemm(P, Ks[wg + z[0], :, wg * 256 : wg * 256 + 256], O, policy=T.GemmWarpPolicy.FullRow)

    @T.macro
    def step(wg, last, Ks, S, P, O, x, v, z, vb, a, f, cs, tx, kfull, kempty, pready, qempty, prev):
        order = [4 * wg + i for i in range(4)] + [4 * (1 - wg) + i for i in range(4)] + [8]
        z[0] = T.call_extern("int32", "mla_zero")
        if prev:
            qk(wg, Ks, S, kfull, v, z, order[:EARLY], order[0])
            other(wg, Ks, O, pready, v, z, a, f)
            qk(wg, Ks, S, kfull, v, z, order[EARLY:], order[0])
            T.wait_wgmma(9 - EARLY)
            T.warpgroup_fence_operand(O, num_regs=128)
            release(kempty, 2 * (1 - wg) + wg, tx)
            T.wait_wgmma(0)
        else:
            qk(wg, Ks, S, kfull, v, z, order, order[0])
            T.wait_wgmma(0)
        v[0] = v[0] ^ 1
        if last:
            release(qempty, 0, tx)
        softmax(wg, S, x, pready, v, vb, a, f, cs, tx)
        own(wg, Ks, O, P, x, v, z, f)
        v[4] = v[4] - 128
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(O, num_regs=128)
        release(kempty, 2 * wg + wg, tx)

    @T.macro
    def consumer(wg, bx, grid, tx, count, scale, H, Ks, Ms, S, P, O, ITEMS, KS, KE, OUT, LSE, bars):
        qfull, qempty, kfull, kempty, pready = bars
        v = T.alloc_local((8,), "int32")
        z = T.alloc_local((1,), "int32")
        vb = T.alloc_local((4,), "int32")
        a = T.alloc_local((5,), "int32")
        f = T.alloc_local((6,), "float32")
        cs = T.alloc_local((1,), "float32")
        x = T.alloc_local((16,), "uint32")
        row0 = T.alloc_var("int32")
        n = T.alloc_var("int32")
        for j in list(range(8)):
            v[j] = 0
        v[5] = T.if_then_else(H > 0, -1, 0)
        cs[0] = scale
        a[0] = T.call_extern("int32", "mla_address", T.address_of(Ms[wg * 64]))
        a[1] = T.call_extern("int32", "mla_address", T.address_of(Ms[(1 - wg) * 64]))
        a[2] = T.call_extern("int32", "mla_address", T.address_of(Ks[0, 0, 0])) + wg * TILE + 8 * PANEL
        a[3] = T.call_extern("int32", "mla_address", T.address_of(Ms[(2 + wg) * 64]))
        a[4] = T.call_extern("int32", "mla_address", T.address_of(Ms[(3 - wg) * 64]))
        for it in T.serial(count):
            row0 = T.call_extern("int32", "mla_int", T.address_of(ITEMS[0]), (bx + it * grid) * 8)
            v[4] = T.call_extern("int32", "mla_int", T.address_of(ITEMS[0]), (bx + it * grid) * 8 + 1) - wg * 64
            n = T.call_extern("int32", "mla_int", T.address_of(ITEMS[0]), (bx + it * grid) * 8 + 2)
            v[6] = T.call_extern("int32", "mla_int", T.address_of(ITEMS[0]), (bx + it * grid) * 8 + 3)
            v[7] = T.call_extern("int32", "mla_int", T.address_of(ITEMS[0]), (bx + it * grid) * 8 + 4)
            T.call_extern(
                "handle", "mla_bounds", vb.access_ptr("w"), T.address_of(KS[0]), T.address_of(KE[0]), row0, H, nt
            )
            T.call_extern("handle", "mla_start", f.access_ptr("w"))
            T.clear(O)
            T.barrier_wait(qfull[0], v[2])
            v[2] = v[2] ^ 1
            if wg == 0:
                step(wg, n == 1, Ks, S, P, O, x, v, z, vb, a, f, cs, tx, kfull, kempty, pready, qempty, False)
                for i in T.serial(n - 1):
                    step(wg, i == n - 2, Ks, S, P, O, x, v, z, vb, a, f, cs, tx, kfull, kempty, pready, qempty, True)
                other(wg, Ks, O, pready, v, z, a, f)
                T.wait_wgmma(0)
                T.warpgroup_fence_operand(O, num_regs=128)
                release(kempty, 2 * (1 - wg) + wg, tx)
            else:
                for i in T.serial(n):
                    step(wg, i == n - 1, Ks, S, P, O, x, v, z, vb, a, f, cs, tx, kfull, kempty, pready, qempty, True)
            T.call_extern("handle", "mla_sums", f.access_ptr("rw"), a[3])
            T.sync_threads(8, 256)
            T.call_extern(
                "handle", "mla_store", O.access_ptr("r"), f.access_ptr("r"), a[4], T.address_of(OUT[0, 0]),
                T.address_of(LSE[0]), row0, nqh, wg,
            )  # fmt: skip

    @T.prim_func
    def flash_indexer_attention_mla(
        Q: T.Tensor((nqh, D), "bfloat16"), K: T.Tensor((tk, D), "bfloat16"), KS: T.Tensor((nt,), "int32"),
        KE: T.Tensor((nt,), "int32"), ITEMS: T.Tensor((nm,), "int32"), OUT: T.Tensor((nqh, V), "bfloat16"),
        LSE: T.Tensor((nqh,), "float32"), H: T.int32, nitems: T.int32, grid: T.int32, scale: T.float32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=384) as bx:
            T.import_source(SOURCE)
            Ks = T.alloc_shared((3, KEYS, D), "bfloat16")  # two key tiles, and the queries
            Ms = T.alloc_shared((256,), "float32")
            S0 = T.alloc_fragment((ROWS, KEYS), "float32")
            P0 = T.alloc_fragment((ROWS, KEYS), "bfloat16")
            O0 = T.alloc_fragment((ROWS, 256), "float32")
            S1 = T.alloc_fragment((ROWS, KEYS), "float32")
            P1 = T.alloc_fragment((ROWS, KEYS), "bfloat16")
            O1 = T.alloc_fragment((ROWS, 256), "float32")
            qfull = T.alloc_barrier([1])
            qempty = T.alloc_barrier([8])
            kfull = T.alloc_barrier([1] * 18)
            kempty = T.alloc_barrier([4] * 4)  # slot * 2 + half
            pready = T.alloc_barrier([4] * 2)
            bars = (qfull, qempty, kfull, kempty, pready)
            tx = T.get_thread_binding()
            count = T.alloc_var("int32")
            count = T.call_extern("int32", "mla_count", nitems, bx, grid)
            if tx < 128:
                T.set_max_nreg(REGISTERS[0], 1)
                consumer(0, bx, grid, tx, count, scale, H, Ks, Ms, S0, P0, O0, ITEMS, KS, KE, OUT, LSE, bars)
            elif tx < 256:
                T.set_max_nreg(REGISTERS[0], 1)
                consumer(1, bx, grid, tx, count, scale, H, Ks, Ms, S1, P1, O1, ITEMS, KS, KE, OUT, LSE, bars)
            else:
                T.set_max_nreg(REGISTERS[1], 0)
                if tx < 288:
                    ph = T.alloc_var("int32", 1)
                    qp = T.alloc_var("int32", 1)
                    k0 = T.alloc_var("int32")
                    n1 = T.alloc_var("int32")
                    rq = T.alloc_var("int32")
                    for it in T.serial(count):
                        rq = T.call_extern("int32", "mla_int", T.address_of(ITEMS[0]), (bx + it * grid) * 8)
                        k0 = T.call_extern("int32", "mla_int", T.address_of(ITEMS[0]), (bx + it * grid) * 8 + 1)
                        n1 = T.call_extern("int32", "mla_int", T.address_of(ITEMS[0]), (bx + it * grid) * 8 + 2)
                        for i in T.serial(n1):
                            for s in [0, 1]:
                                for j in [0, 1]:
                                    T.barrier_wait(kempty[2 * s + (s + j) % 2], ph)
                                    for c in [4 * ((s + j) % 2) + z for z in range(4)] + ([8] if j == 1 else []):
                                        T.tma_copy(
                                            K[k0 : k0 + KEYS, c * 64 : c * 64 + 64],
                                            Ks[s, :, c * 64 : c * 64 + 64],
                                            barrier=kfull[s * 9 + c],
                                        )
                                        if T.shuffle_elect(32):
                                            T.barrier_arrive(kfull[s * 9 + c])
                                    if s + j == 0:  # the first panels of K are free before the queries are
                                        if i == 0:
                                            T.barrier_wait(qempty[0], qp)
                                            qp = qp ^ 1
                                            T.tma_copy(Q[rq : rq + ROWS, 0:D], Ks[2, :, :], barrier=qfull[0])
                                            if T.shuffle_elect(32):
                                                T.barrier_arrive(qfull[0])
                                k0 = k0 - KEYS
                            ph = ph ^ 1

    return flash_indexer_attention_mla
