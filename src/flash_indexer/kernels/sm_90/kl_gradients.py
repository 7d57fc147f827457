"""KL divergence, entropy and di of every query row, and in the same pass the gradients of index_q and of the weights.

    di[t,s] = (softmax(i)[t,s] - p̂[t,s])·weight[t]
    d_index_q[t,j] = w[t,j] · sum_s di[t,s]·[logit[t,j,s] > 0]·index_k[s]
    d_weights[t,j] = index_q[t,j] · sum_s di[t,s]·[logit[t,j,s] > 0]·index_k[s]

The kernels that form the scores leave what one pass needs: masks [logit > 0] in bits, and of each row of a score tile
the sums of what the row sees in it. So no logit is formed again, and a row's scores are read once:

    warps 0-3, 4-7    64 rows (token, head) each, twice: P = di & mask in bfloat16 and O += P index_k in registers
    warps of rows     one, two or four tokens each: their sums at the item's begin; of every key tile KL, entropy and di
    three more        copy both scores of the item's tokens to one ring; index_k and masks to another one; index_q

    tensor cores      | first 64 keys of a tile | the others | first 64 keys of the next ...
    warps 0-7         | P of the others         | P of the next tile's first 64 ...
    warps of rows     | di of a later tile, to the ring of index_k ...

Scores come from far away and are soon in registers, index_k stays until its products are done: so two rings. An item
has 256 rows (token, head) where O of so many fits the registers: most of what a tile reads is index_k.

The item's rows of index_q make d_weights at its end, and w·index_q for `gradients_masked`.
"""

import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from flash_indexer.kernels.device.items import SHORT_ITEM, QueryTilesItem
from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.macros import PASS_CONFIGS, advance, commit, count_items, number, shared_address
from flash_indexer.kernels.sm_90.sizes import (
    KL_ROW_WARPS,
    MASK_WORDS,
    kl_parts,
    kl_registers,
    kl_stages,
    kl_threads,
)

__all__ = ["PASS_CONFIGS", "build"]
SOURCE = source(__file__)
MULTIPLIERS = 256  # threads


