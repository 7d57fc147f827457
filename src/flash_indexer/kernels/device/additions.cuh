#pragma once
// Accumulators added to rows of float32 sums in memory, which other CTAs add to as well.
static __device__ __forceinline__ void add_to(float* p, const float* x) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x[0]), "f"(x[1]), "f"(x[2]),
               "f"(x[3])
               : "memory");
}
static __device__ __forceinline__ void swap_pairs(float& a, float& b, bool second, int lanes) {
  const float sent = second ? a : b;
  const float got = __shfl_xor_sync(0xffffffffu, sent, lanes);
  if (second) a = got; else b = got;
}
// An accumulator [64, N] of a warpgroup, traded within each warp in place. Then x[16m + 8e + 4o ..] are four neighbouring
// columns, 32m + traded_column() .. + 3, of the warp's row 8e + o + (lane / 4 & ~1): an instruction of 16 bytes a lane
// covers 4 rows x 128 bytes.
template <int N>
static __device__ __forceinline__ void trade_rows(float* x) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 4;
#pragma unroll
  for (int m = 0; m < N / 32; ++m) {
    float t[16];
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float a0 = x[16 * m + 8 * h + 2 * e], a1 = x[16 * m + 8 * h + 2 * e + 1];
        float b0 = x[16 * m + 8 * h + 4 + 2 * e], b1 = x[16 * m + 8 * h + 5 + 2 * e];
        swap_pairs(a0, b0, odd, 1);
        swap_pairs(a1, b1, odd, 1);
        float* v = t + 8 * e + 4 * h;  // columns 16h + 8 odd + 4 (lane / 2 & 1) .. + 3
        v[0] = a0, v[1] = a1, v[2] = b0, v[3] = b1;
      }
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int i = 0; i < 4; ++i) swap_pairs(t[8 * e + i], t[8 * e + 4 + i], high, 4);
#pragma unroll
    for (int i = 0; i < 16; ++i) x[16 * m + i] = t[i];
  }
}
static __device__ __forceinline__ int traded_column() {
  return 8 * (threadIdx.x & 1) + 2 * (threadIdx.x & 2) + 4 * (threadIdx.x & 4);
}
