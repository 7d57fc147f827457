#pragma once
#include "../device/accumulator.cuh"
// a += f(s) for column groups FIRST .. LAST-1; l = the row scalars (lse or weight) of the thread's two rows.
// exp(x - lse) = 2^(x·c - n)·2^(n - lse·log2(e)) with n = lse·log2(e) rounded: n's rounding error would be common to
// all keys of a head, so the second factor, 1 plus a few 1e-7, multiplies each term in the addition
template <int MODE, int FIRST, int LAST>
static __device__ __forceinline__ void sc_add(const float* s, float* a, const float* l, float c) {
  const float n0 = l[0] * -LOG2E, n1 = l[1] * -LOG2E;
  const float r0 = fmaf(l[0], -1.9259629911e-8f, fmaf(l[0], -LOG2E, -n0));
  const float r1 = fmaf(l[1], -1.9259629911e-8f, fmaf(l[1], -LOG2E, -n1));
  const float f0 = fmaf(r0, LN2, 1.0f), f1 = fmaf(r1, LN2, 1.0f);
#pragma unroll
  for (int g = FIRST; g < LAST; ++g) {
#pragma unroll
    for (int i = 4 * g; i < 4 * g + 4; ++i) {
      if (MODE == 0) {
        a[i] = fmaf(exp2_approximate(fmaf(s[i], c, (i & 2) ? n1 : n0)), (i & 2) ? f1 : f0, a[i]);
      } else if (MODE == 1) {
        a[i] = fmaf(relu(s[i]), (i & 2) ? l[1] : l[0], a[i]);
      } else {
        a[i] = fmaf(s[i], c, a[i]);
      }
    }
  }
}
// the tile's rows of OUT begin at row0; the accumulator is cleared for the next tile
static __device__ __forceinline__ void sc_store(float* a, float* out, int row0) {
  float* o = out + ((long long)row0 + thread_row()) * 128 + (threadIdx.x & 3) * 2;
#pragma unroll
  for (int g = 0; g < 16; ++g) {
    *(float2*)(o + 8 * g) = make_float2(a[4 * g], a[4 * g + 1]);
    *(float2*)(o + 8 * 128 + 8 * g) = make_float2(a[4 * g + 2], a[4 * g + 3]);
    a[4 * g] = a[4 * g + 1] = a[4 * g + 2] = a[4 * g + 3] = 0.0f;
  }
}
