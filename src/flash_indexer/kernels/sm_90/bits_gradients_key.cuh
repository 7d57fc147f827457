#pragma once
#include "bits_gradients.cuh"
// Rows are keys, columns queries, of which numbers_at has (lse · log2(e), delta).
// s = a, of logits
template <int N>
static __device__ __forceinline__ void bk_probabilities(float* s, int words_at, int numbers_at, float scale) {
  unsigned words[N / 16];
  load_words<N>(words, words_at);
  numbers_at += (threadIdx.x & 3) * 16;
#pragma unroll
  for (int g = 0; g < N / 8; ++g) {
    const float4 x = load_shared_float4(numbers_at + g * 64);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = 4 * g + j;
      const float a = exp2_approximate(fmaf(s[i], scale, j % 2 ? -x.z : -x.x));
      s[i] = is_selected<N>(words, i) ? a : 0.f;
    }
  }
}
// s = dS / scale, of a in s and dP in z
template <int N>
static __device__ __forceinline__ void bk_apply(float* s, const float* z, int numbers_at) {
  numbers_at += (threadIdx.x & 3) * 16;
#pragma unroll
  for (int g = 0; g < N / 8; ++g) {
    const float4 x = load_shared_float4(numbers_at + g * 64);
#pragma unroll
    for (int j = 0; j < 4; ++j) s[4 * g + j] = ds_of(s[4 * g + j], z[4 * g + j], j % 2 ? x.w : x.y);
  }
}
// SUM [S, G, D] += factor · o, from key `key` on
template <int D>
static __device__ __forceinline__ void bk_add(
    const float* o, float* SUM, int64_t offset, int key, int g, int S, int G, float factor) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int s = key + thread_row(h);
    if (s >= S) continue;
    float2* p = (float2*)(SUM + offset + ((int64_t)s * G + g) * D) + (threadIdx.x & 3);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      const float2 old = p[4 * j];
      p[4 * j] = make_float2(fmaf(o[4 * j + 2 * h], factor, old.x), fmaf(o[4 * j + 2 * h + 1], factor, old.y));
    }
  }
}
