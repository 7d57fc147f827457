"""Gradients of the indexer where each index head is distilled from its own attention head ("per_head").

    a[t,h,s] = scale · q[t,h]·k[s,g] - lse[t,h]                z[t,h,s] = index_q[t,h]·index_k[s]
    x[t,h,s] = w[t,h] · max(z, 0) - lsx[t,h]                   g[t,h,s] = (exp(x) - exp(a)) · [z > 0]      where seen
    d_index_q[t,h] = w · coef[t] · sum_s g·index_k[s]          `head_gradients_query`
    d_weights[t,h] = coef[t] · index_q[t,h] · (sum_s g·index_k[s])
    d_index_k[s]   = sum_t,h g·w·coef[t]·index_q[t,h]          `head_gradients_key`

Both kernels are one template. X = (X1, X2), 128 rows, stays in shared memory; tiles Y = (Y1, Y2), N rows, stream by:

    S = X1 Y1^T    Z = X2 Y2^T    P = f(S, Z) in bfloat16    O += P Y2

             X (stationary)                    Y (streamed)                      P
    query    queries: q and index_q of         keys: k and index_k of N keys     g
             128 // HG tokens, HG heads each
    key      keys: k and index_k of 128 keys   queries: N // HG tokens           g · w · coef

    warps 0-3, 4-7   64 rows of X each: S, Z, P [64, N] and O [64, E] in registers
    warp 8           feeds by TMA
    warps 10, 11     where keys are stationary, they gather the numbers of a tile's queries; else idle, as warp 9 is

    tensor cores     | S Z of tile i+1 | O += P Y2 of tile i | ...      of one warpgroup, while the other one
    everything else  |                 | f of tile i+1       |          is at its f

Rows of queries are (token, head) in one of two orders, see `attention`. Tiles that cross a query's interval are masked.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from flash_indexer.kernels.sm_90.macros import FULL_ROW, Ring, pass_turn, release, wait_for_turn

# of a thread that computes: tiles of X and of Y so far; stage of Y2 of this tile, its parity; stage of the tile before;
# which masked tile of the item this is
X_TILES, Y_TILES, Y2_STAGE, Y2_PARITY, Y2_BEFORE, MASKED = range(6)
STATE = 6


class Tiles(NamedTuple):
    """X1, X2: tiles that stay, and their ring's barriers. y1, y2: rings of what streams by."""

    X1: Any
    X2: Any
    y1: Ring
    y2: Ring


class Products(NamedTuple):
    """Fragments: logits S and Z, P, the sum O."""

    S: Any
    Z: Any
    P: Any
    O: Any


def template(E, N, XS, Y2S, apply, mask):
    """The consumers' side of both kernels: macros first, step and last, on these products.

    apply(S, Z, v, context): P of the logits. mask(S, v, context): zeros where a query doesn't see the key.
    """

    @T.macro
    def advance(v):
        v[Y2_BEFORE] = v[Y2_STAGE]
        v[Y_TILES] = v[Y_TILES] + 1
        v[Y2_STAGE] = v[Y2_STAGE] + 1
        if v[Y2_STAGE] == Y2S:
            v[Y2_STAGE] = 0
            v[Y2_PARITY] = v[Y2_PARITY] ^ 1

    # S = X1 @ Y1.T; Z = X2 @ Y2.T
    @T.macro
    def logits(tiles, S, Z, v, tx):
        v[X_TILES] = T.call_extern("int32", "opaque", v[X_TILES])
        T.barrier_wait(tiles.y1.full[v[Y_TILES] % 2], v[Y_TILES] // 2 % 2)
        T.barrier_wait(tiles.y2.full[v[Y2_STAGE]], v[Y2_PARITY])
        wait_for_turn(tx)
        T.wgmma_gemm(
            tiles.X1[v[X_TILES] % XS, :, :], tiles.y1.stages[v[Y_TILES] % 2, :, :], S, transpose_B=True,
            clear_accum=True, policy=FULL_ROW,
        )  # fmt: skip
        T.wgmma_gemm(
            tiles.X2[v[X_TILES] % XS, :, :], tiles.y2.stages[v[Y2_STAGE], :, :], Z, transpose_B=True, clear_accum=True,
            policy=FULL_ROW,
        )  # fmt: skip

    @T.macro
    def pack(P, S):
        T.call_extern("handle", f"pack_operand<{N}>", P.access_ptr("w"), S.access_ptr("r"))

    # P of the item's first tile; O = 0
    @T.macro
    def first(tiles, products, v, tx, context):
        S, Z, P, O = products
        logits(tiles, S, Z, v, tx)
        T.clear(O)
        T.wait_wgmma(0)
        pass_turn(tx)
        T.warpgroup_fence_operand(S, num_regs=N // 2)
        T.warpgroup_fence_operand(Z, num_regs=N // 2)
        release(tiles.y1.empty, v[Y_TILES] % 2, tx)
        apply(S, Z, v, context)
        mask(S, v, context)
        pack(P, S)
        advance(v)

    # O += P @ Y2 of the tile before; then P of this one
    @T.macro
    def step(tiles, products, v, tx, context, masked):
        S, Z, P, O = products
        logits(tiles, S, Z, v, tx)
        T.wgmma_gemm(P, tiles.y2.stages[v[Y2_BEFORE], :, :], O, policy=FULL_ROW)
        pass_turn(tx)
        T.wait_wgmma(1)
        T.warpgroup_fence_operand(S, num_regs=N // 2)
        T.warpgroup_fence_operand(Z, num_regs=N // 2)
        release(tiles.y1.empty, v[Y_TILES] % 2, tx)
        apply(S, Z, v, context)
        if masked:
            mask(S, v, context)
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(O, num_regs=E // 2)
        release(tiles.y2.empty, v[Y2_BEFORE], tx)
        pack(P, S)
        advance(v)

    @T.macro
    def last(tiles, products, v, tx):
        T.wgmma_gemm(products.P, tiles.y2.stages[v[Y2_BEFORE], :, :], products.O, policy=FULL_ROW)
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(products.O, num_regs=E // 2)
        release(tiles.y2.empty, v[Y2_BEFORE], tx)

    return first, step, last
