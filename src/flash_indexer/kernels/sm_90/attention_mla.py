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

import tilelang.language as T

from flash_indexer.kernels.device.items import ITEM, LatentItem
from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.attention_mla_steps import (
    FIRST_KEY,
    HIGH,
    KEYS,
    LOW,
    OTHER_SUMS,
    PANELS,
    Q_PARITY,
    ROWS,
    Barriers,
    D,
    State,
    Tiles,
    V,
    begin,
    sweep,
)
from flash_indexer.kernels.sm_90.macros import PASS_CONFIGS, REGISTERS, commit, count_items, number

__all__ = ["PASS_CONFIGS", "build"]
SOURCE = source(__file__)
EARLY = 6  # 2, 4 and 9 are slower


def build():
    """Attention forward with its logsumexp: q and k 576 wide, v = k[:, :512], one key head. Run-time arguments:

    Q     [T·H, 576], K [S, 576] bfloat16
    KS    [T], KE [T] int32             visible keys of each token
    ITEMS [8·nitems] int32              `items.LatentItem` (row, first, pairs, low, high): rows row .. row + 63 of Q;
                                        key tiles 2·pairs, at least 2: tile j holds the keys first - 64·j + 0 .. 63,
                                        all that some row sees; tiles within low .. high - 1, which every row sees, are
                                        not masked
    OUT   [T·H, 512] bfloat16, LSE [T·H] float32     written; zeros and -inf where a token sees nothing
    H, nitems, grid int32; scale float32, times log2(e)     CTA c of `grid` takes the items c, c + grid, ...
    """
    nqh, tk, nm, nt = T.dynamic("nqh"), T.dynamic("tk"), T.dynamic("nm"), T.dynamic("nt")

    def item_field(ITEMS, item, n):
        return number(ITEMS, item * ITEM + n)

    @T.macro
    def arrived(bars, wg, panel, parity):
        T.barrier_wait(bars.kfull[wg * PANELS + panel], parity)

    tiles = Tiles(arrived, -2 * KEYS, EARLY)

    @T.macro
    def consumer(wg, bx, grid, tx, count, scale, H, shared, fragments, tensors, bars):
        Ks, Ms = shared
        S, P, O = fragments
        ITEMS, KS, KE, OUT, LSE = tensors
        v = T.alloc_local((8,), "int32")
        z = T.alloc_local((1,), "int32")
        vb = T.alloc_local((4,), "int32")
        a = T.alloc_local((5,), "int32")
        f = T.alloc_local((6,), "float32")
        cs = T.alloc_local((1,), "float32")
        x = T.alloc_local((16,), "uint32")
        state, registers = State(v, z, vb, a, f, cs), (S, P, O, x)
        row0 = T.alloc_var("int32")
        n = T.alloc_var("int32")
        begin(wg, Ks, Ms, state, scale, H)
        for it in T.serial(count):
            row0 = item_field(ITEMS, bx + it * grid, LatentItem.ROW)
            v[FIRST_KEY] = item_field(ITEMS, bx + it * grid, LatentItem.FIRST_KEY) - wg * 64
            n = item_field(ITEMS, bx + it * grid, LatentItem.PAIRS)
            v[LOW] = item_field(ITEMS, bx + it * grid, LatentItem.LOW)
            v[HIGH] = item_field(ITEMS, bx + it * grid, LatentItem.HIGH)
            T.call_extern(
                "handle", "mla_bounds", vb.access_ptr("w"), T.address_of(KS[0]), T.address_of(KE[0]), row0, H, nt
            )
            T.call_extern("handle", "mla_start", f.access_ptr("w"))
            T.clear(O)
            T.barrier_wait(bars.qfull[0], v[Q_PARITY])
            v[Q_PARITY] = v[Q_PARITY] ^ 1
            sweep(wg, n, Ks, registers, state, bars, tx, tiles)
            T.call_extern(
                "handle", "mla_store", O.access_ptr("r"), f.access_ptr("r"), a[OTHER_SUMS], T.address_of(OUT[0, 0]),
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
            kfull = T.alloc_barrier([1] * (2 * PANELS))
            kempty = T.alloc_barrier([4] * 4)  # slot * 2 + half
            pready = T.alloc_barrier([128] * 2)
            bars = Barriers(qfull, qempty, kfull, kempty, pready)
            shared, tensors = (Ks, Ms), (ITEMS, KS, KE, OUT, LSE)
            tx = T.get_thread_binding()
            count = T.alloc_var("int32")
            count = count_items(nitems, bx, grid)
            if tx < 128:
                T.set_max_nreg(REGISTERS[0], 1)
                consumer(0, bx, grid, tx, count, scale, H, shared, (S0, P0, O0), tensors, bars)
            elif tx < 256:
                T.set_max_nreg(REGISTERS[0], 1)
                consumer(1, bx, grid, tx, count, scale, H, shared, (S1, P1, O1), tensors, bars)
            else:
                T.set_max_nreg(REGISTERS[1], 0)
                if tx < 288:
                    ph = T.alloc_var("int32", 1)
                    qp = T.alloc_var("int32", 1)
                    k0 = T.alloc_var("int32")
                    n1 = T.alloc_var("int32")
                    rq = T.alloc_var("int32")
                    for it in T.serial(count):
                        rq = item_field(ITEMS, bx + it * grid, LatentItem.ROW)
                        k0 = item_field(ITEMS, bx + it * grid, LatentItem.FIRST_KEY)
                        n1 = item_field(ITEMS, bx + it * grid, LatentItem.PAIRS)
                        for i in T.serial(n1):
                            for s in [0, 1]:
                                for j in [0, 1]:
                                    T.barrier_wait(kempty[2 * s + (s + j) % 2], ph)
                                    last = [PANELS - 1] if j == 1 else []
                                    for c in [4 * ((s + j) % 2) + z for z in range(4)] + last:
                                        T.tma_copy(
                                            K[k0 : k0 + KEYS, c * 64 : c * 64 + 64],
                                            Ks[s, :, c * 64 : c * 64 + 64],
                                            barrier=kfull[s * PANELS + c],
                                        )
                                        commit((kfull, s * PANELS + c))
                                    if s + j == 0:  # the first panels of K are free before the queries are
                                        if i == 0:
                                            T.barrier_wait(qempty[0], qp)
                                            qp = qp ^ 1
                                            T.tma_copy(Q[rq : rq + ROWS, 0:D], Ks[2, :, :], barrier=qfull[0])
                                            commit((qfull, 0))
                                k0 = k0 - KEYS
                            ph = ph ^ 1

    return flash_indexer_attention_mla
