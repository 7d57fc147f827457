#pragma once
#include "../device/partial_sums.cuh"
#include "head_gradients.cuh"
// Rows are keys, columns queries. Numbers of a tile's N queries, [6, N]: lse, lsx (base 2), w · log2(e), w · coef (four
// together); first visible key, end (two together).
// the first tile of an item counts as masked, whatever it is
static __device__ __forceinline__ int hk_masked_left(const int* items, int at, int g) {
  const int n = masked_row_tiles(items, at);
  return g == 0 && n > 0 ? n - 1 : n;
}
static __device__ __forceinline__ int hk_whole_left(const int* items, int at, int g) {
  const int n = whole_row_tiles(items, at);
  return g == 0 && masked_row_tiles(items, at) == 0 ? n - 1 : n;
}
// 64 threads gather the numbers of a row tile: HG heads of key head g, tokens from t0
template <int HG, int N>
static __device__ __forceinline__ void hk_gather(
    int numbers, int t0, int g, const float* LSE, const float* LSX, const float* W, const float* COEF, const int* KS,
    const int* KE, int n, int H) {
  float lse[N / 64], lsx[N / 64], w[N / 64], coef[N / 64];
  int first[N / 64], end[N / 64];
#pragma unroll
  for (int i = 0; i < N / 64; ++i) {
    const int r = i * 64 + threadIdx.x % 64, t = t0 + Rows<HG, N>::token(r);
    lse[i] = lsx[i] = w[i] = coef[i] = 0.f;
    first[i] = end[i] = 0;
    if (!Rows<HG, N>::padding(r) && t < n) {
      const long long at = (long long)t * H + g * HG + Rows<HG, N>::head(r);
      lse[i] = load_float(LSE, at), lsx[i] = load_float(LSX, at), w[i] = load_float(W, at);
      coef[i] = load_float(COEF, t), first[i] = load_int(KS, t), end[i] = load_int(KE, t);
    }
  }
#pragma unroll
  for (int i = 0; i < N / 64; ++i) {
    const int r = i * 64 + threadIdx.x % 64;
    const bool seen = end[i] > first[i] + 1;  // with one key both distributions are 1
    store_shared(numbers + r * 16, seen ? lse[i] * LOG2E : HG_NOTHING, seen ? lsx[i] * LOG2E : HG_NOTHING, w[i] * LOG2E,
                 w[i] * coef[i]);
    store_shared(numbers + N * 16 + r * 8, first[i], end[i]);
  }
}
// s = g · w · coef: rows keys, columns queries
template <int N>
static __device__ __forceinline__ void hk_apply(float* s, const float* z, int numbers, float scale) {
  const int at = numbers + (threadIdx.x & 3) * 32;
#pragma unroll
  for (int g = 0; g < N / 8; ++g)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float4 x = load_shared_float4(at + g * 128 + c * 16);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = 4 * g + 2 * h + c;
        const float e = (exp2f(fmaf(z[i], x.z, -x.y)) - exp2f(fmaf(s[i], scale, -x.x))) * x.w;
        s[i] = z[i] > 0.f ? e : 0.f;
      }
    }
}
template <int N>
static __device__ __forceinline__ void hk_mask(float* s, int numbers, const int* items, int at_item) {
  const int at = numbers + N * 16 + (threadIdx.x & 3) * 16;
  const int key = list_field(items, at_item, key_item::KEY_TILE) * 128 + thread_row();
#pragma unroll
  for (int g = 0; g < N / 8; ++g) {
    const int4 x = load_shared_int4(at + g * 64);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int low = i % 2 ? x.z : x.x, high = i % 2 ? x.w : x.y, here = key + (i / 2) * 8;
      s[4 * g + i] = here >= low && here < high ? s[4 * g + i] : 0.f;
    }
  }
}
// the sum of an item to where it says
template <int E>
static __device__ __forceinline__ void hk_store(
    const float* o, const int* items, int at, float* DK, float* PART, int S) {
  const int kt = list_field(items, at, key_item::KEY_TILE), slot = list_field(items, at, key_item::SLOT);
  add_or_store<E>(o, DK, PART, kt, slot, S);
}
