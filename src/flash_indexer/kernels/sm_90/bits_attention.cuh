#pragma once
#include "bits_words.cuh"
// Sums of the thread's two rows: m their largest logit so far, times scale, l the sum of exp2(logit - m) over the
// thread's columns; alpha the factor of what was summed before. Without a key so far m is -inf and l zero.
static __device__ __forceinline__ void ba_begin(float* m, float* l) { m[0] = m[1] = -INFINITY, l[0] = l[1] = 0.f; }
// s = exp2(scale · s - m) at set bits, else 0
template <int N>
static __device__ __forceinline__ void ba_softmax(float* s, float* m, float* l, float* alpha, int words_at, float scale) {
  unsigned words[N / 16];
  load_words<N>(words, words_at);
  float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    s[i] = is_selected<N>(words, i) ? s[i] : -INFINITY;
    largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], s[i]);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float next = fmaxf(m[h], quad_max(largest[h]) * scale), shift = next == -INFINITY ? 0.f : next;
    alpha[h] = exp2_approximate(m[h] - shift);
    m[h] = next, largest[h] = shift, l[h] *= alpha[h];
  }
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int h = i / 2 % 2;
    s[i] = exp2_approximate(fmaf(s[i], scale, -largest[h]));
    l[h] += s[i];
  }
}
// o *= alpha, where a row of the warp has a new largest logit
template <int V>
static __device__ __forceinline__ void ba_rescale(float* o, const float* alpha) {
  if (__any_sync(0xffffffffu, alpha[0] != 1.f || alpha[1] != 1.f)) scale_rows<V>(o, alpha[0], alpha[1]);
}
// OUT [T, H, V] = o / l, LSE [T, H] = ln(sum of exp); BAD[t] is added: NaN where a score of the query's was
template <int V>
static __device__ __forceinline__ void ba_store(
    const float* o, const float* m, const float* l, const float* BAD, void* OUT, float* LSE, int t0, int head, int T, int H) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = quad_sum(l[h]);
    const int t = t0 + thread_row(h);
    if (t >= T) continue;
    const float bad = load_float(BAD, t), factor = (sum == 0.f ? 0.f : 1.f / sum) + bad;
    const int64_t at = (int64_t)t * H + head;
    if ((threadIdx.x & 3) == 0) LSE[at] = (sum == 0.f ? -INFINITY : (m[h] + log2f(sum)) * LN2) + bad;
    unsigned* to = (unsigned*)OUT + at * (V / 2) + (threadIdx.x & 3);
#pragma unroll
    for (int g = 0; g < V / 8; ++g) to[4 * g] = pack(o[4 * g + 2 * h] * factor, o[4 * g + 2 * h + 1] * factor);
  }
}
