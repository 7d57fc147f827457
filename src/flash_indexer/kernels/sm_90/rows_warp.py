"""KL divergence, entropy and di of every query row, as `rows`, by a warp each: for many rows that are not too long.

A warp goes through its row twice, 256 columns at a time, eight of each lane, and holds sums alone:

    forwards     each lane: running maximum and sum of exponentials of its keys; then one reduction over the warp
    backwards    KL, entropy and di of the same keys, the last ones first, which the L1 cache still has

No warp waits for another one. di is zero in tiles that the row doesn't see. The sums are trees of a fixed shape: always
the same bits.
"""

import tilelang
import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.sizes import ROWS_CTAS

PASS_CONFIGS = {
    tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True,
    tilelang.PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
    tilelang.PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
}
THREADS = 128
SOURCE = source(__file__)


def build(logits):
    """The kernel; logits and run-time arguments as in `rows.build`, but that a warp takes what a CTA does there."""
    nr, nb, nt = T.dynamic("nr"), T.dynamic("nb"), T.dynamic("nt")

    @T.prim_func
    def flash_indexer_rows_warp(
        P: T.Tensor((nr, 128), "float32"), X: T.Tensor((nr, 128), "float32"), BLOCKS: T.Tensor((nb,), "int32"),
        KS: T.Tensor((nt,), "int32"), KE: T.Tensor((nt,), "int32"), WT: T.Tensor((nt,), "float32"),
        DI: T.Tensor((nr, 128), "bfloat16"), KL: T.Tensor((nt,), "float32"), ENT: T.Tensor((nt,), "float32"),
        row0: T.int32, nrows: T.int32, grid: T.int32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=THREADS):
            T.import_source(SOURCE)
            T.annotate_min_blocks_per_sm(ROWS_CTAS["rows_warp"])
            # for t in rows: KL[t], ENT[t], DI[t] = ...
            T.call_extern(
                "handle", f"rows_warp_rows<{logits}>", T.address_of(P[0, 0]), T.address_of(X[0, 0]),
                T.address_of(BLOCKS[0]), T.address_of(KS[0]), T.address_of(KE[0]), T.address_of(WT[0]),
                T.address_of(DI[0, 0]), T.address_of(KL[0]), T.address_of(ENT[0]), row0, row0 + nrows,
            )  # fmt: skip

    return flash_indexer_rows_warp
