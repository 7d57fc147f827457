"""KL divergence, entropy and di of the selected keys' scores: the arithmetic of `rows`, on slots instead of tiles.

    KL[t] = sum_s p̂ (log p̂ - log_softmax(x)[s])     ENT[t] = -sum_s p̂ log p̂     DI[t,s] = (softmax(x)[s] - p̂)·WT[t]

with p̂ = p / sum p, sums over the first COUNT[t] slots of a row. One CTA takes one row, up to 4,096 slots of which its
256 threads hold in registers. Bound by memory: 8 bytes read and 4 written a slot.
"""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.rows import PASS_CONFIGS, THREADS

__all__ = ["PASS_CONFIGS", "build"]
SOURCE = source(__file__)


def build():
    """The kernel. Run-time arguments: P, X [T·width] float32 (sums of probabilities, the indexer's scores; read in the
    first COUNT slots only), COUNT [T] int32, WT [T] float32; written: DI [T·width] float32, zero behind the last slot,
    KL, ENT [T] float32; width.
    """
    ns, nt = T.dynamic("ns"), T.dynamic("nt")

    @T.prim_func
    def flash_indexer_sparse_rows(
        P: T.Tensor((ns,), "float32"), X: T.Tensor((ns,), "float32"), COUNT: T.Tensor((nt,), "int32"),
        WT: T.Tensor((nt,), "float32"), DI: T.Tensor((ns,), "float32"), KL: T.Tensor((nt,), "float32"),
        ENT: T.Tensor((nt,), "float32"), width: T.int32,
    ):  # fmt: skip
        with T.Kernel(nt, threads=THREADS) as bx:
            T.import_source(SOURCE)
            T.annotate_min_blocks_per_sm(4)
            # for t in rows: KL[t], ENT[t], DI[t] = ...
            T.call_extern(
                "handle", "sparse_rows_row", T.address_of(P[0]), T.address_of(X[0]), T.address_of(COUNT[0]),
                T.address_of(WT[0]), T.address_of(DI[0]), T.address_of(KL[0]), T.address_of(ENT[0]), bx, width,
            )  # fmt: skip

    return flash_indexer_sparse_rows
