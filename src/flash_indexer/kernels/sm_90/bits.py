"""A selection as bits, for kernels whose tiles are dense.

    bit[t,s] = 1 where query t selected key s. They are held twice, in words of 32:

    BITS    [words, rows]           word w of query t: keys 32w .. 32w + 31      queries beside one another
    TURNED  [rows / 32, words·32]   word b of key s: queries 32b .. 32b + 31     keys beside one another
    FLAGS   [rows / 32, words / 2]  whether 32 queries select any of 64 keys

so that the words of a tile are a few runs of 512 bytes, whichever of queries and keys its rows are. `rows` is T and
`words` ceil(S / 32), filled up so that whole tiles can be copied: multiples of 128 and of 4.
"""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.macros import PASS_CONFIGS

__all__ = ["PASS_CONFIGS", "build"]
SOURCE = source(__file__)
THREADS, SHARED_WORDS = 512, 32 * 513 + 32  # BT_STRIDE of the .cuh, for 32 queries, and a word each


def build():
    """BITS, TURNED and FLAGS of `rows` queries, all written; BAD [T] float32: NaN where a query's scores are or where a
    key that it selected is among ODD, else 0.

    IDX [T·K] int32: keys in the first COUNT[t] slots, in any order; one outside 0 .. S - 1 sets no bit. SCORES [T·K]
    float32: of a query with NaN the first is one.
    """
    n = [T.dynamic(f"n{i}") for i in range(8)]

    @T.prim_func
    def flash_indexer_bits(
        IDX: T.Tensor((n[0],), "int32"), COUNT: T.Tensor((n[1],), "int32"), SCORES: T.Tensor((n[2],), "float32"),
        ODD: T.Tensor((n[3],), "int32"), BITS: T.Tensor((n[4],), "int32"), TURNED: T.Tensor((n[5],), "int32"),
        FLAGS: T.Tensor((n[6],), "int32"), BAD: T.Tensor((n[7],), "float32"), queries: T.int32, K: T.int32, S: T.int32,
        rows: T.int32, words: T.int32,
    ):  # fmt: skip
        with T.Kernel(rows // 32, threads=THREADS) as bx:
            T.import_source(SOURCE)
            shared = T.alloc_shared((SHARED_WORDS,), "uint32")
            T.call_extern(
                "handle", "bt_bits", T.address_of(shared[0]), T.address_of(IDX[0]), T.address_of(COUNT[0]),
                T.address_of(SCORES[0]), T.address_of(ODD[0]), T.address_of(BITS[0]), T.address_of(TURNED[0]),
                T.address_of(FLAGS[0]), T.address_of(BAD[0]), queries, K, S, rows, words, bx,
            )  # fmt: skip

    return flash_indexer_bits
