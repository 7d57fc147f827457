"""The last step of a forward (the loss, and index_k's gradient in its own dtype) and the scaling that is the backward.

    finish   LOSS = sum_t WT[t]·KL[t]        DK = bfloat16(DK32)
    scale    DQ *= F, DK *= F, DW *= F       nothing is read or written where F is 1, as in `loss.backward()`

Both are bound by memory, and each is one launch: at small sizes launches are what an operator waits for. The loss is
summed in float64 by one CTA, in a fixed order.
"""

import tilelang
import tilelang.language as T

PASS_CONFIGS = {
    tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True,
    tilelang.PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
}
CTAS, THREADS = 1056, 256

SOURCE = r"""
#ifndef FLASH_INDEXER_SCALE
#define FLASH_INDEXER_SCALE
static __device__ __forceinline__ unsigned scale_pair(unsigned v, float f) {
  const float lo = __uint_as_float(v << 16) * f, hi = __uint_as_float(v & 0xffff0000u) * f;
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
// words of 4 bytes, each two bfloat16 or one float32
template <int BF16>
static __device__ __forceinline__ void scale_all(void* x, long long rows, int columns, const float* factor) {
  const float f = *factor;
  if (f == 1.0f) return;
  const long long bytes = rows * columns * (BF16 ? 2 : 4), vectors = bytes >> 4;
  const long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x, step = (long long)gridDim.x * blockDim.x;
  auto word = [&](unsigned v) { return BF16 ? scale_pair(v, f) : __float_as_uint(__uint_as_float(v) * f); };
  for (long long i = first; i < vectors; i += step) {
    uint4 v = ((uint4*)x)[i];
    ((uint4*)x)[i] = make_uint4(word(v.x), word(v.y), word(v.z), word(v.w));
  }
  const long long whole = vectors * 4, words = bytes >> 2;
  if (first < words - whole) ((unsigned*)x)[whole + first] = word(((unsigned*)x)[whole + first]);
  if (BF16 && (bytes & 2) && first == 0) {
    unsigned short* last = (unsigned short*)x + (bytes >> 1) - 1;
    *last = (unsigned short)scale_pair(*last, f);
  }
}
// columns is a multiple of 32: whole vectors of 8
static __device__ __forceinline__ void finish_cast(const float* x, void* y, long long rows, int columns) {
  const long long vectors = rows * columns >> 3, step = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += step) {
    const float4 a = ((const float4*)x)[2 * i], b = ((const float4*)x)[2 * i + 1];
    unsigned r[4];
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r[0]) : "f"(a.y), "f"(a.x));
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r[1]) : "f"(a.w), "f"(a.z));
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r[2]) : "f"(b.y), "f"(b.x));
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r[3]) : "f"(b.w), "f"(b.z));
    ((uint4*)y)[i] = make_uint4(r[0], r[1], r[2], r[3]);
  }
}
static __device__ __forceinline__ void finish_loss(const float* weight, const float* kl, float* loss, int tokens) {
  __shared__ double part[8];
  if (blockIdx.x) return;
  double sum = 0.0;
#pragma unroll 8
  for (int t = threadIdx.x; t < tokens; t += 256) sum += (double)weight[t] * (double)kl[t];
#pragma unroll
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < 8; ++w) sum += part[w];
    *loss = (float)sum;
  }
}
#endif
"""


def build_finish(E):
    """Forward's last kernel, for index head width E.

    Run-time arguments: DK32 [S, E] float32, DK [S, E] bfloat16 (written), WT, KL [T] float32, LOSS [1] float32
    (written); rows (S, or 0 where index_k's gradient is not wanted).
    """
    nk, nd, nt = T.dynamic("nk"), T.dynamic("nd"), T.dynamic("nt")

    @T.prim_func
    def flash_indexer_finish(
        DK32: T.Tensor((nk, E), "float32"), DK: T.Tensor((nd, E), "bfloat16"), WT: T.Tensor((nt,), "float32"),
        KL: T.Tensor((nt,), "float32"), LOSS: T.Tensor((1,), "float32"), rows: T.int32,
    ):  # fmt: skip
        with T.Kernel(CTAS, threads=THREADS):
            T.import_source(SOURCE)
            # LOSS = WT.dot(KL)
            T.call_extern("handle", "finish_loss", T.address_of(WT[0]), T.address_of(KL[0]), T.address_of(LOSS[0]), nt)
            # DK = DK32.bfloat16()
            T.call_extern(
                "handle", "finish_cast", T.address_of(DK32[0, 0]), T.address_of(DK[0, 0]), T.cast(rows, "int64"), E
            )

    return flash_indexer_finish


def build_scale():
    """The backward: all three gradients in one launch; it has no static sizes.

    Run-time arguments: DQ [rows, E] bfloat16, DK [rows, E] bfloat16, DW [rows, I] float32, each beginning at a multiple
    of 16 bytes; F [1] float32; nq, nk, nw: their rows (0: not wanted).
    """
    dq, dk, dw = T.dynamic("dq"), T.dynamic("dk"), T.dynamic("dw")
    cq, ck, cw = T.dynamic("cq"), T.dynamic("ck"), T.dynamic("cw")

    @T.prim_func
    def flash_indexer_scale(
        DQ: T.Tensor((dq, cq), "bfloat16"), DK: T.Tensor((dk, ck), "bfloat16"), DW: T.Tensor((dw, cw), "float32"),
        F: T.Tensor((1,), "float32"), nq: T.int32, nk: T.int32, nw: T.int32,
    ):  # fmt: skip
        with T.Kernel(CTAS, threads=THREADS):
            T.import_source(SOURCE)
            # DQ.mul_(F); DK.mul_(F); DW.mul_(F)
            T.call_extern("handle", "scale_all<1>", T.address_of(DQ[0, 0]), T.cast(nq, "int64"), cq, T.address_of(F[0]))
            T.call_extern("handle", "scale_all<1>", T.address_of(DK[0, 0]), T.cast(nk, "int64"), ck, T.address_of(F[0]))
            T.call_extern("handle", "scale_all<0>", T.address_of(DW[0, 0]), T.cast(nw, "int64"), cw, T.address_of(F[0]))

    return flash_indexer_scale
