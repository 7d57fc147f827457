#pragma once
#include "../device/additions.cuh"
#include "sparse_gradients_tiles.cuh"
// Warps 8 to 11 of `sparse_gradients_mla`: dk of this CTA's columns, added to memory.
namespace sparse {
// offsets in dk of the four traded rows of the warp, or negative where a slot holds no key: at[2e + o] of row 8e + o
__device__ __forceinline__ void row_offsets(int (&at)[4], const Problem& x, int t, int tile, int count, int rank) {
  const int lane = threadIdx.x & 31, row = ((threadIdx.x >> 5) & 3) * 16 + ((lane / 4) & ~1);
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int slot = tile * KEYS + ((row + (e & 1) + 8 * (e / 2)) ^ (32 * rank));
    const int key = slot < count ? __ldg(x.indices + (int64_t)t * x.width + slot) : -1;
    at[e] = (unsigned)key < (unsigned)x.S ? key * D + traded_column() : -1;
  }
}
// P^T as A of products, of 16 heads; dS^T at + 4096
constexpr uint64_t p_t = tile(P, 64, P_THERE, 512);
__device__ __forceinline__ constexpr uint64_t heads_16(int j) {
  return plus(p_t, (j / 4) * P_SIZE + (j % 4) * 1024);
}
// dk [64 keys, 64 columns] over all heads; dv of the same columns in the same sum
__device__ __forceinline__ void key_gradients(float (&d)[32], uint64_t q, uint64_t g) {
  begin_products();
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    product<true, true>(d, plus(heads_16(j), 4096), plus(q, j * 2048), j > 0);
    product<true, true>(d, heads_16(j), plus(g, j * 2048), true);
  }
  commit_products();
}
// the same of the 32 rope columns
__device__ __forceinline__ void key_gradients(float (&d)[16], uint64_t q) {
  begin_products();
#pragma unroll
  for (int j = 0; j < 8; ++j) product<true, true>(d, plus(heads_16(j), 4096), plus(q, j * 1024), j > 0);
  commit_products();
}
template <int R>
__device__ __forceinline__ void add_keys(const Problem& x, float (&d)[R], const int (&at)[4], int column) {
  trade_rows<2 * R>(d);
#pragma unroll
  for (int m = 0; m < R / 16; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (at[i] >= 0) add_to(x.dk + at[i] + column + 32 * m, d + 16 * m + 4 * i);
}
// this warpgroup no longer reads P and dS of the tile, of either CTA's keys
__device__ __forceinline__ void release_p(int bar, int rank) {
  if ((threadIdx.x & 31) == 0) {
    barrier_arrive(bar + 8 * P_FREE);
    barrier_arrive_there(of_rank(bar + 8 * P_FREE, rank ^ 1));
  }
}

// the whole work of these warps
__device__ __forceinline__ void add_gradients(const Problem& x, int sm, int rank) {
  const int bar = sm + BARRIERS;
  int number = 0;
  for (int t = blockIdx.x / 2; t < x.T; t += gridDim.x / 2) {
    const int count = __ldg(x.count + t), n = tiles_of(count);
    for (int i = 0; i < n; ++i, ++number) {
      int at[4];
      row_offsets(at, x, t, i, count, rank);
      barrier_wait(bar + 8 * P_OWN, number & 1);
      barrier_wait(bar + 8 * P_FULL, number & 1);
      {
        float d[16];
        key_gradients(d, tile(Q_ROPE, 64, 16, 512));
        wait_products<0>();
        add_keys(x, d, at, V + 32 * rank);
      }
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        float d[32];
        key_gradients(d, tile(Q + part * 16384, 128, 16, 1024), tile(G + part * 16384, 128, 16, 1024));
        wait_products<0>();
        if (part == 3) release_p(bar, rank);
        add_keys(x, d, at, 256 * rank + 64 * part);
      }
    }
  }
}
}  // namespace sparse
