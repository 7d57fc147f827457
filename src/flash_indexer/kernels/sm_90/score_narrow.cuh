#pragma once
#include "score.cuh"
// rows of 32 bytes, of 32 columns in e4m3: one step of a product
template <int ROWS>
struct Tile<16, ROWS> {
  static __device__ __forceinline__ uint64_t descriptor(int low) { return (uint64_t)0xc0000010u << 32 | (unsigned)low; }
  static __device__ constexpr int along_row(int k) { return 0; }
};
// s = Q K^T of a head: addresses as in Tile
template <int D>
static __device__ __forceinline__ void nr_product(float* s, int q, int k) {
  wg_product<128, D, 64>(s, wg_uniform(q), wg_uniform(k));
}
// a += l (s + |s|), twice the weighted ReLU; l = the row scalars of the thread's two rows
static __device__ __forceinline__ void nr_add_twice(const float* s, float* a, const float* l) {
#pragma unroll
  for (int i = 0; i < 64; ++i) a[i] = fmaf(s[i] + fabsf(s[i]), (i & 2) ? l[1] : l[0], a[i]);
}
// row of Q of the thread's first row, for the warpgroup's tokens from `token` on, at most `last`
static __device__ __forceinline__ int nr_row(int token, int last) { return min(token + warpgroup_row(), last); }
// the thread's first row of OUT: its tokens are the first or the last 64 of their block
static __device__ __forceinline__ int nr_out(int tile, int token) {
  return tile * 128 + (token & 64) + warpgroup_row();
}
