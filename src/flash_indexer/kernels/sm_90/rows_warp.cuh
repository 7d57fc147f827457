#pragma once
#include "rows.cuh"
#define ROWS_WARP_WARPS 4  // of a CTA
static __device__ __forceinline__ float rows_warp_finite(float top) { return top == -INFINITY ? 0.0f : top; }
// the largest x of the warp, NaN where one is (max_or_nan has made it canonical): integers are ordered as their floats are
static __device__ __forceinline__ float rows_warp_max(float x) {
  const int bits = __float_as_int(x);
  const int top = __reduce_max_sync(0xffffffffu, bits ^ (bits >> 31 & 0x7fffffff));
  return __int_as_float(top ^ (top >> 31 & 0x7fffffff));
}
// (a, b) summed over the warp
static __device__ __forceinline__ float2 rows_warp_sum(float a, float b) {
#pragma unroll
  for (int d = 16; d; d >>= 1) a += __shfl_xor_sync(0xffffffffu, a, d), b += __shfl_xor_sync(0xffffffffu, b, d);
  return make_float2(a, b);
}
// 256 columns of a row, two tiles: eight of each lane, scores of the teacher and of the indexer
struct RowPiece {
  float p[8], x[8];
  // where the row sees none of four columns, zeros
  __device__ __forceinline__ void load(const float* P, const float* X, const ScoreRow& row, int first) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int c = first + 128 * i + (threadIdx.x & 31) * 4;
      float4 a = make_float4(0.0f, 0.0f, 0.0f, 0.0f), b = a;
      if (c < row.high && c + 4 > row.low) {
        a = *(const float4*)(P + row.begin + in_tiles(c));
        b = *(const float4*)(X + row.begin + in_tiles(c));
      }
      p[4 * i] = a.x, p[4 * i + 1] = a.y, p[4 * i + 2] = a.z, p[4 * i + 3] = a.w;
      x[4 * i] = b.x, x[4 * i + 1] = b.y, x[4 * i + 2] = b.z, x[4 * i + 3] = b.w;
    }
  }
  __device__ __forceinline__ static bool is_seen(const ScoreRow& row, int first, int n) {
    const int c = first + 128 * (n >> 2) + (threadIdx.x & 31) * 4 + (n & 3);
    return c >= row.low && c < row.high;
  }
  template <bool LOGITS>
  __device__ __forceinline__ void mask(const ScoreRow& row, int first) {
    if (first >= row.low && first + 256 <= row.high) return;
#pragma unroll
    for (int n = 0; n < 8; ++n)
      if (!is_seen(row, first, n)) p[n] = LOGITS ? -INFINITY : 0.0f, x[n] = -INFINITY;
  }
};
// m = max(x), l = sum(exp(x - m)), z = sum(p); of logits mp = max(p) and z = sum(exp(p - mp)). Of one lane
template <bool LOGITS>
struct RowSums {
  float m, l, mp, z;
  __device__ __forceinline__ void add(const RowPiece& piece) {
    float top = m, topp = mp, sum = 0.0f, sump = 0.0f;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      top = max_or_nan(top, piece.x[n]);
      if (LOGITS) topp = max_or_nan(topp, piece.p[n]);
    }
    const float safe = rows_warp_finite(top), safep = rows_warp_finite(topp);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      sum += rows_exp(piece.x[n] - safe);
      sump += LOGITS ? rows_exp(piece.p[n] - safep) : piece.p[n];
    }
    l = fmaf(l, rows_exp(m - safe), sum);
    z = LOGITS ? fmaf(z, rows_exp(mp - safep), sump) : z + sump;
    m = top, mp = topp;
  }
  // the sums of other elements
  __device__ __forceinline__ void merge(const RowSums& other) {
    const float top = max_or_nan(m, other.m), topp = LOGITS ? max_or_nan(mp, other.mp) : 0.0f;
    const float safe = rows_warp_finite(top), safep = rows_warp_finite(topp);
    l = fmaf(l, rows_exp(m - safe), other.l * rows_exp(other.m - safe));
    z = LOGITS ? fmaf(z, rows_exp(mp - safep), other.z * rows_exp(other.mp - safep)) : z + other.z;
    m = top, mp = topp;
  }
  // of all lanes, in every lane
  __device__ __forceinline__ void combine() {
    const float top = rows_warp_finite(rows_warp_max(m)), topp = LOGITS ? rows_warp_finite(rows_warp_max(mp)) : 0.0f;
    const float2 sums = rows_warp_sum(l * rows_exp(m - top), LOGITS ? z * rows_exp(mp - topp) : z);
    m = top, mp = topp, l = sums.x, z = sums.y;
  }
};
// What a row's sums say of a pair: its share of KL and entropy, and its di
template <bool LOGITS>
struct RowTotals {
  float m, mp, z, scale, log_sum;
  __device__ __forceinline__ RowTotals(float m_, float z_, float scale_, float log_sum_)
      : m(m_), mp(0.0f), z(z_), scale(scale_), log_sum(log_sum_) {}
  // a teacher whose every probability is 0, because of an lse that is not its own, has no distribution
  __device__ __forceinline__ explicit RowTotals(const RowSums<LOGITS>& sums) {
    m = sums.m, mp = sums.mp, z = sums.z >= 1.17549435e-38f ? sums.z : INFINITY - INFINITY;
    scale = __frcp_rn(z), log_sum = rows_log(sums.l);
  }
  __device__ __forceinline__ float pair(float p, float x, float w, float& kl, float& ent) const {
    const float score = x - m, share = LOGITS ? rows_exp(p - mp) : p;
    const float q = fmaf(fmaf(-share * scale, z, share), scale, share * scale), log_q = rows_log(q);
    const float log_softmax = score - log_sum;
    const bool counts = !(q <= 1.2e-38f);  // NaN does
    kl = fmaf(q, counts ? log_q - log_softmax : 0.0f, kl);
    ent = fmaf(-q, log_q, ent);  // of zero the logarithm is finite here
    // by the special function unit: the result is rounded to bfloat16
    return (exp2_approximate(log_softmax * LOG2E) - q) * w;
  }
};
// KL, entropy and di of row t, by one warp. A piece is loaded while the one before is worked on
template <bool LOGITS>
static __device__ __forceinline__ void rows_warp_row(
    const float* P, const float* X, const ScoreRow& row, float w, unsigned short* DI, float* KL, float* ENT, int t) {
  constexpr int STEP = 256;
  const int lane = threadIdx.x & 31;
  const int first = max(row.low, 0) / STEP * STEP;  // the first piece of which the row sees a column
  RowSums<LOGITS> sums = {-INFINITY, 0.0f, LOGITS ? -INFINITY : 0.0f, 0.0f};
  RowPiece piece, coming;
  int c = first;
  if (c < row.high) coming.load(P, X, row, c);
  for (; c < row.high; c += STEP) {
    piece = coming;
    if (c + STEP < row.high) coming.load(P, X, row, c + STEP);
    piece.template mask<LOGITS>(row, c);
    sums.add(piece);
  }
  const int end = c;
  sums.combine();
  const RowTotals<LOGITS> totals(sums);
  float kl = 0.0f, ent = 0.0f;
  unsigned short* di = DI + row.begin;
  auto store = [&](int c, uint2 two) {
    if (c < row.width) *(uint2*)(di + in_tiles(c)) = two;
  };
  // from the last piece on, which the cache still has
  c = end - STEP;
  if (c >= first) coming.load(P, X, row, c);
  for (; c >= first; c -= STEP) {
    piece = coming;
    if (c - STEP >= first) coming.load(P, X, row, c - STEP);
    piece.template mask<LOGITS>(row, c);
    const bool whole = c >= row.low && c + 256 <= row.high;
    float d[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) d[n] = totals.pair(piece.p[n], piece.x[n], w, kl, ent);
    if (!whole)
#pragma unroll
      for (int n = 0; n < 8; ++n)
        if (!RowPiece::is_seen(row, c, n)) d[n] = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      store(c + 128 * i + lane * 4, make_uint2(pack(d[4 * i], d[4 * i + 1]), pack(d[4 * i + 2], d[4 * i + 3])));
  }
  for (c = first > 0 ? 0 : end; c < row.width; c = c + STEP == first ? end : c + STEP)
    store(c + lane * 4, make_uint2(0, 0)), store(c + 128 + lane * 4, make_uint2(0, 0));
  const float2 result = rows_warp_sum(kl, ent);
  if (lane == 0) {
    KL[t] = row.high > row.low ? result.x : 0.0f;
    ENT[t] = row.high > row.low ? result.y : 0.0f;
  }
}
// rows end - 1 down to first, a warp's each; every second round of them backwards, for of a long document rows are the
// shorter the earlier they come
template <bool LOGITS>
static __device__ __forceinline__ void rows_warp_rows(
    const float* P, const float* X, const int* blocks, const int* key_start, const int* key_end, const float* weight,
    void* DI, float* KL, float* ENT, int first, int end) {
  const int warps = gridDim.x * ROWS_WARP_WARPS, warp = (threadIdx.x >> 5) * gridDim.x + blockIdx.x;
  for (int done = 0, backwards = 0; done < end - first; done += warps, backwards ^= 1) {
    const int t = end - 1 - done - (backwards ? warps - 1 - warp : warp);
    if (t < first) continue;
    const ScoreRow row(blocks, load_int(key_start, t), load_int(key_end, t), t);
    rows_warp_row<LOGITS>(P, X, row, load_float(weight, t), (unsigned short*)DI, KL, ENT, t);
  }
}
