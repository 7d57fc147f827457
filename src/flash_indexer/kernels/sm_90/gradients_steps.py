"""What the two kernels of `gradients` share: the macros of the warps that compute, their rings and their registers."""

import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from flash_indexer.kernels.sm_90.macros import Ring, advance, arrive, shared_address
from flash_indexer.kernels.sm_90.sizes import X_STAGES, Y_STAGES

# of a thread that computes: newest stage of Y and its parity; stage of Y that is released next; stage of Y whose S is
# next for f; stage of X and its parity; where masks are kept, the tile of scores next for f, and which of its rows
Y_STAGE, Y_PARITY, Y_RELEASE, Y_APPLY, X_STAGE, X_PARITY, SCORE_TILE, ROW_TILE = range(8)
STATE = 8
# where in shared memory the warpgroup's rows of X begin, and Y (units of 16 bytes); di and w (bytes)
X_ROWS, Y_ROWS, DI, WEIGHTS = range(4)


def template(E, IP, function, masks=None):
    """The consumers' side of both kernels: the macros (mainloop, release_x, addresses).

    masks: of "query", the two arrays that the masks are kept in, or None.
    """
    STAGES = Y_STAGES[E]
    SIZE = 128 * E // 8  # of a stage, in units of 16 bytes
    di_bytes = 128 // IP * 256
    w_bytes = 512
    HELD = E < 128  # -X stays in registers: half as many bytes are read from shared memory for S

    # S = -X @ Y.T, negative where the logit is positive: f takes its mask from the sign bits, which zero doesn't have
    @T.macro
    def first_product(y, S, X, at, v):
        T.barrier_wait(y.full[v[Y_STAGE]], v[Y_PARITY])
        if HELD:
            T.call_extern(
                "handle", f"gd_held_product<{E}>", S.access_ptr("rw"), X.access_ptr("r"),
                at[Y_ROWS] + v[Y_STAGE] * SIZE,
            )  # fmt: skip
        else:
            T.call_extern(
                "handle", f"gd_product<{E}>", S.access_ptr("rw"), at[X_ROWS] + v[X_STAGE] * SIZE,
                at[Y_ROWS] + v[Y_STAGE] * SIZE,
            )  # fmt: skip

    # O += P @ Y
    @T.macro
    def second_product(P, O, at, stage):
        T.call_extern(
            "handle", f"gd_accumulate<{E}>", O.access_ptr("rw"), P.access_ptr("rw"), at[Y_ROWS] + stage * SIZE
        )

    # P = f(S)
    @T.macro
    def apply(S, P, at, stage, v):
        T.warpgroup_fence_operand(S, num_regs=64)
        if function == "query" and masks is not None:
            T.call_extern(
                "handle", f"gd_query_masks<{IP}>", S.access_ptr("r"), P.access_ptr("w"), at[DI] + stage * di_bytes,
                T.address_of(masks[0][0, 0]), T.address_of(masks[1][0, 0]), v[SCORE_TILE], v[ROW_TILE],
            )  # fmt: skip
            v[SCORE_TILE] = v[SCORE_TILE] + 1
        elif function == "query":
            T.call_extern("handle", f"gd_query<{IP}>", S.access_ptr("r"), P.access_ptr("w"), at[DI] + stage * di_bytes)
        else:
            T.call_extern(
                "handle", f"gd_key<{IP}>", S.access_ptr("r"), P.access_ptr("w"), at[DI] + stage * di_bytes,
                at[WEIGHTS] + stage * w_bytes,
            )  # fmt: skip

    # P[0] is of tile i at entry, P[tiles % 2] of tile i + tiles at exit, and nothing is in flight
    @T.macro
    def group(y, S, X, P, O, at, v, tx, tiles):
        v[Y_RELEASE] = v[Y_STAGE]
        advance(v[Y_STAGE], v[Y_PARITY], STAGES)
        first_product(y, S, X, at, v)
        for u in list(range(tiles)):
            v[Y_APPLY] = v[Y_STAGE]
            second_product(P[u % 2], O, at, v[Y_RELEASE])
            T.wait_wgmma(1)
            apply(S, P[(u + 1) % 2], at, v[Y_APPLY], v)
            if u < tiles - 1:
                advance(v[Y_STAGE], v[Y_PARITY], STAGES)
                first_product(y, S, X, at, v)
                T.wait_wgmma(1)
            else:
                T.wait_wgmma(0)
            T.warpgroup_fence_operand(O, num_regs=E // 2)
            arrive(y.empty, v[Y_RELEASE], tx)  # di and w are read by plain loads: every warp arrives
            v[Y_RELEASE] = v[Y_APPLY]

    @T.macro
    def last(y, P, O, at, v, tx):
        second_product(P, O, at, v[Y_STAGE])
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(O, num_regs=E // 2)
        arrive(y.empty, v[Y_STAGE], tx)
        advance(v[Y_STAGE], v[Y_PARITY], STAGES)

    # for Y in tiles: O += f(X @ Y.T) @ Y
    @T.macro
    def mainloop(x, y, S, X, P, O, at, v, n, tx):
        T.barrier_wait(x.full[v[X_STAGE]], v[X_PARITY])
        if HELD:
            T.call_extern("handle", f"gd_hold<{E}>", X.access_ptr("w"), at[X_ROWS] * 16 + v[X_STAGE] * (256 * E))
        first_product(y, S, X, at, v)
        T.wait_wgmma(0)
        apply(S, P[0], at, v[Y_STAGE], v)
        for i in T.unroll(E // 2):
            O[i] = 0.0
        for _ in T.serial((n - 1) // 2):
            group(y, S, X, P, O, at, v, tx, 2)
        if (n - 1) % 2 > 0:
            group(y, S, X, P, O, at, v, tx, 1)
            last(y, P[1], O, at, v, tx)
        else:
            last(y, P[0], O, at, v, tx)

    @T.macro
    def release_x(x, v, tx):
        arrive(x.empty, v[X_STAGE], tx)
        advance(v[X_STAGE], v[X_PARITY], X_STAGES)

    # addresses of X and Y in units of 16 bytes, of di and w in bytes
    @T.macro
    def addresses(at, Xs, Ys, Ds, tx):
        at[X_ROWS] = shared_address(Xs) // 16 + tx // 128 * (8 * min(E, 64))
        at[Y_ROWS] = shared_address(Ys) // 16
        at[DI] = shared_address(Ds)

    return mainloop, release_x, addresses


def shared_rings(E, STAGES, TOKENS):
    """The rings of X and of Y, and the di of each stage of Y."""
    Xs = T.alloc_shared((X_STAGES, 128, E), "bfloat16")
    Ys = T.alloc_shared((STAGES, 128, E), "bfloat16")
    Ds = T.alloc_shared((STAGES, TOKENS, 128), "bfloat16")
    T.annotate_layout({x: make_swizzled_layout(x) for x in (Xs, Ys)})
    x = Ring(Xs, T.alloc_barrier([1] * X_STAGES), T.alloc_barrier([8] * X_STAGES))
    return x, Ring(Ys, T.alloc_barrier([1] * STAGES), T.alloc_barrier([8] * STAGES)), Ds


def registers(E):
    """v, S, P, O, X and the addresses, as the macros of `template` take them."""
    v, at = T.alloc_local((STATE,), "int32"), T.alloc_local((4,), "int32")
    S, O = T.alloc_local((64,), "float32"), T.alloc_local((E // 2,), "float32")
    P, X = [T.alloc_local((32,), "uint32") for _ in range(2)], T.alloc_local((E // 4,), "uint32")
    return v, S, P, O, X, at
