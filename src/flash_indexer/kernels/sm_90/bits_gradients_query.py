"""dq of attention over selected keys, in dense tiles with a bit per (query, key).

    a[t,h,s]  = exp(scale·q[t,h]·k[s,g(h)] - lse[t,h])                          s in S_t
    dq[t,h]   = scale · sum_{s in S_t} a · (d_out[t,h]·v[s,g(h)] - delta[t,h]) k[s,g(h)]

128 queries of a head stay, their keys stream by: the template of `head_gradients`, with X = (d_out, q), Y = (v, k). A
tile's bits come with its keys; tiles without one are left out.
"""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.bits_steps import QueryTile, copy_bits
from flash_indexer.kernels.sm_90.head_gradients import STATE, Y2_STAGE, Products, Tiles, template
from flash_indexer.kernels.sm_90.macros import (
    LOG2E,
    PASS_CONFIGS,
    REGISTERS,
    advance,
    begin_turns,
    commit,
    new_ring,
    place,
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
            Bs = T.alloc_shared((Y2S * WORDS,), "int32")
            S = T.alloc_fragment((128, N), "float32")
            Z = T.alloc_fragment((128, N), "float32")
            P = T.alloc_fragment((128, N), "bfloat16")
            O = T.alloc_fragment((128, D), "float32")
            fullx = T.alloc_barrier([1])
            values, keys = new_ring(Y1S, N, D), new_ring(Y2S, N, D)
            tx = T.get_thread_binding()
            if tx < 256:
                T.set_max_nreg(REGISTERS[0], 1)
                v = T.alloc_local((STATE,), "int32")
                x = T.alloc_local((4,), "float32")
                words = T.alloc_var("int32")
                factor = T.alloc_var("float32")
                tiles_of = Tiles(X1s, X2s, values, keys)
                products = Products(S, Z, P, O)
                factor = scale * LOG2E
                context = (x, words, factor)
                for i in list(range(STATE)):
                    v[i] = 0
                words = shared_address(Bs)
                here = QueryTile(LIST, bx, H, row_tiles, tiles)
                T.call_extern(
                    "handle", "bq_numbers", x.access_ptr("w"), T.address_of(NUMBERS[0]), here.head, here.first, rows
                )
                T.clear(O)
                begin_turns(tx)
                if here.count > 0:
                    T.barrier_wait(fullx[0], 0)
                    first(tiles_of, products, v, tx, context)
                    for _ in T.serial(here.count - 1):
                        step(tiles_of, products, v, tx, context, False)
                    last(tiles_of, products, v, tx)
                T.call_extern(
                    "handle", f"bq_store<{D}>", O.access_ptr("r"), T.address_of(DQ[0, 0]), here.first, here.head, tq,
                    H, scale,
                )  # fmt: skip
            else:
                T.set_max_nreg(REGISTERS[1], 0)
                if tx < 288:
                    vs, vp = place(1)
                    ks, kp = place(1)
                    column = T.alloc_var("int32")
                    key = T.alloc_var("int32")
                    here = QueryTile(LIST, bx, H, row_tiles, tiles)
                    column = here.head // HG * D
                    if here.count > 0:
                        for X, Xs in [(G, X1s), (Q, X2s)]:
                            T.tma_copy(
                                X[here.first : here.first + 128, here.head * D : here.head * D + D], Xs[0, :, :],
                                barrier=fullx[0],
                            )  # fmt: skip
                        commit((fullx, 0))
                    for i in T.serial(here.count):
                        key = here.keys(i, N)
                        T.barrier_wait(values.empty[vs], vp)
                        T.tma_copy(
                            V[key : key + N, column : column + D], values.stages[vs, :, :], barrier=values.full[vs]
                        )
                        commit((values.full, vs))
                        advance(vs, vp, Y1S)
                        T.barrier_wait(keys.empty[ks], kp)
                        T.tma_copy(K[key : key + N, column : column + D], keys.stages[ks, :, :], barrier=keys.full[ks])
                        copy_bits(BITS, Bs, (keys.full, ks), N // 32, (key // 32, rows, here.first))
                        commit((keys.full, ks))
                        advance(ks, kp, Y2S)

    return flash_indexer_bits_gradients_query
