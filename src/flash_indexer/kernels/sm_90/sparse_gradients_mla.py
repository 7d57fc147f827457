"""Gradients of attention over selected keys, and the head-summed target, for MLA's absorbed form (one key head).

    a[t,h,s]  = exp(scale · q[t,h]·k[s] - lse[t,h])                               s in S_t
    dS[t,h,s] = scale · a[t,h,s] · (d_out[t,h]·k[s, :512] - delta[t,h]),          delta = rowsum(out · d_out)
    dq[t,h]   = sum_{s in S_t} dS[t,h,s] k[s]
    dk[s]    += sum_{t, h: s in S_t} dS[t,h,s] q[t,h] + a[t,h,s] d_out[t,h]       the second in the first 512 columns
    p_sum[t,s] = sum_h a[t,h,s]

A token is the work of two CTAs of a cluster, split by columns: CTA c holds the columns 256c .. 256c + 255 of q, d_out
and the keys, and 32 of the 64 rope columns, of all heads; so each row of dk is added once a token. Tiles are 64 keys,
of which each CTA finishes 32:

    warps 0-3      heads 0 .. 63: S, dP, dq; gather half of the next tile's keys
    warps 4-7      heads 64 .. 127, the other half
    warps 8-11     dk of this CTA's columns, in pieces of 64 that are added to memory one after the other

    1  S over this CTA's columns; that of the other CTA's keys goes there (16 numbers a thread)
    2  dP likewise; under its products S of both CTAs is added, and becomes P
    3  sums of P over heads, written by the one CTA that finishes the key; dS; P and dS to shared memory, and to the
       other CTA in one bulk copy
    4  dq += dS k over the own keys, then over the other's. The keys' buffer is free: the next tile is gathered
    5  meanwhile, and during 1 to 3 of the next tile, warps 8-11 make dk of P and dS, then free them in both CTAs

S(i + 1) is sent after the other CTA's P(i) has come, for which it has read dP(i): the inbox needs no more barriers.

Up to 64 heads (`half`): one CTA a token, with all columns of q, d_out and the keys, and nothing to exchange.

    warps 0-3      S, dP of the tile's first 32 keys; dq of the columns below 256, and half of the rope's
    warps 4-7      of the other 32 keys; dq of the columns 256 .. 511, and the other half. Both gather the next tile
    warps 8-11     dk of all columns, in pieces of 64 that are added to memory one after the other. After the rope's
                   they wait until copies of the next tile are on their way, which additions would hold up

`exact`: dk is made of integers, whose sums don't depend on their order; see device/exact_sums.cuh.
"""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.macros import PASS_CONFIGS, shared_address
from flash_indexer.kernels.sm_90.sizes import MLA_WIDTHS

__all__ = ["PASS_CONFIGS", "build"]
SOURCE = source(__file__)
D, V = MLA_WIDTHS
SHARED_BYTES = 227328 + 128, 230400 + 128  # up to the barriers of sparse_gradients_keys.cuh, sparse_gradients_half.cuh


def build(exact, half):
    """exact (1): dk in integers. half (1): up to 64 heads, one CTA a token. Run-time arguments:

    Q     [T·H, 576], K [S, 576], G [T·H, 512] bfloat16     G: the gradient of out
    IDX   [T·width] int32               selected keys of each token in its first COUNT slots; one outside 0 .. S - 1 is
                                        neither read nor added to, and counts as a key of zeros
    COUNT [T] int32                     at most width
    LSE   [T·H], DELTA [T·H] float32    of the forward; rowsum(out · d_out)
    DQ    [T·H, 576] bfloat16           written
    DK    [S·576] float32               not exact: added to. Otherwise not looked at
    PSUM  [T·width] float32             written but for empty tiles: zeros at first
    GRID  [S] float32                   exact: powers of two, by which terms are multiplied
    SUMS  int32                         exact: added to, zeros at first: low sums [S·576], whose pairs carry, high sums
                                        [S·576], and [S] that are not 0 where NaN is the sum
    H     at most 128; S below 2^31 / 576; tokens, width, clusters int32; scale float32. Clusters take tokens in turns
    """
    nqh, tk, nx, nt = T.dynamic("nqh"), T.dynamic("tk"), T.dynamic("nx"), T.dynamic("nt")
    nh, nd = T.dynamic("nh"), T.dynamic("nd")
    ng, nz = T.dynamic("ng"), T.dynamic("nz")

    @T.prim_func
    def flash_indexer_sparse_gradients_mla(
        Q: T.Tensor((nqh, D), "bfloat16"), K: T.Tensor((tk, D), "bfloat16"), G: T.Tensor((nqh, V), "bfloat16"),
        IDX: T.Tensor((nx,), "int32"), COUNT: T.Tensor((nt,), "int32"), LSE: T.Tensor((nh,), "float32"),
        DELTA: T.Tensor((nh,), "float32"), DQ: T.Tensor((nqh, D), "bfloat16"), DK: T.Tensor((nd,), "float32"),
        PSUM: T.Tensor((nx,), "float32"), GRID: T.Tensor((ng,), "float32"), SUMS: T.Tensor((nz,), "int32"),
        tokens: T.int32, H: T.int32, S: T.int32, width: T.int32, clusters: T.int32, scale: T.float32,
    ):  # fmt: skip
        with T.Kernel(clusters * (2 - half), threads=384, cluster_dims=(2 - half, 1, 1)):
            T.import_source(SOURCE)
            shared = T.alloc_shared((SHARED_BYTES[half],), "uint8")
            T.call_extern(
                "handle", f"sparse_gradients<{exact}, {half}>", shared_address(shared), T.address_of(Q[0, 0]),
                T.address_of(K[0, 0]), T.address_of(G[0, 0]), T.address_of(IDX[0]), T.address_of(COUNT[0]),
                T.address_of(LSE[0]), T.address_of(DELTA[0]), T.address_of(DQ[0, 0]), T.address_of(DK[0]),
                T.address_of(PSUM[0]), T.address_of(GRID[0]), T.address_of(SUMS[0]), tokens, H, S, width, scale,
            )  # fmt: skip

    return flash_indexer_sparse_gradients_mla
