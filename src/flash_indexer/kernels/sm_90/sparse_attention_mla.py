"""Attention over selected keys for MLA's absorbed form: q and k 576 wide, one key head, v = k[:, :512].

    out[t,h] = sum_{s in S_t} exp(scale · q[t,h]·k[s] - lse[t,h]) · k[s, :512]
    lse[t,h] = log sum_{s in S_t} exp(scale · q[t,h]·k[s])          S_t: the first count[t] of indices[t]

An item is up to 64 heads of a token. Its tiles are 64 selected keys each, from the first slot on; the schedule of the
two warpgroups that compute is that of `attention_mla`, and only the feeding differs: four warps gather.

    warps 8-11   16 rows of a tile each; a copy of 16 bytes a lane, 4 rows x 128 bytes an instruction, so a panel of 64
                 columns is four instructions of each warp
    warp 8       also copies the queries

Slots behind the last key are filled with zeros, not read: what lies in keys that nobody selected has no part.
"""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.attention_mla_steps import (
    FIRST_KEY,
    HIGH,
    KEYS,
    OTHER_SUMS,
    PANEL_BYTES,
    PANELS,
    Q_PARITY,
    ROWS,
    TILE_BYTES,
    Barriers,
    D,
    State,
    Tiles,
    V,
    begin,
    sweep,
)
from flash_indexer.kernels.sm_90.macros import PASS_CONFIGS, commit, count_items, shared_address

__all__ = ["PASS_CONFIGS", "build"]
SOURCE = source(__file__)
REGISTERS = (232, 40)  # of a thread of the warps that compute, of those that gather
EARLY = 4
GATHER = 128  # threads that gather
GROUPS = 4  # barriers of a tile: of panels 0 and 1, 2 and 3, 4 and 5, 6 and 7; panel 8 arrives with the last


