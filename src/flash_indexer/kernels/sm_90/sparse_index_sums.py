"""What d_index_k's sums of integers need: the scale of each row before they are made, and their conversion behind it.

    largest   C[t] = max_e sum_j |w[t,j] · index_q[t,j,e]|       MOST = max over t, s of |di[t,s]| · C[t]
    bounds    BOUND[s] = sum_{t: s in S_t} |di[t,s]| · C[t], in units of MOST · 2^-40, each term rounded up
    finish    d_index_k[s] += SUMS[s] / scale(BOUND[s])

No sum of terms of d_index_k is larger than its row's bound. Maxima and sums of integers are the same in any order, so
the scales are the same bits every time, and with them the gradient. All three are bound by memory.
"""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.finish import PASS_CONFIGS, THREADS

__all__ = ["PASS_CONFIGS", "build_bounds", "build_finish", "build_largest"]
SOURCE = source(__file__)


def build_largest(E):
    """C [T] float32 is written, MOST [1] (float32 as int32) raised: zero at first. A CTA a token.

    Run-time arguments: IQ [T·I, E] bfloat16, W [T·I] float32, DI [T·width] float32 and COUNT [T] int32 as of
    `sparse_index_gradients`; I, width.
    """
    nq, nw, ns, nt = T.dynamic("nq"), T.dynamic("nw"), T.dynamic("ns"), T.dynamic("nt")

    @T.prim_func
    def flash_indexer_sparse_index_largest(
        IQ: T.Tensor((nq, E), "bfloat16"), W: T.Tensor((nw,), "float32"), DI: T.Tensor((ns,), "float32"),
        COUNT: T.Tensor((nt,), "int32"), C: T.Tensor((nt,), "float32"), MOST: T.Tensor((1,), "float32"),
        I: T.int32, width: T.int32,
    ):  # fmt: skip
        with T.Kernel(nt, threads=THREADS) as bx:
            T.import_source(SOURCE)
            # C[t] = (W[t, :, None] * IQ[t]).abs().sum(0).max()
            T.call_extern(
                "handle", f"index_largest<{E}>", T.address_of(IQ[0, 0]), T.address_of(W[0]), T.address_of(DI[0]),
                T.address_of(COUNT[0]), T.address_of(C[0]), T.address_of(MOST[0]), bx, I, width,
            )  # fmt: skip

    return flash_indexer_sparse_index_largest


def build_bounds():
    """BOUND [S] int64 is added to: zero at first. Run-time arguments as above; IDX [T·width] int32; S."""
    ns, nt, nb = T.dynamic("ns"), T.dynamic("nt"), T.dynamic("nb")

    @T.prim_func
    def flash_indexer_sparse_index_bounds(
        DI: T.Tensor((ns,), "float32"), IDX: T.Tensor((ns,), "int32"), COUNT: T.Tensor((nt,), "int32"),
        C: T.Tensor((nt,), "float32"), MOST: T.Tensor((1,), "float32"), BOUND: T.Tensor((nb,), "int64"),
        S: T.int32, width: T.int32,
    ):  # fmt: skip
        with T.Kernel(nt, threads=THREADS) as bx:
            T.import_source(SOURCE)
            # BOUND.index_add_(0, IDX[t], DI[t].abs() * C[t])
            T.call_extern(
                "handle", "index_bounds", T.address_of(DI[0]), T.address_of(IDX[0]), T.address_of(COUNT[0]),
                T.address_of(C[0]), T.address_of(MOST[0]), T.address_of(BOUND[0]), bx, S, width,
            )  # fmt: skip

    return flash_indexer_sparse_index_bounds


def build_finish(E):
    """DK [S, E] float32 is added to. Run-time arguments: SUMS [S·E] int32, BOUND, MOST; S; blocks of 1,024 numbers."""
    nz, nb, nk = T.dynamic("nz"), T.dynamic("nb"), T.dynamic("nk")

    @T.prim_func
    def flash_indexer_sparse_index_finish(
        SUMS: T.Tensor((nz,), "int32"), BOUND: T.Tensor((nb,), "int64"), MOST: T.Tensor((1,), "float32"),
        DK: T.Tensor((nk, E), "float32"), S: T.int32, blocks: T.int32,
    ):  # fmt: skip
        with T.Kernel(blocks, threads=THREADS) as bx:
            T.import_source(SOURCE)
            # DK += SUMS / scale
            T.call_extern(
                "handle", f"index_sums_finish<{E}>", T.address_of(SUMS[0]), T.address_of(BOUND[0]),
                T.address_of(MOST[0]), T.address_of(DK[0, 0]), S, bx,
            )  # fmt: skip

    return flash_indexer_sparse_index_finish
