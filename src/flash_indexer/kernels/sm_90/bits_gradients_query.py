"""dq of attention over selected keys, in dense tiles with a bit per (query, key).

    a[t,h,s]  = exp(scale·q[t,h]·k[s,g(h)] - lse[t,h])                          s in S_t
    dq[t,h]   = scale · sum_{s in S_t} a · (d_out[t,h]·v[s,g(h)] - delta[t,h]) k[s,g(h)]

128 queries of a head stay, their keys stream by: the template of `head_gradients`, with X = (d_out, q), Y = (v, k). A
tile's bits come with its keys; tiles without one are left out.
"""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.head_gradients import STATE, Y2_STAGE, Products, Tiles, template
from flash_indexer.kernels.sm_90.macros import (
    LOG2E,
    PASS_CONFIGS,
    REGISTERS,
    Ring,
    advance,
    begin_turns,
    commit,
    number,
    shared_address,
)

__all__ = ["PASS_CONFIGS", "build"]
SOURCE = source(__file__)
Y1S, Y2S = 2, 3  # of the rings of values and keys; the first is the template's


def build(D, N):
    """The kernel for queries, keys and values of D columns, 64 or 128, and N rows that stream by. Run-time arguments:

    Q, G  [T, H·D], K, V [S, G·D] bfloat16           G: the gradient of out
    NUMBERS [H·rows·2] float32                       lse and delta, see `bits_tables`
    BITS  [words·rows] int32
    LIST  [row tiles · (tiles + 1)] int32            of tiles of N keys
    DQ    [T, H·D] bfloat16                          written
    H, HG, rows, row_tiles, tiles int32; scale float32
    """
    WORDS = N // 32 * 128
    tq, tk, hd, gd = (T.dynamic(x) for x in ("tq", "tk", "hd", "gd"))
    nb, nl, nn = (T.dynamic(x) for x in ("nb", "nl", "nn"))

    @T.macro
    def apply(S, Z, v, context):
        x, words, scale = context
        T.call_extern(
            "handle", f"bq_apply<{N}>", S.access_ptr("rw"), Z.access_ptr("r"), x.access_ptr("r"),
            words + v[Y2_STAGE] * (WORDS * 4), scale,
        )  # fmt: skip

    @T.macro
    def mask(S, v, context):
        pass

    first, step, last = template(D, N, 1, Y2S, apply, mask)

    @T.prim_func
    def flash_indexer_bits_gradients_query(
        Q: T.Tensor((tq, hd), "bfloat16"), G: T.Tensor((tq, hd), "bfloat16"), K: T.Tensor((tk, gd), "bfloat16"),
        V: T.Tensor((tk, gd), "bfloat16"), NUMBERS: T.Tensor((nn,), "float32"), BITS: T.Tensor((nb,), "int32"),
        LIST: T.Tensor((nl,), "int32"), DQ: T.Tensor((tq, hd), "bfloat16"), H: T.int32, HG: T.int32, rows: T.int32,
        row_tiles: T.int32, tiles: T.int32, scale: T.float32,
    ):  # fmt: skip
        with T.Kernel(row_tiles * H, threads=384) as bx:
            T.import_source(SOURCE)
            X1s = T.alloc_shared((1, 128, D), "bfloat16")
            X2s = T.alloc_shared((1, 128, D), "bfloat16")
            Y1s = T.alloc_shared((Y1S, N, D), "bfloat16")
            Y2s = T.alloc_shared((Y2S, N, D), "bfloat16")
            Bs = T.alloc_shared((Y2S * WORDS,), "int32")
            S = T.alloc_fragment((128, N), "float32")
            Z = T.alloc_fragment((128, N), "float32")
            P = T.alloc_fragment((128, N), "bfloat16")
            O = T.alloc_fragment((128, D), "float32")
            fullx = T.alloc_barrier([1])
            full1 = T.alloc_barrier([1] * Y1S)
            empty1 = T.alloc_barrier([8] * Y1S)
            full2 = T.alloc_barrier([1] * Y2S)
            empty2 = T.alloc_barrier([8] * Y2S)
            tx = T.get_thread_binding()
            if tx < 256:
                T.set_max_nreg(REGISTERS[0], 1)
                v = T.alloc_local((STATE,), "int32")
                x = T.alloc_local((4,), "float32")
                words = T.alloc_var("int32")
                tile = T.alloc_var("int32")
                count = T.alloc_var("int32")
                factor = T.alloc_var("float32")
                tiles_of = Tiles(X1s, X2s, Ring(Y1s, full1, empty1), Ring(Y2s, full2, empty2))
                products = Products(S, Z, P, O)
                factor = scale * LOG2E
                context = (x, words, factor)
                for i in list(range(STATE)):
                    v[i] = 0
                words = shared_address(Bs)
                tile = row_tiles - 1 - bx // H
                count = number(LIST, tile * (tiles + 1))
                T.call_extern(
                    "handle", "bq_numbers", x.access_ptr("w"), T.address_of(NUMBERS[0]), bx % H, tile * 128, rows
                )
                T.clear(O)
                begin_turns(tx)
                if count > 0:
                    T.barrier_wait(fullx[0], 0)
                    first(tiles_of, products, v, tx, context)
                    for _ in T.serial(count - 1):
                        step(tiles_of, products, v, tx, context, False)
                    last(tiles_of, products, v, tx)
                T.call_extern(
                    "handle", f"bq_store<{D}>", O.access_ptr("r"), T.address_of(DQ[0, 0]), tile * 128, bx % H, tq, H,
                    scale,
                )  # fmt: skip
            else:
                T.set_max_nreg(REGISTERS[1], 0)
                if tx < 288:
                    s1 = T.alloc_var("int32", 0)
                    p1 = T.alloc_var("int32", 1)
                    s2 = T.alloc_var("int32", 0)
                    p2 = T.alloc_var("int32", 1)
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
                        T.tma_copy(G[t0 : t0 + 128, head * D : head * D + D], X1s[0, :, :], barrier=fullx[0])
                        T.tma_copy(Q[t0 : t0 + 128, head * D : head * D + D], X2s[0, :, :], barrier=fullx[0])
                        commit((fullx, 0))
                    for i in T.serial(total):
                        key = number(LIST, at + 1 + i) * N
                        T.barrier_wait(empty1[s1], p1)
                        T.tma_copy(V[key : key + N, column : column + D], Y1s[s1, :, :], barrier=full1[s1])
                        commit((full1, s1))
                        advance(s1, p1, Y1S)
                        T.barrier_wait(empty2[s2], p2)
                        T.tma_copy(K[key : key + N, column : column + D], Y2s[s2, :, :], barrier=full2[s2])
                        for j in list(range(N // 32)):
                            T.tma_copy(
                                BITS[(key // 32 + j) * rows + t0 : (key // 32 + j) * rows + t0 + 128],
                                Bs[s2 * WORDS + j * 128 : s2 * WORDS + j * 128 + 128], barrier=full2[s2],
                            )  # fmt: skip
                        commit((full2, s2))
                        advance(s2, p2, Y2S)

    return flash_indexer_bits_gradients_query
