"""Rows of bfloat16 to e4m3, one power-of-two scale each, rotated before if wanted.

    SC[r] = 2^ceil(log2(max_d |x[r,d]| / 448)),   V[r] = e4m3(x[r] / SC[r]),   x = X or its Hadamard rotation

4 to 32 lanes hold a row, 8 numbers a vector, and a vector of all lanes is a block of the rotation. The largest number
is found, and a block rotated, by exchange between lanes, with sums of pairs at distance 1, 2, 4, ... as everywhere in
this package (`ops.quantization`). Bound by memory: 2 bytes read and 1 written a number.
"""

import tilelang
import tilelang.language as T

from flash_indexer.kernels.device.sources import source

__all__ = ["PASS_CONFIGS", "build", "build_index", "build_keys"]
PASS_CONFIGS = {
    tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True,
    tilelang.PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
    tilelang.PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
}
THREADS = 256
SOURCE = source(__file__)


def build(D, rotation):
    """The kernel for rows of D numbers; rotation: 0 or 1.

    Run-time arguments: X [rows, D] bfloat16, V [rows, D] float8_e4m3fn, SC [...] float32; rows, heads, stride: the
    scale of row r goes to SC[(r % heads)·stride + r // heads]; blocks of 256 threads, `sizes.quantized_rows(D)` rows
    each.
    """
    nx, nv, ns = T.dynamic("nx"), T.dynamic("nv"), T.dynamic("ns")

    @T.prim_func
    def flash_indexer_quantize(
        X: T.Tensor((nx, D), "bfloat16"), V: T.Tensor((nv, D), "float8_e4m3fn"), SC: T.Tensor((ns,), "float32"),
        rows: T.int32, heads: T.int32, stride: T.int32, blocks: T.int32,
    ):  # fmt: skip
        with T.Kernel(blocks, threads=THREADS):
            T.import_source(SOURCE)
            # V, SC = quantize(X)
            T.call_extern(
                "handle", f"quantize<{D}, {rotation}>", T.address_of(X[0, 0]), T.address_of(V[0, 0]),
                T.address_of(SC[0]), rows, heads, stride,
            )  # fmt: skip

    return flash_indexer_quantize


def build_index(E, rotation):
    """The kernel for an indexer's queries and keys in one launch; rotation: 0 or 1.

    Run-time arguments: Q [rows, E], K [keys, E] bfloat16; QV, KV the same in float8_e4m3fn; W [rows] float32, the
    weights, and WS, half of these times the scales of Q's rows, as `score_narrow.build_fp8` takes them; KS float32, the
    scales of K's, whole tiles of 128; blocks as above: those of Q, then of KS.
    """
    nq, nk, ns = T.dynamic("nq"), T.dynamic("nk"), T.dynamic("ns")

    @T.prim_func
    def flash_indexer_quantize_index(
        Q: T.Tensor((nq, E), "bfloat16"), QV: T.Tensor((nq, E), "float8_e4m3fn"), W: T.Tensor((nq,), "float32"),
        WS: T.Tensor((nq,), "float32"), K: T.Tensor((nk, E), "bfloat16"), KV: T.Tensor((nk, E), "float8_e4m3fn"),
        KS: T.Tensor((ns,), "float32"), blocks: T.int32,
    ):  # fmt: skip
        with T.Kernel(blocks, threads=THREADS):
            T.import_source(SOURCE)
            # QV, scale = quantize(Q); WS = W * scale / 2; KV, KS = quantize(K)
            T.call_extern(
                "handle", f"quantize_index<{E}, {rotation}>", T.address_of(Q[0, 0]), T.address_of(QV[0, 0]),
                T.address_of(W[0]), T.address_of(WS[0]), T.address_of(K[0, 0]), T.address_of(KV[0, 0]),
                T.address_of(KS[0]), nq, nk,
            )  # fmt: skip

    return flash_indexer_quantize_index


def build_keys(D, narrow, rotation):
    """The kernel for a teacher's keys, rows of D numbers: as `build`, and then 128 keys of a head share a scale.

        c = max over the 128 keys of SC,   V[r] = e4m3(V[r] * SC[r] / c),   SC[r] = -c

    c is a power of two times every SC[r], 16 times the smallest at most; otherwise the rows keep their own scales,
    which are positive. Rows of zeros and of NaN don't count. What a row loses lies below e4m3's smallest normal number:
    less than 2^-13 of its largest entry, where tensor cores cut off the terms of a sum.

    Run-time arguments: X [S·G, D] bfloat16, or e4m3 (narrow: 1, never rotated) with scales SX [S·G] float32 (not read
    otherwise);
    V [S·G, D] e4m3; SC [G·stride] float32, stride a multiple of 128, at least S; a block of 256 threads for 128 keys of
    a head.
    """
    nx, nr, nv, ns = T.dynamic("nx"), T.dynamic("nr"), T.dynamic("nv"), T.dynamic("ns")

    @T.prim_func
    def flash_indexer_quantize_keys(
        X: T.Tensor((nx, D), "float8_e4m3fn" if narrow else "bfloat16"), SX: T.Tensor((nr,), "float32"),
        V: T.Tensor((nv, D), "float8_e4m3fn"), SC: T.Tensor((ns,), "float32"),
        S: T.int32, G: T.int32, stride: T.int32, blocks: T.int32,
    ):  # fmt: skip
        with T.Kernel(blocks, threads=THREADS):
            T.import_source(SOURCE)
            # V, SC = quantize(X), a scale for 128 keys of a head
            T.call_extern(
                "handle", f"quantize_keys<{D}, {narrow}, {rotation}>", T.address_of(X[0, 0]), T.address_of(SX[0]),
                T.address_of(V[0, 0]), T.address_of(SC[0]), S, G, stride,
            )  # fmt: skip

    return flash_indexer_quantize_keys
