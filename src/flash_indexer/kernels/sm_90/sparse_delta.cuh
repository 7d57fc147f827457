#pragma once
#include "../device/memory.cuh"
#include "../device/numbers.cuh"
// DELTA[row] = sum over 512 columns of OUT · G, a warp a row
static __device__ __forceinline__ void sparse_delta(const void* OUT, const void* G, float* DELTA, int rows, int block) {
  const int row = block * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (row >= rows) return;
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint4 a = __ldg((const uint4*)OUT + (int64_t)row * 64 + 32 * j + lane);
    const uint4 b = __ldg((const uint4*)G + (int64_t)row * 64 + 32 * j + lane);
    const unsigned x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += low_half(x[i]) * low_half(y[i]) + high_half(x[i]) * high_half(y[i]);
  }
#pragma unroll
  for (int m = 16; m; m >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, m);
  if (lane == 0) DELTA[row] = sum;
}
