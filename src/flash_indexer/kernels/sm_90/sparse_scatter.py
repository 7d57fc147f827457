"""di of the selected keys as the tiles that `gradients` reads: OUT[t, IDX[t,slot]] = bfloat16(DI[t,slot]), else zero.

A CTA takes one row, 8,192 keys of it at a time in shared memory, and writes whole lines. Bound by memory: 8 bytes read
a slot and 2 written a key.
"""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.rows import PASS_CONFIGS, THREADS

__all__ = ["PASS_CONFIGS", "build"]
SOURCE = source(__file__)


def build():
    """The kernel. Run-time arguments: DI [T·width] float32, IDX [T·width] int32, COUNT [T] int32, of which the first
    COUNT slots of a row are read, keys outside of the tiles left out; OUT [blocks·tiles·128, 128] bfloat16, written in
    the rows of the T tokens; width; tiles: of each block of 128 tokens.
    """
    ns, nt, nr = T.dynamic("ns"), T.dynamic("nt"), T.dynamic("nr")

    @T.prim_func
    def flash_indexer_sparse_scatter(
        DI: T.Tensor((ns,), "float32"), IDX: T.Tensor((ns,), "int32"), COUNT: T.Tensor((nt,), "int32"),
        OUT: T.Tensor((nr, 128), "bfloat16"), width: T.int32, tiles: T.int32,
    ):  # fmt: skip
        with T.Kernel(nt, threads=THREADS) as bx:
            T.import_source(SOURCE)
            # for t in rows: OUT[t, IDX[t]] = DI[t]
            T.call_extern(
                "handle", "scatter_row", T.address_of(DI[0]), T.address_of(IDX[0]), T.address_of(COUNT[0]),
                T.address_of(OUT[0, 0]), bx, width, tiles,
            )  # fmt: skip

    return flash_indexer_sparse_scatter
