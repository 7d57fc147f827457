#pragma once
#include "score.cuh"
// s = Q K^T of a head: addresses as in Tile
template <int D>
static __device__ __forceinline__ void nr_product(float* s, int q, int k) {
  wg_product<128, D, 64>(s, wg_uniform(q), wg_uniform(k));
}
// row of Q of the thread's first row, for the warpgroup's tokens from `token` on, at most `last`
static __device__ __forceinline__ int nr_row(int token, int last) { return min(token + warpgroup_row(), last); }
// the thread's first row of OUT: its tokens are the first or the last 64 of their block
static __device__ __forceinline__ int nr_out(int tile, int token) {
  return tile * 128 + (token & 64) + warpgroup_row();
}
