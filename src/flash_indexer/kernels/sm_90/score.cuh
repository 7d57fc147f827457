#pragma once
#include "../device/accumulator.cuh"
#include "../device/wgmma.cuh"
// exp(x - lse) = 2^(x·c - n)·2^(n - lse·log2(e)) with n = lse·log2(e) rounded: n's rounding error would be common to
// all keys of a head, so the second factor, 1 plus a few 1e-7, multiplies each term in the addition
struct Normalizer {
  float n, f;  // -n, and the second factor
  __device__ __forceinline__ explicit Normalizer(float lse) {
    n = lse * -LOG2E;
    f = fmaf(fmaf(lse, -1.9259629911e-8f, fmaf(lse, -LOG2E, -n)), LN2, 1.0f);
  }
};
// a += f(s) for column groups FIRST .. LAST-1; l = the row scalars (lse or weight) of the thread's two rows
template <int MODE, int FIRST, int LAST>
static __device__ __forceinline__ void sc_add(const float* s, float* a, const float* l, float c) {
  const Normalizer upper(l[0]), lower(l[1]);
#pragma unroll
  for (int g = FIRST; g < LAST; ++g) {
#pragma unroll
    for (int i = 4 * g; i < 4 * g + 4; ++i) {
      if (MODE == 0) {
        a[i] = fmaf(
            exp2_approximate(fmaf(s[i], c, (i & 2) ? lower.n : upper.n)), (i & 2) ? lower.f : upper.f, a[i]);
      } else if (MODE == 1) {
        a[i] = fmaf(relu(s[i]), (i & 2) ? l[1] : l[0], a[i]);
      } else {
        a[i] = fmaf(s[i], c, a[i]);
      }
    }
  }
}
// the teacher's of e4m3 rows: l[2], l[3] are the scales of the two rows; those of the thread's columns, two of every
// group of 8, lie at `scales` in shared memory
template <int FIRST, int LAST>
static __device__ __forceinline__ void sc_add_scaled(const float* s, float* a, const float* l, float c, int scales) {
  const Normalizer upper(l[0]), lower(l[1]);
  const float cu = c * l[2], cl = c * l[3];
#pragma unroll
  for (int g = FIRST; g < LAST; ++g) {
    const float2 k = load_shared_float2(scales + 32 * g);
    const int i = 4 * g;
    a[i] = fmaf(exp2_approximate(fmaf(s[i] * k.x, cu, upper.n)), upper.f, a[i]);
    a[i + 1] = fmaf(exp2_approximate(fmaf(s[i + 1] * k.y, cu, upper.n)), upper.f, a[i + 1]);
    a[i + 2] = fmaf(exp2_approximate(fmaf(s[i + 2] * k.x, cl, lower.n)), lower.f, a[i + 2]);
    a[i + 3] = fmaf(exp2_approximate(fmaf(s[i + 3] * k.y, cl, lower.n)), lower.f, a[i + 3]);
  }
}
// the same where the columns share a scale, l[4] with a minus sign: these logits are good to 14 bits, so that n's rounding
// error doesn't count
template <int FIRST, int LAST>
static __device__ __forceinline__ void sc_add_shared(const float* s, float* a, const float* l, float c) {
  const float k = -l[4], cu = c * l[2] * k, cl = c * l[3] * k;
  const Normalizer upper(l[0]), lower(l[1]);
#pragma unroll
  for (int g = FIRST; g < LAST; ++g)
#pragma unroll
    for (int i = 4 * g; i < 4 * g + 4; ++i)
      a[i] += exp2_approximate(fmaf(s[i], (i & 2) ? cl : cu, (i & 2) ? lower.n : upper.n));
}
// s = Q K^T of a chunk of BK columns and TAIL more, or added to s: e4m3, addresses as in Tile
template <int BK, int TAIL, int ADD>
static __device__ __forceinline__ void sc_product(float* s, int q, int k, int q_tail, int k_tail) {
  q = wg_uniform(q), k = wg_uniform(k);
  if (TAIL) q_tail = wg_uniform(q_tail), k_tail = wg_uniform(k_tail);
  tl::warpgroup_fence_operand(s, 64);
  tl::warpgroup_arrive();
  wg_e4m3_products<BK>(s, q, k, ADD);
  if constexpr (TAIL > 0) wg_e4m3_products<TAIL>(s, q_tail, k_tail, true);
  tl::warpgroup_commit_batch();
  tl::warpgroup_fence_operand(s, 64);
}
// a *= the scales of its columns
static __device__ __forceinline__ void sc_scale(float* a, int scales) {
#pragma unroll
  for (int g = 0; g < 16; ++g) {
    const float2 k = load_shared_float2(scales + 32 * g);
    a[4 * g] *= k.x;
    a[4 * g + 1] *= k.y;
    a[4 * g + 2] *= k.x;
    a[4 * g + 3] *= k.y;
  }
}
// `row` of OUT is the thread's first; with CLEAR the accumulator is cleared for the next tile
template <bool CLEAR = true>
static __device__ __forceinline__ void sc_store_rows(float* a, float* out, int row) {
  float* o = out + (long long)row * 128 + (threadIdx.x & 3) * 2;
#pragma unroll
  for (int g = 0; g < 16; ++g) {
    *(float2*)(o + 8 * g) = make_float2(a[4 * g], a[4 * g + 1]);
    *(float2*)(o + 8 * 128 + 8 * g) = make_float2(a[4 * g + 2], a[4 * g + 3]);
    if (CLEAR) a[4 * g] = a[4 * g + 1] = a[4 * g + 2] = a[4 * g + 3] = 0.0f;
  }
}
// the tile's rows of OUT begin at row0
static __device__ __forceinline__ void sc_store(float* a, float* out, int row0) {
  sc_store_rows(a, out, row0 + thread_row());
}
