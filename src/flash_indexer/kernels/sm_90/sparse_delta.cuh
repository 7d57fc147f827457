#pragma once
#include "../device/memory.cuh"
#include "../device/numbers.cuh"
// DELTA[row] = sum over 512 columns of OUT · G, a warp a row. BOUND: also MOST[token] = max over its H rows of
// max |G| + 2 scale VALUE[0] |G| max |Q|, of bits: a NaN is the largest
template <bool BOUND>
static __device__ __forceinline__ void sparse_delta(
    const void* OUT, const void* G, const void* Q, const float* VALUE, float* DELTA, float* MOST, int rows, int H,
    float scale, int block) {
  const int row = block * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (row >= rows) return;
  float sum = 0.f, squares = 0.f, most_g = 0.f, most_q = 0.f;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint4 a = __ldg((const uint4*)OUT + (int64_t)row * 64 + 32 * j + lane);
    const uint4 b = __ldg((const uint4*)G + (int64_t)row * 64 + 32 * j + lane);
    const unsigned x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low = low_half(y[i]), high = high_half(y[i]);
      sum += low_half(x[i]) * low + high_half(x[i]) * high;
      if (BOUND) squares += low * low + high * high, most_g = max_or_nan(most_g, max_or_nan(fabsf(low), fabsf(high)));
    }
  }
  if (BOUND) {
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      if (j == 2 && lane >= 8) break;
      const uint4 a = __ldg((const uint4*)Q + (int64_t)row * 72 + 32 * j + lane);
      const unsigned x[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        most_q = max_or_nan(most_q, max_or_nan(fabsf(low_half(x[i])), fabsf(high_half(x[i]))));
    }
  }
#pragma unroll
  for (int m = 16; m; m >>= 1) {
    sum += __shfl_xor_sync(0xffffffffu, sum, m);
    if (BOUND) {
      squares += __shfl_xor_sync(0xffffffffu, squares, m);
      most_g = max_or_nan(most_g, __shfl_xor_sync(0xffffffffu, most_g, m));
      most_q = max_or_nan(most_q, __shfl_xor_sync(0xffffffffu, most_q, m));
    }
  }
  if (lane) return;
  DELTA[row] = sum;
  if (!BOUND) return;
  const float most = most_g + 2.f * scale * VALUE[0] * sqrtf(squares) * most_q;
  asm volatile("red.relaxed.gpu.global.max.u32 [%0], %1;" ::"l"(MOST + row / H), "r"(__float_as_uint(most) & 0x7fffffffu)
               : "memory");
}
