"""What the kernels of this generation are compiled for: data alone, read by operators, catalog, `tune` and tests.

Widths, modes and the depth of rings; how large the tiles of the attention kernels are (the largest that shared memory
and registers hold: bytes and registers are counted here, and what was measured to be faster than the largest stands
beside it), with `candidates`, what they hold besides, for `flash-indexer tune`; and `BUILDERS`, a row for each kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import NamedTuple

from flash_indexer.kernels.device.items import ITEM_BYTES

Sizes = dict[str, int]  # static sizes of a kernel, by the names that its builder gives them

CAPABILITY, ARCH = (9, 0), "sm_90a"
SHARED_MEMORY = 232448 - 1024  # bytes a CTA may have, less the barriers

# `indexer_kl`: widths of heads and of index heads, most heads, numbers that index heads are padded to
HEAD_WIDTHS, INDEX_WIDTHS = (64, 96, 128, 192, 256, 576), (32, 64, 128)
MAX_HEADS, MAX_INDEX_HEADS = 128, 64
PADDED_HEADS = (8, 16, 32, 64)
EXP, RELU, SUM = 0, 1, 2  # modes of `score`
SCORE_STAGES = {32: (8, 4), 64: (8, 4), 96: (7, 6), 128: (8, 4), 192: (7, 6), 256: (8, 5), 576: (5, 9)}  # Q, K rings
NARROW_STAGES = {32: (16, 8), 64: (12, 8), 128: (4, 5)}  # of `score_narrow`: Q, K rings
NARROW_FP8 = {32: (8, 8), 64: (8, 8), 128: (6, 7)}  # of its e4m3 rows; two heads a stage of Q
ROWS_CTAS = {"rows": 3, "rows_warp": 5}  # CTAs of a multiprocessor
ROWS_STAGES, ROWS_KEYS = 2, 4096  # of `rows`: stages of a CTA, keys of each
# of e4m3 rows, twice as many columns a stage, and up to two more arrays for what is left of a row (`macros.Chunks`)
SCORE_FP8 = {64: (8, 4), 96: (8, 6), 128: (8, 4), 192: (5, 4), 256: (8, 5), 576: (6, 5)}
UNIFORM_FP8 = (192,)  # of e4m3: widths whose descriptors lie in uniform registers: faster
SHARED_KEY_SCALES = (192,)  # of e4m3: widths of heads where 128 keys share a scale
LSE_STAGES = {64: (2, 6), 96: (6, 9), 128: (4, 8), 192: (6, 7), 256: (4, 8), 576: (9, 4)}  # of the Q and K rings
LSE_FP8 = {64: (2, 6), 96: (2, 6), 128: (2, 8), 192: (2, 6), 256: (4, 8), 576: (6, 5)}
GATHERED_INDEX_WIDTHS = (64, 128)  # of the indexer at the selected keys
INDEX_TABLE_KEYS = 16384  # keys of a table of `sparse_index_table`
SELECT_ROW, SELECT_ORDERED = 16384, 4096  # of `select`: keys of a row that it holds; slots that it puts in order
MASK_WORDS = 64  # of 16 rows x 128 keys of masks in bits
KL_ROW_WARPS = 8  # of `kl_gradients`: warps that make KL and di
MASKED_REGISTERS = (232, 40)  # of `gradients_masked`: of a thread that computes, of the others
X_STAGES, Y_STAGES = 2, {32: 10, 64: 8, 128: 4}  # of `gradients`; Y by E: about as many bytes in flight

# Attention: widths of queries, keys and values (others are padded with zeros), keys of a tile at most
WIDTHS = (64, 128, 192, 256)
MLA_WIDTHS = (576, 512)
MAX_KEYS = 176
ROW_BYTES = 16  # numbers of a row: its interval, its weight
SLOT_BYTES = ITEM_BYTES + 128 * ROW_BYTES  # an item in shared memory, with the numbers of its rows
BACKUP_BYTES, BACKUP_BYTES_ENTROPY = 256 * 16, 256 * 24  # sums before a tile, of each thread that computes
NUMBERS_BYTES = 24  # of a query of `head_gradients_key`
ONCE_WIDTHS = (128, 64)  # the widest D and E of `head_gradients_once`
# The bit form: columns of a row; by these, of each kernel the rows of what streams by, which registers bound
BITS_WIDTHS = (64, 128)
BITS_ALL_KEYS, BITS_MAX_KEYS = 2**17, 2**20  # that are taken whatever gathering costs; at most
BITS_ATTENTION, BITS_QUERY, BITS_KEY = {64: 128, 128: 128}, {64: 128, 128: 64}, {64: 64, 128: 64}
KERNELS = ("attention", "head_gradients_query", "head_gradients_key")  # of which tiles can be chosen


class Kernel(NamedTuple):
    """module, function: below this folder, what builds the kernel from static sizes. compiled: those of the package.

    streamed: whether the copy engine feeds tensor cores through rings of shared memory, as the tests then require.
    """

    module: str
    function: str
    compiled: tuple[Sizes, ...]
    streamed: bool = True


def masked_stage(E: int, IP: int) -> int:
    """Bytes of a stage of `gradients_masked`: a tile of w·index_q, di and masks of two key tiles."""
    return 256 * E + 2 * (128 // IP * 256 + 2048)


def masked_stages(E: int, IP: int) -> int:
    """Stages of its ring: what lies around the ring takes another KiB."""
    return min((SHARED_MEMORY - 1024) // masked_stage(E, IP), 8)


def kl_threads(warps: int) -> int:
    """Threads of `kl_gradients`: two warpgroups that multiply, those of the warps of rows, one that copies."""
    return 256 + warps * 32 + 128


def kl_parts(E: int) -> int:
    """Times 128 rows (token, head) of an item of `kl_gradients`: index_k is read from the L2 cache once for all."""
    return 2 if E <= 64 else 1


def kl_registers(E: int, warps: int) -> tuple[int, int, int]:
    """Of a thread of each role: what those that multiply and copy leave is for the warps of rows."""
    threads = kl_threads(warps)
    multiplies, copies = {64: 120, 128: 144}[E * kl_parts(E)], 24
    left = 65536 // threads // 8 * 8 * threads - 256 * multiplies - 128 * copies
    return multiplies, min(left // (threads - 384) // 8 * 8, 168), copies


def kl_stages(E: int, IP: int) -> tuple[int, int]:
    """Stages of its two rings: a tile of index_k with masks and di of an item's rows; both scores of its tokens."""
    parts = kl_parts(E)
    tokens = parts * 128 // IP
    left = SHARED_MEMORY - parts * 256 * E - 2048
    keys, scores = 256 * E + parts * 2048 + tokens * 256, tokens * 1024
    stages = min(left // (keys + scores), 6)
    return stages, min((left - stages * keys) // scores, 8)


def sparse_index_bytes(E: int) -> int:
    """Shared memory of `sparse_index_gradients`: keys, tokens, sums, weights, numbers of keys, barriers."""
    stages, tokens = 3 if E == 128 else 4, 2
    sums = 2 * 64 * (4 * E + 16)
    return stages * (256 * E + 128 * 14 + 16) + tokens * (128 * E + 64 * 4 + 16) + sums


def quantized_rows(D: int) -> int:
    """Rows that a block of `quantize` takes: 4 to 32 lanes hold one."""
    vectors = D // 8
    return 256 // next(lanes for lanes in (32, 16, 8, 4) if vectors % lanes == 0)


def attention(D: int, V: int, E: int, HG: int) -> Sizes:
    """Static sizes of `attention` besides D, V, E and HG; E is 0 without an indexer, V without values."""
    for QS in (2, 1):
        BN = min(_most_keys(D, V, E, QS), 128)  # 144 and more are slower
        if BN >= 64 or QS == 1:
            break
    return {"BN": BN, "QS": QS, "TMA_STORE": int(0 < V <= D and QS == 2 and whole_boxes(HG))}


def _most_keys(D: int, V: int, E: int, QS: int) -> int:
    registers = (190 - V // 2) * 4 // 5 if E else (200 - V // 2) * 4 // 3  # O, S and P, and X with an indexer
    left = SHARED_MEMORY - (BACKUP_BYTES if V else BACKUP_BYTES_ENTROPY) - QS * (256 * (D + E) + SLOT_BYTES)
    return min(left // (4 * (D + V + E)), registers, MAX_KEYS) // 16 * 16


def whole_boxes(HG: int) -> bool:
    """Whether copies of part of a tile's rows, 64 or fewer, make up the half of each warpgroup."""
    TOKENS = 128 // HG
    box = max(HG, TOKENS)
    return HG * TOKENS == 128 and 64 % min(box, 64) == 0


def head_gradients_query(D: int, E: int) -> Sizes:
    """Static sizes of `head_gradients_query` besides D, E and HG."""
    for XS, Y2S in ((2, 3), (1, 3), (1, 2)):
        N = _most_streamed(D, E, XS, Y2S)
        if N >= 64:
            break
    return {"N": N, "XS": XS, "Y2S": Y2S}


def _most_streamed(D: int, E: int, XS: int, Y2S: int) -> int:
    left = SHARED_MEMORY - XS * (256 * (D + E) + ITEM_BYTES)
    return min(left // (4 * D + 2 * Y2S * E), 96 if E == 128 else 128) // 16 * 16


def head_gradients_key(D: int, E: int) -> Sizes:
    """Static sizes of `head_gradients_key` besides D, E and HG; HG is at most N."""
    for N, (XS, Y2S) in product((128, 64), ((2, 3), (1, 3), (1, 2))):
        if _key_fits(D, E, N, XS, Y2S):
            return {"N": N, "XS": XS, "Y2S": Y2S}
    raise ValueError(f"head_gradients_key: no tiles for D={D}, E={E}")


def _key_fits(D: int, E: int, N: int, XS: int, Y2S: int) -> bool:
    room = XS * (256 * (D + E) + ITEM_BYTES) + N * (4 * D + Y2S * (2 * E + NUMBERS_BYTES)) <= SHARED_MEMORY
    return room and (N == 64 or E < 128)  # registers: S, P and two accumulators


def default(kernel: str, shape: Mapping[str, int]) -> Sizes:
    """The sizes above for one of KERNELS and its shape: D, E and HG, of attention V as well."""
    if kernel == "attention":
        return attention(**shape)
    tiles = {"head_gradients_query": head_gradients_query, "head_gradients_key": head_gradients_key}[kernel]
    return tiles(shape["D"], shape["E"])


def candidates(kernel: str, shape: Mapping[str, int]) -> list[Sizes]:
    """Every admissible choice of sizes, the default first; none where the kernel doesn't take the shape.

    A size that is not varied here is in every candidate as it is in the default.
    """
    choices: dict[str, Callable[..., Iterator[Sizes]]] = {
        "attention": _attention, "head_gradients_query": _query, "head_gradients_key": _key,
    }  # fmt: skip
    varied = choices[kernel]
    shipped = default(kernel, shape)
    admitted = [shipped | sizes for sizes in varied(shipped, **shape)]
    return [shipped, *(sizes for sizes in admitted if sizes != shipped)] if shipped in admitted else []


def _attention(shipped: Sizes, D: int, V: int, E: int, HG: int) -> Iterator[Sizes]:
    for QS, TMA_STORE in ((2, 1), (2, 0), (1, 0)):
        if not TMA_STORE or (0 < V <= D and whole_boxes(HG)):
            for BN in range(min(64, shipped["BN"]), _most_keys(D, V, E, QS) + 1, 16):
                yield {"BN": BN, "QS": QS, "TMA_STORE": TMA_STORE}


def _query(shipped: Sizes, D: int, E: int, HG: int) -> Iterator[Sizes]:
    for XS, Y2S in product((2, 1), (4, 3, 2)):
        for N in range(min(64, shipped["N"]), _most_streamed(D, E, XS, Y2S) + 1, 16):
            yield {"N": N, "XS": XS, "Y2S": Y2S}


def _key(shipped: Sizes, D: int, E: int, HG: int) -> Iterator[Sizes]:
    for N, XS, Y2S in product((128, 64), (2, 1), (4, 3, 2)):
        if HG <= N and _key_fits(D, E, N, XS, Y2S):
            yield {"N": N, "XS": XS, "Y2S": Y2S}


ATTENTION = (  # D, V, E, heads of a key head: common sizes, and those of the tests
    (64, 64, 64, 3), (128, 128, 64, 64), (128, 128, 64, 4), (128, 128, 128, 1), (128, 128, 64, 128), (192, 128, 64, 2),
    (256, 256, 64, 8), (128, 64, 64, 5), (128, 64, 128, 12), (64, 64, 32, 4),
)  # fmt: skip
INDEX = tuple({"E": E} for E in INDEX_WIDTHS)
GATHERED_INDEX = tuple({"E": E} for E in GATHERED_INDEX_WIDTHS)
INDEX_HEADS = tuple({"E": E, "IP": IP} for E, IP in product(INDEX_WIDTHS, PADDED_HEADS))
GRADIENTS = tuple({"D": D, "E": E, "HG": HG} for D, _, E, HG in ATTENTION)


def attention_sizes() -> Iterator[Sizes]:
    """Attention alone, with an indexer, and the indexer's KL alone."""
    for D, V, E, HG in ATTENTION:
        for value_width, index_width in ((V, 0), (V, E), (0, E)):
            shape = {"D": D, "V": value_width, "E": index_width, "HG": HG}
            yield shape | attention(**shape)


def bits_sizes(rows: Mapping[int, int]) -> tuple[Sizes, ...]:
    """Of a kernel of the bit form, from the rows that it has by width."""
    return tuple({"D": D, "N": N} for D, N in rows.items())


BUILDERS = {
    "score": Kernel(
        "score",
        "build",
        (
            *({"D": D, "mode": EXP} for D in HEAD_WIDTHS),
            *({"D": D, "mode": SUM} for D in HEAD_WIDTHS if D not in NARROW_STAGES),
            *({"D": E, "mode": RELU} for E in INDEX_WIDTHS),
        ),
    ),
    "score_narrow": Kernel(
        "score_narrow",
        "build",
        (
            *({"D": D, "mode": mode} for D in HEAD_WIDTHS if D in NARROW_STAGES for mode in (EXP, SUM)),
            *({"D": E, "mode": RELU} for E in INDEX_WIDTHS),
            *({"D": D, "mode": EXP, "left": 1} for D in HEAD_WIDTHS if D in NARROW_STAGES),
            *({"D": E, "mode": RELU, "left": 1} for E in INDEX_WIDTHS),
        ),
    ),
    "score_narrow_fp8": Kernel("score_narrow", "build_fp8", INDEX),
    "score_fp8": Kernel("score", "build_fp8", tuple({"D": D} for D in HEAD_WIDTHS)),
    "lse": Kernel("lse", "build", tuple({"D": D} for D in HEAD_WIDTHS)),
    "lse_fp8": Kernel("lse", "build_fp8", tuple({"D": D} for D in HEAD_WIDTHS)),
    "select": Kernel("select", "build", ({},), streamed=False),
    "sparse_rows": Kernel("sparse_rows", "build", ({},), streamed=False),
    "rows": Kernel("rows", "build", ({"logits": 0}, {"logits": 1}), streamed=False),
    "rows_warp": Kernel("rows_warp", "build", ({"logits": 0}, {"logits": 1}), streamed=False),
    "quantize": Kernel(
        "quantize",
        "build",
        tuple({"D": D, "rotation": rotation} for D in HEAD_WIDTHS for rotation in (0, 1)),
        streamed=False,
    ),
    "quantize_index": Kernel(
        "quantize",
        "build_index",
        tuple({"E": E, "rotation": rotation} for E in INDEX_WIDTHS for rotation in (0, 1)),
        streamed=False,
    ),
    "quantize_keys": Kernel(
        "quantize",
        "build_keys",
        tuple(
            {"D": D, "narrow": narrow, "rotation": rotation}
            for D in SHARED_KEY_SCALES
            for narrow, rotation in ((0, 0), (0, 1), (1, 0))
        ),
        streamed=False,
    ),
    "sparse_index_gradients": Kernel(
        "sparse_index_gradients",
        "build",
        tuple({"E": E, "exact": exact} for E in GATHERED_INDEX_WIDTHS for exact in (0, 1)),
        streamed=False,
    ),
    "sparse_scatter": Kernel("sparse_scatter", "build", ({},), streamed=False),
    "sparse_index_scores": Kernel("sparse_index_gradients", "build_scores", GATHERED_INDEX, streamed=False),
    "sparse_index_largest": Kernel("sparse_index_sums", "build_largest", GATHERED_INDEX, streamed=False),
    "sparse_index_table": Kernel("sparse_index_sums", "build_table", ({"sum": 0}, {"sum": 1}), streamed=False),
    "sparse_index_finish": Kernel("sparse_index_sums", "build_finish", GATHERED_INDEX, streamed=False),
    "gradients_query": Kernel(
        "gradients",
        "build_query",
        tuple(shape | masks for shape in INDEX_HEADS for masks in ({}, {"masks": 1})),
    ),
    "gradients_key": Kernel("gradients", "build_key", INDEX_HEADS),
    "gradients_key_masked": Kernel("gradients_masked", "build", INDEX_HEADS, streamed=False),
    "kl_gradients": Kernel("kl_gradients", "build", INDEX_HEADS),
    "gradients_reduce": Kernel("gradients_reduce", "build", INDEX, streamed=False),
    "finish": Kernel("finish", "build_finish", INDEX, streamed=False),
    "scale": Kernel("finish", "build_scale", ({},), streamed=False),
    "attention": Kernel("attention", "build", tuple(attention_sizes())),
    "attention_mla": Kernel("attention_mla", "build", ({},)),
    "sparse_attention_mla": Kernel("sparse_attention_mla", "build", ({},)),
    "sparse_delta": Kernel("sparse_delta", "build", ({"bound": 0}, {"bound": 1}), streamed=False),
    "sparse_exact_table": Kernel("sparse_exact_sums", "build_table", ({},), streamed=False),
    "sparse_exact_grid": Kernel("sparse_exact_sums", "build_grid", ({},), streamed=False),
    "sparse_exact_finish": Kernel("sparse_exact_sums", "build_finish", ({},), streamed=False),
    "sparse_gradients_mla": Kernel(
        "sparse_gradients_mla",
        "build",
        tuple({"exact": exact, "half": half} for exact in (0, 1) for half in (0, 1)),
        streamed=False,
    ),
    "bits": Kernel("bits", "build", ({},), streamed=False),
    "bits_keys": Kernel("bits_tables", "build_keys", tuple({"W": W} for W in BITS_WIDTHS), streamed=False),
    "bits_lists": Kernel("bits_tables", "build_lists", ({},), streamed=False),
    "bits_numbers": Kernel("bits_tables", "build_numbers", tuple({"D": W} for W in BITS_WIDTHS), streamed=False),
    "bits_slots": Kernel("bits_tables", "build_slots", ({},), streamed=False),
    "bits_attention": Kernel("bits_attention", "build", bits_sizes(BITS_ATTENTION)),
    "bits_gradients_query": Kernel("bits_gradients_query", "build", bits_sizes(BITS_QUERY)),
    "bits_gradients_key": Kernel("bits_gradients_key", "build", bits_sizes(BITS_KEY)),
    "head_gradients_query": Kernel(
        "head_gradients_query", "build", tuple(x | head_gradients_query(x["D"], x["E"]) for x in GRADIENTS)
    ),
    "head_gradients_key": Kernel(
        "head_gradients_key", "build", tuple(x | head_gradients_key(x["D"], x["E"]) for x in GRADIENTS)
    ),
    "head_gradients_once": Kernel(
        "head_gradients_once",
        "build",
        tuple(x for x in GRADIENTS if x["D"] <= ONCE_WIDTHS[0] and x["E"] <= ONCE_WIDTHS[1]),
    ),
}
