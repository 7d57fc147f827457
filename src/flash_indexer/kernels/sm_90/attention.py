"""Attention forward with its logsumexp, and in the same pass the KL of each head's index scores to its attention.

    a[t,h,s] = scale · q[t,h]·k[s,g]          x[t,h,s] = w[t,h] · max(index_q[t,h]·index_k[s], 0)
    out[t,h] = sum_s exp(a - lse) · v[s,g]    lse[t,h] = log sum_s exp(a)    lsx[t,h] = log sum_s exp(x)
    kl[t,h]  = sum_s exp(a - lse) · (a - x) - lse + lsx                      over key_start[t] <= s < key_end[t]

A tile of 128 rows holds HG heads (those of one key head g) of 128 // HG tokens, so that rows share their keys:

    HG > 128 // HG    row = token · HG + head      one copy a token
    otherwise         row = head · TOKENS + token  one copy a head

    warps 0-3, 4-7   64 rows each: S = q k^T and X = index_q index_k^T [64, BN], P [64, BN] and O [64, V] in registers
    warp 8           feeds by TMA: the row tile of the next item while this one is under way; keys and values in rings
    warps 10, 11     gather the numbers that belong to an item's rows; warp 9 is idle

    tensor cores     | S X of tile i+1 | O += P v of tile i | S X of i+2 ...      of one warpgroup, while the other one
    everything else  |                 | softmaxes of i+1   |                     is at its softmaxes

The last product of an item shares its turn with the first ones of the next item, whose queries came long before;
outputs are scaled and stored beside them. Where row tiles have one place only (QS = 1), items follow one another.

Only key tiles that cross some row's interval are masked, and they come first: every row that sees a key sees one there.
Softmaxes of the first one visit its first half alone where no row sees more. Shifts are in powers of two: m, of a, is
the maximum of the masked tiles, n, of x, that of the first tile that the row sees. They are raised after the fact,
where a sum has passed 1e18: see `redo`, which forms the tile's logits once more. Without an indexer this is found out
beside the next tile's first product. A row that has seen nothing yet has both at UNSET: every term is then zero.
"""

import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from flash_indexer.kernels.device.items import ITEM_BYTES, RowItem
from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.attention_steps import (
    KEY_TILES,
    OVER,
    QUERIES,
    ROW_TILES,
    STATE,
    UNSET,
    Barriers,
    Item,
    Registers,
    Sums,
    Tensors,
    Tiles,
    Widths,
    steps,
)
from flash_indexer.kernels.sm_90.macros import (
    PASS_CONFIGS,
    REGISTERS,
    RowTile,
    advance,
    begin_turns,
    commit,
    count_items,
    pass_turn,
    release,
    shared_address,
    wait_for_turn,
)
from flash_indexer.kernels.sm_90.sizes import BACKUP_BYTES, BACKUP_BYTES_ENTROPY, SLOT_BYTES

__all__ = ["PASS_CONFIGS", "build"]
SOURCE = source(__file__)


