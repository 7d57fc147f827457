#pragma once
#include "sparse_gradients_rows.cuh"
// Shared memory of a CTA of a pair; and its warps 8 to 11: dk of this CTA's columns, added to memory.
namespace sparse_pair {
using namespace sparse;
// shared memory of a CTA, in bytes from BASE on; "128" and "64": bytes of a row of a panel, swizzled
constexpr int Q = 0;            // queries, 256 columns: 4 panels [128 heads][64], 128
constexpr int G = 65536;        // d_out, the same
constexpr int K = 131072;       // keys, 256 columns: 4 panels [64 keys][64], 128
constexpr int Q_ROPE = 163840;  // queries, 32 rope columns [128][32], 64
constexpr int K_ROPE = 172032;  // keys, 32 rope columns [64][32], 64
constexpr int P = 176128;       // of each warpgroup: own P and dS [64 heads][32 keys], then the other CTA's, 64
constexpr int P_SIZE = 16384, P_THERE = 8192;
constexpr int INBOX = 208896;  // of each warpgroup: S, then dP that the other CTA sends, 16 numbers a thread
constexpr int INBOX_SIZE = 8192;
constexpr int SUMS = 225280;  // of even and odd tiles: sums of P over the heads of each warp [8][32 keys] float32
constexpr int BARRIERS = 227328;
constexpr int BYTES = BARRIERS + 128;
// barriers; those of both warpgroups that attend come in pairs
enum {
  S_FULL = 0,   // S of the other CTA is in the inbox
  DP_FULL = 2,  // dP is
  S_READ = 4,   // the other CTA has read S: its inbox may hold dP
  P_OWN = 6,    // P and dS of this CTA's keys are written
  P_FULL = 7,   // of the other's keys
  P_FREE = 8,   // both CTAs have made dk of them: they may be overwritten
};

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
// this warpgroup no longer reads P and dS of the tile, of either CTA's keys
__device__ __forceinline__ void release_p(int bar, int rank) {
  if ((threadIdx.x & 31) == 0) {
    barrier_arrive(bar + 8 * P_FREE);
    barrier_arrive_there(of_rank(bar + 8 * P_FREE, rank ^ 1));
  }
}

// the whole work of these warps
template <bool EXACT>
__device__ __forceinline__ void add_gradients(const Problem& x, int sm, int rank) {
  const int bar = sm + BARRIERS;
  int number = 0;
  for (int t = blockIdx.x / 2; t < x.T; t += gridDim.x / 2) {
    const int count = __ldg(x.count + t), n = tiles_of(count);
    for (int i = 0; i < n; ++i, ++number) {
      sparse::Rows rows;
      rows_of_tile<EXACT>(rows, x, t, i, count, rank);
      barrier_wait(bar + 8 * P_OWN, number & 1);
      barrier_wait(bar + 8 * P_FULL, number & 1);
      {
        float d[16];
        key_gradients(d, tile(Q_ROPE, 64, 16, 512));
        wait_products<0>();
        add_keys<EXACT>(x, d, rows, V + 32 * rank);
      }
#pragma unroll 1
      for (int part = 0; part < 4; ++part) {
        float d[32];
        key_gradients(d, tile(Q + part * 16384, 128, 16, 1024), tile(G + part * 16384, 128, 16, 1024));
        wait_products<0>();
        if (part == 3) release_p(bar, rank);
        add_keys<EXACT>(x, d, rows, 256 * rank + 64 * part);
      }
    }
  }
}
}  // namespace sparse_pair
