#pragma once
#include "memory.cuh"
#include "numbers.cuh"
// Accumulator [64·warpgroups, N] of one thread: s[4g+2h+c] = row 16·warp + lane/4 + 8h, column 8g + 2·(lane%4) + c. The
// four lanes of a row are a quad. As the A operand of a product, in bfloat16: p[2g+h] = columns c = 0, 1 of s[4g+2h+c].
static __device__ __forceinline__ int thread_row(int h = 0) {
  return (threadIdx.x >> 5) * 16 + ((threadIdx.x & 31) >> 2) + 8 * h;
}
// the thread's first row within the 64 of its warpgroup
static __device__ __forceinline__ int warpgroup_row() {
  return ((threadIdx.x >> 5) & 3) * 16 + ((threadIdx.x & 31) >> 2);
}
static __device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
static __device__ __forceinline__ float quad_max_or_nan(float x) {
  x = max_or_nan(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return max_or_nan(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
static __device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
// s = outside where a key is none of limits[2h] .. limits[2h+1] - 1; `key` is that of the tile's first column
template <int N, int H>
static __device__ __forceinline__ void mask_row(float* s, const int* limits, int key, float outside) {
  const int low = limits[2 * H] - key - (threadIdx.x & 3) * 2;
  const unsigned size = limits[2 * H + 1] - limits[2 * H];
#pragma unroll
  for (int g = 0; g < N / 8; ++g)
#pragma unroll
    for (int c = 0; c < 2; ++c)
      s[4 * g + 2 * H + c] = (unsigned)(8 * g + c - low) < size ? s[4 * g + 2 * H + c] : outside;
}
template <int N>
static __device__ __forceinline__ void mask_keys(float* s, const int* limits, int key, float outside) {
  mask_row<N, 0>(s, limits, key, outside);
  mask_row<N, 1>(s, limits, key, outside);
}
// The registers of the A operand must be defined by a real, ordered instruction after the wait for the product that
// reads what was in them, or ptxas serialises the products (C7513): here the conversion,
template <int N>
static __device__ __forceinline__ void pack_operand(void* p, const float* s) {
#pragma unroll
  for (int g = 0; g < N / 4; ++g) {
    unsigned v;
    asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(s[2 * g + 1]), "f"(s[2 * g]));
    ((unsigned*)p)[g] = v;
  }
}
// and here a bitwise AND: with a mask,
static __device__ __forceinline__ unsigned define_word(unsigned x, unsigned mask) {
  unsigned r;
  asm volatile("and.b32 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(mask));
  return r;
}
// or, where the words are there already, with an opaque ~0
template <int WORDS>
static __device__ __forceinline__ void define_operand(void* p, const unsigned* x, int ones) {
#pragma unroll
  for (int g = 0; g < WORDS; ++g) ((unsigned*)p)[g] = define_word(x[g], (unsigned)ones);
}
template <int N>
static __device__ __forceinline__ void scale_rows(float* o, float first, float second) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) o[i] *= i / 2 % 2 ? second : first;
}
// Address that a lane gives to store_shared_matrices for columns 8g .. 8g + 15 of its warp's 16 rows: `row` is that of row
// lane % 16, r its number (of which three bits count). Panels of 64 columns and 128 rows, swizzled as the copy engine and
// wgmma read them.
static __device__ __forceinline__ int matrix_address(int row, int r, int g) {
  return row + g / 8 * 16384 + (((g % 8 + ((threadIdx.x & 31) >> 4)) ^ (r & 7)) << 4);
}
