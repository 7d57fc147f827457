#pragma once
#include "../device/additions.cuh"
#include "../device/exact_sums.cuh"
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
// Rows of sums in integers that the thread adds to: powers of two, and offsets, negative where a slot holds no key
template <int N>
struct ExactRows {
  float grid[N];
  int at[N];
};
// MODE 1: rows e; else rows 2e + o
template <int MODE, int N>
__device__ __forceinline__ void exact_rows(ExactRows<N>& r, const Problem& x, int t, int tile, int count, int rank) {
  const int lane = threadIdx.x & 31, row = ((threadIdx.x >> 5) & 3) * 16 + lane / 4, high = lane >> 2 & 1;
  const int column = 2 * (lane & 3) + (MODE == 2 ? 8 * high : MODE == 3 ? high : 0);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int local = MODE == 1 ? row + 8 * i : (row & ~1) + (i & 1) + 8 * (i / 2);
    const int slot = tile * KEYS + (local ^ (32 * rank));
    const int key = slot < count ? __ldg(x.indices + (int64_t)t * x.width + slot) : -1;
    const bool is_key = (unsigned)key < (unsigned)x.S;
    r.at[i] = is_key ? key * D + column : -1;
    r.grid[i] = is_key ? __ldg(x.grid + key) : 0.f;
  }
}
// a term that is too large for the low sum: a multiple of 2^18 of it to the high sum, what is left is returned
__device__ __forceinline__ float add_high(const Problem& x, float y, int at) {
  const float high = rintf(y * power_of_two(-LOW_BITS));
  if (!is_below(high, MOST_HIGH)) {
    x.bad[at / D] = 1;
    return 0.f;
  }
  if (high != 0.f) add_int(x.high + at, (int)high);
  return fmaf(-power_of_two(LOW_BITS), high, y);
}
// numbers y of one row, at columns at + step * i (and + 1 of pairs)
template <bool PAIRS, int N>
__device__ __forceinline__ void add_row(const Problem& x, float (&y)[N], float grid, int at, int step) {
  const float limit = power_of_two(LOW_BITS - 1);
  float most = 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] *= grid, most = max_or_nan(most, fabsf(y[i]));
  if (at < 0) return;
  if (!is_below(most, limit)) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (!is_below(y[i], limit)) y[i] = add_high(x, y[i], PAIRS ? at + i / 2 * step + i % 2 : at + i * step);
  }
#pragma unroll
  for (int i = 0; i < N; i += PAIRS ? 2 : 1)
    if (PAIRS) add_pair(x.low + at + i / 2 * step, rounded(y[i]), rounded(y[i + 1]));
    else add_int(x.low + at + i * step, rounded(y[i]));
}
template <int MODE, int R, int N>
__device__ __forceinline__ void add_exactly(const Problem& x, float (&d)[R], const ExactRows<N>& r, int column) {
  const bool high = threadIdx.x & 4;
  if constexpr (MODE == 5) {
#pragma unroll
    for (int i = 0; i < R; ++i) asm volatile("" ::"f"(d[i]));
    return;
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (MODE == 1) {
      float a[R / 2];
#pragma unroll
      for (int g = 0; g < R / 4; ++g) a[2 * g] = d[4 * g + 2 * e], a[2 * g + 1] = d[4 * g + 2 * e + 1];
      add_row<true>(x, a, r.grid[e], r.at[e] < 0 ? -1 : r.at[e] + column, 8);
    } else if (MODE == 2) {
      float a[R / 4], b[R / 4];
#pragma unroll
      for (int g = 0; g < R / 8; ++g)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          a[2 * g + c] = d[8 * g + 2 * e + c], b[2 * g + c] = d[8 * g + 4 + 2 * e + c];
          swap_pairs(a[2 * g + c], b[2 * g + c], high, 4);
        }
      add_row<true>(x, a, r.grid[2 * e], r.at[2 * e] < 0 ? -1 : r.at[2 * e] + column, 16);
      add_row<true>(x, b, r.grid[2 * e + 1], r.at[2 * e + 1] < 0 ? -1 : r.at[2 * e + 1] + column, 16);
    } else {
      float a[R / 4], b[R / 4];
#pragma unroll
      for (int g = 0; g < R / 4; ++g) {
        a[g] = d[4 * g + 2 * e], b[g] = d[4 * g + 2 * e + 1];
        swap_pairs(a[g], b[g], high, 4);
      }
      add_row<false>(x, a, r.grid[2 * e], r.at[2 * e] < 0 ? -1 : r.at[2 * e] + column, 8);
      add_row<false>(x, b, r.grid[2 * e + 1], r.at[2 * e + 1] < 0 ? -1 : r.at[2 * e + 1] + column, 8);
    }
  }
}
// this warpgroup no longer reads P and dS of the tile, of either CTA's keys
__device__ __forceinline__ void release_p(int bar, int rank) {
  if ((threadIdx.x & 31) == 0) {
    barrier_arrive(bar + 8 * P_FREE);
    barrier_arrive_there(of_rank(bar + 8 * P_FREE, rank ^ 1));
  }
}

