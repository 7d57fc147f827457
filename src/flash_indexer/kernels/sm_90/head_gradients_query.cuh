#pragma once
#include "head_gradients.cuh"
// Rows are queries, columns keys.
// numbers of the thread's two queries: lse, lsx, w, coef, and their intervals; padding and tokens t >= n have none
template <int HG>
static __device__ __forceinline__ void hq_numbers(
    float* x, int* limits, int item, const float* LSE, const float* LSX, const float* W, const float* COEF,
    const int* KS, const int* KE, int n, int H) {
  const int t0 = item_field(item, row_item::TOKEN), g = item_field(item, row_item::KEY_HEAD);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = thread_row(h), t = t0 + Rows<HG, 128>::token(r);
    const bool none = Rows<HG, 128>::padding(r) || t >= n;
    const long long at = (long long)t * H + g * HG + Rows<HG, 128>::head(r);
    const int first = none ? 0 : load_int(KS, t), end = none ? 0 : load_int(KE, t);
    const bool seen = end > first + 1;  // with one key both distributions are 1: no gradient
    x[h] = seen ? load_float(LSE, at) * LOG2E : HG_NOTHING;
    x[2 + h] = seen ? load_float(LSX, at) * LOG2E : HG_NOTHING;
    x[4 + h] = none ? 0.f : load_float(W, at) * LOG2E;
    limits[2 * h] = first;
    limits[2 * h + 1] = end;
  }
}
// s = g
template <int N>
static __device__ __forceinline__ void hq_apply(float* s, const float* z, const float* x, float scale) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int h = i / 2 % 2;
    const float e = exp2f(fmaf(z[i], x[4 + h], -x[2 + h])) - exp2f(fmaf(s[i], scale, -x[h]));
    s[i] = z[i] > 0.f ? e : 0.f;
  }
}
template <int N>
static __device__ __forceinline__ void hq_mask(float* s, const int* limits, int item, int i) {
  mask_keys<N>(s, limits, first_key<N>(item, i), 0.f);
}
// DQ = w · coef · O and DW = coef · dw
template <int HG, int E>
static __device__ __forceinline__ void hq_store(
    const float* o, const float* dw, const float* x, int item, const float* COEF, void* DQ, float* DW, int n, int H) {
  const int t0 = item_field(item, row_item::TOKEN), key_head = item_field(item, row_item::KEY_HEAD);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = thread_row(h), t = t0 + Rows<HG, 128>::token(r);
    if (!Rows<HG, 128>::padding(r) && t < n) {
      const long long at = (long long)t * H + key_head * HG + Rows<HG, 128>::head(r);
      const float coef = load_float(COEF, t), w = x[4 + h] * (coef / LOG2E);
      unsigned* q = (unsigned*)DQ + at * (E / 2) + (threadIdx.x & 3);
      if ((threadIdx.x & 3) == 0) DW[at] = dw[h] * coef;
#pragma unroll
      for (int i = 0; i < E / 8; ++i) {
        const float high = o[4 * i + 2 * h + 1] * w, low = o[4 * i + 2 * h] * w;
        q[4 * i] = pack(low, high);
      }
    }
  }
}
