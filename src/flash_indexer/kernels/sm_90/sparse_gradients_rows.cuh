#pragma once
#include "../device/additions.cuh"
#include "../device/exact_sums.cuh"
#include "sparse_gradients_tiles.cuh"
// Products [64 keys, N] of a warpgroup, added to the rows of dk: to float32 in any order, or (EXACT) to integers.
namespace sparse {
// of the four rows that a thread has after a trade: offsets, negative where a slot holds no key, and powers of two
struct Rows {
  int at[4];
  float grid[4];
};
template <bool EXACT>
__device__ __forceinline__ void rows_of_tile(Rows& rows, const Problem& x, int t, int tile, int count, int rank) {
  const int lane = threadIdx.x & 31, row = ((threadIdx.x >> 5) & 3) * 16 + ((lane / 4) & ~1);
  const int column = EXACT ? 2 * (lane & 3) + 2 * (lane & 4) : traded_column();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int slot = tile * KEYS + ((row + (i & 1) + 8 * (i / 2)) ^ (32 * rank));
    const int key = key_in(x, t, slot, count);
    rows.at[i] = key >= 0 ? key * D + column : -1;
    if (EXACT) rows.grid[i] = key >= 0 ? __ldg(x.grid + key) : 0.f;
  }
}
// pairs of numbers of one row, 16 columns apart
template <int N>
__device__ __forceinline__ void add_exact_row(const Problem& x, float (&y)[N], float grid, int at) {
  float most = 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] *= grid, most = max_or_nan(most, fabsf(y[i]));
  if (!is_below(most, LOW_LIMIT)) {
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = add_high(x.high + at + i / 2 * 16 + i % 2, x.bad + at / D, y[i]);
  }
#pragma unroll
  for (int i = 0; i < N; i += 2) add_low(x.low + at + i / 2 * 16, y[i], y[i + 1]);
}
template <bool EXACT, int R>
__device__ __forceinline__ void add_keys(const Problem& x, float (&d)[R], const Rows& rows, int column) {
  if constexpr (EXACT) {
    const bool second = threadIdx.x & 4;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      // lanes of neighbouring rows trade: each then has pairs of either row, an instruction 4 rows x 64 bytes
      float a[R / 4], b[R / 4];
#pragma unroll
      for (int i = 0; i < R / 4; ++i) {
        a[i] = d[i / 2 * 8 + 2 * e + i % 2], b[i] = d[i / 2 * 8 + 4 + 2 * e + i % 2];
        swap_pairs(a[i], b[i], second, 4);
      }
      if (rows.at[2 * e] >= 0) add_exact_row(x, a, rows.grid[2 * e], rows.at[2 * e] + column);
      if (rows.at[2 * e + 1] >= 0) add_exact_row(x, b, rows.grid[2 * e + 1], rows.at[2 * e + 1] + column);
    }
  } else {
    trade_rows<2 * R>(d);
#pragma unroll
    for (int m = 0; m < R / 16; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (rows.at[i] >= 0) add_to(x.dk + rows.at[i] + column + 32 * m, d + 16 * m + 4 * i);
  }
}
}  // namespace sparse
