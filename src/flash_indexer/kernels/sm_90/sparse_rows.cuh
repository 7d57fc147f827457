#pragma once
#include "rows.cuh"
// Where a row's scores and di lie in slots, [T, width]; no slot from `high` on is read
struct SlotRow {
  long long begin;
  int width, low, high;
  bool whole;  // vectors of four are aligned
  __device__ __forceinline__ SlotRow(const float* scores, const float* index_scores, int t, int width, int count)
      : begin((long long)t * width), width(width), low(0), high(min(max(count, 0), width)), whole(width % 4 == 0),
        scores(scores), index_scores(index_scores) {}
  const float *scores, *index_scores;
  __device__ __forceinline__ void open() const {}
  __device__ __forceinline__ void close() const {}
  __device__ __forceinline__ void meet() const { __syncthreads(); }
  __device__ __forceinline__ float4 p(int c) const { return load(scores, c); }
  __device__ __forceinline__ float4 x(int c) const { return load(index_scores, c); }
  __device__ __forceinline__ float4 load(const float* x, int c) const {
    x += begin + c;
    if (whole) return __ldcs((const float4*)x);
    return make_float4(x[0], c + 1 < high ? x[1] : 0.f, c + 2 < high ? x[2] : 0.f, c + 3 < high ? x[3] : 0.f);
  }
  __device__ __forceinline__ void store(void* di, int c, const float* d) const {
    float* to = (float*)di + begin + c;
    if (whole) {
      *(float4*)to = make_float4(d[0], d[1], d[2], d[3]);
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (c + e < width) to[e] = d[e];
  }
};
static __device__ __forceinline__ void sparse_rows_row(
    const float* P, const float* X, const int* count, const float* weight, float* DI, float* KL, float* ENT, int t,
    int width) {
  SlotRow row(P, X, t, width, count[t]);
  rows_row<false>(row, weight[t], DI, KL + t, ENT + t);
}
