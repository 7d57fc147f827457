#pragma once
#include "../device/accumulator.cuh"
// first key tile and number of key tiles (at least one, so that the pipeline never runs empty) of a token block
static __device__ __forceinline__ int lse_first(const int* KS, int t0, int keys) {
  return min(max(load_int(KS, t0), 0), keys - 1) >> 7;
}
static __device__ __forceinline__ int lse_count(const int* KE, int t0, int tokens, int keys, int first) {
  const int end = min(max(load_int(KE, min(t0 + 127, tokens - 1)), 0), keys);
  return max(((end + 127) >> 7) - first, 1);
}
// s *= the scales of its two rows and of its columns, two of every group of 8, which lie at `scales` in shared memory
static __device__ __forceinline__ void lse_scale(float* s, const float* rows, int scales) {
#pragma unroll
  for (int g = 0; g < 16; ++g) {
    const float2 k = load_shared_float2(scales + 32 * g);
    s[4 * g] *= k.x * rows[0];
    s[4 * g + 1] *= k.y * rows[0];
    s[4 * g + 2] *= k.x * rows[1];
    s[4 * g + 3] *= k.y * rows[1];
  }
}
// m, l [2]: running maximum (of logits times c) and sum of 2^(logit·c - m) of the thread's keys of its two rows
static __device__ __forceinline__ void lse_add(
    float* s, float* m, float* l, const int* low, const int* high, int s0, float c) {
  const int column = s0 + (threadIdx.x & 3) * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool whole = low[r] <= s0 && s0 + 128 <= high[r];
    float top = m[r];
#pragma unroll
    for (int g = 0; g < 16; ++g)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int i = 4 * g + 2 * r + e, key = column + 8 * g + e;
        if (!whole && (key < low[r] || key >= high[r])) s[i] = -INFINITY;
        top = fmaxf(top, s[i] * c);
      }
    const float safe = top == -INFINITY ? 0.0f : top;
    float sum = 0.0f;
#pragma unroll
    for (int g = 0; g < 16; ++g)
#pragma unroll
      for (int e = 0; e < 2; ++e) sum += exp2_approximate(fmaf(s[4 * g + 2 * r + e], c, -safe));
    l[r] = l[r] * exp2_approximate(m[r] - safe) + sum;
    m[r] = top;
  }
}
// the four threads of a row combined and written, natural logarithm; the state is cleared for the next item
static __device__ __forceinline__ void lse_store(float* m, float* l, float* out, int t0, int tokens, int H, int h) {
  const float none = -INFINITY;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float top = quad_max(m[r]), safe = top == none ? 0.0f : top;
    const float sum = quad_sum(l[r] * exp2_approximate(m[r] - safe));
    const int t = t0 + thread_row(r);
    float log2sum;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2sum) : "f"(sum));
    if (t < tokens && (threadIdx.x & 3) == 0)
      out[(long long)t * H + h] = sum == 0.0f ? none : (safe + log2sum) * LN2;
    m[r] = none;
    l[r] = 0.0f;
  }
}
