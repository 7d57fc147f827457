"""Adds the partial sums of d_index_k, which the kernels of index_k's gradient write, in a fixed order."""

import tilelang.language as T

from flash_indexer.kernels.device.items import SHORT_ITEM, ReduceItem
from flash_indexer.kernels.sm_90.macros import PASS_CONFIGS

__all__ = ["PASS_CONFIGS", "build"]


def build(E):
    """Adds the partial sums of `gradients_key_masked` and others to the gradient of index_k, in a fixed order.

        DK[kt·128 + r] += PART[slot_begin·128 + r] + ... + PART[(slot_end - 1)·128 + r]      (rows below S)

    E: index head width. Run-time arguments: DK [S, E] float32, PART [slots·128, E] float32, ITEMS int32
    (`items.ReduceItem`) with every key tile kt at most once, nitems int32.
    """
    ROWS = 1024 // E
    CTAS = 128 // ROWS
    nk, np, ni = T.dynamic("nk"), T.dynamic("np"), T.dynamic("ni")

    @T.prim_func
    def flash_indexer_gradient_reduce(
        DK: T.Tensor((nk, E), "float32"), PART: T.Tensor((np, E), "float32"), ITEMS: T.Tensor((ni,), "int32"),
        nitems: T.int32,
    ):  # fmt: skip
        with T.Kernel(CTAS, nitems, threads=256) as (bx, by):
            total = T.alloc_fragment((ROWS, E), "float32")
            row = T.alloc_var("int32")
            part = T.alloc_var("int32")
            slots = T.alloc_var("int32")
            left = T.alloc_var("int32")
            row = ITEMS[by * SHORT_ITEM + ReduceItem.KEY_TILE] * 128 + bx * ROWS
            part = ITEMS[by * SHORT_ITEM + ReduceItem.SLOT] * 128 + bx * ROWS
            slots = ITEMS[by * SHORT_ITEM + ReduceItem.SLOT_END] - ITEMS[by * SHORT_ITEM + ReduceItem.SLOT]
            left = nk - row
            T.clear(total)
            # total = PART[slots].sum(0)
            for _ in T.serial(slots):
                for r, e in T.Parallel(ROWS, E):
                    total[r, e] = total[r, e] + PART[part + r, e]
                part = part + 128
            # DK[rows] += total
            for r, e in T.Parallel(ROWS, E):
                if r < left:
                    DK[row + r, e] = DK[row + r, e] + total[r, e]

    return flash_indexer_gradient_reduce
