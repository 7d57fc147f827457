"""How large the tiles of the attention kernels are: the largest that shared memory and registers hold.

Bytes and registers are counted here from the sizes; what was measured to be faster than the largest stands beside it.
These are the defaults. `candidates` are what shared memory and registers hold besides, for `flash-indexer tune`.
"""

from itertools import product

SHARED_MEMORY = 232448 - 1024  # bytes a CTA may have, less the barriers
WIDTHS = (64, 128, 192, 256)  # of queries, keys and values; other widths are padded with zeros
INDEX_WIDTHS = (32, 64, 128)
MAX_HEADS = 128
MAX_KEYS = 176  # of a tile of `attention`
KERNELS = ("attention", "head_gradients_query", "head_gradients_key")


def attention(D, V, E, HG):
    """Static sizes of `attention.build` besides D, V, E and HG; E is 0 without an indexer, V without values."""
    for QS in (2, 1):
        BN = min(_most_keys(D, V, E, QS), 128)  # 144 and more are slower
        if BN >= 64 or QS == 1:
            break
    return {"BN": BN, "QS": QS, "TMA_STORE": int(0 < V <= D and QS == 2 and whole_boxes(HG))}


def _most_keys(D, V, E, QS):
    registers = (190 - V // 2) * 4 // 5 if E else (200 - V // 2) * 4 // 3  # O, S and P, and X with an indexer
    left = SHARED_MEMORY - (4096 if V else 6144) - QS * (256 * (D + E) + 2080)
    return min(left // (4 * (D + V + E)), registers, MAX_KEYS) // 16 * 16


def whole_boxes(HG):
    """Whether copies of part of a tile's rows, 64 or fewer, make up the half of each warpgroup."""
    TOKENS = 128 // HG
    box = max(HG, TOKENS)
    return HG * TOKENS == 128 and 64 % min(box, 64) == 0


def head_gradients_query(D, E):
    """Static sizes of `head_gradients.build_query` besides D, E and HG."""
    for XS, Y2S in ((2, 3), (1, 3), (1, 2)):
        N = _most_streamed(D, E, XS, Y2S)
        if N >= 64:
            break
    return {"N": N, "XS": XS, "Y2S": Y2S}


def _most_streamed(D, E, XS, Y2S):
    left = SHARED_MEMORY - XS * (256 * (D + E) + 32)
    return min(left // (4 * D + 2 * Y2S * E), 96 if E == 128 else 128) // 16 * 16


def head_gradients_key(D, E):
    """Static sizes of `head_gradients.build_key` besides D, E and HG; HG is at most N."""
    for N, (XS, Y2S) in product((128, 64), ((2, 3), (1, 3), (1, 2))):
        if _key_fits(D, E, N, XS, Y2S):
            return {"N": N, "XS": XS, "Y2S": Y2S}
    raise ValueError(f"head_gradients_key: no tiles for D={D}, E={E}")


def _key_fits(D, E, N, XS, Y2S):
    room = XS * (256 * (D + E) + 32) + N * (4 * D + Y2S * (2 * E + 24)) <= SHARED_MEMORY
    return room and (N == 64 or E < 128)  # registers: S, P and two accumulators


def default(kernel, shape):
    """The sizes above for one of KERNELS and its shape: D, E and HG, of attention V as well."""
    if kernel == "attention":
        return attention(**shape)
    sizes = {"head_gradients_query": head_gradients_query, "head_gradients_key": head_gradients_key}[kernel]
    return sizes(shape["D"], shape["E"])


def candidates(kernel, shape):
    """Every admissible choice of sizes, the default first; none where the kernel doesn't take the shape.

    A size that is not varied here is in every candidate as it is in the default.
    """
    varied = {"attention": _attention, "head_gradients_query": _query, "head_gradients_key": _key}[kernel]
    shipped = default(kernel, shape)
    found = [shipped | sizes for sizes in varied(shipped, **shape)]
    return [shipped, *(sizes for sizes in found if sizes != shipped)] if shipped in found else []


def _attention(shipped, D, V, E, HG):
    for QS, TMA_STORE in ((2, 1), (2, 0), (1, 0)):
        if not TMA_STORE or (0 < V <= D and whole_boxes(HG)):
            for BN in range(min(64, shipped["BN"]), _most_keys(D, V, E, QS) + 1, 16):
                yield {"BN": BN, "QS": QS, "TMA_STORE": TMA_STORE}


def _query(shipped, D, E, HG):
    for XS, Y2S in product((2, 1), (4, 3, 2)):
        for N in range(min(64, shipped["N"]), _most_streamed(D, E, XS, Y2S) + 1, 16):
            yield {"N": N, "XS": XS, "Y2S": Y2S}


def _key(shipped, D, E, HG):
    for N, XS, Y2S in product((128, 64), (2, 1), (4, 3, 2)):
        if HG <= N and _key_fits(D, E, N, XS, Y2S):
            yield {"N": N, "XS": XS, "Y2S": Y2S}
