"""Gradients of the indexer at the selected keys, in gather form.

    logit[t,j,s] = index_q[t,j] · index_k[s]            m[t,j,s] = di[t,s] · [logit[t,j,s] > 0]      s in S_t
    d_index_q[t,j] = w[t,j] · sum_s m[t,j,s] · index_k[s]
    d_weights[t,j] = index_q[t,j] · sum_s m[t,j,s] · index_k[s]
    d_index_k[s]  += sum_{t: s in S_t} sum_j m[t,j,s] · w[t,j] · index_q[t,j]

One CTA takes one token after the other, its keys in tiles of 128. X, the 64 heads of the token, and Y, the tile, lie in
shared memory, and three warpgroups read them:

    warps 12-15      gather: 16 bytes a lane and instruction; the keys' numbers, di and scale beside them
    warps 8-11       S = X Y^T    P = di [S > 0]      O += P Y               d_index_q, d_weights of all heads
    warps 0-3, 4-7   S = Y X^T    P = di w [S > 0]    sums[keys] += P X      64 keys of the tile each

The logits are formed twice, once for each orientation: a product more, but P stays in registers. Nothing waits for
anything but its tile, so that products of one warpgroup run beside the conversions and additions of another.

Sums over tokens are of integers, which are the same in any order (device/fixed_point.cuh): each row of index_k has a
power of two by which its terms are multiplied before they are rounded. The rows of a tile go to shared memory, and from
there to memory by one addition of the copy engine each. Or, where any order will do, they are of float32, four columns
of a row by an instruction (device/additions.cuh).
"""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.macros import PASS_CONFIGS, shared_address
from flash_indexer.kernels.sm_90.sizes import sparse_index_bytes

__all__ = ["PASS_CONFIGS", "build", "build_scores"]
SOURCE = source(__file__)


def build(E, exact):
    """The kernel for index width E, 64 or 128. exact (1): sums of integers. Run-time arguments:

    IQ    [T·I, E], IK [S, E] bfloat16, W [T·I] float32; I at most 64
    DI    [T·width] float32, IDX [T·width] int32: read in the first COUNT[t] slots of a row; a key outside 0 .. S - 1
          is neither read nor added to
    COUNT [T] int32, at most width
    BOUND [S] int32, MOST [S] float32, bits     exact: of `sparse_index_table`. Otherwise not looked at
    DQ    [T·I, E] bfloat16, DW [T·I] float32     written
    SUMS  [S·E] int32     added to, in units of each row's scale; not exact: the bits of float32
    tokens, I, S, width; wants: 1 for DQ and DW, 2 for SUMS, 3 for both; grid
    """
    nq, nk, nw, ns, nt, nb = (T.dynamic(name) for name in ("nq", "nk", "nw", "ns", "nt", "nb"))
    no, nd, nz = (T.dynamic(name) for name in ("no", "nd", "nz"))

    @T.prim_func
    def flash_indexer_sparse_index_gradients(
        IQ: T.Tensor((nq, E), "bfloat16"), IK: T.Tensor((nk, E), "bfloat16"), W: T.Tensor((nw,), "float32"),
        DI: T.Tensor((ns,), "float32"), IDX: T.Tensor((ns,), "int32"), COUNT: T.Tensor((nt,), "int32"),
        BOUND: T.Tensor((nb,), "int32"), MOST: T.Tensor((nb,), "float32"), DQ: T.Tensor((no, E), "bfloat16"),
        DW: T.Tensor((nd,), "float32"), SUMS: T.Tensor((nz,), "int32"), tokens: T.int32, I: T.int32, S: T.int32,
        width: T.int32, bits: T.int32, wants: T.int32, grid: T.int32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=512):
            T.import_source(SOURCE)
            shared = T.alloc_shared((sparse_index_bytes(E),), "uint8")
            T.call_extern(
                "handle", f"sparse_index_gradients<{E}, {exact}>", shared_address(shared), T.address_of(IQ[0, 0]),
                T.address_of(IK[0, 0]), T.address_of(W[0]), T.address_of(DI[0]), T.address_of(IDX[0]),
                T.address_of(COUNT[0]), T.address_of(BOUND[0]), T.address_of(MOST[0]), T.address_of(DQ[0, 0]),
                T.address_of(DW[0]), T.address_of(SUMS[0]), tokens, I, S, width, bits, wants,
            )  # fmt: skip

    return flash_indexer_sparse_index_gradients


def build_scores(E):
    """SC[t,slot] = sum_j w[t,j] · max(logit[t,j,s], 0) at the selected keys, by warpgroups 0 and 1 from the same rings.

    Run-time arguments: IQ, IK, W, IDX, COUNT as above; SC [T·width] float32, written in the first COUNT[t] slots of a
    row; tokens, I, S, width, grid.
    """
    nq, nk, nw, ns, nt = (T.dynamic(name) for name in ("nq", "nk", "nw", "ns", "nt"))

    @T.prim_func
    def flash_indexer_sparse_index_scores(
        IQ: T.Tensor((nq, E), "bfloat16"), IK: T.Tensor((nk, E), "bfloat16"), W: T.Tensor((nw,), "float32"),
        IDX: T.Tensor((ns,), "int32"), COUNT: T.Tensor((nt,), "int32"), SC: T.Tensor((ns,), "float32"),
        tokens: T.int32, I: T.int32, S: T.int32, width: T.int32, grid: T.int32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=512):
            T.import_source(SOURCE)
            shared = T.alloc_shared((sparse_index_bytes(E),), "uint8")
            T.call_extern(
                "handle", f"sparse_index_scores<{E}>", shared_address(shared), T.address_of(IQ[0, 0]),
                T.address_of(IK[0, 0]), T.address_of(W[0]), T.address_of(IDX[0]), T.address_of(COUNT[0]),
                T.address_of(SC[0]), tokens, I, S, width,
            )  # fmt: skip

    return flash_indexer_sparse_index_scores