def build(E, IP, warps=KL_ROW_WARPS):
    """KL, entropy, di, d_index_q, d_index_w and w·index_q. E, IP: as in `gradients.build_query`; warps: of rows.

    Run-time arguments; a score tile is 128 tokens x 128 keys, of which a token sees KS[t] <= key < KE[t]:

        IQ, IK, W, DI, DQ, DW, ITEMS, WQ    as in `gradients.build_query`, but that DI is written: in all tiles of the
                                            items' tokens' blocks, zeros where a token doesn't see the key
        P, X    [tiles·128, 128] float32    the teacher's and the indexer's scores
        TSUM    [tiles·128] float32         of each row of a tile the sum of P over keys that it sees
        TOPS    [tiles·128, 2] float32      m, the maximum of X over these (-inf where there is none), and the sum of
                                            exp(X - m)
        MASKS   [tiles·8·IP, 64] int32      [logit > 0], as `device/mask_words.cuh` says
        BLOCKS  [blocks·4] int32            as in `rows.build`, with KS, KE [T] int32, WT, KL, ENT [T] float32
        I, q_base, ntok, nitems, grid, base int32
    """
    (STAGES, SCORE_STAGES), PARTS = kl_stages(E, IP), kl_parts(E)
    TOKENS = PARTS * 128 // IP
    registers, threads = kl_registers(E, warps), kl_threads(warps)
    feeder = threads - 128
    empty, score_full = 2 * STAGES, 3 * STAGES  # behind those of full stages and of di
    score_empty, x_full = score_full + SCORE_STAGES, score_full + 2 * SCORE_STAGES
    ring_type = f"KlRing<{E}, {IP}, {PARTS}, {STAGES}, {SCORE_STAGES}>"
    nq, nk, nt, nr = T.dynamic("nq"), T.dynamic("nk"), T.dynamic("nt"), T.dynamic("nr")
    nm, nb, ni, no, nw = T.dynamic("nm"), T.dynamic("nb"), T.dynamic("ni"), T.dynamic("no"), T.dynamic("nw")

    @T.prim_func
    def flash_indexer_kl_gradients(
        IQ: T.Tensor((nq, E), "bfloat16"), IK: T.Tensor((nk, E), "bfloat16"), W: T.Tensor((nq,), "float32"),
        P: T.Tensor((nr, 128), "float32"), X: T.Tensor((nr, 128), "float32"), TOPS: T.Tensor((nr, 2), "float32"),
        TSUM: T.Tensor((nr,), "float32"), MASKS: T.Tensor((nm, MASK_WORDS), "int32"),
        BLOCKS: T.Tensor((nb,), "int32"), KS: T.Tensor((nt,), "int32"), KE: T.Tensor((nt,), "int32"),
        WT: T.Tensor((nt,), "float32"), DI: T.Tensor((nr, 128), "bfloat16"), DQ: T.Tensor((no, E), "bfloat16"),
        DW: T.Tensor((no,), "float32"), WQ: T.Tensor((nw, E), "bfloat16"), KL: T.Tensor((nt,), "float32"),
        ENT: T.Tensor((nt,), "float32"), ITEMS: T.Tensor((ni,), "int32"), I: T.int32, q_base: T.int32,
        ntok: T.int32, nitems: T.int32, grid: T.int32, base: T.int32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=threads) as bx:
            T.import_source(SOURCE)
            Ys = T.alloc_shared((STAGES, 128, E), "bfloat16")
            Xs = T.alloc_shared((PARTS, 128, E), "bfloat16")
            Ss = T.alloc_shared((SCORE_STAGES, 2 * TOKENS, 128), "float32")  # the teacher's, then the indexer's
            Ds = T.alloc_shared((STAGES, TOKENS, 128), "bfloat16")  # di
            Ms = T.alloc_shared((STAGES, 8 * PARTS, MASK_WORDS), "int32")
            bars = T.alloc_barrier(
                [1] * STAGES + [32 * min(warps, TOKENS)] * STAGES + [256] * STAGES
                + [1] * SCORE_STAGES + [32 * warps] * SCORE_STAGES + [1, 8]
            )  # fmt: skip
            T.annotate_layout({x: make_swizzled_layout(x) for x in (Xs, Ys)})
            tx = T.get_thread_binding()
            if tx < MULTIPLIERS:
                T.set_max_nreg(registers[0], 1)
                # for t0, keys in items: O = (masks * di) @ keys; DQ = w * O; DW = sum(index_q * O); WQ = w * index_q
                T.call_extern(
                    "handle", f"kg_multiply<{E}, {IP}, {ring_type}>",
                    T.call_extern(
                        "handle", ring_type, shared_address(Ys), shared_address(Ms), shared_address(Ds),
                        shared_address(Ss), shared_address(Xs), shared_address(bars),
                    ),
                    T.address_of(W[0]), T.address_of(ITEMS[0]), T.address_of(DQ[0, 0]), T.address_of(DW[0]),
                    T.address_of(WQ[0, 0]), I, q_base, ntok, nitems, grid, base, nq,
                )  # fmt: skip
            elif tx < feeder:
                T.set_max_nreg(registers[1], int(registers[1] * threads > 65536))
                # for t in items' tokens: KL[t], ENT[t], DI[t] = ...
                T.call_extern(
                    "handle", f"kg_rows<{IP}, {warps}, {ring_type}>",
                    T.call_extern(
                        "handle", ring_type, shared_address(Ys), shared_address(Ms), shared_address(Ds),
                        shared_address(Ss), shared_address(Xs), shared_address(bars),
                    ),
                    T.call_extern(
                        "handle", "KlRows", T.address_of(TOPS[0, 0]), T.address_of(TSUM[0]), T.address_of(BLOCKS[0]),
                        T.address_of(KS[0]), T.address_of(KE[0]), T.address_of(WT[0]), ntok,
                    ),
                    T.address_of(ITEMS[0]), T.address_of(DI[0, 0]), T.address_of(KL[0]), T.address_of(ENT[0]),
                    nitems, grid, tx // 32 - MULTIPLIERS // 32,
                )  # fmt: skip
            else:
                T.set_max_nreg(registers[2], 0)
                items = T.alloc_var("int32")
                first = T.alloc_var("int32")
                items = count_items(nitems, bx, grid)
                stage = T.alloc_var("int32", 0)
                parity = T.alloc_var("int32", 1)
                key = T.alloc_var("int32")
                steps = T.alloc_var("int32")
                row = T.alloc_var("int32")
                mask = T.alloc_var("int32")
                if tx < feeder + 32:
                    for it in T.serial(items):
                        first = number(ITEMS, (bx + it * grid) * SHORT_ITEM + QueryTilesItem.TOKEN) & 127
                        key = number(ITEMS, (bx + it * grid) * SHORT_ITEM + QueryTilesItem.KEY_TILE)
                        steps = number(ITEMS, (bx + it * grid) * SHORT_ITEM + QueryTilesItem.KEY_TILES)
                        row = number(ITEMS, (bx + it * grid) * SHORT_ITEM + QueryTilesItem.TILE_BASE)
                        row = (row + key) * 128 + first
                        for _ in T.serial(steps):
                            T.barrier_wait(bars[score_empty + stage], parity)
                            T.tma_copy(
                                P[row : row + TOKENS, 0:128], Ss[stage, 0:TOKENS, :], barrier=bars[score_full + stage]
                            )
                            T.tma_copy(
                                X[row : row + TOKENS, 0:128], Ss[stage, TOKENS : 2 * TOKENS, :],
                                barrier=bars[score_full + stage],
                            )  # fmt: skip
                            commit((bars, score_full + stage))
                            row = row + 128
                            advance(stage, parity, SCORE_STAGES)
                elif tx < feeder + 64:
                    for it in T.serial(items):
                        first = number(ITEMS, (bx + it * grid) * SHORT_ITEM + QueryTilesItem.TOKEN) & 127
                        key = number(ITEMS, (bx + it * grid) * SHORT_ITEM + QueryTilesItem.KEY_TILE)
                        steps = number(ITEMS, (bx + it * grid) * SHORT_ITEM + QueryTilesItem.KEY_TILES)
                        row = number(ITEMS, (bx + it * grid) * SHORT_ITEM + QueryTilesItem.TILE_BASE)
                        mask = ((row + key) * IP + first * IP // 128) * 8
                        key = key * 128
                        for _ in T.serial(steps):
                            T.barrier_wait(bars[empty + stage], parity)
                            T.tma_copy(
                                MASKS[mask : mask + 8 * PARTS, 0:MASK_WORDS], Ms[stage, :, :], barrier=bars[stage]
                            )
                            T.tma_copy(IK[key : key + 128, 0:E], Ys[stage, :, :], barrier=bars[stage])
                            commit((bars, stage))
                            key = key + 128
                            mask = mask + 8 * IP
                            advance(stage, parity, STAGES)
                elif tx < feeder + 96:
                    for it in T.serial(items):
                        first = number(ITEMS, (bx + it * grid) * SHORT_ITEM + QueryTilesItem.TOKEN)
                        first = (first - q_base) * IP
                        T.barrier_wait(bars[x_full + 1], parity)
                        for part in list(range(PARTS)):
                            T.tma_copy(
                                IQ[first + part * 128 : first + part * 128 + 128, 0:E], Xs[part, :, :],
                                barrier=bars[x_full],
                            )  # fmt: skip
                        commit((bars, x_full))
                        parity = parity ^ 1

    return flash_indexer_kl_gradients
