"""The keys that each query selects: the K of largest score among those that it sees, of equal scores the lowest.

    IDX[t] = the width keys with the largest X[t,s], key_start[t] <= s < key_end[t], ascending; all where it sees fewer

Exact, whatever the scores: -0.0 equals +0.0, infinities are ranked like any other score, and a NaN makes the row's
scores NaN. One CTA takes one row, whose scores become 32-bit ranks of the same order in shared memory.

    sample      one rank in 16 says which first digits the K largest have at least: ranks below need not be counted
    threshold   numbers of ranks by their first 11 bits; which digit the K-th largest has; then the next 11 bits of
                those with that digit, and the last 10. As a rule two rounds are enough: as soon as the ranks of a digit
                are just those that are missing, all of them are taken
    ties        where only some of the ranks that equal the threshold are taken: the place of the last one
    order       every warp has a run of neighbours and counts what it takes, a sum over warps gives its first slot,
                votes give each lane's

A row of more than 16,384 keys is not held. Of one score in 64 a rank is found above which there are, with some room, K
of all; what is above it, 8,192 at most, is listed in order with one reading of the row, and the steps above take the
list. Where the sample misleads (fewer than K, more than the list holds), or K is larger than the list, the digits are
counted by reading the row again for each.

Bound by memory: 4 bytes read a visible pair, 8 written a slot. What the sample says changes the work, not the result,
and only integers are added: always the same bits.
"""

import tilelang
import tilelang.language as T

from flash_indexer.kernels.device.sources import source

PASS_CONFIGS = {
    tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True,
    tilelang.PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
    tilelang.PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
}
THREADS = 512
SHARED_BYTES = 4 * (16384 + 2048 + 2 * 16 + 4)  # `selection::Shared`: ranks, histogram, sums of warps, what was found
SOURCE = source(__file__)


def build():
    """The kernel, for rows of any length. Run-time arguments:

    X      [tiles·128, 128] float32     score tiles, of which only visible elements are read
    BLOCKS [blocks·4] int32             (`items.Block`); KS, KE [T] int32: intervals
    IDX    [T·width] int32, COUNT [T] int32, SC [T·width] float32     written; -1 and -inf behind a row's last key
    row0 (first token), nrows, width; first, last: numbers of a row's first and last keys that are taken in any case,
    together at most width
    """
    nr, nb, nt, no = T.dynamic("nr"), T.dynamic("nb"), T.dynamic("nt"), T.dynamic("no")

    @T.prim_func
    def flash_indexer_select(
        X: T.Tensor((nr, 128), "float32"), BLOCKS: T.Tensor((nb,), "int32"), KS: T.Tensor((nt,), "int32"),
        KE: T.Tensor((nt,), "int32"), IDX: T.Tensor((no,), "int32"), COUNT: T.Tensor((nt,), "int32"),
        SC: T.Tensor((no,), "float32"), row0: T.int32, nrows: T.int32, width: T.int32, first: T.int32, last: T.int32,
    ):  # fmt: skip
        with T.Kernel(nrows, threads=THREADS) as bx:
            T.import_source(SOURCE)
            T.annotate_min_blocks_per_sm(3)
            shared = T.alloc_shared((SHARED_BYTES,), "uint8")
            # for t in rows: IDX[t], COUNT[t], SC[t] = topk(X[t, KS[t] : KE[t]], width)
            T.call_extern(
                "handle", "select_row", T.address_of(shared[0]), T.address_of(X[0, 0]), T.address_of(BLOCKS[0]),
                T.address_of(KS[0]), T.address_of(KE[0]), T.address_of(IDX[0]), T.address_of(COUNT[0]),
                T.address_of(SC[0]), row0 + bx, width, first, last,
            )  # fmt: skip

    return flash_indexer_select
