"""How large the tiles of the attention kernels are: the largest that shared memory and registers hold.

Bytes and registers are counted here from the sizes; what was measured to be faster than the largest stands beside it.
"""

SHARED_MEMORY = 232448 - 1024  # bytes a CTA may have, less the barriers
WIDTHS = (64, 128, 192, 256)  # of queries, keys and values; other widths are padded with zeros
INDEX_WIDTHS = (32, 64, 128)
MAX_HEADS = 128


def attention(D, V, E, HG):
    """Static sizes of `attention.build` besides D, V, E and HG; E is 0 without an indexer."""
    most = (190 - V // 2) * 4 // 5 if E else (200 - V // 2) * 4 // 3  # registers: O, S and P, and X with an indexer
    for QS in (2, 1):
        left = SHARED_MEMORY - 4096 - QS * (256 * (D + E) + 2080)
        BN = min(left // (4 * (D + V + E)), most, 128) // 16 * 16  # 128: 144 and more are slower
        if BN >= 64 or QS == 1:
            break
    return {"BN": BN, "QS": QS, "TMA_STORE": int(V <= D and QS == 2 and whole_boxes(HG))}


def whole_boxes(HG):
    """Whether copies of part of a tile's rows, 64 or fewer, make up the half of each warpgroup."""
    TOKENS = 128 // HG
    box = max(HG, TOKENS)
    return HG * TOKENS == 128 and 64 % min(box, 64) == 0


def head_gradients_query(D, E):
    """Static sizes of `head_gradients.build_query` besides D, E and HG."""
    for XS, Y2S in ((2, 3), (1, 3), (1, 2)):
        left = SHARED_MEMORY - XS * (256 * (D + E) + 32)
        N = min(left // (4 * D + 2 * Y2S * E), 96 if E == 128 else 128) // 16 * 16
        if N >= 64:
            break
    return {"N": N, "XS": XS, "Y2S": Y2S}


def head_gradients_key(D, E):
    """Static sizes of `head_gradients.build_key` besides D, E and HG; HG is at most N."""
    for N in (128, 64) if E < 128 else (64,):
        for XS, Y2S in ((2, 3), (1, 3), (1, 2)):
            if XS * (256 * (D + E) + 32) + N * (4 * D + Y2S * (2 * E + 24)) <= SHARED_MEMORY:
                return {"N": N, "XS": XS, "Y2S": Y2S}
    raise ValueError(f"head_gradients_key: no tiles for D={D}, E={E}")