// Piece 0: the rope's 32 columns; piece p: 32 columns of the values from 32 (p - 1) on
template <int PIECE>
__device__ __forceinline__ void piece_product(float (&d)[16]) {
  if constexpr (PIECE == 0) {
    key_gradients(d, tile(Q_ROPE, 64, 16, 512));
  } else {
    constexpr int at = (PIECE - 1) / 2 * 16384, half = (PIECE - 1) % 2 * 64;
    constexpr uint64_t q = plus(tile(Q + at, 128, 16, 1024), half), g = plus(tile(G + at, 128, 16, 1024), half);
    begin_products();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      product<true, true>(d, plus(heads_16(j), 4096), plus(q, j * 2048), j > 0);
      product<true, true>(d, heads_16(j), plus(g, j * 2048), true);
    }
    commit_products();
  }
}
template <int MODE, int PIECE, int N>
__device__ __forceinline__ void pieces(
    const Problem& x, float (&d)[16], float (&next)[16], const int (&at)[4], const ExactRows<N>& rows, int bar, int rank) {
  if constexpr (PIECE < 8) piece_product<PIECE + 1>(next);
  else release_p(bar, rank);
  const int column = PIECE == 0 ? V + 32 * rank : 256 * rank + 32 * (PIECE - 1);
  if constexpr (MODE == 0) add_keys(x, d, at, column);
  else add_exactly<MODE>(x, d, rows, column);
  if constexpr (PIECE < 8) {
    wait_products<0>();
    pieces<MODE, PIECE + 1>(x, next, d, at, rows, bar, rank);
  }
}
// the whole work of these warps
template <int MODE, bool OVERLAP>
__device__ __forceinline__ void add_gradients(const Problem& x, int sm, int rank) {
  const int bar = sm + BARRIERS;
  int number = 0;
  for (int t = blockIdx.x / 2; t < x.T; t += gridDim.x / 2) {
    const int count = __ldg(x.count + t), n = tiles_of(count);
    for (int i = 0; i < n; ++i, ++number) {
      int at[4];
      ExactRows<MODE == 1 ? 2 : 4> rows;
      if constexpr (MODE == 0) row_offsets(at, x, t, i, count, rank);
      else exact_rows<MODE>(rows, x, t, i, count, rank);
      barrier_wait(bar + 8 * P_OWN, number & 1);
      barrier_wait(bar + 8 * P_FULL, number & 1);
      if constexpr (OVERLAP) {
        float d[16], next[16];
        piece_product<0>(d);
        wait_products<0>();
        pieces<MODE, 0>(x, d, next, at, rows, bar, rank);
        continue;
      }
      {
        float d[16];
        key_gradients(d, tile(Q_ROPE, 64, 16, 512));
        wait_products<0>();
        if constexpr (MODE == 0) add_keys(x, d, at, V + 32 * rank);
        else add_exactly<MODE>(x, d, rows, V + 32 * rank);
      }
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        float d[32];
        key_gradients(d, tile(Q + part * 16384, 128, 16, 1024), tile(G + part * 16384, 128, 16, 1024));
        wait_products<0>();
        if (part == 3) release_p(bar, rank);
        if constexpr (MODE == 0) add_keys(x, d, at, 256 * rank + 64 * part);
        else add_exactly<MODE>(x, d, rows, 256 * rank + 64 * part);
      }
    }
  }
}
}  // namespace sparse
