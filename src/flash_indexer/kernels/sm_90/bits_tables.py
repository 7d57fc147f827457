"""What kernels of dense tiles with bits read besides bits: keys fit for products, lists of tiles, numbers of queries.

`bits` says how bits and flags lie in memory. `bt_lists` leaves out the tiles without a set bit; `bt_slots` is the way
back, from tiles to the slots of a selection.
"""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.macros import PASS_CONFIGS

__all__ = ["PASS_CONFIGS", "build_keys", "build_lists", "build_numbers", "build_slots"]
SOURCE = source(__file__)
THREADS = 256
KEYS_THREADS = 1024
SLOTS = 1024  # of a block


def build_keys(W):
    """Keys and values in rows of W columns, zeros where a key holds NaN or infinity: a product with the zero of an
    unselected key must be zero. ODD [words] int32 has the bits of such keys: who selects one gets NaN instead.

    K, V bfloat16: of S keys and G heads rows of k_columns, v_columns numbers, strides apart. K_TO, V_TO [S·G, W]
    bfloat16; all of S words·32 keys. blocks: `words`.
    """
    n = [T.dynamic(f"n{i}") for i in range(4)]

    @T.prim_func
    def flash_indexer_bits_keys(
        K: T.Tensor((n[0],), "bfloat16"), V: T.Tensor((n[1],), "bfloat16"), K_TO: T.Tensor((n[2], W), "bfloat16"),
        V_TO: T.Tensor((n[2], W), "bfloat16"), ODD: T.Tensor((n[3],), "int32"), S: T.int32, G: T.int32,
        k_stride: T.int32, k_columns: T.int32, v_stride: T.int32, v_columns: T.int32,
    ):  # fmt: skip
        with T.Kernel(n[3], threads=KEYS_THREADS) as bx:
            T.import_source(SOURCE)
            shared = T.alloc_shared((32,), "uint32")
            T.call_extern(
                "handle", f"bt_keys<{W}>", T.address_of(shared[0]), T.address_of(K[0]), T.address_of(V[0]),
                T.address_of(K_TO[0, 0]), T.address_of(V_TO[0, 0]), T.address_of(ODD[0]), S, G, k_stride, k_columns,
                v_stride, v_columns, bx,
            )  # fmt: skip

    return flash_indexer_bits_keys


def build_lists():
    """LIST [A, tiles + 1]: of each tile a the number of tiles b that hold a bit together with it, and which, ascending.

    A tile a is na flags along an axis of end_a flags that are step_a apart, a tile b likewise along the other axis.
    """
    nf, nl = T.dynamic("nf"), T.dynamic("nl")

    @T.prim_func
    def flash_indexer_bits_lists(
        FLAGS: T.Tensor((nf,), "int32"), LIST: T.Tensor((nl,), "int32"), A: T.int32, tiles: T.int32, na: T.int32,
        step_a: T.int32, end_a: T.int32, nb: T.int32, step_b: T.int32, end_b: T.int32,
    ):  # fmt: skip
        with T.Kernel(A, threads=32) as bx:
            T.import_source(SOURCE)
            T.call_extern(
                "handle", "bt_list", T.address_of(FLAGS[0]), T.address_of(LIST[0]), tiles, na, step_a, end_a, nb,
                step_b, end_b, bx,
            )  # fmt: skip

    return flash_indexer_bits_lists


def build_numbers(D):
    """NUMBERS [H·rows·2] float32: of head h and query t lse·log2(e) and delta = out·G, zeros behind the last query.

    OUT, G [T·H, D] bfloat16; LSE [T·H] float32.
    """
    nq, nl, nn = T.dynamic("nq"), T.dynamic("nl"), T.dynamic("nn")
    per_block = THREADS // (D // 8)

    @T.prim_func
    def flash_indexer_bits_numbers(
        OUT: T.Tensor((nq, D), "bfloat16"), G: T.Tensor((nq, D), "bfloat16"), LSE: T.Tensor((nl,), "float32"),
        NUMBERS: T.Tensor((nn,), "float32"), queries: T.int32, H: T.int32, rows: T.int32,
    ):  # fmt: skip
        with T.Kernel((rows * H + per_block - 1) // per_block, threads=THREADS) as bx:
            T.import_source(SOURCE)
            T.call_extern(
                "handle", f"bt_numbers<{D}>", T.address_of(OUT[0, 0]), T.address_of(G[0, 0]), T.address_of(LSE[0]),
                T.address_of(NUMBERS[0]), queries, H, rows, bx,
            )  # fmt: skip

    return flash_indexer_bits_numbers


def build_slots():
    """P_SUM [T·K] float32 = the selected keys' numbers out of tiles of scores, zeros behind them.

    SCORES [n·128, 128] float32, as `score` writes it. PLACE [ceil(T / 128), tiles] int32: which of the n tiles. IDX,
    COUNT as above. parts: ceil(K / SLOTS) blocks take a query.
    """
    ns, np, ni, nc = T.dynamic("ns"), T.dynamic("np"), T.dynamic("ni"), T.dynamic("nc")

    @T.prim_func
    def flash_indexer_bits_slots(
        SCORES: T.Tensor((ns, 128), "float32"), PLACE: T.Tensor((np,), "int32"), IDX: T.Tensor((ni,), "int32"),
        COUNT: T.Tensor((nc,), "int32"), P_SUM: T.Tensor((ni,), "float32"), K: T.int32, S: T.int32, tiles: T.int32,
        parts: T.int32,
    ):  # fmt: skip
        with T.Kernel(nc * parts, threads=THREADS) as bx:
            T.import_source(SOURCE)
            T.call_extern(
                "handle", "bt_slots", T.address_of(SCORES[0, 0]), T.address_of(PLACE[0]), T.address_of(IDX[0]),
                T.address_of(COUNT[0]), T.address_of(P_SUM[0]), K, S, tiles, bx // parts, bx % parts,
            )  # fmt: skip

    return flash_indexer_bits_slots
