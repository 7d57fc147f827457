"""The two warps of `score_narrow` that feed its rings by TMA: one copies rows of Q, the other rows of K."""

from typing import NamedTuple

import tilelang.language as T

from flash_indexer.kernels.device.items import SHORT_ITEM, NarrowItem
from flash_indexer.kernels.sm_90.macros import advance, commit, count_items, number, turn

WARPGROUPS = 3  # that compute, each with a key tile of its own


class Rings(NamedTuple):
    """Stages of Q and K, and the heads that a stage of Q holds; D: columns of a head, PANEL of them in a line."""

    D: int
    PANEL: int
    HEADS: int
    QST: int
    KST: int
    fp8: bool

    def feed_queries(self):
        """feed(bx, Q, q, ITEMS, H, qbase, nitems, grid): of each item 64 rows of Q, head by head."""
        D, PANEL, HEADS, QST = self.D, self.PANEL, self.HEADS, self.QST

        @T.macro
        def feed(bx, Q, q, ITEMS, H, qbase, nitems, grid):
            stage = T.alloc_var("int32", 0)
            parity = T.alloc_var("int32", 1)
            row = T.alloc_var("int32")
            column = T.alloc_var("int32")
            items = T.alloc_var("int32")
            items = count_items(nitems, bx, grid)
            for it in T.serial(items):
                row = number(ITEMS, (bx + it * grid) * SHORT_ITEM + NarrowItem.TOKEN) - qbase
                column = 0
                for _ in T.serial((H + HEADS - 1) // HEADS):
                    T.barrier_wait(q.empty[stage], parity)
                    for n in list(range(HEADS)):
                        for c in list(range(D // PANEL)):
                            T.tma_copy(
                                Q[row : row + 64, column + n * D + c * PANEL : column + n * D + (c + 1) * PANEL],
                                q.stages[stage * HEADS + n, :, c * PANEL : (c + 1) * PANEL], barrier=q.full[stage],
                            )  # fmt: skip
                    commit((q.full, stage))
                    column = column + HEADS * D
                    advance(stage, parity, QST)

        return feed

    def feed_keys(self):
        """feed(bx, tensors, k, Ss, ITEMS, groups, nitems, grid): of each item up to three tiles, group by group."""
        D, PANEL, KST, FP8 = self.D, self.PANEL, self.KST, self.fp8

        @T.macro
        def feed(bx, tensors, k, Ss, ITEMS, groups, nitems, grid):
            K, KS = tensors
            stage = T.alloc_var("int32", 0)
            parity = T.alloc_var("int32", 1)
            place = T.alloc_local((WARPGROUPS,), "int32")
            full = T.alloc_var("int32")
            key = T.alloc_var("int32")
            column = T.alloc_var("int32")
            tiles = T.alloc_var("int32")
            items = T.alloc_var("int32")
            for w in list(range(WARPGROUPS)):
                place[w] = 0
            items = count_items(nitems, bx, grid)
            for it in T.serial(items):
                key = number(ITEMS, (bx + it * grid) * SHORT_ITEM + NarrowItem.KEY)
                tiles = number(ITEMS, (bx + it * grid) * SHORT_ITEM + NarrowItem.TILES)
                column = 0
                for _ in T.serial(groups):
                    for w in list(range(WARPGROUPS)):
                        if w < tiles:
                            T.barrier_wait(k.empty[stage], parity)
                            full = w * KST + place[w]
                            for c in list(range(D // PANEL)):
                                T.tma_copy(
                                    K[
                                        key + w * 128 : key + w * 128 + 128,
                                        column + c * PANEL : column + (c + 1) * PANEL,
                                    ],
                                    k.stages[stage, :, c * PANEL : (c + 1) * PANEL], barrier=k.full[full],
                                )  # fmt: skip
                            if FP8:
                                T.tma_copy(
                                    KS[key + w * 128 : key + w * 128 + 128], Ss[stage * 128 : stage * 128 + 128],
                                    barrier=k.full[full],
                                )  # fmt: skip
                            commit((k.full, full))
                            advance(stage, parity, KST)
                            turn(place[w], KST)
                    column = column + D

        return feed
