"""Gradient of index_k from the masks [logit > 0] and the products w·index_q that `gradients.build_query` leaves.

    d_index_k[s] = sum_t sum_j di[t,s]·[logit[t,j,s] > 0]·(w[t,j]·index_q[t,j])

One product in place of the two of `gradients.build_key`, and no arithmetic on what it multiplies: w·index_q is rounded
to bfloat16 once, where di·w is there.

    P = di & mask, transposed        O += P Y            Y: 128 rows (token, head) of w·index_q

    warps 0-3, 4-7   a key tile of a pair each: P [128, 128] in bfloat16 and O [128, E] in registers
    warp 8           feeds a ring: Y, which both read, di and masks of both key tiles

    tensor cores     | first halves of rows of Y | second halves | first ...
    everything else  | P of the second halves    | P of the first ...

A block of tokens may see one tile of a pair alone: there the other warpgroup's masks are zero.
"""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.macros import PASS_CONFIGS, shared_address
from flash_indexer.kernels.sm_90.sizes import MASKED_REGISTERS, masked_stage, masked_stages

__all__ = ["PASS_CONFIGS", "build"]
SOURCE = source(__file__)


def build(E, IP):
    """d_index_k of pairs of key tiles, each summed over a run of quarters of blocks of 128 query tokens.

    E, IP: as in `gradients.build_query`, which writes WQ, MASKS and MORE. Run-time arguments:

        WQ           [n·IP, E] bfloat16      tiles of 128 rows as they lie in shared memory, rows from token `base` on
        DI           [tiles·128, 128] bfloat16   gradient of the scores
        MASKS, MORE  [n, 64] int32           masks of the score tiles (`device/mask_words.cuh`), a tile's first 4,096
                                             rows (token, head) and the others (IP = 64); of each `pitch` times 128
                                             rows from a tile to the next one
        DK           [S, E] float32          d_index_k, added to, or written (adds 0)
        PART         [2·slots·128, E] float32    partial sums, written
        BLOCKS       as in `gradients.build_key`
        ITEMS        [4·nitems] int32        (pair, begin, end, slot): key tiles 2·pair and 2·pair + 1, tokens of the
                                             quarters of blocks begin .. end - 1. slot < 0: DK's rows; otherwise the
                                             first tile's sum is PART's `slot`, the second tile's `slots + slot`
        base, ntok, slots, nitems, grid, pitch, adds int32
    """
    STAGES = masked_stages(E, IP)
    nw, nt, nk, np = T.dynamic("nw"), T.dynamic("nt"), T.dynamic("nk"), T.dynamic("np")
    nb, ni, nm, nr = T.dynamic("nb"), T.dynamic("ni"), T.dynamic("nm"), T.dynamic("nr")

    @T.prim_func
    def flash_indexer_gradient_key_masked(
        WQ: T.Tensor((nw, E), "bfloat16"), DI: T.Tensor((nt, 128), "bfloat16"), MASKS: T.Tensor((nm, 64), "int32"),
        MORE: T.Tensor((nr, 64), "int32"), DK: T.Tensor((nk, E), "float32"), PART: T.Tensor((np, E), "float32"),
        BLOCKS: T.Tensor((nb,), "int32"), ITEMS: T.Tensor((ni,), "int32"), base: T.int32, ntok: T.int32,
        slots: T.int32, nitems: T.int32, grid: T.int32, pitch: T.int32, adds: T.int32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=384):
            T.import_source(SOURCE)
            # one array, for of two TileLang may put the second where the first is: the ring, which begins where
            # descriptors say, and behind it each stage's barriers, full and empty, and which tiles are seen
            shared = T.alloc_shared((STAGES * masked_stage(E, IP) + 1024 + 20 * STAGES,), "uint8")
            tx = T.get_thread_binding()
            begin = T.alloc_var("int32")
            barriers = T.alloc_var("int32")
            begin = (shared_address(shared) + 1023) // 1024 * 1024
            barriers = begin + STAGES * masked_stage(E, IP)
            T.call_extern("handle", f"gm_begin<{STAGES}>", barriers)
            if tx < 256:
                T.set_max_nreg(MASKED_REGISTERS[0], 1)
                T.call_extern(
                    "handle", f"gm_sum<{E}, {IP}, {STAGES}>", T.address_of(DK[0, 0]), T.address_of(PART[0, 0]),
                    T.address_of(ITEMS[0]), ntok, nitems, grid, slots, nk, adds, begin, barriers,
                )  # fmt: skip
            else:
                T.set_max_nreg(MASKED_REGISTERS[1], 0)
                if tx < 288:
                    T.call_extern(
                        "handle", f"gm_feed<{E}, {IP}, {STAGES}>", T.address_of(WQ[0, 0]), T.address_of(DI[0, 0]),
                        T.address_of(MASKS[0, 0]), T.address_of(MORE[0, 0]), pitch, T.address_of(BLOCKS[0]),
                        T.address_of(ITEMS[0]), base, ntok, nitems, grid, begin, barriers,
                    )  # fmt: skip

    return flash_indexer_gradient_key_masked
