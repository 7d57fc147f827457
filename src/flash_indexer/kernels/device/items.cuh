#pragma once
#include <tl_templates/cuda/common.h>
#include <tl_templates/cuda/intrin.h>
// An item of work on its way from the list to shared memory: lanes 0 to 7 of the warp that feeds hold its eight fields (the
// other lanes hold them again), and all that this warp asks comes by shuffles.
static __device__ __forceinline__ int it_lane(const int* items, int at) {
  int v;
  asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(v) : "l"(items + (long long)at * 8 + (threadIdx.x & 7)));
  return v;
}
static __device__ __forceinline__ int it_pick(int fields, int n) { return __shfl_sync(0xffffffffu, fields, n); }
// all eight by the lane that then arrives at a barrier: it need not speak for others
static __device__ __forceinline__ void it_put(int address, int fields) {
  int v[8];
#pragma unroll
  for (int n = 0; n < 8; ++n) v[n] = it_pick(fields, n);
  if (cute::elect_one_sync()) {
    asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
    asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(address + 16), "r"(v[4]), "r"(v[5]), "r"(v[6]), "r"(v[7])
                 : "memory");
  }
}
// first key of the i-th key tile of (.., .., first, tiles, right, left, ..): 0 .. right - 1, left .. tiles - 1, right .. left - 1
template <int BN>
static __device__ __forceinline__ int it_key(int fields, int i) {
  const int first = it_pick(fields, 2), tiles = it_pick(fields, 3), right = it_pick(fields, 4), left = it_pick(fields, 5);
  const int masked = right + tiles - left;
  return first - BN * (i < right ? i : i < masked ? i - right + left : i - masked + right);
}
