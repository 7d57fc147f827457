#pragma once
#include "attention_mla.cuh"
#include "gather.cuh"
// slots that the thread's two rows see: `count`, or none where a row is no head
static __device__ __forceinline__ void sparse_bounds(int* b, int heads, int count) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    b[2 * h] = 0;
    b[2 * h + 1] = warpgroup_row() + 8 * h < heads ? count : 0;
  }
}
