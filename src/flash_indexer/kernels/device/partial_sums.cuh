#pragma once
#include "accumulator.cuh"
// slot < 0: SUM[tile * 128 + r] += O[r] for rows below S; otherwise PART[slot * 128 + r] = O[r]
template <int E>
static __device__ __forceinline__ void add_or_store(
    const float* o, float* SUM, float* PART, int tile, int slot, int S) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = thread_row(h);
    if (slot >= 0) {
      float2* p = (float2*)(PART + ((long long)slot * 128 + r) * E) + (threadIdx.x & 3);
#pragma unroll
      for (int g = 0; g < E / 8; ++g) p[4 * g] = make_float2(o[4 * g + 2 * h], o[4 * g + 2 * h + 1]);
    } else if (tile * 128 + r < S) {
      float2* p = (float2*)(SUM + ((long long)tile * 128 + r) * E) + (threadIdx.x & 3);
#pragma unroll
      for (int g = 0; g < E / 8; ++g) {
        const float2 old = p[4 * g];
        p[4 * g] = make_float2(old.x + o[4 * g + 2 * h], old.y + o[4 * g + 2 * h + 1]);
      }
    }
  }
}
