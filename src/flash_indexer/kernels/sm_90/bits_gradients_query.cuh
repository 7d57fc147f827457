#pragma once
#include "bits_gradients.cuh"
// Rows are queries, columns keys. x: of the thread's two rows lse · log2(e), delta
static __device__ __forceinline__ void bq_numbers(float* x, const float* NUMBERS, int head, int t0, int rows) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t at = ((int64_t)head * rows + t0 + thread_row(h)) * 2;
    x[h] = load_float(NUMBERS, at), x[2 + h] = load_float(NUMBERS, at + 1);
  }
}
// s = dS / scale, of dP in s and logits in z
template <int N>
static __device__ __forceinline__ void bq_apply(float* s, const float* z, const float* x, int words_at, float scale) {
  unsigned words[N / 16];
  load_words<N>(words, words_at);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int h = i / 2 % 2;
    const float a = exp2_approximate(fmaf(z[i], scale, -x[h]));
    s[i] = ds_of(is_selected<N>(words, i) ? a : 0.f, s[i], x[2 + h]);
  }
}
// DQ [T, H, D] = factor · o
template <int D>
static __device__ __forceinline__ void bq_store(const float* o, void* DQ, int t0, int head, int T, int H, float factor) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int t = t0 + thread_row(h);
    if (t >= T) continue;
    unsigned* to = (unsigned*)DQ + ((int64_t)t * H + head) * (D / 2) + (threadIdx.x & 3);
#pragma unroll
    for (int g = 0; g < D / 8; ++g) to[4 * g] = pack(o[4 * g + 2 * h] * factor, o[4 * g + 2 * h + 1] * factor);
  }
}
