"""KL divergence, entropy and di = (softmax(x) - p)·w of every query row, from the two tile buffers of scores.

    KL[t] = sum_s p̂ (log p̂ - log_softmax(x)[s])     ENT[t] = -sum_s p̂ log p̂     DI[t,s] = (softmax(x)[s] - p̂)·WT[t]

with p̂ = p / sum p, or softmax(p) where the teacher's scores are logits. One CTA takes one row: its 256 threads hold
4,096 keys of both scores in registers (16 each), so that a row is read once; longer ones again, from the L2 cache.

    pass 1   each thread: running maximum and sum of exponentials of its keys; then two tree reductions over the CTA
    pass 2   KL, entropy and di of the same keys; di is written for whole tiles, zero where the row sees nothing

Bound by memory: 8 bytes read and 2 written a visible pair. The sums are trees of a fixed shape: always the same bits.
"""

import tilelang
import tilelang.language as T

from flash_indexer.kernels.device.sources import source

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
    row0 (first token), nrows.
    """
    nr, nb, nt = T.dynamic("nr"), T.dynamic("nb"), T.dynamic("nt")

    @T.prim_func
    def flash_indexer_rows(
        P: T.Tensor((nr, 128), "float32"), X: T.Tensor((nr, 128), "float32"), BLOCKS: T.Tensor((nb,), "int32"),
        KS: T.Tensor((nt,), "int32"), KE: T.Tensor((nt,), "int32"), WT: T.Tensor((nt,), "float32"),
        DI: T.Tensor((nr, 128), "bfloat16"), KL: T.Tensor((nt,), "float32"), ENT: T.Tensor((nt,), "float32"),
        row0: T.int32, nrows: T.int32,
    ):  # fmt: skip
        with T.Kernel(nrows, threads=THREADS) as bx:
            T.import_source(SOURCE)
            T.annotate_min_blocks_per_sm(4)
            # for t in rows: KL[t], ENT[t], DI[t] = ...
            T.call_extern(
                "handle", f"rows_tile_row<{logits}>", T.address_of(P[0, 0]), T.address_of(X[0, 0]),
                T.address_of(BLOCKS[0]), T.address_of(KS[0]), T.address_of(KE[0]), T.address_of(WT[0]),
                T.address_of(DI[0, 0]), T.address_of(KL[0]), T.address_of(ENT[0]), row0 + bx,
            )  # fmt: skip

    return flash_indexer_rows
