"""d_index_k at the selected keys where keys are few: sums stay in shared memory, nothing is added in global memory.

    d_index_k[s] = sum_{t: s in S_t} sum_j m[t,j,s] · w[t,j] · index_q[t,j]      m[t,j,s] = di[t,s] · [logit[t,j,s] > 0]

One CTA has a range of 768 keys, 64 of their columns, and a part of the tokens. The sums, 192 KB of float32, lie in its
shared memory; tokens that select a key of the range stream past:

    warps 12-15             index_q of a token, 64 heads by 64 columns; of its slots in the range di, the key, and which
                            heads' logits are positive: 64 bits that `sparse_index_masks` writes
    warps 0-3, 4-7, 8-11    P = di w [logit > 0]    sums[keys] += P X       256 keys each, up to 64 slots at a time

A key's sum is one warpgroup's, which takes one token after the other: the order of additions is that of the tokens, and
parts are added up in theirs, so the bits are always the same. No logit is formed again and no key is read.

`sparse_index_spans` says where a token's slots of each run of 256 keys are.
"""

import tilelang.language as T

from flash_indexer.kernels.device.sources import source
from flash_indexer.kernels.sm_90.macros import PASS_CONFIGS, shared_address
from flash_indexer.kernels.sm_90.sizes import INDEX_KEYS_BYTES

__all__ = ["PASS_CONFIGS", "build"]
SOURCE = source(__file__)


def build(E):
    """OUT [parts·S, E] float32 is written. Run-time arguments:

    IQ [T·I, E] bfloat16, W [T·I] float32, DI [T·width] float32, IDX [T·width] int32, MASKS [T·width·2] int32: as of
    `sparse_index_masks`, I at most 64; SPANS [T·runs·2] int32 of `sparse_index_spans`
    tokens, I, S, width; ranges: of 768 keys, times E / 64; parts, of so many tokens each: length
    """
    nq, nw, ns, nm, nr, no = (T.dynamic(name) for name in ("nq", "nw", "ns", "nm", "nr", "no"))

    @T.prim_func
    def flash_indexer_sparse_index_keys(
        IQ: T.Tensor((nq, E), "bfloat16"), W: T.Tensor((nw,), "float32"), DI: T.Tensor((ns,), "float32"),
        IDX: T.Tensor((ns,), "int32"), MASKS: T.Tensor((nm,), "int32"), SPANS: T.Tensor((nr,), "int32"),
        OUT: T.Tensor((no, E), "float32"), tokens: T.int32, I: T.int32, S: T.int32, width: T.int32, ranges: T.int32,
        parts: T.int32, length: T.int32,
    ):  # fmt: skip
        with T.Kernel(ranges, parts, threads=512) as (bx, by):
            T.import_source(SOURCE)
            shared = T.alloc_shared((INDEX_KEYS_BYTES,), "uint8")
            T.call_extern(
                "handle", "sparse_index_keys", shared_address(shared), T.address_of(IQ[0, 0]), T.address_of(W[0]),
                T.address_of(DI[0]), T.address_of(IDX[0]), T.address_of(MASKS[0]), T.address_of(SPANS[0]),
                T.address_of(OUT[0, 0]), tokens, I, S, E, width, bx, by, length,
            )  # fmt: skip

    return flash_indexer_sparse_index_keys