def build():
    """Attention over selected keys with its logsumexp: q, k 576 wide, v = k[:, :512], one key head. Run-time arguments:

    Q     [T·H, 576], K [S, 576] bfloat16
    IDX   [T·width] int32               selected keys of each token in its first COUNT slots; one outside 0 .. S - 1 is
                                        not read and counts as a key of zeros
    COUNT [T] int32                     at most width
    OUT   [T·H, 512] bfloat16, LSE [T·H] float32     written; zeros and -inf where a token has no key
    H     at most 64·halves, halves 1 or 2; nitems = T·halves, grid, width, S int32
    scale float32, times log2(e)        CTA c of `grid` takes the items c, c + grid, ...: item i is the heads from
                                        64·(i % halves) on of token i / halves
    """
    nqh, tk, nx, nt = T.dynamic("nqh"), T.dynamic("tk"), T.dynamic("nx"), T.dynamic("nt")

    @T.macro
    def arrived(bars, wg, panel, parity):
        if panel % 2 == 0 and panel < PANELS - 1:
            T.barrier_wait(bars.kfull[wg * GROUPS + panel // 2], parity)
            T.call_extern("handle", "fence_shared")

    tiles = Tiles(arrived, 2 * KEYS, EARLY)

    def count_of(COUNT, token):
        return T.call_extern("int32", "load_int", T.address_of(COUNT[0]), token)

    def pairs(keys):
        return T.max(1, (keys + 2 * KEYS - 1) // (2 * KEYS))

    @T.macro
    def consumer(wg, bx, grid, tx, count, scale, H, halves, shared, fragments, tensors, bars):
        Ks, Ms = shared
        S, P, O = fragments
        COUNT, OUT, LSE = tensors
        v = T.alloc_local((8,), "int32")
        z = T.alloc_local((1,), "int32")
        vb = T.alloc_local((4,), "int32")
        a = T.alloc_local((5,), "int32")
        f = T.alloc_local((6,), "float32")
        cs = T.alloc_local((1,), "float32")
        x = T.alloc_local((16,), "uint32")
        state, registers = State(v, z, vb, a, f, cs), (S, P, O, x)
        token = T.alloc_var("int32")
        head = T.alloc_var("int32")
        n = T.alloc_var("int32")
        begin(wg, Ks, Ms, state, scale, H)
        for it in T.serial(count):
            token = (bx + it * grid) >> (halves - 1)
            head = ((bx + it * grid) & (halves - 1)) * ROWS
            n = count_of(COUNT, token)
            v[FIRST_KEY] = wg * KEYS
            v[HIGH] = T.if_then_else(head + ROWS > H, 0, n)  # rows that are no heads are masked
            T.call_extern("handle", "sparse_bounds", vb.access_ptr("w"), H - head, n)
            T.call_extern("handle", "mla_start", f.access_ptr("w"))
            T.clear(O)
            T.barrier_wait(bars.qfull[0], v[Q_PARITY])
            v[Q_PARITY] = v[Q_PARITY] ^ 1
            sweep(wg, pairs(n), Ks, registers, state, bars, tx, tiles)
            T.call_extern(
                "handle", "mla_store", O.access_ptr("r"), f.access_ptr("r"), a[OTHER_SUMS], T.address_of(OUT[0, 0]),
                T.address_of(LSE[0]), token * H + head, token * H + H, wg,
            )  # fmt: skip

    @T.macro
    def gather(bx, grid, tx, count, H, halves, width, S, shared, tensors, bars):
        Ks, start = shared
        Q, K, IDX, COUNT = tensors
        w = T.alloc_local((4,), "int64")  # addresses of four keys' rows, of this lane's 16 bytes in them
        size = T.alloc_local((4,), "int32")  # bytes to copy: 16, or 0 for a slot without a key
        key = T.alloc_local((1,), "int32")  # the key of slot 16·warp + lane % 16, of the next tile
        token = T.alloc_var("int32")
        row = T.alloc_var("int32")
        n = T.alloc_var("int32")
        ph = T.alloc_var("int32", 1)
        qp = T.alloc_var("int32", 1)
        for it in T.serial(count):
            token = (bx + it * grid) >> (halves - 1)
            n = count_of(COUNT, token)
            T.call_extern("handle", "gather_key", key.access_ptr("w"), T.address_of(IDX[0]), token, width, 0, n)
            for i in T.serial(pairs(n)):
                for s in [0, 1]:
                    T.call_extern(
                        "handle",
                        "gather_rows",
                        w.access_ptr("w"),
                        size.access_ptr("w"),
                        key[0],
                        T.address_of(K[0, 0]),
                        S,
                    )
                    T.call_extern(
                        "handle", "gather_key", key.access_ptr("w"), T.address_of(IDX[0]), token, width,
                        (2 * i + s + 1) * KEYS, n,
                    )  # fmt: skip
                    for j in [0, 1]:
                        T.barrier_wait(bars.kempty[2 * s + (s + j) % 2], ph)
                        for g in [2 * ((s + j) % 2), 2 * ((s + j) % 2) + 1]:
                            for c in [2 * g, 2 * g + 1] + ([PANELS - 1] if j == 1 and g % 2 == 1 else []):
                                T.call_extern(
                                    "handle", f"gather_panel<{c}>", start + s * TILE_BYTES + c * PANEL_BYTES,
                                    w.access_ptr("r"), size.access_ptr("r"),
                                )  # fmt: skip
                            T.cp_async_barrier_noinc(bars.kfull[s * GROUPS + g])
                        if s + j == 0 and i == 0 and tx < 288:  # the first panels of K are free before the queries are
                            T.barrier_wait(bars.qempty[0], qp)
                            qp = qp ^ 1
                            row = token * H + ((bx + it * grid) & (halves - 1)) * ROWS
                            T.tma_copy(Q[row : row + ROWS, 0:D], Ks[2, :, :], barrier=bars.qfull[0])
                            commit((bars.qfull, 0))
                ph = ph ^ 1

    @T.prim_func
    def flash_indexer_sparse_attention_mla(
        Q: T.Tensor((nqh, D), "bfloat16"), K: T.Tensor((tk, D), "bfloat16"), IDX: T.Tensor((nx,), "int32"),
        COUNT: T.Tensor((nt,), "int32"), OUT: T.Tensor((nqh, V), "bfloat16"), LSE: T.Tensor((nqh,), "float32"),
        H: T.int32, halves: T.int32, nitems: T.int32, grid: T.int32, width: T.int32, S: T.int32, scale: T.float32,
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
            kfull = T.alloc_barrier([GATHER] * (2 * GROUPS))
            kempty = T.alloc_barrier([4] * 4)  # slot * 2 + half
            pready = T.alloc_barrier([128] * 2)
            bars = Barriers(qfull, qempty, kfull, kempty, pready)
            tx = T.get_thread_binding()
            count = T.alloc_var("int32")
            count = count_items(nitems, bx, grid)
            if tx < 128:
                T.set_max_nreg(REGISTERS[0], 1)
                consumer(0, bx, grid, tx, count, scale, H, halves, (Ks, Ms), (S0, P0, O0), (COUNT, OUT, LSE), bars)
            elif tx < 256:
                T.set_max_nreg(REGISTERS[0], 1)
                consumer(1, bx, grid, tx, count, scale, H, halves, (Ks, Ms), (S1, P1, O1), (COUNT, OUT, LSE), bars)
            else:
                T.set_max_nreg(REGISTERS[1], 0)
                gather(bx, grid, tx, count, H, halves, width, S, (Ks, shared_address(Ks)), (Q, K, IDX, COUNT), bars)

    return flash_indexer_sparse_attention_mla
