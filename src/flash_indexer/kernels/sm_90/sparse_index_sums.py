"""What d_index_k's sums of integers need: the scale of each row before they are made, and their conversion behind it.

    largest   C[t] = max_e sum_j |w[t,j] · index_q[t,j,e]|
    most      MOST[s] = max_{t: s in S_t} |di[t,s]| · C[t]
    bound     BOUND[s] = sum_{t: s in S_t} |di[t,s]| · C[t], in units of MOST[s] · 2^-bits, each term rounded up
    finish    d_index_k[s] += SUMS[s] / scale(BOUND[s], MOST[s])

No sum of terms of d_index_k is larger than its row's bound. Maxima and sums of integers are the same in any order, so
the scales are the same bits every time, and with them the gradient. All are bound by memory. Maxima and bounds are
taken in tables in shared memory of 16,384 keys, a CTA each for a run of keys and a part of the tokens, a warp a token;
then the tables are combined in memory.
"""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.finish import PASS_CONFIGS, THREADS
from flash_indexer.kernels.sm_90.macros import shared_address
from flash_indexer.kernels.sm_90.sizes import INDEX_TABLE_KEYS

__all__ = ["PASS_CONFIGS", "build_finish", "build_largest", "build_table"]
SOURCE = source(__file__)
TABLE_THREADS = 1024


def build_largest(E):
    """C [T] float32 is written, a CTA a token. Run-time arguments: IQ [T·I, E] bfloat16, W [T·I] float32; I."""
    nq, nw, nt = T.dynamic("nq"), T.dynamic("nw"), T.dynamic("nt")

    @T.prim_func
    def flash_indexer_sparse_index_largest(
        IQ: T.Tensor((nq, E), "bfloat16"), W: T.Tensor((nw,), "float32"), C: T.Tensor((nt,), "float32"), I: T.int32
    ):  # fmt: skip
        with T.Kernel(nt, threads=THREADS) as bx:
            T.import_source(SOURCE)
            # C[t] = (W[t, :, None] * IQ[t]).abs().sum(0).max()
            T.call_extern(
                "handle", f"index_largest<{E}>", T.address_of(IQ[0, 0]), T.address_of(W[0]), T.address_of(C[0]), bx, I
            )  # fmt: skip

    return flash_indexer_sparse_index_largest


def build_table(sum):
    """MOST [S] float32 is raised (sum: 0), or BOUND [S] int32 is added to (1): zeros at first.

    Run-time arguments: DI [T·width] float32, IDX [T·width] int32, COUNT [T] int32 as of `sparse_index_gradients`,
    C [T]; width; bits, 30 less the bits of T; runs of 16,384 keys, parts of the tokens.
    """
    ns, nt, nb = T.dynamic("ns"), T.dynamic("nt"), T.dynamic("nb")

    @T.prim_func
    def flash_indexer_sparse_index_table(
        DI: T.Tensor((ns,), "float32"), IDX: T.Tensor((ns,), "int32"), COUNT: T.Tensor((nt,), "int32"),
        C: T.Tensor((nt,), "float32"), MOST: T.Tensor((nb,), "float32"), BOUND: T.Tensor((nb,), "int32"),
        width: T.int32, bits: T.int32, runs: T.int32, parts: T.int32,
    ):  # fmt: skip
        with T.Kernel(runs, parts, threads=TABLE_THREADS) as (bx, by):
            T.import_source(SOURCE)
            table = T.alloc_shared(((1 + sum) * INDEX_TABLE_KEYS * 4,), "uint8")
            # MOST.scatter_reduce_(0, IDX[t], DI[t].abs() * C[t], "amax"), or BOUND.index_add_
            T.call_extern(
                "handle", f"index_table<{sum}>", T.address_of(DI[0]), T.address_of(IDX[0]), T.address_of(COUNT[0]),
                T.address_of(C[0]), T.address_of(MOST[0]), T.address_of(BOUND[0]), nb, width, nt, bits, bx, by, parts,
                shared_address(table),
            )  # fmt: skip

    return flash_indexer_sparse_index_table


def build_finish(E):
    """DK [S, E] float32 is added to. From SUMS [S·E] int32, BOUND, MOST, bits; blocks of 1,024 numbers."""
    nz, nb, nk = T.dynamic("nz"), T.dynamic("nb"), T.dynamic("nk")

    @T.prim_func
    def flash_indexer_sparse_index_finish(
        SUMS: T.Tensor((nz,), "int32"), BOUND: T.Tensor((nb,), "int32"), MOST: T.Tensor((nb,), "float32"),
        DK: T.Tensor((nk, E), "float32"), bits: T.int32, blocks: T.int32,
    ):  # fmt: skip
        with T.Kernel(blocks, threads=THREADS) as bx:
            T.import_source(SOURCE)
            # DK += SUMS / scale
            T.call_extern(
                "handle", f"index_sums_finish<{E}>", T.address_of(SUMS[0]), T.address_of(BOUND[0]),
                T.address_of(MOST[0]), T.address_of(DK[0, 0]), nk, bits, bx,
            )  # fmt: skip

    return flash_indexer_sparse_index_finish
