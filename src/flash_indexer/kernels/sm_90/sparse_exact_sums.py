"""What the keys' gradients need to be sums of integers: a grid for each key before, and conversion to float32 behind.

    TERMS[s]  = number of tokens t with s in S_t
    SHARES[s] = sum_{t: s in S_t} BOUND[t] / LARGEST, in units of 2^-17, each rounded up
    GRID[s]   = 2^n, so that a term x is the integer round(GRID[s] x); 2^n from the mean bound of the key's terms
    DK[s]    += (LOW[s] + 2^18 HIGH[s]) / GRID[s]

BOUND[t], of `sparse_delta`, is as large as any element of the token's term for a key can be. Maxima and sums of
integers are the same in any order, so the grid is the same bits every time, and with it the gradient. Terms and shares
are taken in tables in shared memory of 16,384 keys, a CTA each for a run of keys and a part of the tokens, a warp a
token; then the tables are added up in memory.
"""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.finish import PASS_CONFIGS, THREADS
from flash_indexer.kernels.sm_90.macros import shared_address
from flash_indexer.kernels.sm_90.sizes import INDEX_TABLE_KEYS, MLA_WIDTHS

__all__ = ["PASS_CONFIGS", "build_finish", "build_grid", "build_table"]
SOURCE = source(__file__)
TABLE_THREADS = 1024
D = MLA_WIDTHS[0]


def build_table():
    """TERMS, SHARES [S] int32 are added to: zeros at first. At most 8,192 tokens. Run-time arguments:

    IDX [T·width], COUNT [T] int32 as of `sparse_gradients_mla`; BOUND [T] float32 and the LARGEST [1] that is finite;
    width; runs of 16,384 keys, parts of the tokens.
    """
    nx, nt, nk, no = T.dynamic("nx"), T.dynamic("nt"), T.dynamic("nk"), T.dynamic("no")

    @T.prim_func
    def flash_indexer_sparse_exact_table(
        IDX: T.Tensor((nx,), "int32"), COUNT: T.Tensor((nt,), "int32"), BOUND: T.Tensor((nt,), "float32"),
        LARGEST: T.Tensor((no,), "float32"), TERMS: T.Tensor((nk,), "int32"), SHARES: T.Tensor((nk,), "int32"),
        width: T.int32, runs: T.int32, parts: T.int32,
    ):  # fmt: skip
        with T.Kernel(runs, parts, threads=TABLE_THREADS) as (bx, by):
            T.import_source(SOURCE)
            table = T.alloc_shared((2 * INDEX_TABLE_KEYS * 4,), "uint8")
            # TERMS.index_add_(0, IDX[t], 1), SHARES.index_add_(0, IDX[t], ceil(2^17 BOUND[t] / LARGEST))
            T.call_extern(
                "handle", "exact_table", T.address_of(IDX[0]), T.address_of(COUNT[0]), T.address_of(BOUND[0]),
                T.address_of(LARGEST[0]), T.address_of(TERMS[0]), T.address_of(SHARES[0]), nk, width, nt, bx, by, parts,
                shared_address(table),
            )  # fmt: skip

    return flash_indexer_sparse_exact_table


def build_grid():
    """GRID [S] float32 is written. From TERMS, SHARES [S] int32 and LARGEST [1]."""
    nk, no = T.dynamic("nk"), T.dynamic("no")

    @T.prim_func
    def flash_indexer_sparse_exact_grid(
        TERMS: T.Tensor((nk,), "int32"), SHARES: T.Tensor((nk,), "int32"), LARGEST: T.Tensor((no,), "float32"),
        GRID: T.Tensor((nk,), "float32"),
    ):  # fmt: skip
        with T.Kernel((nk + THREADS - 1) // THREADS, threads=THREADS) as bx:
            T.import_source(SOURCE)
            # GRID = 2^(18 + 15 - floor(log2(LARGEST 2^-17 SHARES / TERMS)))
            T.call_extern(
                "handle", "exact_grid", T.address_of(TERMS[0]), T.address_of(SHARES[0]), T.address_of(LARGEST[0]),
                T.address_of(GRID[0]), nk, bx,
            )  # fmt: skip

    return flash_indexer_sparse_exact_grid


def build_finish():
    """DK [S, 576] float32 is added to. From SUMS int32, as `sparse_gradients_mla` makes them; GRID [S] float32."""
    nz, nk = T.dynamic("nz"), T.dynamic("nk")

    @T.prim_func
    def flash_indexer_sparse_exact_finish(
        SUMS: T.Tensor((nz,), "int32"), GRID: T.Tensor((nk,), "float32"), DK: T.Tensor((nk, D), "float32")
    ):  # fmt: skip
        with T.Kernel((nk * (D // 2) + THREADS - 1) // THREADS, threads=THREADS) as bx:
            T.import_source(SOURCE)
            # DK += (low + 2^18 high) / GRID
            T.call_extern(
                "handle", f"exact_finish<{D}>", T.address_of(SUMS[0]), T.address_of(GRID[0]), T.address_of(DK[0, 0]),
                nk, bx,
            )  # fmt: skip

    return flash_indexer_sparse_exact_finish
