"""What the gradients of attention over selected keys need of each row of 512: a warp a row.

    delta[t,h] = out[t,h]·d_out[t,h]
    most[t]    = max_h max_e |d_out[t,h,e]| + 2 scale value |d_out[t,h]| max_e |q[t,h,e]|

The softmax's gradient subtracts delta. With `value` the largest norm of values, H · most[t] is as large as any element
of the token's term of dk[s], sum_h dS[t,h,s] q[t,h] + a[t,h,s] d_out[t,h]: a is at most 1, and of d_out·(v[s] - out)
either product is at most |d_out| value.
"""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.macros import PASS_CONFIGS
from flash_indexer.kernels.sm_90.sizes import MLA_WIDTHS

__all__ = ["PASS_CONFIGS", "build"]
SOURCE = source(__file__)
D, V = MLA_WIDTHS
ROWS = 8  # of a CTA


def build(bound):
    """DELTA [rows] float32 = row sums of OUT · G, both [rows, 512] bfloat16.

    bound (1): MOST [T] float32, zeros at first, is raised to the maxima over the H rows of a token, from Q [rows, 576]
    bfloat16, VALUE [1] float32 and scale. 0: neither is looked at.
    """
    rows, nq, nt, no = T.dynamic("rows"), T.dynamic("nq"), T.dynamic("nt"), T.dynamic("no")

    @T.prim_func
    def flash_indexer_sparse_delta(
        OUT: T.Tensor((rows, V), "bfloat16"), G: T.Tensor((rows, V), "bfloat16"), Q: T.Tensor((nq, D), "bfloat16"),
        VALUE: T.Tensor((no,), "float32"), DELTA: T.Tensor((rows,), "float32"), MOST: T.Tensor((nt,), "float32"),
        H: T.int32, scale: T.float32,
    ):  # fmt: skip
        with T.Kernel((rows + ROWS - 1) // ROWS, threads=32 * ROWS) as bx:
            T.import_source(SOURCE)
            # DELTA = (OUT * G).sum(1)
            T.call_extern(
                "handle", f"sparse_delta<{bound}>", T.address_of(OUT[0, 0]), T.address_of(G[0, 0]),
                T.address_of(Q[0, 0]), T.address_of(VALUE[0]), T.address_of(DELTA[0]), T.address_of(MOST[0]), rows, H,
                scale, bx,
            )  # fmt: skip

    return flash_indexer_sparse_delta