def build(D, V, E, HG, BN, QS, TMA_STORE):
    """Attention of HG heads a key head, queries and keys of width D, values of width V (multiples of 64).

    E: index head width (32, 64 or 128); 0 leaves the indexer out. BN: keys of a tile. QS: row tiles in shared memory, 1
    or 2. TMA_STORE: whether outputs leave through shared memory, in the place of their queries (V <= D, QS = 2), or
    from registers. V = 0 leaves values and output out, and gives the entropy of each row's attention instead (E > 0,
    TMA_STORE = 0). Run-time arguments, with TOKENS = 128 // HG:

        Q     [T·H, D] bfloat16; the same memory is read as [T, H·D] where HG <= TOKENS
        K     [S, G·D], VAL [S, G·V] bfloat16
        IQ    as Q with E, IK [S, E] bfloat16, W [T·H] float32   index_q, index_k, weights; not read where E is 0
        KS    [T], KE [T] int32             visible keys of each token
        ITEMS [8·nitems] int32              `items.RowItem` (t0, g, first, tiles, right, left, seen): TOKENS tokens from
                                            t0, heads of g; key tile j < tiles holds the keys first - j·BN + 0 .. BN-1;
                                            those with j < right or j >= left are masked, 1 <= right <= left <= tiles.
                                            Where some row sees its last key in tile j, j < right. No row
                                            sees more of tile 0 than its first `seen` keys
        OUT   as Q with V, bfloat16; LSE, LSX, KL [T·H] float32     written; LSX and KL where E is not 0. Where V is 0
                                            VAL is not read, and OUT is the entropy, [T·H] float32
        H, tokens, nitems, grid int32, scale float32        CTA c of `grid` takes the items c, c + grid, ...; scale
                                                            times log2(e)
    """
    row_tile = RowTile(HG, 128)
    TOKENS, TOKEN_MAJOR = row_tile.TOKENS, row_tile.TOKEN_MAJOR
    PIECE = min(row_tile.BOX, 64)  # rows of one store
    NARROW = BN // 32 * 16
    ENTROPY = int(V == 0)
    assert V or (E and not TMA_STORE)
    assert not TMA_STORE or (V <= D and QS == 2 and 64 % PIECE == 0 and row_tile.BOX % PIECE == 0)
    assert not TMA_STORE or not row_tile.PADDED
    nq, nk, nt, nx, ni = T.dynamic("nq"), T.dynamic("nk"), T.dynamic("nt"), T.dynamic("nx"), T.dynamic("ni")
    kd, kv = T.dynamic("kd"), T.dynamic("kv")
    qd, qv = (D, V) if TOKEN_MAJOR else (T.dynamic("qd"), T.dynamic("qv"))
    index_q = (nq, E if TOKEN_MAJOR else T.dynamic("qe")) if E else (T.dynamic("n0"), T.dynamic("n1"))
    index_k = (nk, E) if E else (T.dynamic("n2"), T.dynamic("n3"))
    output, output_type = ((nx,), "float32") if ENTROPY else ((nq, qv), "bfloat16")
    load_rows = row_tile.copies()
    begin, first, step, redo, values, values_ready, values_done, rescale, finish = steps(Widths(D, V, E, HG, BN, QS))

    # the row tile of the item whose fields the lanes hold
    @T.macro
    def feed_rows(tensors, tiles, bars, qs, qp, slots, field, H):
        Q, IQ = tensors
        T.barrier_wait(bars.qempty[qs], qp)
        T.call_extern("handle", "put_item", slots + qs * SLOT_BYTES, field)
        t0 = T.call_extern("int32", "pick_field", field, RowItem.TOKEN)
        g = T.call_extern("int32", "pick_field", field, RowItem.KEY_HEAD)
        load_rows(Q, tiles.Q, qs, bars.qfull, D, t0, g, H)
        if E:
            load_rows(IQ, tiles.IQ, qs, bars.qfull, E, t0, g, H)
        commit((bars.qfull, qs))

    # warp 8: row tiles, and what they see of keys and values
    @T.macro
    def feed(tensors, tiles, bars, Is, ITEMS, nitems, bx, grid, H):
        Q, K, VAL, IQ, IK = tensors
        st = T.alloc_var("int32", 0)
        ph = T.alloc_var("int32", 1)
        qs = T.alloc_var("int32", 0)
        qp = T.alloc_var("int32", 1)
        key = T.alloc_var("int32")
        g = T.alloc_var("int32")
        tiles_left = T.alloc_var("int32")
        field = T.alloc_var("int32")  # of the item under way, one a lane
        coming = T.alloc_var("int32")  # of the next one
        count = T.alloc_var("int32")
        slots = T.alloc_var("int32")
        slots = shared_address(Is)
        count = count_items(nitems, bx, grid)
        coming = T.call_extern("int32", "lane_field", T.address_of(ITEMS[0]), bx)
        feed_rows((Q, IQ), tiles, bars, qs, qp, slots, coming, H)
        for it in T.serial(count):
            field = coming
            g = T.call_extern("int32", "pick_field", field, RowItem.KEY_HEAD)
            tiles_left = T.call_extern("int32", "pick_field", field, RowItem.TILES)
            if it + 1 < count:
                coming = T.call_extern("int32", "lane_field", T.address_of(ITEMS[0]), bx + (it + 1) * grid)
            for i in T.serial(tiles_left):
                key = T.call_extern("int32", f"pick_first_key<{BN}>", field, i)
                T.barrier_wait(bars.kempty[st], ph)
                T.tma_copy(K[key : key + BN, g * D : g * D + D], tiles.K[st, :, :], barrier=bars.kfull[st])
                if E:
                    T.tma_copy(IK[key : key + BN, 0:E], tiles.IK[st, :, :], barrier=bars.kfull[st])
                commit((bars.kfull, st))
                if V:
                    T.barrier_wait(bars.vempty[st], ph)
                    T.tma_copy(VAL[key : key + BN, g * V : g * V + V], tiles.V[st, :, :], barrier=bars.vfull[st])
                    commit((bars.vfull, st))
                advance(st, ph, 2)
                if i == (T.min(tiles_left - 1, 2) if QS == 2 else tiles_left - 1):
                    advance(qs, qp, QS)
                    if it + 1 < count:
                        feed_rows((Q, IQ), tiles, bars, qs, qp, slots, coming, H)

    # warps 10 and 11: the numbers of a row tile's rows
    @T.macro
    def gather(tensors, bars, Is, ITEMS, nitems, bx, grid, tokens, H):
        KS, KE, W = tensors
        qs = T.alloc_var("int32", 0)
        qp = T.alloc_var("int32", 1)
        count = T.alloc_var("int32")
        slots = T.alloc_var("int32")
        slots = shared_address(Is)
        count = count_items(nitems, bx, grid)
        for it in T.serial(count):
            T.barrier_wait(bars.qempty[qs], qp)
            T.call_extern(
                "handle", f"at_gather<{HG}, {E}>", slots + qs * SLOT_BYTES + ITEM_BYTES, T.address_of(ITEMS[0]),
                bx + it * grid, T.address_of(KS[0]), T.address_of(KE[0]), T.address_of(W[0]), tokens, H,
            )  # fmt: skip
            T.mbarrier_arrive(bars.qfull[qs])
            advance(qs, qp, QS)

    # the sums of a new item are zero, and its shifts are unset
    @T.macro
    def clear(registers, sums):
        for h in [0, 1]:
            sums.m[h] = UNSET
            if E:
                sums.n[h] = UNSET
        for i in [0, 1, 2, 3]:
            sums.l[i] = 0.0
            if E:
                sums.y[i] = 0.0
                sums.c[i] = 0.0
            if ENTROPY:
                sums.d[i] = 0.0
        for i in list(range(V // 2)):
            registers.O[i] = 0.0

    @T.macro
    def store_piece(Qs, OUT, slot, row, t0, g, panel, H, tokens):
        # row of the tile, first of PIECE; token-major: part of a token's heads, head-major: some tokens of one head
        if TOKEN_MAJOR:
            if t0 + row // HG < tokens:
                T.tma_copy(
                    Qs[slot, row : row + PIECE, panel * 64 : panel * 64 + 64],
                    OUT[
                        (t0 + row // HG) * H + g * HG + row % HG : (t0 + row // HG) * H + g * HG + row % HG + PIECE,
                        panel * 64 : panel * 64 + 64,
                    ],
                    leader_scope_threads=128,
                )
        else:
            if t0 + row % TOKENS < tokens:
                T.tma_copy(
                    Qs[slot, row : row + PIECE, panel * 64 : panel * 64 + 64],
                    OUT[
                        t0 + row % TOKENS : t0 + row % TOKENS + PIECE,
                        (g * HG + row // TOKENS) * V + panel * 64 : (g * HG + row // TOKENS) * V + panel * 64 + 64,
                    ],
                    leader_scope_threads=128,
                )

    # O of the item before, which has been scaled, to OUT: through the place of its queries, or from registers
    @T.macro
    def store(registers, item, Qs, OUT, at, bars, v, tokens, H, tx):
        if TMA_STORE:
            t0 = T.call_extern("int32", "item_field", item.address, RowItem.TOKEN)
            g = T.call_extern("int32", "item_field", item.address, RowItem.KEY_HEAD)
            T.call_extern(
                "handle",
                f"at_stage<{V}>",
                registers.O.access_ptr("r"),
                at[QUERIES] + (v[ROW_TILES] + 1) % 2 * (256 * D),
            )
            T.fence_proxy_async()
            T.sync_threads(10 + tx // 128, 128)
            for z in list(range(64 // PIECE)):
                for p in list(range(V // 64)):
                    store_piece(Qs, OUT, (v[ROW_TILES] + 1) % 2, tx // 128 * 64 + z * PIECE, t0, g, p, H, tokens)
        else:
            if V:
                T.call_extern(
                    "handle", f"at_store<{HG}, {V}>", registers.O.access_ptr("r"), item.address,
                    T.address_of(OUT[0, 0]), tokens, H,
                )  # fmt: skip
            release(bars.qempty, (v[ROW_TILES] + QS - 1) % QS, tx)

    # tile 0 of the next item
    @T.macro
    def go_on(registers, at, bars, v, more, tx):
        v[ROW_TILES] = v[ROW_TILES] + 1
        wait_for_turn(tx)
        if QS == 2:
            values(registers, at, v)
        begin(registers, at, bars, v, more)
        pass_turn(tx)

    @T.macro
    def fence_logits(registers):
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(registers.S, num_regs=BN // 2)
        if E:
            T.warpgroup_fence_operand(registers.X, num_regs=BN // 2)

    @T.prim_func
    def flash_indexer_attention(
        Q: T.Tensor((nq, qd), "bfloat16"), K: T.Tensor((nk, kd), "bfloat16"), VAL: T.Tensor((nk, kv), "bfloat16"),
        IQ: T.Tensor(index_q, "bfloat16"), IK: T.Tensor(index_k, "bfloat16"), W: T.Tensor((nx,), "float32"),
        KS: T.Tensor((nt,), "int32"), KE: T.Tensor((nt,), "int32"), ITEMS: T.Tensor((ni,), "int32"),
        OUT: T.Tensor(output, output_type), LSE: T.Tensor((nx,), "float32"), LSX: T.Tensor((nx,), "float32"),
        KL: T.Tensor((nx,), "float32"), H: T.int32, tokens: T.int32, nitems: T.int32, grid: T.int32, scale: T.float32,
    ):  # fmt: skip
        with T.Kernel(grid, threads=384) as bx:
            T.import_source(SOURCE)
            Qs = T.alloc_shared((QS, 128, D), "bfloat16")
            Ks = T.alloc_shared((2, BN, D), "bfloat16")
            Vs = T.alloc_shared((2, BN, V), "bfloat16") if V else Ks
            Is = T.alloc_shared((QS, SLOT_BYTES // 4), "int32")  # an item, and the numbers of its rows
            Bs = T.alloc_shared(((BACKUP_BYTES_ENTROPY if ENTROPY else BACKUP_BYTES) // 4,), "float32")
            S = T.alloc_local((BN // 2,), "float32")
            P = T.alloc_local((BN // 4,), "uint32") if V else S
            O = T.alloc_local((V // 2,), "float32") if V else S
            T.annotate_layout({x: make_swizzled_layout(x) for x in (Qs, Ks, Vs)})
            if E:
                IQs = T.alloc_shared((QS, 128, E), "bfloat16")
                IKs = T.alloc_shared((2, BN, E), "bfloat16")
                X = T.alloc_local((BN // 2,), "float32")
                T.annotate_layout({x: make_swizzled_layout(x) for x in (IQs, IKs)})
            else:
                IQs, IKs, X = Qs, Ks, S
            qfull = T.alloc_barrier([65] * QS)  # the copies, 64 gathering threads
            qempty = T.alloc_barrier([2 if TMA_STORE else 8] * QS)
            kfull = T.alloc_barrier([1] * 2)
            kempty = T.alloc_barrier([8] * 2)
            vfull = T.alloc_barrier([1] * 2)
            vempty = T.alloc_barrier([8] * 2)
            bars = Barriers(qfull, qempty, kfull, kempty, vfull, vempty)
            tensors = Tensors(Q, K, tokens, H, scale)
            tx = T.get_thread_binding()
            if row_tile.PADDED:  # rows that no copy reaches: what lies there could make sums overflow
                for z, r, d in T.Parallel(QS, 128, D):
                    Qs[z, r, d] = T.cast(0.0, "bfloat16")
                if E:
                    for z, r, d in T.Parallel(QS, 128, E):
                        IQs[z, r, d] = T.cast(0.0, "bfloat16")
                T.fence_proxy_async()
                T.sync_threads()
            if tx < 256:
                T.set_max_nreg(REGISTERS[0], 1)
                v = T.alloc_local((STATE,), "int32")
                limits = T.alloc_local((4,), "int32")
                m = T.alloc_local((2,), "float32")
                l = T.alloc_local((4,), "float32")
                alpha = T.alloc_local((2,), "float32")
                if E:
                    n = T.alloc_local((2,), "float32")
                    w = T.alloc_local((2,), "float32")
                    y = T.alloc_local((4,), "float32")
                    c = T.alloc_local((4,), "float32")
                    y_tile = T.alloc_local((4,), "float32")
                else:
                    n, w, y, c, y_tile = m, m, l, l, l
                d = T.alloc_local((4,), "float32") if ENTROPY else l
                sums, registers = Sums(m, n, w, l, y, y_tile, c, d, alpha), Registers(S, X, P, O)
                at = T.alloc_local((5,), "int32")
                for j, x in enumerate((Qs, Ks, Vs, IQs, IKs)):
                    at[j] = shared_address(x)
                backup = T.alloc_var("int32")
                backup = shared_address(Bs)
                items = T.alloc_var("int32")
                address = T.alloc_var("int32")
                count = T.alloc_var("int32")
                item = Item(address, limits, backup)
                v[KEY_TILES] = 0
                v[ROW_TILES] = 0
                begin_turns(tx)
                items = count_items(nitems, bx, grid)
                wait_for_turn(tx)
                begin(registers, at, bars, v, True)
                pass_turn(tx)
                fence_logits(registers)
                for it in T.serial(items):
                    # tile 0: S and X are there; P
                    address = shared_address(Is) + v[ROW_TILES] % QS * SLOT_BYTES
                    release(kempty, v[KEY_TILES] % 2, tx)
                    v[KEY_TILES] = v[KEY_TILES] + 1
                    T.call_extern("handle", "at_limits", limits.access_ptr("w"), address + ITEM_BYTES)
                    if E:
                        T.call_extern("handle", "at_weights", w.access_ptr("w"), address + ITEM_BYTES)
                    clear(registers, sums)
                    count = T.call_extern("int32", "item_field", address, RowItem.SEEN)
                    if count <= NARROW:
                        first(NARROW, registers, sums, item, scale)
                    else:
                        first(BN, registers, sums, item, scale)
                    if TMA_STORE:
                        if v[ROW_TILES] > 0:  # the last item's outputs have left
                            if T.shuffle_elect(128):
                                T.tma_store_wait(0)
                                T.mbarrier_arrive(qempty[(v[ROW_TILES] + 1) % 2])
                    count = T.call_extern("int32", "masked_tiles_left", address)
                    for i in T.serial(count):
                        step(registers, at, bars, v, sums, item, tensors, i + 1, True, tx)
                    count = T.call_extern("int32", "whole_tiles", address)
                    for i in T.serial(count):
                        step(registers, at, bars, v, sums, item, tensors, i, False, tx)
                    if not E:
                        v[OVER] = T.call_extern("int32", f"at_over<{E}>", l.access_ptr("r"), y_tile.access_ptr("r"))
                        if v[OVER] != 0:
                            redo(registers, sums, item, tensors, count - 1)
                    # O += P v of the last tile, and tile 0 of the next item beside it
                    values_ready(bars, v)
                    if QS == 2:
                        go_on(registers, at, bars, v, it + 1 < items, tx)
                    else:
                        values(registers, at, v)
                    finish(sums, item, tensors, LSE, LSX, KL, OUT if ENTROPY else LSE)
                    if V:
                        T.wait_wgmma(0 if QS == 1 else 2 if E else 1)
                    values_done(registers, bars, v, tx)
                    rescale(registers, alpha)
                    store(registers, item, Qs, OUT, at, bars, v, tokens, H, tx)
                    if QS == 1:
                        go_on(registers, at, bars, v, it + 1 < items, tx)
                    fence_logits(registers)
                if TMA_STORE:
                    if T.shuffle_elect(128):
                        T.tma_store_wait(0)
            else:
                T.set_max_nreg(REGISTERS[1], 0)
                if tx < 288:
                    feed((Q, K, VAL, IQ, IK), Tiles(Qs, Ks, Vs, IQs, IKs), bars, Is, ITEMS, nitems, bx, grid, H)
                elif tx >= 320:
                    gather((KS, KE, W), bars, Is, ITEMS, nitems, bx, grid, tokens, H)

    return flash_indexer_attention
