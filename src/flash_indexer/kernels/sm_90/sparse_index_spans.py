"""Where a token's slots of each run of 256 keys are: from the first to behind the last, slots of other keys among them.

One CTA takes one token. Only a slot whose neighbour has a key of another run is looked at, so that keys in ascending
order cost two minima and maxima in shared memory a run; keys in any other order are found as well.
"""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.finish import PASS_CONFIGS, THREADS

__all__ = ["PASS_CONFIGS", "build"]
SOURCE = source(__file__)


def build():
    """SPANS [T·runs·2] int32 is written: the slots of keys 256r .. 256r + 255, first and end, (0, 0) for none.

    Run-time arguments: IDX [T·width], COUNT [T] int32; width, S, runs: ceil(S / 256), at most 1,024.
    """
    ns, nt, nr = T.dynamic("ns"), T.dynamic("nt"), T.dynamic("nr")

    @T.prim_func
    def flash_indexer_sparse_index_spans(
        IDX: T.Tensor((ns,), "int32"), COUNT: T.Tensor((nt,), "int32"), SPANS: T.Tensor((nr,), "int32"),
        width: T.int32, S: T.int32, runs: T.int32,
    ):  # fmt: skip
        with T.Kernel(nt, threads=THREADS) as bx:
            T.import_source(SOURCE)
            T.call_extern(
                "handle", "index_spans", T.address_of(IDX[0]), T.address_of(COUNT[0]),
                T.address_of(SPANS[0]), bx, width, S, runs,
            )  # fmt: skip

    return flash_indexer_sparse_index_spans
