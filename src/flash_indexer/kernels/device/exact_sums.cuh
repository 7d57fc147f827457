#pragma once
#include "memory.cuh"
#include "numbers.cuh"
// Sums of float32 terms that come in any order, the same bits every time: of integers, two for each number. A row has a
// power of two, its grid, by which its terms are multiplied. A product below 2^17 is rounded and added to the low sum; of
// a larger one a multiple of 2^18 goes to the high sum first. A term loses half a unit of the grid at most. The widths are
// for up to 2^13 terms a row: 2^13 · 2^17 is below 2^31.
static constexpr int LOW_BITS = 18, HIGH_BITS = 16;
static constexpr float LOW_LIMIT = 131072.f, HIGH_UNIT = 262144.f, HIGH_LIMIT = 1073741824.f;
// 1.5 · 2^23: adding it to a number below 2^22 rounds that, and leaves the whole number above these bits
static constexpr float ROUNDING = 12582912.f;
static constexpr int ROUNDING_BITS = 0x4b400000;
static __device__ __forceinline__ float two_to_the(int exponent) { return __int_as_float((exponent + 127) << 23); }
// of the largest power of two not above x, which is positive and normal
static __device__ __forceinline__ int exponent_of(float x) { return (int)(__float_as_uint(x) >> 23 & 255) - 127; }
// |x| < limit, by their bits: not where x is NaN
static __device__ __forceinline__ bool is_below(float x, float limit) {
  return (__float_as_uint(x) & 0x7fffffffu) < __float_as_uint(limit);
}
static __device__ __forceinline__ void add_int(int* p, int x) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
// two neighbouring terms, in units of the grid and below 2^22, to their low sums by one addition: the first one's carry to
// the second is taken back by `low_sums`
static __device__ __forceinline__ void add_low(int* p, float x, float y) {
  const int a = __float_as_int(x + ROUNDING) - ROUNDING_BITS, b = __float_as_int(y + ROUNDING) - ROUNDING_BITS;
  const unsigned long long v = (unsigned long long)(unsigned)(b + (a >> 31)) << 32 | (unsigned)a;
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
static __device__ __forceinline__ int2 low_sums(int2 v) { return make_int2(v.x, v.y - (v.x >> 31)); }
// of a large term x, in units of the grid, a multiple of 2^18 to its high sum; what is left of it. `bad` is set where the
// sum is NaN: it has a term that is none, or is infinite
static __device__ __forceinline__ float add_high(int* p, int* bad, float x) {
  if (is_below(x, LOW_LIMIT)) return x;
  const float high = rintf(x * (1.f / HIGH_UNIT));
  if (!is_below(high, HIGH_LIMIT)) {
    *bad = 1;
    return 0.f;
  }
  add_int(p, (int)high);
  return fmaf(-HIGH_UNIT, high, x);
}
