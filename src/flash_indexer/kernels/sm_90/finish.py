"""The last step of a forward (the loss, and index_k's gradient in its own dtype) and the scaling that is the backward.

    finish   LOSS = sum_t WT[t]·KL[t]        DK = bfloat16(DK32)
    scale    DQ *= F, DK *= F, DW *= F       nothing is read or written where F is 1, as in `loss.backward()`

Both are bound by memory, and each is one launch: at small sizes launches are what an operator waits for. The loss is
summed in float64 by one CTA, in a fixed order.
"""

import tilelang
import tilelang.language as T

from flash_indexer.kernels.device.sources import source

PASS_CONFIGS = {
    tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True,
    tilelang.PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
}
CTAS, THREADS = 1056, 256
SOURCE = source(__file__)


def build_finish(E):
    """Forward's last kernel, for index head width E.

    Run-time arguments: DK32 [S, E] float32, DK [S, E] bfloat16 (written), WT, KL [T] float32, LOSS [1] float32
    (written); rows (S, or 0 where index_k's gradient is not wanted).
    """
    nk, nd, nt = T.dynamic("nk"), T.dynamic("nd"), T.dynamic("nt")

    @T.prim_func
    def flash_indexer_finish(
        DK32: T.Tensor((nk, E), "float32"), DK: T.Tensor((nd, E), "bfloat16"), WT: T.Tensor((nt,), "float32"),
        KL: T.Tensor((nt,), "float32"), LOSS: T.Tensor((1,), "float32"), rows: T.int32,
    ):  # fmt: skip
        with T.Kernel(CTAS, threads=THREADS):
            T.import_source(SOURCE)
            # LOSS = WT.dot(KL)
            T.call_extern("handle", "finish_loss", T.address_of(WT[0]), T.address_of(KL[0]), T.address_of(LOSS[0]), nt)
            # DK = DK32.bfloat16()
            T.call_extern(
                "handle", "finish_cast", T.address_of(DK32[0, 0]), T.address_of(DK[0, 0]), T.cast(rows, "int64"), E
            )

    return flash_indexer_finish


def build_scale():
    """The backward: all three gradients in one launch; it has no static sizes.

    Run-time arguments: DQ [rows, E] bfloat16, DK [rows, E] bfloat16, DW [rows, I] float32, each beginning at a multiple
    of 16 bytes; F [1] float32; nq, nk, nw: their rows (0: not wanted).
    """
    dq, dk, dw = T.dynamic("dq"), T.dynamic("dk"), T.dynamic("dw")
    cq, ck, cw = T.dynamic("cq"), T.dynamic("ck"), T.dynamic("cw")

    @T.prim_func
    def flash_indexer_scale(
        DQ: T.Tensor((dq, cq), "bfloat16"), DK: T.Tensor((dk, ck), "bfloat16"), DW: T.Tensor((dw, cw), "float32"),
        F: T.Tensor((1,), "float32"), nq: T.int32, nk: T.int32, nw: T.int32,
    ):  # fmt: skip
        with T.Kernel(CTAS, threads=THREADS):
            T.import_source(SOURCE)
            # DQ.mul_(F); DK.mul_(F); DW.mul_(F)
            T.call_extern("handle", "scale_all<1>", T.address_of(DQ[0, 0]), T.cast(nq, "int64"), cq, T.address_of(F[0]))
            T.call_extern("handle", "scale_all<1>", T.address_of(DK[0, 0]), T.cast(nk, "int64"), ck, T.address_of(F[0]))
            T.call_extern("handle", "scale_all<0>", T.address_of(DW[0, 0]), T.cast(nw, "int64"), cw, T.address_of(F[0]))

    return flash_indexer_scale
