"""delta[t,h] = out[t,h]·d_out[t,h]: what the softmax's gradient subtracts. A warp a row of 512."""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.macros import PASS_CONFIGS
from flash_indexer.kernels.sm_90.sizes import MLA_WIDTHS

__all__ = ["PASS_CONFIGS", "build"]
SOURCE = source(__file__)
V = MLA_WIDTHS[1]
ROWS = 8  # of a CTA


def build():
    """DELTA [rows] float32 = row sums of OUT · G, both [rows, 512] bfloat16."""
    rows = T.dynamic("rows")

    @T.prim_func
    def flash_indexer_sparse_delta(
        OUT: T.Tensor((rows, V), "bfloat16"), G: T.Tensor((rows, V), "bfloat16"), DELTA: T.Tensor((rows,), "float32")
    ):  # fmt: skip
        with T.Kernel((rows + ROWS - 1) // ROWS, threads=32 * ROWS) as bx:
            T.import_source(SOURCE)
            T.call_extern(
                "handle",
                "sparse_delta",
                T.address_of(OUT[0, 0]),
                T.address_of(G[0, 0]),
                T.address_of(DELTA[0]),
                rows,
                bx,
            )

    return flash_indexer_sparse_delta
