"""KL divergence, entropy and di = (softmax(x) - p)·w of every query row, from the two tile buffers of scores.

    KL[t] = sum_s p̂ (log p̂ - log_softmax(x)[s])     ENT[t] = -sum_s p̂ log p̂     DI[t,s] = (softmax(x)[s] - p̂)·WT[t]

with p̂ = p / sum p, or softmax(p) where the teacher's scores are logits. A CTA takes one row after the other, of which
its 256 threads hold 4,096 keys of both scores in registers (16 each); longer rows are read again, from the L2 cache.

    warp 8     copies the visible tiles of the next rows to a ring of stages, 4,096 keys each
    pass 1     each thread: running maximum and sum of exponentials of its keys; then two tree reductions over the CTA
    pass 2     KL, entropy and di of the same keys; di is written for whole tiles, zero where the row sees nothing

Columns behind the row's last tile are left out, in steps of 1,024. Bound by memory: 8 bytes read and 2 written a
visible pair. The sums are trees of a fixed shape: always the same bits.
"""

import tilelang
import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.macros import shared_address
from flash_indexer.kernels.sm_90.sizes import ROWS_CTAS, ROWS_KEYS, ROWS_STAGES

PASS_CONFIGS = {
    tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True,
    tilelang.PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
    tilelang.PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
}
THREADS = 256
SOURCE = source(__file__)


def build(logits):
    """The kernel; logits: 1 where P holds logits, p = exp(P - max P), else 0.

    Run-time arguments: P, X [tiles·128, 128] float32 (the teacher's and the indexer's scores; only visible elements are
    read), BLOCKS [blocks·4] int32, KS, KE [T] int32, WT [T] float32, DI [tiles·128, 128] bfloat16, KL, ENT [T] float32;
    row0 (first token), nrows, grid: CTA c takes tokens row0 + c, row0 + c + grid, ...
    """
    nr, nb, nt = T.dynamic("nr"), T.dynamic("nb"), T.dynamic("nt")

    @T.prim_func
    def flash_indexer_rows(
        P: T.Tensor((nr, 128), "float32"), X: T.Tensor((nr, 128), "float32"), BLOCKS: T.Tensor((nb,), "int32"),
        KS: T.Tensor((nt,), "int32"), KE: T.Tensor((nt,), "int32"), WT: T.Tensor((nt,), "float32"),
        DI: T.Tensor((nr, 128), "bfloat16"), KL: T.Tensor((nt,), "float32"), ENT: T.Tensor((nt,), "float32"),
        row0: T.int32, nrows: T.int32, grid: T.int32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=THREADS + 32) as bx:
            T.import_source(SOURCE)
            T.annotate_min_blocks_per_sm(ROWS_CTAS["rows"])
            ring = T.alloc_shared((ROWS_STAGES * 8 * ROWS_KEYS,), "uint8")
            barriers = T.alloc_shared((16 * ROWS_STAGES,), "uint8")  # a stage is full; it has been read
            # for t in rows: KL[t], ENT[t], DI[t] = ...
            T.call_extern(
                "handle", f"rows_tile_rows<{logits}, {ROWS_STAGES}>", T.address_of(P[0, 0]), T.address_of(X[0, 0]),
                T.address_of(BLOCKS[0]), T.address_of(KS[0]), T.address_of(KE[0]), T.address_of(WT[0]),
                T.address_of(DI[0, 0]), T.address_of(KL[0]), T.address_of(ENT[0]), row0 + bx, row0 + nrows, grid,
                shared_address(ring), shared_address(barriers),
            )  # fmt: skip

    return flash_indexer_rows
