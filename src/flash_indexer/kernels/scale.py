"""Scales a gradient by the upstream gradient of the loss, in place; nothing is read or written where that is 1.

    X *= F[0]        memory bound: each element read and written once, 16 bytes a thread

`loss.backward()` hands in 1, which only the device knows: the kernel asks first.
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
#endif
"""


def build(bfloat16):
    """The kernel for bfloat16 (1) or float32 (0) elements.

    Run-time arguments: X [rows, columns], beginning at a multiple of 16 bytes; F [1] float32.
    """
    rows, columns = T.dynamic("rows"), T.dynamic("columns")

    @T.prim_func
    def flash_indexer_scale(
        X: T.Tensor((rows, columns), "bfloat16" if bfloat16 else "float32"), F: T.Tensor((1,), "float32")
    ):
        with T.Kernel(CTAS, threads=THREADS):
            T.import_source(SOURCE)
            # X.mul_(F)
            T.call_extern(
                "handle", f"scale_all<{bfloat16}>", T.address_of(X[0, 0]), T.cast(rows, "int64"), columns,
                T.address_of(F[0]),
            )  # fmt: skip

    return flash_indexer_scale
